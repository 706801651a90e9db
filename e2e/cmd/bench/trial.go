//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
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

// A kind of trial is a fault of the leader.
type kind struct {
	Name string
	part string // of the benchmark
	// ttl for leasehold; otherTTL for the others, who wait for it. 0: they have no such process.
	ttl, otherTTL time.Duration
	// share of n is the number of trials; the others get few where they wait.
	share, otherShare float64
	fault             func() fault.Fault
}

var kinds = []kind{
	{"stop", "stop", longTTL, longTTL, 1, 1, fault.Stop},
	{"kill", "kill", longTTL, shortTTL, 0.4, 1.0 / 16, killed(harness.Guard)},
	{"kill-elector", "kill", longTTL, 0, 0.4, 0, killed(harness.Elector)},
}

func killed(p harness.Process) func() fault.Fault {
	return func() fault.Fault { return fault.Killed(p) }
}

// A testbed is an etcd of one member, reached in one way.
type testbed struct {
	*bench
	*harness.Testbed
	via   string // plain, tls, auth
	count int    // of identities and elections given out
}

func (b *bench) newTestbed(ctx context.Context, via string) (t *testbed, err error) {
	cfg := harness.TestbedConfig{Prefix: "bench/", Auth: via == "auth"}
	cfg.Cluster.Etcd = b.etcd
	if via == "tls" {
		if cfg.Cluster.TLS, err = harness.NewCerts(b.dir); err != nil {
			return nil, err
		}
	}
	t = &testbed{bench: b, via: via}
	t.Testbed, err = harness.NewTestbed(ctx, cfg)
	return t, err
}

// start starts a candidate with the test job. binary, if not empty, is a copy of its program.
func (t *testbed) start(of harness.Implementation, election string, ttl time.Duration,
	binary string,
) (*harness.Machine, error) {
	t.count++
	name := fmt.Sprintf("%s-%d", strings.ReplaceAll(of.Name, " ", "-"), t.count)
	m, err := t.NewMachine(harness.MachineConfig{Name: name})
	if err != nil {
		return nil, err
	}
	c := harness.Candidacy{Programs: t.programs, Election: election, TTL: ttl, Witness: t.witness}
	return m, m.Start(of, c, func(cfg *harness.CandidateConfig) error {
		if binary != "" {
			cfg.Binary = binary
		}
		return nil
	})
}

// end ends the candidate and whatever it left behind.
func (t *testbed) end(m *harness.Machine) {
	_ = m.Close(context.Background()) // what is left shows in the next trial
	for _, l := range t.witness.Lives() {
		if l.Candidate == m.Name && l.Alive() {
			_ = t.witness.Tell(l, "exit 0") // it may be ending
		}
	}
}

// inTurns makes the trials of a kind, the implementations taking turns, so that what else the
// machine does disturbs all alike.
func (t *testbed) inTurns(ctx context.Context, k kind, n int, with []harness.Implementation) error {
	var pairs []*pair
	for _, of := range with {
		share, ttl := k.share, k.ttl
		if !of.Ours() {
			share, ttl = k.otherShare, k.otherTTL
		}
		if ttl == 0 {
			continue
		}
		p := &pair{testbed: t, of: of, ttl: ttl, left: max(1, int(share*float64(n)+0.5))}
		defer p.close()
		pairs = append(pairs, p)
		fmt.Fprintf(os.Stderr, "measuring %s, %s: %d trials of %s\n", k.Name, t.via, p.left, of.Name)
	}
	for more := true; more; {
		more = false
		for _, p := range pairs {
			if p.left == 0 {
				continue
			}
			p.left--
			more = more || p.left > 0
			sample, err := p.trial(ctx, k)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				// Told in the report, and no reason to lose all the rest.
				failure := fmt.Sprintf("%s of %s over %s: %v", k.Name, p.of.Name, t.via, err)
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
	of              harness.Implementation
	ttl             time.Duration
	left            int // trials
	election        string
	leader, standby *harness.Machine
}

func (p *pair) close() {
	for _, m := range []*harness.Machine{p.standby, p.leader} {
		if m != nil {
			p.end(m)
		}
	}
	p.standby, p.leader = nil, nil
}

// ready starts who is missing of the pair and waits until all is quiet.
func (p *pair) ready(ctx context.Context) (leading harness.Leading, err error) {
	if p.leader == nil {
		p.count++
		p.election = fmt.Sprintf("bench/%d", p.count)
		if p.leader, err = p.start(p.of, p.election, p.ttl, ""); err != nil {
			return leading, err
		}
		if _, err := p.job(ctx, p.leader, harness.WaitTimeout); err != nil {
			return leading, err
		}
	}
	if p.standby == nil {
		if p.standby, err = p.start(p.of, p.election, p.ttl, ""); err != nil {
			return leading, err
		}
	}
	if leading, err = p.WaitQueue(ctx, p.election, 2); err != nil {
		return leading, fmt.Errorf("%w; log of the standby:\n%s", err, p.standby.Log())
	}
	return leading, harness.Wait(ctx, settle)
}

// trial injects the fault and takes the times of what follows. Afterwards the standby leads.
func (p *pair) trial(ctx context.Context, k kind) (Sample, error) {
	leading, err := p.ready(ctx)
	if err != nil {
		return Sample{}, err
	}
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	deleted, err := p.watch(watching, leading.Key)
	if err != nil {
		return Sample{}, err
	}
	on := &fault.Target{Testbed: p.Testbed, Machine: p.leader, Leading: leading, TTL: p.ttl}
	if err := k.fault().Start(ctx, on); err != nil {
		return Sample{}, err
	}
	next, err := p.job(ctx, p.standby, p.ttl+harness.WaitTimeout)
	if err != nil {
		return Sample{}, err
	}
	sample := Sample{
		Fault: k.Name, Contender: p.of.Name, Road: p.via, TTL: p.ttl.Seconds(),
		Next: harness.Milliseconds(next.Started - on.Began),
	}
	select {
	case at := <-deleted:
		sample.Freed = harness.Milliseconds(at - on.Began)
	case <-ctx.Done():
		return Sample{}, context.Cause(ctx)
	}
	if exited, ok := p.exited(ctx, p.leader); ok {
		sample.Dead, sample.Died = harness.Milliseconds(exited-on.Began), true
	}
	sample.Late = harness.Milliseconds(check.Latency(check.TimerLatencies(p.leader.Log())))
	p.end(p.leader)
	p.leader, p.standby = p.standby, nil
	return sample, ctx.Err()
}

// job waits for the candidate's job.
func (t *testbed) job(ctx context.Context, of *harness.Machine, within time.Duration,
) (harness.Life, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	life, err := t.witness.WaitForJob(ctx, func(l harness.Life) bool { return l.Candidate == of.Name })
	if err != nil {
		err = fmt.Errorf("no job of %s within %v: %w; its log:\n%s", of.Name, within, err, of.Log())
	}
	return life, err
}

// watch returns when etcd says that the key is deleted.
func (t *testbed) watch(ctx context.Context, key string) (<-chan time.Duration, error) {
	events := t.Client.Watch(ctx, key, clientv3.WithCreatedNotify(), clientv3.WithFilterPut())
	if created := <-events; created.Err() != nil || !created.Created {
		return nil, errors.Join(errors.New("the operator's watch was not made"), created.Err())
	}
	deleted := make(chan time.Duration, 1)
	go func() { // ends with ctx
		for response := range events {
			for _, e := range response.Events {
				if e.Type == mvccpb.DELETE {
					deleted <- harness.Now()
					return
				}
			}
		}
	}()
	return deleted, nil
}

// exited waits, for a while, until nothing of the candidate's job lives.
func (t *testbed) exited(ctx context.Context, of *harness.Machine) (at time.Duration, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, observe)
	defer cancel()
	err := t.witness.Wait(ctx, func(lives []harness.Life) bool {
		at = 0
		for _, l := range lives {
			switch {
			case l.Candidate != of.Name:
			case l.Alive():
				return false
			default:
				at = max(at, l.End)
			}
		}
		return true
	})
	return at, err == nil
}
