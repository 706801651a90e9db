//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

const (
	settle  = 250 * time.Millisecond // from a candidate's coming to the next fault
	observe = 3 * time.Second        // for how long two jobs are watched living at once

	longTTL  = 15 * time.Second // leasehold's default
	shortTTL = 3 * time.Second
)

// vias are the ways to reach etcd.
var (
	vias  = []string{"plain", "tls", "auth"}
	plain = vias[:1]
)

// row is the trials of an implementation with a fault of the leader, one of make faults.
type row struct {
	name  string
	fault func() fault.Fault
	of    harness.Implementation
	ttl   time.Duration
	share float64 // of n
	vias  []string
}

// killElector is the one fault that moves no job.
const killElector = "kill-elector"

// rows are in the order of the report. When the others are killed they wait for the TTL, so theirs
// is short and they get few trials. Over TLS and with auth only what takes milliseconds is
// measured; the naive client knows nothing of them.
var rows = []row{
	{"stop", fault.Stop, harness.Leasehold, longTTL, 1, vias},
	{"stop", fault.Stop, harness.NaiveClient, longTTL, 1, plain},
	{"stop", fault.Stop, harness.EtcdctlLock, longTTL, 1, vias},
	{"kill", killed(harness.Guard), harness.Leasehold, longTTL, 0.4, vias},
	{"kill", killed(harness.Guard), harness.NaiveClient, shortTTL, 1.0 / 16, plain},
	{"kill", killed(harness.Guard), harness.EtcdctlLock, shortTTL, 1.0 / 16, plain},
	{killElector, killed(harness.Elector), harness.Leasehold, longTTL, 0.4, vias},
}

func killed(p harness.Process) func() fault.Fault {
	return func() fault.Fault { return fault.Killed(p) }
}

// trials is how many there are of n, fewer over TLS and with auth.
func (r row) trials(via string, n int) int {
	share := r.share
	if via != "plain" {
		share = 0.2
	}
	return max(1, int(share*float64(n)+0.5))
}

// A testbed is an etcd of one member, reached in one way.
type testbed struct {
	*bench
	*harness.Testbed
	via string
}

// measureVia measures everything that is measured with etcd reached in one way.
func (b *bench) measureVia(ctx context.Context, via string) (err error) {
	t := &testbed{bench: b, via: via}
	cfg := harness.TestbedConfig{Programs: b.programs, Prefix: "bench/", Auth: via == "auth"}
	cfg.Cluster.Etcd = b.etcd
	if via == "tls" {
		if cfg.Cluster.TLS, err = harness.NewCerts(b.dir); err != nil {
			return err
		}
	}
	if t.Testbed, err = harness.NewTestbed(ctx, cfg); err != nil {
		return err
	}
	defer t.Close()
	for _, name := range []string{"stop", "kill", killElector} {
		if !b.only.MatchString(name + ", " + via) {
			continue
		}
		if err := t.inTurns(ctx, name); err != nil {
			return err
		}
	}
	if via == "plain" && b.only.MatchString("size") {
		return t.measureSize(ctx)
	}
	return nil
}

// start starts a candidate with the test job. change may be nil.
func (t *testbed) start(of harness.Implementation, election string, ttl time.Duration,
	change func(*harness.CandidateConfig) error,
) (*harness.Machine, error) {
	t.count++
	name := fmt.Sprintf("%s-%d", strings.ReplaceAll(of.Name, " ", "-"), t.count)
	m, err := t.NewMachine(harness.MachineConfig{Name: name})
	if err != nil {
		return nil, err
	}
	c := harness.CandidateConfig{Election: election, TTL: ttl, Witness: t.witness}
	return m, m.Start(of, c, change)
}

func (t *testbed) newElection() string {
	t.count++
	return fmt.Sprintf("bench/%d", t.count)
}

// end ends the candidate and whatever it left behind.
func end(m *harness.Machine) {
	if m != nil {
		_ = m.Close(context.Background()) // what is left shows in the next trial
	}
}

// inTurns makes the trials with a fault, the implementations taking turns, so that what else the
// machine does disturbs all alike.
func (t *testbed) inTurns(ctx context.Context, name string) error {
	var pairs []*pair
	for _, r := range rows {
		if r.name != name || !slices.Contains(r.vias, t.via) {
			continue
		}
		p := &pair{testbed: t, row: r}
		defer p.close()
		pairs = append(pairs, p)
		fmt.Fprintf(os.Stderr, "measuring %s, %s: %d trials of %s\n",
			name, t.via, r.trials(t.via, t.n), r.of.Name)
	}
	for i := range t.n {
		for _, p := range pairs {
			if i >= p.trials(t.via, t.n) {
				continue
			}
			sample, err := p.trial(ctx)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				// Told in the report, and no reason to lose all the rest.
				failure := fmt.Sprintf("%s of %s over %s: %v", name, p.of.Name, t.via, err)
				t.results.Failures = append(t.results.Failures, failure)
				p.close()
				continue
			}
			t.results.Samples = append(t.results.Samples, sample)
		}
	}
	return nil
}

// A pair is a leader and a standby of one implementation.
type pair struct {
	*testbed
	row
	election        string
	leader, standby *harness.Machine
	leading         harness.Life // the leader's job
}

func (p *pair) close() {
	end(p.standby)
	end(p.leader)
	p.standby, p.leader = nil, nil
}

// ready starts who is missing of the pair and waits until all is quiet.
func (p *pair) ready(ctx context.Context) (first harness.Leading, err error) {
	if p.leader == nil {
		p.election = p.newElection()
		if p.leader, err = p.start(p.of, p.election, p.ttl, nil); err != nil {
			return first, err
		}
		if p.leading, err = p.job(ctx, p.leader.Name, harness.WaitTimeout); err != nil {
			return first, fmt.Errorf("%w; its log:\n%s", err, p.leader.Log())
		}
	}
	if p.standby == nil {
		if p.standby, err = p.start(p.of, p.election, p.ttl, nil); err != nil {
			return first, err
		}
	}
	if first, err = p.WaitQueue(ctx, p.election, 2); err != nil {
		return first, fmt.Errorf("%w; log of the standby:\n%s", err, p.standby.Log())
	}
	return first, harness.Wait(ctx, settle)
}

// trial injects the fault and takes the times of what follows. Afterwards the standby leads.
func (p *pair) trial(ctx context.Context) (Sample, error) {
	s := Sample{Fault: p.name, Implementation: p.of.Name, Via: p.via, TTL: p.ttl.Seconds()}
	first, err := p.ready(ctx)
	if err != nil {
		return s, err
	}
	if p.name == killElector {
		return p.replaced(ctx, s)
	}
	watching, cancel := context.WithTimeout(ctx, p.ttl+harness.WaitTimeout)
	defer cancel()
	watch := p.Client.Watch(watching, first.Key,
		clientv3.WithCreatedNotify(), clientv3.WithFilterPut())
	if created := <-watch; created.Err() != nil || !created.Created {
		return s, errors.Join(errors.New("the operator's watch was not made"), created.Err())
	}
	on := &fault.Target{Testbed: p.Testbed, Machine: p.leader, TTL: p.ttl}
	if err := p.fault().Start(ctx, on); err != nil {
		return s, err
	}
	deleted := <-watch
	s.Freed = harness.Milliseconds(harness.Now() - on.Began)
	if len(deleted.Events) == 0 {
		return s, errors.Join(errors.New("the leader's key was not deleted"), deleted.Err())
	}
	next, err := p.job(ctx, p.standby.Name, p.ttl+harness.WaitTimeout)
	if err != nil {
		return s, fmt.Errorf("%w; its log:\n%s", err, p.standby.Log())
	}
	s.Next = harness.Milliseconds(next.Started - on.Began)
	observed, cancel := context.WithTimeout(ctx, observe)
	defer cancel()
	if ended, err := p.witness.WaitForDead(observed, p.leading); err == nil {
		s.Dead, s.Died = harness.Milliseconds(ended-on.Began), true
	}
	s.Late = harness.Milliseconds(check.Latency(check.TimerLatencies(p.leader.Log())))
	end(p.leader)
	p.leader, p.leading, p.standby = p.standby, next, nil
	return s, nil
}

// replaced kills the leader's elector, and takes the time until the next one has renewed the lease.
// The job must not notice. Then the leader ends, for its guard replaces two in a minute.
func (p *pair) replaced(ctx context.Context, s Sample) (Sample, error) {
	on := &fault.Target{Testbed: p.Testbed, Machine: p.leader, TTL: p.ttl}
	if err := p.fault().Start(ctx, on); err != nil {
		return s, err
	}
	err := harness.Within(ctx, p.ttl, "no renewal", func(ctx context.Context) error {
		return p.leader.WaitReplaced(ctx, 1)
	})
	if err != nil {
		return s, fmt.Errorf("%w; its log:\n%s", err, p.leader.Log())
	}
	s.Renewed = harness.Milliseconds(harness.Now() - on.Began)
	for _, l := range p.witness.Lives() {
		if l.Candidate == p.leader.Name && !l.Alive() || l.Candidate == p.standby.Name {
			return s, errors.New("the job was moved")
		}
	}
	end(p.leader)
	p.leader, p.standby = p.standby, nil
	p.leading, err = p.job(ctx, p.leader.Name, p.ttl+harness.WaitTimeout)
	return s, err
}

// job waits for the job of a candidate.
func (b *bench) job(ctx context.Context, candidate string, within time.Duration,
) (job harness.Life, err error) {
	its := func(l harness.Life) bool { return l.Candidate == candidate }
	err = harness.Within(ctx, within, "no job of "+candidate, func(ctx context.Context) error {
		job, err = b.witness.WaitForJob(ctx, its)
		return err
	})
	return job, err
}
