//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/harness"
)

// A fault is what befalls the leader.
type fault struct {
	Name string
	part string // of the benchmark
	// ttl for leasehold; otherTTL for the others, who wait for it.
	ttl, otherTTL time.Duration
	// share of n is the number of trials; others get few where they wait.
	share, otherShare float64
	ours              bool // the others have no such process
	strike            func(leader *candidate) error
}

const (
	longTTL  = 15 * time.Second // leasehold's default
	shortTTL = 3 * time.Second
	few      = 1.0 / 16
)

var faults = []fault{
	{Name: "stop", part: "stop", ttl: longTTL, otherTTL: longTTL, share: 1, otherShare: 1,
		strike: func(c *candidate) error { return c.of.Stop(c.Candidate) }},
	{Name: "kill", part: "kill", ttl: longTTL, otherTTL: shortTTL, share: 0.4, otherShare: few,
		strike: func(c *candidate) error { return c.Signal(syscall.SIGKILL) }},
	{Name: "kill-elector", part: "kill", ttl: longTTL, share: 0.4, ours: true,
		strike: func(c *candidate) error { return syscall.Kill(c.elector, syscall.SIGKILL) }},
}

// inTurns makes the trials of a fault, the contenders taking turns, so that
// what else the machine does disturbs all alike.
func (s *stage) inTurns(ctx context.Context, f fault, n int, with []harness.Implementation) error {
	var pairs []*pair
	var left []int
	for _, c := range with {
		share, ttl := f.share, f.ttl
		if c.Name != harness.Leasehold.Name {
			if f.ours {
				continue
			}
			share, ttl = f.otherShare, f.otherTTL
		}
		p := &pair{stage: s, of: c, ttl: ttl}
		defer p.close()
		pairs, left = append(pairs, p), append(left, max(1, int(share*float64(n)+0.5)))
	}
	fmt.Fprintf(os.Stderr, "measuring %s, %s: %v trials\n", f.Name, s.road, left)
	for more := true; more; {
		more = false
		for i, p := range pairs {
			if left[i] == 0 {
				continue
			}
			left[i]--
			more = more || left[i] > 0
			sample, err := p.trial(ctx, f)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				// Told in the report, and no reason to lose all the rest.
				s.results.Failures = append(s.results.Failures, fmt.Sprintf("%s of %s over %s: %v", f.Name, p.of.Name, s.road, err))
				p.close()
				continue
			}
			s.results.Samples = append(s.results.Samples, sample)
		}
	}
	return nil
}

// A pair is a leader and a standby of one contender.
type pair struct {
	*stage
	of              harness.Implementation
	ttl             time.Duration
	election        string
	leader, standby *candidate
}

func (p *pair) close() {
	for _, c := range []*candidate{p.standby, p.leader} {
		if c != nil {
			p.end(c)
		}
	}
	p.standby, p.leader = nil, nil
}

// ready fills the places of the pair and waits until all is quiet.
func (p *pair) ready(ctx context.Context) (key string, err error) {
	if p.leader == nil {
		p.count++
		p.election = fmt.Sprintf("bench/%d", p.count)
	}
	for _, c := range []**candidate{&p.leader, &p.standby} {
		if *c != nil {
			continue
		}
		if *c, err = p.start(p.of, p.election, p.ttl, ""); err != nil {
			return "", err
		}
		if c == &p.leader {
			if _, err := p.job(ctx, p.leader, patience); err != nil {
				return "", err
			}
		}
	}
	if key, err = p.queue(ctx, p.election, 2); err != nil {
		return "", fmt.Errorf("%w; log of the standby:\n%s", err, p.standby.Log())
	}
	return key, harness.Wait(ctx, settle)
}

// trial lets a fault befall the leader and takes the times of what follows.
// Afterwards the standby leads.
func (p *pair) trial(ctx context.Context, f fault) (Sample, error) {
	key, err := p.ready(ctx)
	if err != nil {
		return Sample{}, err
	}
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	freed, err := p.watch(watching, key)
	if err != nil {
		return Sample{}, err
	}

	if f.ours { // to find it takes milliseconds
		if p.leader.elector, err = p.leader.Elector(); err != nil {
			return Sample{}, err
		}
	}
	at := harness.Now()
	if err := f.strike(p.leader); err != nil {
		return Sample{}, err
	}
	next, err := p.job(ctx, p.standby, p.ttl+patience)
	if err != nil {
		return Sample{}, err
	}
	sample := Sample{
		Fault: f.Name, Contender: p.of.Name, Road: p.road, TTL: p.ttl.Seconds(),
		Next: harness.Milliseconds(next.Started - at),
	}
	select {
	case t := <-freed:
		sample.Freed = harness.Milliseconds(t - at)
	case <-ctx.Done():
		return Sample{}, context.Cause(ctx)
	}
	if dead, ok := p.dead(ctx, p.leader); ok {
		sample.Dead, sample.Died = harness.Milliseconds(dead-at), true
	}
	sample.Late = harness.Milliseconds(harness.Lateness(p.leader.Log()))
	p.end(p.leader)
	p.leader, p.standby = p.standby, nil
	return sample, ctx.Err()
}

// watch tells when etcd says that the key is deleted.
func (p *pair) watch(ctx context.Context, key string) (<-chan time.Duration, error) {
	events := p.client.Watch(ctx, key, clientv3.WithCreatedNotify(), clientv3.WithFilterPut())
	if created := <-events; created.Err() != nil || !created.Created {
		return nil, errors.Join(errors.New("the operator's watch was not made"), created.Err())
	}
	freed := make(chan time.Duration, 1)
	go func() { // ends with ctx
		for response := range events {
			for _, e := range response.Events {
				if e.Type == mvccpb.DELETE {
					freed <- harness.Now()
					return
				}
			}
		}
	}()
	return freed, nil
}

// dead waits, for a while, until nothing of the candidate's job is alive.
func (p *pair) dead(ctx context.Context, c *candidate) (time.Duration, bool) {
	ctx, cancel := context.WithTimeout(ctx, observe)
	defer cancel()
	var end time.Duration
	err := p.witness.Wait(ctx, func(lives []harness.Life) bool {
		end = 0
		for _, l := range lives {
			if l.Candidate == c.Identity && l.Alive() {
				return false
			}
			if l.Candidate == c.Identity {
				end = max(end, l.End)
			}
		}
		return true
	})
	return end, err == nil
}

// measureExec measures what every contender pays: from the start of the job's
// process to its first instruction.
func (b *bench) measureExec(ctx context.Context, n int) error {
	for i := range n {
		identity := fmt.Sprintf("exec-%d", i)
		job := exec.CommandContext(ctx, b.program("testjob"), "exit=0")
		job.Env = []string{harness.WitnessVariable + "=" + b.witness.Addr, "LEASEHOLD_IDENTITY=" + identity}
		at := harness.Now()
		if out, err := job.CombinedOutput(); err != nil {
			return fmt.Errorf("run the test job: %w: %s", err, strings.TrimSpace(string(out)))
		}
		err := b.witness.Wait(ctx, func(lives []harness.Life) bool {
			for _, l := range lives {
				if l.Candidate == identity {
					b.results.Exec = append(b.results.Exec, harness.Milliseconds(l.Started-at))
					return true
				}
			}
			return false
		})
		if err != nil {
			return err
		}
	}
	return nil
}
