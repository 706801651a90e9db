//go:build linux

package check_test

import (
	"slices"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

type (
	interval  = check.Interval
	intervals = check.Intervals
)

func TestIntervals(t *testing.T) {
	a := check.Merge(interval{5, 7}, interval{1, 3}, interval{3, 4}, interval{9, 9}, interval{8, 6})
	b := intervals{{2, 6}}
	for _, c := range []struct {
		name      string
		got, want intervals
	}{
		{"merged", a, intervals{{1, 4}, {5, 7}}},
		{"and", a.And(b), intervals{{2, 4}, {5, 6}}},
		{"without", a.Without(b), intervals{{1, 2}, {6, 7}}},
		{"without what surrounds it", b.Without(intervals{{0, 9}}), nil},
		{"without nothing", a.Without(nil), a},
	} {
		if !slices.Equal(c.got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, c.got, c.want)
		}
	}
	if got := a.Total(); got != 5 {
		t.Errorf("the total is %v, want 5", got)
	}
}

func life(candidate string, token int64, pid int, from, to time.Duration) harness.Life {
	hello := harness.Hello{Candidate: candidate, Token: token, Pid: pid, Started: from}
	return harness.Life{Hello: hello, End: to}
}

func TestHistory(t *testing.T) {
	h := check.NewHistory([]harness.Life{
		life("b", 9, 3, 30, 0),
		life("a", 5, 1, 10, 20),
		life("a", 5, 2, 15, 33),
	})
	if len(h) != 2 || h[0].Candidate != "a" || h[0].Start != 10 || h[0].End != 33 || !h[1].Alive() {
		t.Fatalf("the terms are %+v and %+v", *h[0], *h[1])
	}
	overlaps := h.Overlaps(check.Lived(50))
	if len(overlaps) != 1 || !slices.Equal(overlaps[0].During, intervals{{30, 33}}) {
		t.Errorf("the overlaps are %v", overlaps)
	}
	frozen := intervals{{28, check.Forever}}
	awake := func(term *check.Term) intervals {
		if term.Candidate == "a" {
			return term.Intervals(50).Without(frozen)
		}
		return term.Intervals(50)
	}
	if overlaps := h.Overlaps(awake); len(overlaps) != 0 {
		t.Errorf("with one of them frozen the overlaps are %v", overlaps)
	}
	got := h.Downtime(interval{0, 60}, awake)
	if !slices.Equal(got, intervals{{0, 10}, {28, 30}, {50, 60}}) {
		t.Errorf("the downtime is %v", got)
	}
	if _, isNew := h.Add(life("b", 9, 3, 30, 40)); isNew || h[1].End != 40 {
		t.Errorf("after the end of its process the term is %+v", *h[1])
	}
}

func TestLog(t *testing.T) {
	log := `time=2026-01-02T03:04:05Z msg="job exited" timer_latency=3ms
time=2026-01-02T03:04:06Z level=WARN msg="leadership lost" from=leading to=stopping ` +
		`reason="the lease is gone from etcd"
time=2026-01-02T03:04:09Z msg="job killed: lease lost" timer_latency=1ms
`
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	if got := check.Latency(check.TimerLatencies(log)); got != 3*time.Millisecond {
		t.Errorf("the timer latency is %v", got)
	}
	late := check.Between(check.TimerLatencies(log), at, at.Add(time.Minute))
	if len(late) != 1 || late[0].Match != "1ms" {
		t.Errorf("after the first line: %v", late)
	}
	if taken := check.TermTaken(log); len(taken) != 1 || !taken[0].At.Equal(at.Add(time.Second)) {
		t.Errorf("etcd took the term at %v", taken)
	}
	if dead := check.JobStates(log); len(dead) != 2 || dead[1].Match != "killed" {
		t.Errorf("the job's states are %v", dead)
	}
}
