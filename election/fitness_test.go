package election

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"leasehold/control"
	"leasehold/e2e/sim/simetcd"
)

// fitnessRig has a, which leads, b and c, each with a record.
func fitnessRig(
	t *testing.T, test func(r *adoptRig, c map[string]*testCandidate),
) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &adoptRig{t: t, etcd: simetcd.New(simetcd.Config{}), start: time.Now()}
		t.Cleanup(r.etcd.Close)
		r.etcd.Elect(1)
		all := map[string]*testCandidate{}
		for _, name := range []string{"a", "b", "c"} {
			c := newTestCandidate(t, r.etcd.Endpoints(), name, func(cfg *Config, h *testCallbacks) {
				cfg.Election, cfg.Dial, cfg.Now = "jobs", r.etcd.Dialer(name), r.now
				cfg.FitnessRound = testTTL
				record(cfg, h, 50)
			})
			c.waitFor("queued", func(s Snapshot) bool { return s.LeaseID != 0 && s.Leader != nil })
			all[name] = c
		}
		time.Sleep(4 * testTTL)
		test(r, all)
	})
}

// A leader that becomes unfit hands over, and is not in the queue until it is fit.
func TestFitness_LeaderHandsOver(t *testing.T) {
	fitnessRig(t, func(_ *adoptRig, c map[string]*testCandidate) {
		c["a"].SetUnfit("no disk")
		if end := c["a"].waitForEnd(); !errors.Is(end.cause, ErrSwitchover) ||
			!strings.Contains(end.cause.Error(), "because this candidate is unfit: no disk") {
			t.Errorf("the term ends with %v", end.cause)
		}
		c["b"].waitForTerm()
		time.Sleep(10 * testTTL)
		if s := c["a"].Snapshot(); s.State != Connecting {
			t.Errorf("a: %+v", s)
		}
		c["a"].SetUnfit("")
		c["a"].waitForState(Standby)
		time.Sleep(10 * testTTL)
		if len(c["b"].ended) > 0 || len(c["c"].terms) > 0 {
			t.Error("the lead moved once more")
		}
	})
}

// If all become unfit for the same reason, one a little later than the other, the job stays where
// it is.
func TestFitness_AllAtOnce(t *testing.T) {
	fitnessRig(t, func(_ *adoptRig, c map[string]*testCandidate) {
		for _, name := range []string{"a", "b", "c"} {
			c[name].SetUnfit("no database")
			time.Sleep(testTTL / 3)
		}
		time.Sleep(10 * testTTL)
		for _, name := range []string{"a", "b", "c"} {
			c[name].SetUnfit("")
		}
		time.Sleep(10 * testTTL)
		if s := c["a"].Snapshot(); s.State != Leading || len(c["a"].ended) > 0 {
			t.Errorf("the leader: %+v", s)
		}
	})
}

// It stays the leader while nobody else is fit, or the election is held, or who is next in line was
// killed.
func TestFitness_LeaderStays(t *testing.T) {
	fitnessRig(t, func(r *adoptRig, c map[string]*testCandidate) {
		stays := func(why string) {
			t.Helper()
			time.Sleep(4 * testTTL)
			if s := c["a"].Snapshot(); s.State != Leading || len(c["a"].ended) > 0 {
				t.Fatalf("%s: %+v", why, s)
			}
		}
		operator := r.operator()
		r.hold(operator, control.Hold{})
		c["a"].SetUnfit("no disk")
		stays("held")
		c["b"].SetUnfit("no disk")
		c["c"].SetUnfit("no disk")
		r.release(operator)
		stays("nobody is fit")
		for range 5 {
			x := r.run("x", nil, nil)
			x.waitForState(Standby)
			r.records(operator, map[string]*testCandidate{"x": x}, nil)
			time.Sleep(testTTL / 5)
			r.kill(x)
			stays("killed")
		}
		c["b"].SetUnfit("")
		c["b"].waitForTerm()
	})
}

// Machines whose fitness comes and goes move the job more and more seldom.
func TestFitness_Flapping(t *testing.T) {
	fitnessRig(t, func(_ *adoptRig, c map[string]*testCandidate) {
		terms := func() (n int) {
			for _, x := range c {
				n += len(x.terms)
			}
			return n
		}
		flap := func(d time.Duration) int {
			before := terms()
			for end := time.Now().Add(d); time.Now().Before(end); {
				for _, name := range []string{"a", "b", "c"} {
					c[name].SetUnfit("no disk")
					time.Sleep(3 * testTTL)
					c[name].SetUnfit("")
				}
				time.Sleep(testTTL)
			}
			return terms() - before
		}
		if n := flap(4 * time.Minute); n < 1 || n > 3 {
			t.Errorf("%d hand-overs at first, want one by each at most", n)
		}
		if n := flap(6 * time.Minute); n > 0 {
			t.Errorf("%d hand-overs more", n)
		}
	})
}

// A leader that stays unfit does hand over in the end, however often it has done so before.
func TestFitness_WaitsLonger(t *testing.T) {
	c := &Candidate{fitness: fitness{changed: make(chan struct{}, 1)}}
	now := time.Hour
	const round = time.Second
	c.cfg.Now, c.cfg.FitnessRound = func() time.Duration { return now }, round
	for _, wait := range []time.Duration{0, 1, 2, 4, 8, 16, 32, 32} {
		c.SetUnfit("no disk")
		now += wait*time.Minute + round
		if left := time.Until(c.fitness.stays); left > wait*time.Minute+round ||
			left < wait*time.Minute+round-time.Minute {
			t.Errorf("it says that it stays for %v, want %d min", left, wait)
		}
		if _, leaves := c.fitness.wantsToLeave(now - 1); leaves {
			t.Errorf("it leaves before %d min", wait)
		}
		if why, leaves := c.fitness.wantsToLeave(now); !leaves || why != "no disk" {
			t.Errorf("it does not leave after %d min", wait)
		}
		c.fitness.left(now)
		c.SetUnfit("")
	}
	now += rest + 1
	c.SetUnfit("no disk")
	now += round
	if _, leaves := c.fitness.wantsToLeave(now); !leaves {
		t.Error("it waits after a long rest")
	}
}
