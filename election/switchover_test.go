package election

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"leasehold/control"
	"leasehold/e2e/sim/simetcd"
)

// queueRig runs candidates whose records are in etcd. The first one leads.
func queueRig(
	t *testing.T, identities string,
	test func(r *adoptRig, n *earlyNetwork, operator *Client, c map[string]*testCandidate),
) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &earlyNetwork{requests: map[string]int{}}
		r := &adoptRig{
			t: t, start: time.Now(), etcd: simetcd.New(simetcd.Config{Network: n.verdict}),
		}
		t.Cleanup(r.etcd.Close)
		r.etcd.Elect(1)
		operator, all := r.operator(), map[string]*testCandidate{}
		for name := range strings.SplitSeq(identities, "") {
			c := r.run(name, nil, nil)
			if len(all) == 0 {
				c.waitForTerm()
			}
			c.waitFor("queued", func(s Snapshot) bool {
				return s.State == Standby || s.State == Leading
			})
			r.put(operator, control.CandidateOf("jobs", c.Snapshot().LeaseID),
				&control.Candidate{Identity: name, Ready: true}, c.Snapshot().LeaseID)
			all[name] = c
		}
		time.Sleep(testTTL)
		test(r, n, operator, all)
	})
}

func (r *adoptRig) put(c *Client, key string, v control.Value, lease int64) {
	r.t.Helper()
	_, err := c.Txn(r.t.Context(), &pb.TxnRequest{Success: []*pb.RequestOp{{
		Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{
			Key: []byte(key), Value: control.Encode(v), Lease: lease,
		}},
	}}})
	if err != nil {
		r.t.Fatal(err)
	}
}

// ask asks for a switchover, and returns the answer.
func (r *adoptRig) ask(c *Client, asked control.Switchover) control.Switchover {
	r.t.Helper()
	p, err := control.ReadProgress(r.t.Context(), c, "jobs")
	if err == nil {
		err = control.AskSwitchover(r.t.Context(), c, "jobs", asked, 0, p)
	}
	for err == nil && (p.Asked == nil || p.Asked.Answer == "") {
		time.Sleep(time.Millisecond)
		p, err = control.ReadProgress(r.t.Context(), c, "jobs")
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return *p.Asked
}

// The chosen candidate leads, although others were ahead of it. Those queue again, and so does who
// led.
func TestSwitchover(t *testing.T) {
	queueRig(t, "abcde", func(
		r *adoptRig, _ *earlyNetwork, operator *Client, c map[string]*testCandidate,
	) {
		before := map[string]int64{}
		for name, x := range c {
			before[name] = x.Snapshot().LeaseID
		}
		if got := r.ask(operator, control.Switchover{ID: "1", To: "d"}); got.Answer !=
			control.Accepted {
			t.Errorf("answer %+v", got)
		}
		if end := c["a"].waitForEnd(); !errors.Is(end.cause, ErrSwitchover) {
			t.Errorf("the term ends with %v", end.cause)
		}
		c["d"].waitForTerm()
		time.Sleep(2 * testTTL)
		for name, x := range c {
			s := x.Snapshot()
			requeued := s.LeaseID != before[name]
			if name != "d" && s.State != Standby || requeued != strings.Contains("abc", name) ||
				s.Leader == nil || s.Leader.Identity != "d" || len(x.terms) > 0 {
				t.Errorf("%s: %d terms, queued again: %v, %+v", name, len(x.terms), requeued, s)
			}
		}
	})
}

// A refusal leaves everything as it is, and an answer is final.
func TestSwitchover_Refused(t *testing.T) {
	queueRig(t, "abc", func(
		r *adoptRig, _ *earlyNetwork, operator *Client, c map[string]*testCandidate,
	) {
		if got := r.ask(operator, control.Switchover{ID: "1", To: "d"}); got.Answer !=
			control.Refused {
			t.Errorf("answer %+v", got)
		}
		r.run("d", nil, nil).waitForState(Standby) // now there is one
		time.Sleep(2 * testTTL)
		if s := c["a"].Snapshot(); s.State != Leading || len(c["a"].ended) > 0 {
			t.Errorf("the leader: %+v", s)
		}
	})
}

// Nothing is deleted unless the leader's key is there, as it was: else another one may lead.
func TestMember_HandOver(t *testing.T) {
	queueRig(t, "abc", func(
		r *adoptRig, _ *earlyNetwork, operator *Client, c map[string]*testCandidate,
	) {
		key := func(name string) string { return "jobs/" + hex(c[name].Snapshot().LeaseID) }
		a, b, target := key("a"), key("b"), key("c")
		m := operator.members.all()[0]
		created := r.etcd.Created(a)
		for _, h := range []struct {
			created, target int64
		}{{created - 1, r.etcd.Created(target)}, {created, 1}} {
			done, err := m.handOver(r.t.Context(), a, h.created, &handover{
				target: queueEntry{key: target, created: h.target}, passed: []string{b},
			}, nil)
			if done || err != nil || r.etcd.Created(a) == 0 || r.etcd.Created(b) == 0 {
				t.Errorf("%+v: done %v, %v", h, done, err)
			}
		}
	})
}

func TestChooseTarget(t *testing.T) {
	candidate := func(lease int64, identity string) *mvccpb.KeyValue {
		e := kv("e/"+hex(lease), lease, lease)
		e.Value = []byte(identity)
		return e
	}
	ready := func(leases ...int64) map[int64]control.Candidate {
		records := map[int64]control.Candidate{}
		for _, l := range leases {
			records[l] = control.Candidate{Ready: true}
		}
		return records
	}
	notReady := ready(1, 2, 3)
	notReady[2] = control.Candidate{}
	handMade := []*mvccpb.KeyValue{candidate(1, "a"), kv("e/x", 9, 0), candidate(10, "d")}
	abc := []*mvccpb.KeyValue{candidate(1, "a"), candidate(2, "b"), candidate(3, "c")}
	for name, test := range map[string]struct {
		own, to  string
		queue    []*mvccpb.KeyValue
		records  map[int64]control.Candidate
		want     string
		passed   int
		refusing string
	}{
		"the next":             {"e/1", "", abc, ready(1, 2, 3), "b", 0, ""},
		"a named one":          {"e/1", "c", abc, ready(1, 2, 3), "c", 1, ""},
		"a stranger":           {"e/1", "", abc, ready(1), "", 0, `in line, "b", has no record`},
		"a stranger by name":   {"e/1", "b", abc, ready(1), "b", 0, ""},
		"behind a stranger":    {"e/1", "c", abc, ready(1, 3), "", 0, `that can't be passed`},
		"behind a hand-made":   {"e/1", "d", handMade, ready(1, 10), "", 0, `"e/x"`},
		"the first is unready": {"e/1", "", abc, notReady, "c", 1, ""},
		"named and unready":    {"e/1", "b", abc, notReady, "", 0, `"b" is not ready`},
		"alone":                {"e/1", "", abc[:1], ready(1), "", 0, "nobody waits"},
		"unknown":              {"e/1", "x", abc, ready(1, 2, 3), "", 0, `no candidate "x"`},
		"oneself":              {"e/1", "a", abc, ready(1, 2, 3), "", 0, `no candidate "a"`},
		"not the first":        {"e/2", "", abc, ready(1, 2, 3), "", 0, "not the first"},
	} {
		h, refused := chooseTarget("e/", test.own, control.Switchover{To: test.to},
			test.queue, test.records)
		if h.target.identity != test.want || test.want != "" && len(h.passed) != test.passed ||
			!strings.Contains(refused, test.refusing) || (refused == "") != (test.want != "") {
			t.Errorf("%s: %+v, %q", name, h, refused)
		}
	}
}

// Who takes over from an elector that had accepted a request serves it.
func TestSwitchover_Adopted(t *testing.T) {
	inBubble(t, func(_ *testing.T, r *adoptRig) {
		operator, record := r.operator(), r.killLeader("a")
		b, c := r.run("b", nil, nil), r.run("c", nil, nil)
		b.waitForState(Standby)
		c.waitForState(Standby)
		for _, x := range []*testCandidate{b, c} {
			r.put(operator, control.CandidateOf("jobs", x.Snapshot().LeaseID),
				&control.Candidate{Ready: true}, x.Snapshot().LeaseID)
		}
		last := c
		if r.etcd.Created("jobs/"+hex(b.Snapshot().LeaseID)) >
			r.etcd.Created("jobs/"+hex(c.Snapshot().LeaseID)) {
			last = b
		}
		r.put(operator, control.SwitchoverOf("jobs"), &control.Switchover{
			ID: "1", Token: record.Created, Answer: control.Accepted,
			Key: "jobs/" + hex(last.Snapshot().LeaseID),
		}, 0)
		a := r.run("a", &record, nil)
		if end := a.waitForEnd(); !errors.Is(end.cause, ErrSwitchover) {
			t.Errorf("the term ends with %v", end.cause)
		}
		last.waitForTerm()
	})
}

// records writes what the candidates say of themselves.
func (r *adoptRig) records(
	operator *Client, c map[string]*testCandidate, priorities map[string]int,
) {
	r.t.Helper()
	for name, x := range c {
		lease := x.Snapshot().LeaseID
		r.put(operator, control.CandidateOf("jobs", lease), &control.Candidate{
			Identity: name, Priority: priorities[name], Ready: true,
		}, lease)
	}
}

// The leader lets those queue again that wait ahead of one with a higher priority. That one leads
// next, and the leader goes on until then.
func TestPriority(t *testing.T) {
	queueRig(t, "abcd", func(
		r *adoptRig, _ *earlyNetwork, operator *Client, c map[string]*testCandidate,
	) {
		r.records(operator, c, map[string]int{"a": 50, "b": 50, "c": 50, "d": 90})
		b := c["b"].Snapshot().LeaseID
		for c["b"].Snapshot().LeaseID == b { // until it queues again
			time.Sleep(testTTL / 10)
		}
		time.Sleep(testTTL / 2)
		if s := c["a"].Snapshot(); s.State != Leading || len(c["a"].ended) > 0 {
			t.Errorf("the leader: %+v", s)
		}
		c["a"].stop(nil)
		c["d"].waitForTerm()
		for _, name := range []string{"b", "c"} {
			if len(c[name].terms) > 0 {
				t.Errorf("%s has led", name)
			}
		}
	})
}

// The highest priority does not help a candidate that is not ready: of those that are, the one with
// the highest leads next.
func TestPriority_NotReady(t *testing.T) {
	queueRig(t, "abcd", func(
		r *adoptRig, _ *earlyNetwork, operator *Client, c map[string]*testCandidate,
	) {
		ready := map[string]*testCandidate{"a": c["a"], "b": c["b"], "c": c["c"]}
		r.records(operator, ready, map[string]int{"a": 50, "b": 50, "c": 70})
		r.put(operator, control.CandidateOf("jobs", c["d"].Snapshot().LeaseID),
			&control.Candidate{Identity: "d", Priority: 90}, c["d"].Snapshot().LeaseID)
		b := c["b"].Snapshot().LeaseID
		for c["b"].Snapshot().LeaseID == b { // until it queues again
			time.Sleep(testTTL / 10)
		}
		time.Sleep(testTTL / 2)
		c["a"].stop(nil)
		c["c"].waitForTerm()
		for _, name := range []string{"b", "d"} {
			if len(c[name].terms) > 0 {
				t.Errorf("%s has led", name)
			}
		}
	})
}

// Equal priorities move nobody, and neither does a candidate that comes and goes.
func TestPriority_MovesNobody(t *testing.T) {
	queueRig(t, "abc", func(
		r *adoptRig, _ *earlyNetwork, operator *Client, c map[string]*testCandidate,
	) {
		r.records(operator, c, nil)
		leases := func() (all [3]int64) {
			for i, name := range []string{"a", "b", "c"} {
				all[i] = c[name].Snapshot().LeaseID
			}
			return all
		}
		before := leases()
		for range 20 {
			x := r.run("x", nil, nil)
			x.waitForState(Standby)
			r.records(operator, map[string]*testCandidate{"x": x}, map[string]int{"x": 90})
			time.Sleep(testTTL * 3 / 5)
			x.stop(nil)
			x.waitForReturn()
		}
		if after := leases(); after != before || len(c["a"].ended) > 0 {
			t.Errorf("leases %x, then %x; %d terms have ended", before, after, len(c["a"].ended))
		}
	})
}

// The leader hands over to one with a higher priority once that has been ready for long enough.
func TestPriority_Failback(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		operator, all := r.operator(), map[string]*testCandidate{}
		for _, name := range []string{"a", "b", "c"} {
			c := newTestCandidate(t, r.etcd.Endpoints(), name, func(cfg *Config, _ *testCallbacks) {
				cfg.Election, cfg.Dial, cfg.Now = "jobs", r.etcd.Dialer(name), r.now
				cfg.Failback = 2 * testTTL
			})
			c.waitFor("queued", func(s Snapshot) bool { return s.LeaseID != 0 && s.Leader != nil })
			all[name] = c
		}
		began := time.Now()
		r.records(operator, all, map[string]int{"a": 50, "b": 40, "c": 60})
		all["c"].waitForTerm()
		if end := all["a"].waitForEnd(); !strings.Contains(end.cause.Error(), "a higher priority") {
			t.Errorf("the term ended with %v", end.cause)
		}
		if took := time.Since(began); took < 2*testTTL {
			t.Errorf("it took %v", took)
		}
		time.Sleep(20 * testTTL)
		if len(all["c"].ended) > 0 || len(all["b"].terms) > 0 {
			t.Error("the lead moved once more")
		}
	})
}

// A job is not stopped for a candidate that was killed, although its lease has not expired yet.
func TestPriority_KilledCandidate(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		operator, all := r.operator(), map[string]*testCandidate{}
		for _, name := range []string{"a", "b"} {
			c := newTestCandidate(t, r.etcd.Endpoints(), name, func(cfg *Config, _ *testCallbacks) {
				cfg.Election, cfg.Dial, cfg.Now = "jobs", r.etcd.Dialer(name), r.now
				cfg.Failback = 0
			})
			c.waitFor("queued", func(s Snapshot) bool { return s.LeaseID != 0 && s.Leader != nil })
			all[name] = c
		}
		r.records(operator, all, map[string]int{"a": 50, "b": 50})
		for range 10 {
			x := r.run("x", nil, nil)
			x.waitForState(Standby)
			r.records(operator, map[string]*testCandidate{"x": x}, map[string]int{"x": 90})
			time.Sleep(testTTL / 5)
			r.kill(x)
			time.Sleep(2 * testTTL)
		}
		if len(all["a"].ended) > 0 {
			t.Error("the job was stopped")
		}
	})
}

// Neither is it if somebody asks for that candidate.
func TestSwitchover_ToOneThatWasKilled(t *testing.T) {
	queueRig(t, "abc", func(
		r *adoptRig, _ *earlyNetwork, operator *Client, c map[string]*testCandidate,
	) {
		r.kill(c["b"])
		time.Sleep(testTTL/2 + time.Second/2)
		got := r.ask(operator, control.Switchover{ID: "1", To: "b"})
		if got.Answer != control.Refused || len(c["a"].ended) > 0 {
			t.Errorf("answer %+v", got)
		}
	})
}

// The leader's answer comes through, and it does not learn that. It serves the request anyway.
func TestSwitchover_AnswerLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var armed, seen atomic.Int64
		verdict := func(client, _, method string) (v simetcd.Verdict) {
			if armed.Load() != 0 && client == "a" && method == pb.KV_Txn_FullMethodName {
				v.DropAnswer = seen.Add(1) > 1 // the first one reads the queue
			}
			return v
		}
		r := &adoptRig{
			t: t, start: time.Now(), etcd: simetcd.New(simetcd.Config{Network: verdict}),
		}
		t.Cleanup(r.etcd.Close)
		r.etcd.Elect(1)
		operator, all := r.operator(), map[string]*testCandidate{}
		for _, name := range []string{"a", "b"} {
			all[name] = r.run(name, nil, nil)
			all[name].waitFor("queued", func(s Snapshot) bool {
				return s.LeaseID != 0 && s.Leader != nil
			})
		}
		r.records(operator, all, nil)
		time.Sleep(testTTL)
		all["a"].waitForExtensions(1)
		time.Sleep(testTTL / 50)
		armed.Store(1)
		r.ask(operator, control.Switchover{ID: "1", To: "b"})
		time.Sleep(2200 * time.Millisecond)
		armed.Store(0)
		all["b"].waitForTerm()
	})
}
