//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e"
)

// A fault is what befalls the leader.
type fault struct {
	Name string
	part string // of the benchmark
	// ttl for leasehold; otherTTL for the others, who wait for it.
	ttl, otherTTL time.Duration
	// share of n is the number of trials; others get few where they wait.
	share, otherShare float64
	proxied           bool
	ours              bool // the others have no such process
	strike            func(ctx context.Context, s *stage, leader *candidate, key string, lease clientv3.LeaseID) error
}

const (
	longTTL  = 15 * time.Second // leasehold's default
	shortTTL = 3 * time.Second
	few      = 1.0 / 16
)

func signalled(send func(*candidate) error) func(context.Context, *stage, *candidate, string, clientv3.LeaseID) error {
	return func(_ context.Context, _ *stage, leader *candidate, _ string, _ clientv3.LeaseID) error {
		return send(leader)
	}
}

var faults = []fault{
	{Name: "stop", part: "stop", ttl: longTTL, otherTTL: longTTL, share: 1, otherShare: 1,
		strike: signalled((*candidate).stop)},
	{Name: "kill", part: "kill", ttl: longTTL, otherTTL: shortTTL, share: 0.4, otherShare: few,
		strike: signalled(func(c *candidate) error { return c.Signal(syscall.SIGKILL) })},
	{Name: "kill-elector", part: "kill", ttl: longTTL, share: 0.4, ours: true,
		strike: signalled(func(c *candidate) error { return c.SignalElector(syscall.SIGKILL) })},
	{Name: "hang", part: "hang", ttl: shortTTL, otherTTL: shortTTL, share: 0.1, otherShare: few,
		strike: signalled(func(c *candidate) error { return c.Signal(syscall.SIGSTOP) })},
	{Name: "hang-elector", part: "hang", ttl: shortTTL, share: 0.1, ours: true,
		strike: signalled(func(c *candidate) error { return c.SignalElector(syscall.SIGSTOP) })},
	{Name: "cut", part: "cut", ttl: shortTTL, otherTTL: shortTTL, share: 0.2, otherShare: 0.1, proxied: true,
		strike: signalled(func(c *candidate) error { c.road.Cut(e2e.BothWays); return nil })},
	{Name: "key-deleted", part: "operator", ttl: longTTL, otherTTL: shortTTL, share: 0.5, otherShare: few,
		strike: func(ctx context.Context, s *stage, _ *candidate, key string, _ clientv3.LeaseID) error {
			_, err := s.client.Delete(ctx, key)
			return err
		}},
	{Name: "lease-revoked", part: "operator", ttl: longTTL, otherTTL: shortTTL, share: 0.5, otherShare: few,
		strike: func(ctx context.Context, s *stage, _ *candidate, _ string, lease clientv3.LeaseID) error {
			_, err := s.client.Revoke(ctx, lease)
			return err
		}},
}

// inTurns makes the trials of a fault, the contenders taking turns, so that
// what else the machine does disturbs all alike.
func (s *stage) inTurns(ctx context.Context, f fault, n int, with []contender) error {
	var pairs []*pair
	var left []int
	for _, c := range with {
		share, ttl := f.share, f.ttl
		if c.Name != leasehold.Name {
			if f.ours {
				continue
			}
			share, ttl = f.otherShare, f.otherTTL
		}
		p := &pair{stage: s, of: c, ttl: ttl, proxied: f.proxied}
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
	of              contender
	ttl             time.Duration
	proxied         bool
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
func (p *pair) ready(ctx context.Context) (key string, lease clientv3.LeaseID, err error) {
	if p.leader == nil {
		p.count++
		p.election = fmt.Sprintf("bench/%d", p.count)
	}
	for _, c := range []**candidate{&p.leader, &p.standby} {
		if *c != nil {
			continue
		}
		if *c, err = p.start(p.of, p.election, p.ttl, p.proxied, ""); err != nil {
			return "", 0, err
		}
		if c == &p.leader {
			if _, err := p.job(ctx, p.leader, patience); err != nil {
				return "", 0, err
			}
		}
	}
	if key, lease, err = p.queue(ctx, p.election, 2); err != nil {
		return "", 0, fmt.Errorf("%w; log of the standby:\n%s", err, p.standby.Log())
	}
	quiet := settle
	if p.proxied { // what follows depends on how long ago the lease was renewed
		quiet += rand.N(p.ttl / 3)
	}
	return key, lease, wait(ctx, quiet)
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// trial lets a fault befall the leader and takes the times of what follows.
// Afterwards the standby leads.
func (p *pair) trial(ctx context.Context, f fault) (Sample, error) {
	key, lease, err := p.ready(ctx)
	if err != nil {
		return Sample{}, err
	}
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	freed, err := p.watch(watching, key)
	if err != nil {
		return Sample{}, err
	}

	at := e2e.Now()
	if err := f.strike(ctx, p.stage, p.leader, key, lease); err != nil {
		return Sample{}, err
	}
	next, err := p.job(ctx, p.standby, p.ttl+patience)
	if err != nil {
		return Sample{}, err
	}
	sample := Sample{
		Fault: f.Name, Contender: p.of.Name, Road: p.road, TTL: p.ttl.Seconds(),
		Next: milliseconds(next.Started - at),
	}
	select {
	case t := <-freed:
		sample.Freed = milliseconds(t - at)
	case <-ctx.Done():
		return Sample{}, context.Cause(ctx)
	}
	if dead, ok := p.dead(ctx, p.leader); ok {
		sample.Dead, sample.Died = milliseconds(dead-at), true
	}
	sample.Late = milliseconds(lateness(p.leader.Log()))
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
					freed <- e2e.Now()
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
	err := p.witness.Wait(ctx, func(lives []e2e.Life) bool {
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

var latenessPattern = regexp.MustCompile(`guard_lateness=(\S+)`)

// lateness is how late the guard served a deadline, by its own account.
func lateness(log string) time.Duration {
	var worst time.Duration
	for _, m := range latenessPattern.FindAllStringSubmatch(log, -1) {
		if d, err := time.ParseDuration(m[1]); err == nil {
			worst = max(worst, d)
		}
	}
	return worst
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// measureExec measures what every contender pays: from the start of the job's
// process to its first instruction.
func (b *bench) measureExec(ctx context.Context, n int) error {
	for i := range n {
		identity := fmt.Sprintf("exec-%d", i)
		job := exec.CommandContext(ctx, b.program("testjob"), "exit=0")
		job.Env = []string{e2e.WitnessVariable + "=" + b.witness.Addr, "LEASEHOLD_IDENTITY=" + identity}
		at := e2e.Now()
		if out, err := job.CombinedOutput(); err != nil {
			return fmt.Errorf("run the test job: %w: %s", err, strings.TrimSpace(string(out)))
		}
		err := b.witness.Wait(ctx, func(lives []e2e.Life) bool {
			for _, l := range lives {
				if l.Candidate == identity {
					b.results.Exec = append(b.results.Exec, milliseconds(l.Started-at))
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
