//go:build linux

package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/control"
	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// Whoever starts while the election is held is found, unless the hold names it.
func TestHeld(t *testing.T) {
	now := harness.Now()
	for _, c := range []struct {
		name             string
		token            int64
		started          time.Duration // after the hold
		released, guilty bool
	}{
		{"somebody", 9, time.Second, false, true},
		{"whom the hold names", 7, time.Second, false, false},
		{"before the hold", 9, -time.Second, false, false},
		{"after the release", 9, 3 * time.Second, true, false},
		{"before the release", 9, time.Second, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := quietChecker()
			h := &held{token: 7, from: now - 5*time.Second, to: check.Forever}
			k.holds(h)
			if c.released {
				h.to = now - 3*time.Second
			}
			at := h.from + c.started
			k.saw(now, []harness.Life{lived("b", c.token, at, now)})
			if err := k.verdict(); (err != nil) != c.guilty {
				t.Errorf("the verdict is %v", err)
			}
		})
	}
}

// A leader that hands over although it has refused is found.
func TestSwitchover_Refused(t *testing.T) {
	const refused = "leasehold: switchover: refused: nobody waits"
	for _, c := range []struct {
		name, said string
		code       int
		by         string        // whose request the leader says it is
		after      time.Duration // from the request to "handing over"
		guilty     bool
	}{
		{"refused, and handed over", refused, 1, "x@y", time.Millisecond, true},
		{"handed over before", refused, 1, "x@y", -time.Second, false},
		{"failback", refused, 1, "failback", time.Millisecond, false},
		{"served", `"b" leads`, 0, "x@y", time.Millisecond, false},
		{"refused, and nobody knows why", "leasehold: switchover: refused: so", 1, "", 0, true},
		{"failed", "leasehold: switchover: no such file", 1, "", 0, true},
		{"died", "panic: nil map", 2, "", 0, true},
		{"another one leads, and anybody may", `leasehold: switchover: "b" has gone meanwhile: ` +
			`"c" leads, token 7`, 1, "", 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, began := quietChecker(), time.Now().Add(-time.Second)
			log := fmt.Sprintf("time=%s level=INFO msg=\"handing over\" target=b by=%s\n",
				began.Add(c.after).Format(time.RFC3339Nano), c.by)
			i := &injection{drawn: drawn{kind: &kind{name: "switchover"}}}
			err := k.answered(i, c.code, c.said, began, func() []check.Entry {
				return check.Handovers(log)
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := k.verdict(); (err != nil) != c.guilty {
				t.Errorf("the verdict is %v", err)
			}
		})
	}
}

// A job that runs on in spite of a hold that is to stop it is found.
func TestHeld_Stop(t *testing.T) {
	const s = time.Second
	for _, c := range []struct {
		name    string
		goesOn  bool          // the hold does not stop the job
		end     time.Duration // of the job, after the hold; 0: it runs
		to      time.Duration // of the hold; 0: it is there
		frozen  time.Duration // the machine of the job, from the hold on
		starved bool
		guilty  bool
	}{
		{name: "stopped at once", end: 600 * time.Millisecond},
		{name: "runs on", guilty: true},
		{name: "runs on, the machine starved", starved: true},
		{name: "stopped late", end: 5 * s, guilty: true},
		{name: "stopped late, after the release", end: 5 * s, to: 4 * s},
		{name: "stopped late, before the release", end: 5 * s, to: 6 * s, guilty: true},
		{name: "not to be stopped", goesOn: true},
		{name: "stopped late, because its machine stood still", end: 5 * s, frozen: 4800 * 1e6},
		{
			name: "stopped late, long after its machine stood still", end: 5 * s, frozen: 2 * s,
			guilty: true,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, now := quietChecker(), harness.Now()
			h := &held{token: 7, stop: !c.goesOn, from: now - 8*s, to: check.Forever}
			k.holds(h)
			if c.to != 0 {
				h.to = h.from + c.to
			}
			k.excuses.samples = nil
			for at := h.from - s; at < now; at += 50 * time.Millisecond {
				waited := time.Hour
				if c.starved {
					waited += at - h.from
				}
				k.excuses.samples = append(k.excuses.samples, sample{at, waited})
			}
			if c.frozen != 0 {
				k.excuses.frozen["b"] = check.Intervals{{From: h.from, To: h.from + c.frozen}}
			}
			end := time.Duration(0)
			if c.end != 0 {
				end = h.from + c.end
			}
			k.saw(now, []harness.Life{lived("b", 7, h.from-s, end)})
			if v := k.first.Load(); (v != nil) != c.guilty {
				t.Errorf("the verdict is %v", v)
			}
		})
	}
}

// etcd plays what etcd sends.
type etcd struct {
	*checker
	at       time.Duration
	revision int64
	made     map[string]int64
}

func playEtcd() *etcd {
	e := &etcd{
		checker: quietChecker(), at: harness.Now() - 100*time.Second, made: map[string]int64{},
	}
	e.read(e.at-settles, 1, nil)
	e.after(settles)
	return e
}

// after lets time pass, while etcd sends what does not matter.
func (e *etcd) after(d time.Duration) {
	for until := e.at + d; e.at < until; {
		e.at = min(until, e.at+silence/2)
		e.revision++
		e.changed(e.at, e.revision, []*clientv3.Event{put("store/1", "", e.revision, e.revision)})
		e.sawRevision(e.at, e.revision)
	}
}

// isCutOff lets time pass while the member that serves the watch is cut off: it goes on answering,
// and shows nothing of what happens.
func (e *etcd) isCutOff(d time.Duration) {
	shows := e.revision
	for until := e.at + d; e.at < until; {
		e.at = min(until, e.at+silence/2)
		e.revision++
		e.shown.hears(e.at, shows)
		e.sawRevision(e.at, e.revision)
	}
}

func put(key, value string, made, revision int64) *clientv3.Event {
	return &clientv3.Event{Type: clientv3.EventTypePut, Kv: &mvccpb.KeyValue{
		Key: []byte(key), Value: []byte(value), CreateRevision: made, ModRevision: revision,
	}}
}

// sends has etcd send a change of each key, at one revision. A value is a text, a control.Value or
// nil, for a deletion.
func (e *etcd) sends(keys ...any) int64 {
	e.after(silence / 2)
	e.revision++
	var events []*clientv3.Event
	for i := 0; i < len(keys); i += 2 {
		key, value := keys[i].(string), ""
		switch v := keys[i+1].(type) {
		case nil:
			events = append(events, &clientv3.Event{
				Type: clientv3.EventTypeDelete,
				Kv:   &mvccpb.KeyValue{Key: []byte(key), ModRevision: e.revision},
			})
			delete(e.made, key)
			continue
		case string:
			value = v
		case control.Value:
			value = string(control.Encode(v))
		}
		if e.made[key] == 0 {
			e.made[key] = e.revision
		}
		events = append(events, put(key, value, e.made[key], e.revision))
	}
	e.changed(e.at, e.revision, events)
	return e.revision
}

// joins puts a candidate into the queue, with its record, and returns its key.
func (e *etcd) joins(name string, lease int64, priority int) (key string) {
	key = fmt.Sprintf("%s/%x", election, lease)
	e.sends(key, name, control.CandidateOf(election, lease),
		&control.Candidate{Identity: name, Priority: priority, Ready: true})
	return key
}

// renews has /status of a candidate say that it has just renewed its lease.
func (e *etcd) renews(lease int64) { e.leases.claim(fmt.Sprintf("%x", lease), e.at+e.ttl) }

// judged judges what etcd has sent, and fails unless that finds somebody guilty as it should.
func (e *etcd) judged(t *testing.T, guilty bool) {
	t.Helper()
	e.judge(e.at, true)
	if v := e.first.Load(); (v != nil) != guilty {
		t.Errorf("the verdict is %v", v)
	}
}

// A hold that ends before its release is found.
func TestHeld_Gone(t *testing.T) {
	for _, c := range []struct {
		name   string
		to     time.Duration // after the hold
		guilty bool
	}{
		{"nobody has released it", check.Forever, true},
		{"released", 5 * time.Second, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := playEtcd()
			made := e.sends(control.HoldOf(election), &control.Hold{})
			e.holds(&held{made: made, from: e.at, to: min(c.to, check.Forever-e.at) + e.at})
			e.holdGone(e.at, made-1) // an earlier one, of which etcd is late to tell
			e.judged(t, false)
			e.after(10 * time.Second)
			e.sends(control.HoldOf(election), nil)
			e.judged(t, c.guilty)
		})
	}
}

// A hold ends no term but those that it does not name.
func TestHeld_EndsTerm(t *testing.T) {
	for _, c := range []struct {
		name          string
		stop, another bool
		before, none  bool // the hold is over before the term begins; there is none
		why           string
		guilty        bool
	}{
		{name: "of whom it names", why: "held", guilty: true},
		{name: "of whom it names, for another reason", why: "stopped"},
		{name: "of whom it stops", why: "held", stop: true},
		{name: "of another one", why: "held", another: true},
		{name: "of another one, long ago", why: "held", another: true, before: true, guilty: true},
		{name: "without a hold", why: "held", none: true, guilty: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, h := playEtcd(), &control.Hold{Stop: c.stop}
			if c.before {
				e.sends(control.HoldOf(election), h)
				e.sends(control.HoldOf(election), nil)
			}
			key := e.joins("a", 0xa, 50)
			token := e.made[key]
			if h.Token = token; c.another {
				h.Token = 1
			}
			if !c.before && !c.none {
				e.sends(control.HoldOf(election), h)
			}
			e.sends(key, nil, control.JobExitedOf(election), "")
			e.sends(control.TermOf(election, token),
				&control.Term{Token: token, Identity: "a", Ended: time.Now(), Why: c.why})
			e.judged(t, c.guilty)
		})
	}
}

// A request for a switchover is answered once, in time, and the term ends then.
func TestSwitchover_Request(t *testing.T) {
	const long = 20 * time.Second
	asked := control.Switchover{ID: "1", By: "x@y"}
	for _, c := range []struct {
		name   string
		to     string
		play   func(e *etcd, says func(control.Answer), leader string)
		guilty bool
	}{
		{"accepted, and handed over", "b", func(
			e *etcd, says func(control.Answer), leader string,
		) {
			says(control.Accepted)
			e.sends(leader, nil, control.JobExitedOf(election), "")
			e.after(long)
		}, false},
		{"accepted, and still leading", "b", func(
			e *etcd, says func(control.Answer), _ string,
		) {
			says(control.Accepted)
			e.after(long)
		}, true},
		{"refused", "b", func(e *etcd, says func(control.Answer), _ string) {
			says(control.Refused)
			e.after(long)
		}, false},
		{"refused, and accepted", "b", func(_ *etcd, says func(control.Answer), _ string) {
			says(control.Refused)
			says(control.Accepted)
		}, true},
		{"withdrawn", "b", func(e *etcd, _ func(control.Answer), _ string) {
			e.sends(control.SwitchoverOf(election), nil)
			e.after(long)
		}, false},
		{"withdrawn, and accepted", "b", func(e *etcd, says func(control.Answer), _ string) {
			e.sends(control.SwitchoverOf(election), nil)
			says(control.Accepted)
		}, true},
		{"never answered", "b", func(e *etcd, _ func(control.Answer), _ string) {
			e.after(long)
		}, true},
		{"never answered, and etcd silent", "b", func(e *etcd, _ func(control.Answer), _ string) {
			e.at += long
		}, false},
		{"another one is chosen", "c", func(_ *etcd, says func(control.Answer), _ string) {
			says(control.Accepted)
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := playEtcd()
			leader, target := e.joins("a", 0xa, 50), e.joins("b", 0xb, 50)
			e.renews(0xb)
			s := asked
			s.To, s.Token = c.to, e.made[leader]
			e.sends(control.SwitchoverOf(election), &s)
			c.play(e, func(answer control.Answer) {
				s.Answer, s.Key = answer, target
				e.sends(control.SwitchoverOf(election), &s)
			}, leader)
			e.judged(t, c.guilty)
		})
	}
}

// Nobody is chosen who has not renewed its lease for long.
func TestSwitchover_ToTheLiving(t *testing.T) {
	const s = time.Second
	for _, c := range []struct {
		name          string
		silent        time.Duration // since the last renewal; 0: none is known
		reset, outage time.Duration // of etcd, before
		guilty        bool
	}{
		{name: "alive", silent: s},
		{name: "dead", silent: 2700 * time.Millisecond, guilty: true},
		{name: "unknown"},
		{name: "dead, and etcd gave it new life", silent: 4 * s, reset: s},
		{
			name: "dead, and etcd gave it new life long ago", silent: 9 * s, reset: 5 * s,
			guilty: true,
		},
		{name: "dead, and etcd could not be told", silent: 4 * s, outage: s},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := playEtcd()
			leader, target := e.joins("a", 0xa, 50), e.joins("b", 0xb, 50)
			e.after(10 * s)
			at := e.at + silence/2
			if c.silent != 0 {
				e.leases.claim("b", at-c.silent+e.ttl)
			}
			if c.reset != 0 {
				e.leases.resets = append(e.leases.resets, at-c.reset)
			}
			if c.outage != 0 {
				e.leases.silent = check.Intervals{{From: at - c.outage, To: at - c.outage/2}}
			}
			e.sends(control.SwitchoverOf(election), &control.Switchover{
				ID: "1", Token: e.made[leader], Answer: control.Accepted, Key: target,
			})
			e.judged(t, c.guilty)
		})
	}
}

// A leader hands over to whom it has chosen.
func TestSwitchover_ToTheChosen(t *testing.T) {
	for _, c := range []struct {
		name                    string
		passed                  bool // the one ahead of the chosen one
		gone, unready, notByOwn bool
		why                     string
		guilty                  bool
	}{
		{name: "to the chosen one", passed: true, why: "switchover"},
		{name: "to another one", why: "switchover", guilty: true},
		{name: "to another one, the chosen one gone", gone: true, why: "switchover"},
		{name: "to another one, the chosen one not ready", unready: true, why: "switchover"},
		{name: "by somebody else", notByOwn: true, why: "switchover"},
		{name: "for another reason", why: "stopped"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := playEtcd()
			leader, first := e.joins("a", 0xa, 50), e.joins("b", 0xb, 50)
			target := e.joins("c", 0xc, 50)
			token := e.made[leader]
			e.sends(control.SwitchoverOf(election), &control.Switchover{
				ID: "1", Token: token, Answer: control.Accepted, Key: target,
			})
			if c.unready {
				e.sends(control.CandidateOf(election, 0xc), &control.Candidate{Identity: "c"})
			}
			changes := []any{leader, nil}
			if c.gone {
				e.sends(target, nil)
			}
			if c.passed {
				changes = append(changes, first, nil)
			}
			if !c.notByOwn {
				changes = append(changes, control.JobExitedOf(election), "")
			}
			e.sends(changes...)
			e.sends(control.TermOf(election, token),
				&control.Term{Token: token, Identity: "a", Ended: time.Now(), Why: c.why})
			e.judged(t, c.guilty)
		})
	}
}

// What a switchover says that has happened is compared with etcd.
func TestSwitchover_Says(t *testing.T) {
	for _, c := range []struct {
		said, to string
		guilty   bool
	}{
		{`jobs/soak: "b" leads, token TOKEN; nobody led for 20ms at most`, "b", false},
		{`jobs/soak: "b" leads already, token TOKEN`, "b", false},
		{`jobs/soak: "b" leads, token TOKEN`, "", false},
		{`jobs/soak: "b" leads, token TOKEN`, "c", true},
		{`jobs/soak: "c" leads, token TOKEN`, "", true},
		{`jobs/soak: "b" leads, token 7777777`, "", true},
		{``, "", true},
	} {
		t.Run(c.said, func(t *testing.T) {
			e := playEtcd()
			leader, target := e.joins("a", 0xa, 50), e.joins("b", 0xb, 50)
			e.sends(leader, nil)
			said := strings.ReplaceAll(c.said, "TOKEN", fmt.Sprint(e.made[target]))
			e.said = []claimed{{at: e.at, said: said, to: c.to}}
			e.judged(t, false)
			e.after(3 * settles)
			e.judged(t, c.guilty)
		})
	}
}

// It is compared when all is known of that time.
func TestSwitchover_SaysWhileCutOff(t *testing.T) {
	for _, guilty := range []bool{false, true} {
		t.Run(fmt.Sprintf("guilty=%v", guilty), func(t *testing.T) {
			e := playEtcd()
			leader, target := e.joins("a", 0xa, 50), e.joins("b", 0xb, 50)
			e.said = []claimed{{
				at: e.at, said: fmt.Sprintf(`jobs/soak: "b" leads, token %d`, e.made[target]),
			}}
			e.isCutOff(3 * settles)
			e.judged(t, false)
			if !guilty {
				e.sends(leader, nil)
			}
			e.after(3 * settles)
			e.judged(t, guilty)
		})
	}
}

// A failback goes to a candidate with a higher priority that has had it for its time, and that
// lives. The next one is not before its time.
func TestFailback(t *testing.T) {
	for _, c := range []struct {
		name     string
		priority int
		setting  string
		since    time.Duration // the candidate has joined
		silent   time.Duration // since its last renewal
		again    time.Duration // after the first one; 0: never
		guilty   bool
	}{
		{"in time", 90, "1s", 7 * time.Second, 0, 0, false},
		{"to an equal one", 50, "1s", 7 * time.Second, 0, 0, true},
		{"to a lower one", 10, "1s", 7 * time.Second, 0, 0, true},
		{"of one that makes none", 90, "never", 7 * time.Second, 0, 0, true},
		{"to one that has just joined", 90, "1s", 400 * time.Millisecond, 0, 0, true},
		{"to one that does not live", 90, "1s", 7 * time.Second, 2800 * 1e6, 0, true},
		{"again in time", 90, "1s", 7 * time.Second, 0, 7 * time.Second, false},
		{"again too soon", 90, "1s", 7 * time.Second, 0, 4 * time.Second, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := playEtcd()
			leader := e.joins("a", 0xa, 50)
			e.after(10 * time.Second)
			target := e.joins("b", 0xb, c.priority)
			e.after(c.since)
			e.leases.claim("b", e.at-c.silent+e.ttl)
			if c.again != 0 {
				e.failbacks = append(e.failbacks, e.at+c.again)
			}
			log := fmt.Sprintf("time=%s level=INFO msg=\"handing over\" target=b by=failback "+
				"passed=0\n", e.wall(e.at).Format(time.RFC3339Nano))
			e.sends(leader, nil, control.JobExitedOf(election), "")
			e.failedBack("a", c.setting, log)
			if e.counts.Steered.Failbacks != 1 || target == "" {
				t.Errorf("%d failbacks", e.counts.Steered.Failbacks)
			}
			e.judged(t, c.guilty)
		})
	}
}

// A schedule is cut after each hundred faults, whatever commands lie between them.
func TestParts(t *testing.T) {
	all := draw(settings{seed: 3, faults: 250, ttl: 3 * time.Second})
	n, faults := 0, []int{}
	for _, part := range parts(all) {
		n += len(part)
		faults = append(faults, 0)
		for _, f := range part {
			if f.target != anElectionsFuture {
				faults[len(faults)-1]++
			}
		}
	}
	if n != len(all) || !slices.Equal(faults, []int{100, 100, 50}) {
		t.Errorf("%d of %d, faults by part: %v", n, len(all), faults)
	}
}
