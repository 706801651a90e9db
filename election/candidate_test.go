package election

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

func TestCandidate_PlannedHandOver(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	first := a.waitForTerm()
	if s := a.Snapshot(); !s.Leading || s.State != Leading || s.LeaseID != first.LeaseID ||
		s.TTL != testTTL {
		t.Errorf("snapshot while leading: %+v", s)
	}
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	s := b.waitForState(Standby)
	if s.Leader == nil || s.Leader.Identity != "a" || s.Leader.Token != first.Token || s.Leading {
		t.Errorf("snapshot of the standby: %+v", s)
	}
	cause := errors.New("planned")
	a.stop(cause)
	end := a.waitForEnd()
	if !errors.Is(end.cause, cause) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	second := b.waitForTerm()
	t.Logf("hand-over: %v after Lead returned", harness.Now()-end.at)
	if err := a.waitForReturn(); err != nil {
		t.Errorf("Run after a planned stop: %v", err)
	}
	if second.Token <= first.Token {
		t.Errorf("token %d follows %d", second.Token, first.Token)
	}
	waitForLeases(t, cluster, second.LeaseID)
	b.stop(cause)
	b.waitForReturn()
	waitForLeases(t, cluster)
	if out := etcdctl(t, cluster, "get", "--prefix", "--keys-only", ""); out != "" {
		t.Errorf("keys left in etcd: %s", out)
	}
	a.mu.Lock()
	if want := []int64{first.LeaseID, 0}; !slices.Equal(a.leased, want) {
		t.Errorf("Leased was called with %v, want %v", a.leased, want)
	}
	a.mu.Unlock()
}

// A guard may stop the job before the candidate knows of the planned stop. Then Lead returns before
// its context has ended.
func TestCandidate_LeadReturnsBeforeItsContextEnds(t *testing.T) {
	cluster := newTestEtcd(t)
	cause := errors.New("planned")
	before := false
	for range 20 {
		stop := make(chan context.CancelCauseFunc, 1)
		a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testCallbacks) {
			h.lead = func(ctx context.Context, _ Term) error {
				(<-stop)(cause)
				before = before || ctx.Err() == nil
				return nil
			}
		})
		stop <- a.stop
		a.waitForReturn()
		if got := <-a.causes; !errors.Is(got, cause) {
			t.Fatalf("the term ended with %v", got)
		}
	}
	if !before {
		t.Error("Lead has always seen the end first: nothing was tried")
	}
}

func TestCandidate_KeyDeletedWhileLeading(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	first := a.waitForTerm()
	etcdctl(t, cluster, "del", first.Key)
	if end := a.waitForEnd(); !errors.Is(end.cause, ErrKeyDeleted) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	select {
	case <-first.Lost:
	default:
		t.Error("Term.Lost is not closed")
	}
	second := a.waitForTerm()
	if second.Token <= first.Token || second.LeaseID == first.LeaseID {
		t.Errorf("term %+v follows %+v", second, first)
	}
	waitForLeases(t, cluster, second.LeaseID)
}

func TestCandidate_KeyMadeAnewWhileLeading(t *testing.T) {
	cluster := newTestEtcd(t)
	release := make(chan struct{})
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testCallbacks) {
		h.lead = func(ctx context.Context, _ Term) error {
			<-ctx.Done()
			<-release
			return nil
		}
	})
	term := a.waitForTerm()
	etcdctl(t, cluster, "del", term.Key)
	etcdctl(t, cluster, "put", term.Key, "thief")
	a.waitForState(Stopping)
	close(release)
	if end := a.waitForEnd(); !errors.Is(end.cause, ErrKeyDeleted) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	// What the thief put has no lease, so it blocks the next campaign.
	// The blocker is published before the state.
	s := a.waitFor("blocked", func(s Snapshot) bool {
		return s.Blocker != nil && s.State == Standby
	})
	if s.Blocker.Key != term.Key || s.Leader != nil {
		t.Errorf("snapshot: %+v, blocker %+v", s, s.Blocker)
	}
	etcdctl(t, cluster, "del", term.Key)
	a.waitForTerm()
}

func TestCandidate_LeaseRevokedWhileLeading(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	term := a.waitForTerm()
	etcdctl(t, cluster, "lease", "revoke", fmt.Sprintf("%x", term.LeaseID))
	// Usually the watch is faster than the next renewal.
	if end := a.waitForEnd(); !errors.Is(end.cause, ErrKeyDeleted) &&
		!errors.Is(end.cause, ErrLeaseLost) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	waitForLeases(t, cluster, a.waitForTerm().LeaseID)
}

// A loss must reach Lead even when its context has already ended.
func TestCandidate_KeyDeletedWhileStopping(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testCallbacks) {
		h.lead = func(ctx context.Context, term Term) error {
			<-ctx.Done()
			<-term.Lost
			return nil
		}
	})
	term := a.waitForTerm()
	a.stop(errors.New("planned"))
	if s := a.waitForState(Stopping); s.Leading {
		t.Errorf("leading while stopping: %+v", s)
	}
	before, _ := a.extensions()
	until(t, func() error { // the lease is renewed until Lead has returned
		if now, _ := a.extensions(); now == before {
			return errors.New("no renewal while stopping")
		}
		return nil
	})
	etcdctl(t, cluster, "del", term.Key)
	a.waitForEnd()
	a.waitForReturn()
	waitForLeases(t, cluster)
}

func TestCandidate_KeyDeletedWhileStandby(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	first := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	old := b.waitForState(Standby).LeaseID
	etcdctl(t, cluster, "del", fmt.Sprintf("%s/%x", t.Name(), old))
	s := b.waitFor(
		"standby again", func(s Snapshot) bool { return s.State == Standby && s.LeaseID != old },
	)
	waitForLeases(t, cluster, first.LeaseID, s.LeaseID)
	a.stop(nil)
	if term := b.waitForTerm(); term.LeaseID != s.LeaseID {
		t.Errorf("term %+v, want lease %x", term, s.LeaseID)
	}
}

func TestCandidate_LeadReturns(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	results := make(chan error)
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testCallbacks) {
		h.lead = func(context.Context, Term) error { return <-results }
	})
	var last Term
	for range 20 {
		term := a.waitForTerm()
		if term.Token <= last.Token || term.LeaseID == last.LeaseID {
			t.Fatalf("term %+v follows %+v", term, last)
		}
		last = term
		results <- nil
	}
	a.waitForTerm()
	began := harness.Now()
	const pause = 2 * time.Second // long enough for etcdctl on a busy machine
	results <- &Backoff{For: pause}
	until(t, func() error {
		if s := a.Snapshot(); s.State != Connecting || !strings.Contains(s.Reason, "resigned") {
			return fmt.Errorf("snapshot: %+v", s)
		}
		return nil
	})
	waitForLeases(t, cluster)
	a.waitForTerm()
	if took := harness.Now() - began; took < pause {
		t.Errorf("campaigned again after %v", took)
	}
	fault := errors.New("the job's own")
	results <- fault
	if err := a.waitForReturn(); !errors.Is(err, fault) {
		t.Errorf("Run returned %v", err)
	}
	waitForLeases(t, cluster)
}

func TestCandidate_Wait(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	term := a.waitForTerm()
	for _, wait := range []time.Duration{0, 3 * time.Second} {
		b := newTestCandidate(
			t, cluster.Endpoints(), "b", func(cfg *Config, _ *testCallbacks) { cfg.Wait = wait },
		)
		began := harness.Now()
		if err := b.waitForReturn(); !errors.Is(err, ErrNotElected) ||
			!strings.Contains(err.Error(), "'a' is ahead") {
			t.Errorf("wait %v: Run returned %v", wait, err)
		}
		if took := harness.Now() - began; took > wait+time.Second {
			t.Errorf("wait %v took %v", wait, took)
		}
	}
	waitForLeases(t, cluster, term.LeaseID)
	a.stop(nil)
	a.waitForReturn()
	// With nobody ahead it is elected, and having been elected once it waits for ever.
	c := newTestCandidate(
		t, cluster.Endpoints(), "c", func(cfg *Config, _ *testCallbacks) { cfg.Wait = 0 },
	)
	etcdctl(t, cluster, "del", c.waitForTerm().Key)
	c.waitForEnd()
	c.waitForTerm()
	c.stop(nil)
	if err := c.waitForReturn(); err != nil {
		t.Errorf("Run returned %v", err)
	}
}

func TestCandidate_EtcdDownAtStart(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	if err := cluster.Members[0].Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, wait := range []time.Duration{0, 300 * time.Millisecond} {
		b := newTestCandidate(
			t, cluster.Endpoints(), "b", func(cfg *Config, _ *testCallbacks) { cfg.Wait = wait },
		)
		if err := b.waitForReturn(); !errors.Is(err, ErrUnreachable) ||
			!strings.Contains(err.Error(), "connection refused") {
			t.Errorf("wait %v: Run returned %v", wait, err)
		}
	}
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	s := a.waitFor(
		"refused",
		func(s Snapshot) bool { return strings.Contains(s.Reason, "connection refused") },
	)
	if s.State != Connecting || harness.Now()-s.LastHeartbeat > HeartbeatInterval {
		t.Errorf("snapshot: %+v", s)
	}
	if err := cluster.Members[0].Start(); err != nil {
		t.Fatal(err)
	}
	a.waitForTerm()
}

// etcdctl elect uses etcd's own concurrency.Election.
func TestCandidate_SharesTheElectionWithEtcdctl(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	first := a.waitForTerm()

	listen := cluster.EtcdctlCommand(cluster.Endpoints(), "elect", "--listen", t.Name())
	var heard, led syncBuffer
	listen.Stdout = &heard
	elect := cluster.EtcdctlCommand(cluster.Endpoints(), "elect", t.Name(), "other")
	elect.Stdout = &led
	for _, cmd := range []*exec.Cmd{listen, elect} {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			cmd.Process.Kill()
			cmd.Wait()
		}()
	}
	hears := func(what string) {
		t.Helper()
		until(t, func() error {
			if !strings.Contains(heard.String(), what) {
				return fmt.Errorf("elect --listen says %q, not %q", heard.String(), what)
			}
			return nil
		})
	}
	hears(first.Key + "\na\n")
	until(t, func() error {
		r, err := query(t.Context(), testConfig(t, cluster.Endpoints(), ""))
		if err == nil && len(r.Queue) != 2 {
			err = fmt.Errorf("queue: %+v", r)
		}
		return err
	})
	a.stop(nil)
	a.waitForReturn()
	hears("\nother\n")
	// A signal before it has printed its key would end it without resigning.
	until(t, func() error {
		if !strings.Contains(led.String(), "other") {
			return errors.New("elect has not printed its key")
		}
		return nil
	})

	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	s := b.waitForState(Standby)
	if s.Leader == nil || s.Leader.Identity != "other" || s.Blocker != nil {
		t.Errorf("snapshot: %+v", s)
	}
	if err := elect.Process.Signal(os.Interrupt); err != nil { // it resigns
		t.Fatal(err)
	}
	b.waitForTerm()
	hears("\nb\n")
}
