//go:build linux

package main

import (
	"cmp"
	"fmt"
	"maps"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
	"leasehold/e2e/store"
)

func lived(candidate string, token int64, from, to time.Duration) harness.Life {
	return harness.Life{Hello: harness.Hello{
		Candidate: candidate, Token: token, Pid: int(token), Role: "job",
		Started: from, Forked: from, Env: []string{"LEASEHOLD_LEASE_ID=2a"},
	}, End: to}
}

func quietChecker() *checker {
	k := newChecker(settings{ttl: 3 * time.Second})
	k.log = func(string) string { return "" }
	return k
}

// Two jobs alive at once are found however late in the run that was.
func TestVerdict_OverlapAtTheEnd(t *testing.T) {
	now := harness.Now()
	for _, c := range []struct {
		name   string
		end    time.Duration // of the earlier job
		guilty bool
	}{
		{"both alive for a millisecond", now - time.Millisecond, true},
		{"one after the other", now - 2*time.Millisecond, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := quietChecker()
			k.saw(now, []harness.Life{
				lived("a", 5, now-time.Second, c.end), lived("b", 9, now-2*time.Millisecond, now),
			})
			if err := k.verdict(); (err != nil) != c.guilty {
				t.Errorf("the verdict is %v", err)
			}
		})
	}
}

// An action excuses two jobs for as long as it can be its doing, and no longer.
func TestAction_EndsToExcuse(t *testing.T) {
	now := harness.Now()
	for _, c := range []struct {
		name   string
		worked bool
		after  time.Duration // from the action to the overlap
		guilty bool
	}{
		{"done, soon after", true, time.Second, false},
		{"done, long after", true, 5 * time.Second, true},
		{"in doubt, soon after", false, 5 * time.Second, false},
		{"in doubt, long after", false, time.Minute, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := quietChecker()
			did := now - c.after
			a := &action{
				at: did, until: did + operatorWaits + etcdWorks + k.ttl, token: 5,
				cause: "key-deleted", unreached: "its links were cut",
			}
			k.did(a)
			if c.worked {
				k.worked(a)
				a.until += did - now // as if at once
			}
			k.saw(now, []harness.Life{
				lived("a", 5, did-time.Second, now+50*time.Millisecond),
				lived("b", 9, now, now+time.Second),
			})
			if err := k.verdict(); (err != nil) != c.guilty {
				t.Errorf("the verdict is %v", err)
			}
		})
	}
}

// An action of etcd's own, of which nobody knows whose term it took, excuses a leader within reach
// only where that has heard of it, and one out of reach only where its lease had time left.
func TestAction_OfEtcdExcusesWhomItHit(t *testing.T) {
	now := harness.Now()
	const loss = `level=WARN msg="leadership lost" from=leading to=stopping ` +
		`reason="the lease is gone from etcd"`
	for _, c := range []struct {
		name, unreached, log string
		written              time.Duration // before now
		left                 time.Duration // of the lease
		guilty               bool
	}{
		{"told", "", loss, 0, 0, false},
		{"not told", "", `level=INFO msg="job exited"`, 0, time.Second, true},
		{"told of an earlier one", "", loss, time.Minute, time.Second, true},
		{"out of reach", "etcd's other members were not all there", "", 0, time.Second, false},
		{
			"out of reach, the lease over", "etcd's other members were not all there", "", 0,
			-time.Millisecond, true,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := quietChecker()
			k.log = func(string) string {
				at := time.Now().Add(-c.written).Format(time.RFC3339Nano)
				return fmt.Sprintf("time=%s %s\n", at, c.log)
			}
			k.leases.claim("2a", now+c.left)
			k.did(&action{
				at: now - time.Second, until: now + time.Second, unreached: c.unreached,
				cause: "a leader of etcd went on after a pause of 3s",
			})
			k.saw(now, []harness.Life{
				lived("a", 5, now-2*time.Second, now+5*time.Millisecond),
				lived("b", 9, now, now+time.Second),
			})
			if err := k.verdict(); (err != nil) != c.guilty {
				t.Errorf("the verdict is %v", err)
			}
		})
	}
}

// Only the time between two answers that both say so counts as a leader's wait to start its crashed
// job again.
func TestStatus_Backoff(t *testing.T) {
	k := quietChecker()
	at := harness.Now()
	for i, a := range []struct{ candidate, state, job string }{
		{"a", "leading", "backoff"},
		{"a", "leading", "backoff"}, // 1 s
		{"b", "standby", "backoff"},
		{"a", "leading", "running"},
		{"a", "leading", "backoff"},
		{"a", "leading", "backoff"}, // 1 s, of which half is asked for
	} {
		body := fmt.Sprintf(`{"state":%q,"job":{"state":%q},"leader":{"identity":"a","token":5}}`,
			a.state, a.job)
		k.answeredStatus(a.candidate, at+time.Duration(i)*time.Second, []byte(body))
	}
	got := within(k.health.backoffs, check.Interval{From: at, To: at + 4500*time.Millisecond})
	if want := 1500 * time.Millisecond; got != want {
		t.Errorf("%v, want %v", got, want)
	}
	if v := k.first.Load(); v != nil {
		t.Error(v)
	}
}

// A guard that was late excuses two jobs only if that was at kill-by, on a starved machine, and for
// no longer than it was late.
func TestGuardLate_Excuses(t *testing.T) {
	const (
		killed = "job killed: kill-by has passed\" reason=kill_by"
		grace  = "job killed: it did not stop within its grace\" reason=grace"
		busy   = time.Second // of a second
		ms     = time.Millisecond
	)
	for _, c := range []struct {
		name    string
		end     string
		stopAt  time.Duration // when the job was asked to stop, before its end; 0: it was not
		late    time.Duration
		waited  time.Duration // for a processor, of a second
		every   time.Duration // between samples
		overlap time.Duration
		guilty  bool
	}{
		{"late at kill-by", killed, 0, time.Second, busy, 50, 500, false},
		{"late at kill-by, asked to stop", killed, 1500, time.Second, busy, 50, 500, false},
		{"the machine stood still", killed, 0, time.Second, 0, 400, 500, false},
		{"late on an idle machine", killed, 0, time.Second, 0, 50, 500, true},
		{"late within the margin", killed, 0, 300 * time.Millisecond, busy, 50, 500, true},
		{"late at the end of its grace", grace, 0, time.Second, busy, 50, 500, true},
		{"late at stop-at, not at kill-by", killed, 600, time.Second, busy, 50, 500, true},
		{"two jobs for longer than it was late", killed, 0, time.Second, busy, 50, 1500, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, now := quietChecker(), harness.Now()
			end := now - 2*time.Second
			k.log = func(string) string {
				at := func(before time.Duration) string {
					return time.Now().Add(-2*time.Second - before).Format(time.RFC3339Nano)
				}
				var log string
				if c.stopAt > 0 {
					log = fmt.Sprintf("time=%s level=WARN msg=\"job asked to stop: no renewal by "+
						"stop-at\" signal=terminated kill_by_in=500ms\n", at(c.stopAt*ms))
				}
				return log + fmt.Sprintf("time=%s level=DEBUG msg=\"job state\" machine=guard "+
					"from=stopping to=killing reason=\"x\"\n"+
					"time=%s level=WARN msg=\"%s timer_latency=%v\n", at(0), at(0), c.end, c.late)
			}
			for at := end - 3*time.Second; at < now+c.every*ms; at += c.every * ms {
				waited := time.Duration((at - end).Seconds() * float64(c.waited))
				k.excuses.samples = append(k.excuses.samples, sample{at, time.Hour + waited})
			}
			k.saw(now, []harness.Life{
				lived("a", 5, end-5*time.Second, end),
				lived("b", 9, end-c.overlap*ms, now),
			})
			if err := k.verdict(); (err != nil) != c.guilty {
				t.Errorf("the verdict is %v", err)
			}
		})
	}
}

// Of an action of etcd's own the history names the terms that it may have taken, and no others.
func TestLockHistory_NamesWhoWasTaken(t *testing.T) {
	now := harness.Now()
	k := quietChecker()
	did := now - 20*time.Second
	k.saw(now, []harness.Life{
		lived("before", 5, did-2*time.Second, did-time.Second),
		lived("hit", 9, did-900*time.Millisecond, did+time.Second),
		lived("renewed", 12, did+2*time.Second, now-10*time.Second),
		lived("after", 15, did+12*time.Second, now-time.Second),
	})
	for i := range k.terms {
		id := fmt.Sprint(i)
		k.terms[i].Lives[0].Env = []string{"LEASEHOLD_LEASE_ID=" + id}
		k.leases.claim(id, k.terms[i].End+k.ttl)
	}
	k.did(&action{at: did, until: did + 3*time.Second, cause: "a leader of etcd went on"})
	k.did(&action{at: did, until: did + k.ttl + 5*time.Millisecond, token: 5, cause: "key-deleted"})
	got := map[int64]time.Duration{}
	for _, o := range k.lockHistory() {
		if o.Kind == store.Take {
			got[o.Token] = o.Return - did
		}
	}
	want := map[int64]time.Duration{9: 3 * time.Second, 5: 5 * time.Millisecond}
	if !maps.Equal(got, want) {
		t.Errorf("taken are %v, want %v", got, want)
	}
}

// A job whose elector was lost must live on, and be the same, for as long as nothing else is wrong.
func TestKept(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		name    string
		end     time.Duration // of the job, after the loss; 0: it lives on
		again   time.Duration // another process in the role job, after the loss; 0: none
		other   time.Duration // another fault, after the loss; 0: none
		of      string        // whom it is for; "": etcd
		action  bool          // an operator's action on the term
		starved bool
		guilty  bool
	}{
		{name: "lives on"},
		{name: "killed with the elector", end: 20 * ms, guilty: true},
		{
			name: "killed with the elector, the machine starved", end: 20 * ms, starved: true,
			guilty: true,
		},
		{name: "stopped at stop-at", end: 1500 * ms, guilty: true},
		{name: "stopped at stop-at, the machine starved", end: 1500 * ms, starved: true},
		{name: "later than a TTL", end: 3100 * ms},
		{name: "etcd had a fault before", end: 800 * ms, other: 500 * ms},
		{name: "the daemon had a fault before", end: 800 * ms, other: 500 * ms, of: "a"},
		{name: "another daemon had one", end: 800 * ms, other: 500 * ms, of: "b", guilty: true},
		{name: "etcd had a fault afterwards", end: 400 * ms, other: 500 * ms, guilty: true},
		{name: "its key was deleted", end: 800 * ms, action: true},
		{name: "started again", again: 300 * ms, guilty: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, now := quietChecker(), harness.Now()
			lost := now - 5*time.Second
			job := lived("a", 5, lost-time.Second, 0)
			k.saw(lost, []harness.Life{job})
			loss := &injection{
				drawn: drawn{kind: &kind{name: electorKilled}}, on: &fault.Target{Began: lost},
				candidate: &candidate{name: "a"},
			}
			k.keeps(loss)
			if c.other != 0 {
				other := &injection{drawn: drawn{kind: &kind{name: "another"}}}
				if c.of != "" {
					other.candidate = &candidate{name: c.of}
				}
				for _, j := range k.kept {
					if other.mayEnd(j.candidate) {
						j.until = lost + c.other // as if it began then
					}
				}
			}
			if c.action {
				k.did(&action{at: lost, until: now, token: 5, cause: "key-deleted"})
			}
			k.excuses.samples = nil
			for at := lost - time.Second; at < now; at += 50 * ms {
				waited := time.Hour
				if c.starved {
					waited += at - lost
				}
				k.excuses.samples = append(k.excuses.samples, sample{at, waited})
			}
			lives := []harness.Life{job}
			if c.end != 0 {
				lives[0].End = lost + c.end
			}
			if c.again != 0 {
				another := lived("a", 5, lost+c.again, 0)
				another.Pid++
				lives = append(lives, another)
			}
			k.saw(now, lives)
			if v := k.first.Load(); (v != nil) != c.guilty {
				t.Errorf("the verdict is %v", v)
			}
			kept := !c.guilty && !c.action && !c.starved
			if len(k.kept) > 0 || (k.counts.Kept == 1) != kept {
				t.Errorf("%d are left, %d were kept", len(k.kept), k.counts.Kept)
			}
		})
	}
}

// The guard gives up at the third loss within a minute, and another fault may end the job as well.
func TestMustKeep(t *testing.T) {
	now := harness.Now()
	a, b := &candidate{name: "a"}, &candidate{name: "b"}
	on := func(c *candidate, name string, target target, before, lasted time.Duration) *injection {
		i := &injection{
			drawn: drawn{kind: &kind{name: name, target: target}}, candidate: c,
			on: &fault.Target{Machine: machineOf(c), Began: now - before},
		}
		i.From = now - before
		i.To = i.From + lasted
		return i
	}
	const s = time.Second
	for _, c := range []struct {
		name   string
		before []*injection
		want   bool
	}{
		{"nothing else", nil, true},
		{"one loss before", []*injection{on(a, electorKilled, aDaemon, 20*s, 0)}, true},
		{"two losses before", []*injection{
			on(a, electorKilled, aDaemon, 50*s, 0), on(a, electorHung, aDaemon, 20*s, s),
		}, false},
		{"a reload is none", []*injection{
			on(a, electorKilled, aDaemon, 50*s, 0), on(a, electorReloaded, aDaemon, 20*s, s),
		}, true},
		{"two losses of another daemon", []*injection{
			on(b, electorKilled, aDaemon, 50*s, 0), on(b, electorHung, aDaemon, 20*s, s),
		}, true},
		{"one of two long ago", []*injection{
			on(a, electorKilled, aDaemon, 70*s, 0), on(a, electorHung, aDaemon, 20*s, s),
		}, true},
		{"a link of its own", []*injection{on(a, "link-lossy", aLink, 3*s, 2*s)}, false},
		{"a link of its own, long ago", []*injection{on(a, "link-lossy", aLink, 5*s, 2*s)}, true},
		{"a link of another one", []*injection{on(b, "link-lossy", aLink, 3*s, 3*s)}, true},
		{"an operator", []*injection{on(nil, "key-deleted", anElection, 3*s, 0)}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			loss := on(a, electorKilled, aDaemon, 0, 0)
			r := &run{injected: append(c.before, loss)}
			if got := r.mustKeep(loss); got != c.want {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}

// A job that is frozen may live beside the next one. It must not run meanwhile, nor again when it
// is killed, and it must have exited before it is thawed.
func TestFrozen(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		name   string
		frozen time.Duration // of the earlier job, from the start of the later one on
		to     time.Duration
		end    frozenEnd
		beats  []time.Duration
		of     string
		guilty bool
	}{
		{name: "killed frozen", frozen: -500 * ms, to: 900 * ms, end: killedFrozen},
		{
			name: "ran before", frozen: -500 * ms, to: 900 * ms, end: killedFrozen,
			beats: []time.Duration{-501 * ms},
		},
		{
			name: "ran while it was frozen", frozen: -500 * ms, to: 900 * ms, end: killedFrozen,
			beats: []time.Duration{-501 * ms, 300 * ms}, guilty: true,
		},
		{
			name: "ran when it was killed", frozen: -500 * ms, to: 900 * ms, end: killedFrozen,
			beats: []time.Duration{950 * ms}, guilty: true,
		},
		{
			name: "thawed beside the next one", frozen: -500 * ms, to: 900 * ms, end: thawed,
			guilty: true,
		},
		{
			name: "killed unseen, and ran", frozen: -500 * ms, to: 900 * ms, end: unknownEnd,
			beats: []time.Duration{950 * ms},
		},
		{
			name: "killed unseen, and ran before", frozen: -500 * ms, to: 900 * ms, end: unknownEnd,
			beats: []time.Duration{300 * ms}, guilty: true,
		},
		{
			name: "frozen too late, and killed unseen", frozen: ms, to: 900 * ms, end: unknownEnd,
			guilty: true,
		},
		{name: "frozen too late", frozen: ms, to: 900 * ms, end: killedFrozen, guilty: true},
		{
			name: "another's", frozen: -500 * ms, to: 900 * ms, end: killedFrozen, of: "c",
			guilty: true,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, now := quietChecker(), harness.Now()
			began := now - 5*time.Second
			earlier := lived("a", 5, began-2*time.Second, began+time.Second)
			for _, at := range c.beats {
				earlier.Heartbeats = append(earlier.Heartbeats, began+at)
			}
			alive := earlier
			alive.End = 0
			k.saw(began, []harness.Life{alive, lived("c", 2, began-4*time.Second, 0)})
			k.jobThawed(k.jobFrozen(cmp.Or(c.of, "a"), began+c.frozen), began+c.to, c.end)
			k.saw(now, []harness.Life{
				earlier, lived("c", 2, began-4*time.Second, began-3*time.Second),
				lived("b", 9, began, now),
			})
			if err := k.verdict(); (err != nil) != c.guilty {
				t.Errorf("the verdict is %v", err)
			}
			if k.counts.Frozen != 1 {
				t.Errorf("%d were frozen", k.counts.Frozen)
			}
		})
	}
}

// A look at a frozen job shows how it ended, unless it came late.
func TestFrozen_Looks(t *testing.T) {
	const soon, late = unseen - 1, unseen
	for _, c := range []struct {
		there, asked, killed bool
		since                time.Duration
		want                 frozenEnd
	}{
		{there: true, asked: true, since: soon, want: stillFrozen},
		{there: true, asked: true, killed: true, since: soon, want: stillFrozen},
		{there: true, asked: true, since: late, want: stillFrozen},
		{there: true, since: soon, want: thawed},
		{there: true, since: late, want: thawed},
		{there: true, killed: true, since: soon, want: stillFrozen},
		{there: true, killed: true, since: late, want: unknownEnd},
		{killed: true, since: soon, want: killedFrozen},
		{killed: true, asked: true, since: late, want: unknownEnd},
	} {
		if got := endOf(c.there, c.asked, c.killed, c.since); got != c.want {
			t.Errorf("%+v: it %q", c, got)
		}
	}
}

// Nobody leads whose job is frozen.
func TestFrozen_Leader(t *testing.T) {
	for _, c := range []struct {
		name    string
		sent    time.Duration // after the freeze
		starved bool
		guilty  bool
	}{
		{name: "just before it is frozen", sent: -time.Millisecond},
		{name: "frozen", sent: time.Second, guilty: true},
		{name: "frozen, the machine starved", sent: time.Second, starved: true},
		{name: "being thawed", sent: 2*time.Second - 20*time.Millisecond},
		{name: "another job", sent: 3 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, now := quietChecker(), harness.Now()
			from := now - 5*time.Second
			job := lived("a", 5, from-time.Second, 0)
			k.saw(from, []harness.Life{job})
			k.jobThawed(k.jobFrozen("a", from), from+2*time.Second, thawed)
			k.excuses.samples = nil
			for at := from - time.Second; at < now; at += 50 * time.Millisecond {
				waited := time.Hour
				if c.starved {
					waited += at - from
				}
				k.excuses.samples = append(k.excuses.samples, sample{at, waited})
			}
			sent := from + c.sent
			k.health.yes = append(k.health.yes, &yes{candidate: "a", sent: sent, received: sent})
			k.saw(now, []harness.Life{job})
			if v := k.first.Load(); (v != nil) != c.guilty {
				t.Errorf("the verdict is %v", v)
			}
		})
	}
}

var machines = map[*candidate]*harness.Machine{}

// machineOf is that of a candidate, whose daemon has logged nothing.
func machineOf(c *candidate) *harness.Machine {
	if machines[c] == nil {
		machines[c] = &harness.Machine{Candidate: &harness.Candidate{Child: &harness.Child{}}}
	}
	return machines[c]
}
