//go:build linux

package scenario_test

import (
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
	"leasehold/internal/boottime"
)

// subscriber is a client of a candidate's /events that comes back when a stream ends, with the id
// of the last event that it has seen.
type subscriber struct {
	tr        *trial
	url       string
	stream    *harness.EventStream
	lastID    string
	connected int
}

// event is what the tests read of an event.
type event struct {
	status
	Position *struct {
		Ahead int
		First []string
	}
	Deadlines *struct {
		StopAt float64 `json:"stop_at"`
		KillBy float64 `json:"kill_by"`
		End    float64 `json:"lease_end"`
	}
}

// until returns the first event that fits.
func (s *subscriber) until(what string, fits func(event) bool) event {
	s.tr.Helper()
	ctx, cancel := context.WithTimeout(s.tr.ctx, waitTimeout)
	defer cancel()
	seen := ""
	for ctx.Err() == nil {
		if s.stream == nil {
			var err error
			s.stream, err = harness.Subscribe(s.tr.ctx, s.url, s.lastID)
			if err != nil {
				_ = harness.Wait(ctx, 0)
				continue
			}
			s.connected++
		}
		got, err := s.stream.Next()
		if err != nil {
			s.stream.Close()
			s.stream = nil
			continue
		}
		var e event
		s.tr.must(json.Unmarshal([]byte(got.Data), &e))
		s.lastID, seen = got.ID, got.Data
		if fits(e) {
			return e
		}
	}
	s.tr.Fatalf("no event shows %s; the last one is %s", what, seen)
	return event{}
}

func (s *subscriber) process() string {
	process, _, _ := strings.Cut(s.lastID, "-")
	return process
}

// TestEvents: by /events alone, through a proxy, an app follows a candidate: that it waits, that
// its elector is replaced or reloaded, and that it leads, with which token and until when.
func TestEvents(t *testing.T) {
	tr := ordinary(t)
	leader, standby, job := tr.pair("")
	proxy, err := harness.StartProxy("127.0.0.1:0", standby.Listen)
	tr.must(err)
	tr.Cleanup(proxy.Close)
	s := &subscriber{tr: tr, url: "http://" + proxy.Addr() + "/events"}
	waits := func(e event) bool {
		return e.State == "standby" && e.Leader != nil && e.Leader.Identity == "a" &&
			e.Leader.Token == job.Token && e.Job.State == "none" &&
			e.Position != nil && e.Position.Ahead == 1 && e.Position.First[0] == "a"
	}
	before := s.until("a standby", waits)
	// Each renewal is an event.
	s.until("a renewed lease", func(e event) bool {
		return waits(e) && e.Deadlines.End > before.Deadlines.End
	})

	first := s.process()
	tr.must(standby.signalElector(syscall.SIGKILL))
	s.until("the same standby with another elector", func(e event) bool {
		return waits(e) && e.Lease.ID == before.Lease.ID && s.process() != first
	})
	second := s.process()
	if code, said := tr.reload(tr.user.uid, strconv.Itoa(standby.Guard())); code != 0 {
		t.Fatalf("reload: %d, %s", code, said)
	}
	s.until("the same standby after a reload", func(e event) bool {
		return waits(e) && e.Lease.ID == before.Lease.ID && s.process() != second
	})
	if s.connected != 3 {
		t.Errorf("connected %d times, want 3", s.connected)
	}

	tr.must(leader.Signal(syscall.SIGTERM))
	e := s.until("a leader whose job runs", func(e event) bool {
		return e.State == "leading" && e.Job.State == "running" &&
			e.Position != nil && e.Position.Ahead == 0
	})
	now := boottime.Now().Seconds()
	if d := e.Deadlines; e.Name != "b" || e.Leader.Token <= job.Token ||
		!(d.StopAt > now && d.KillBy >= d.StopAt && d.End > d.KillBy) ||
		d.End > now+tr.ttl.Seconds() {
		t.Errorf("at %v: %+v, deadlines %+v", now, e, e.Deadlines)
	}
	stream, err := harness.Subscribe(tr.ctx, s.url, "")
	tr.must(err)
	terms, err := stream.NextOf("terms")
	stream.Close()
	tr.must(err)
	checkJSON(t, "terms", terms.Data)

	standby.SetReachable(false)
	e = s.until("the end of the term", func(e event) bool { return e.State == "stopping" })
	if now := boottime.Now().Seconds(); now < e.Deadlines.StopAt {
		t.Errorf("the term has ended at %v, before stop-at: %+v", now, e.Deadlines)
	}
	standby.SetReachable(true)
	tr.stop()
}

// TestEvents_Crowd: a thousand subscribers of the next in line hold up neither its election nor
// probes, and all get the news. So does a crowd that does not read.
func TestEvents_Crowd(t *testing.T) {
	tr := ordinary(t)
	leader, standby, job := tr.pair("")
	url := "http://" + standby.Listen + "/events"
	const crowd = 1000
	streams := make(chan *harness.EventStream, crowd)
	var connecting sync.WaitGroup
	for range 20 {
		connecting.Go(func() {
			for range crowd / 20 {
				s, err := harness.Subscribe(tr.ctx, url, "")
				if err != nil {
					t.Error(err)
					return
				}
				streams <- s
			}
		})
	}
	connecting.Wait()
	close(streams)
	var reading sync.WaitGroup
	n := 0
	for s := range streams {
		if n++; n%10 == 0 { // it does not read
			tr.Cleanup(s.Close)
			continue
		}
		reading.Go(func() {
			defer s.Close()
			for {
				e, err := s.Next()
				if err != nil {
					t.Error(err)
					return
				}
				if strings.Contains(e.Data, `"state":"leading"`) &&
					strings.Contains(e.Data, `"state":"running"`) {
					return
				}
			}
		})
	}
	if n != crowd {
		t.Fatalf("%d subscribers", n)
	}
	tr.waitStatus(standby, "/standby", http.StatusOK)
	tr.must(leader.Signal(syscall.SIGTERM))
	ended := tr.waitDead(job)
	next := tr.waitNext(job, waitTimeout)
	t.Logf("with %d subscribers the next job starts %v after the end of the one before",
		n, next.Started-ended)
	if next.Started-ended > time.Second {
		t.Errorf("the hand-over took %v", next.Started-ended)
	}
	reading.Wait()
	tr.waitStatus(standby, "/leader", http.StatusOK)
	tr.stop()
}
