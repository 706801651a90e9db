//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	"leasehold/e2e/harness"
)

// shape is how many candidates a trial has.
type shape struct {
	Elections int `json:"elections"`
	Size      int `json:"size"` // candidates in each
	// Full: with a restart of etcd and, where there are many elections, all leaders stopped at once.
	Full bool `json:"full"`
}

func (s shape) candidates() int { return s.Elections * s.Size }

func (s shape) String() string {
	if s.Elections == 1 {
		return fmt.Sprintf("%d candidates in one election", s.Size)
	}
	return fmt.Sprintf("%d elections of %d", s.Elections, s.Size)
}

// Trial is what was measured of one shape.
type Trial struct {
	Shape      shape   `json:"shape"`
	TTL        float64 `json:"ttl_seconds"`
	Join       *Burst  `json:"join"` // all at once
	Steady     *Steady `json:"steady"`
	Memory     Memory  `json:"memory"`
	Change     Change  `json:"change"`                // one leader after the other is stopped
	AllLeaders *Burst  `json:"all_leaders,omitempty"` // are stopped at once
	Restart    *Burst  `json:"restart,omitempty"`     // of etcd
	After      *Steady `json:"after,omitempty"`       // the restart
	Leave      *Burst  `json:"leave"`                 // all at once
	// Lost are the terms that ended against the candidate's will, by cause; Warnings are what was
	// warned of, by message.
	Lost     map[string]int `json:"lost"`
	Warnings map[string]int `json:"warnings"`
}

// Burst is what many do at once.
type Burst struct {
	// Seconds is until the last one is done: it stands in the queue, leads, has left, or has
	// renewed its lease.
	Seconds float64   `json:"seconds"`
	Count   count     `json:"count"` // until etcd serves all watches
	Times   []float64 `json:"times_ms,omitempty"`
	// Outage is for how long etcd was down.
	Outage float64 `json:"outage_seconds,omitempty"`
	Terms  int     `json:"terms"` // begun meanwhile
	// Left are the keys of those whose lease could not be revoked in time: etcd removes them when
	// it expires.
	Left float64 `json:"left_keys,omitempty"`
}

// Steady is a while in which nobody comes or goes.
type Steady struct {
	Count count `json:"count"`
	// Peak is the largest number of renewals in a tenth of a second.
	Peak int64 `json:"peak_renewals"`
}

// Memory is what a candidate takes, in bytes, beyond what the process takes without any.
type Memory struct {
	Resident       float64 `json:"resident"`
	Heap           float64 `json:"heap"`
	Stack          float64 `json:"stack"`
	Goroutines     float64 `json:"goroutines"`
	EtcdResident   float64 `json:"etcd_resident"`
	EtcdGoroutines float64 `json:"etcd_goroutines"`
}

// Change is what it costs to stop a leader and to have a new candidate follow it at the end of the
// queue.
type Change struct {
	Times []float64 `json:"times_ms"` // from the stop to the next leader's Lead
	// Stops and Returns are counted apart, each summed up over all changes; All is the whole time,
	// a multiple of the TTL.
	Stops   count `json:"stops"`
	Returns count `json:"returns"`
	All     count `json:"all"`
}

// waitTimeout bounds every wait.
const waitTimeout = 2 * time.Minute

// changes is how many leaders are stopped one after the other.
const changes = 100

// trial is what takes place.
type trial struct {
	*fleet
	meter
	shape shape
}

// carryOut carries out a trial with an etcd of its own.
func carryOut(ctx context.Context, s shape, ttl time.Duration) (*Trial, error) {
	etcd, err := harness.FindEtcd(ctx, os.Stderr)
	if err != nil {
		return nil, err
	}
	cluster, err := harness.StartCluster(ctx, harness.ClusterConfig{Etcd: etcd})
	if err != nil {
		return nil, err
	}
	defer cluster.Close()
	t := &trial{newFleet(cluster.Endpoints(), s, ttl), newMeter(cluster.Members[0]), s}
	defer t.close()
	got := &Trial{Shape: s, TTL: ttl.Seconds()}
	if err := t.measure(ctx, got); err != nil {
		return nil, err
	}
	got.Lost, got.Warnings = t.troubles()
	return got, nil
}

// measure takes the steps of a trial in turn.
func (t *trial) measure(ctx context.Context, to *Trial) error {
	var empty, full Memory
	all, many := t.shape.Full, t.shape.Elections > 1
	for _, step := range []struct {
		name  string
		wants bool
		take  func() error
	}{
		{"measure memory", true, func() (err error) { empty, err = t.memory(ctx); return err }},
		{"join", true, func() (err error) { to.Join, err = t.join(ctx); return err }},
		{"stand by", true, func() (err error) { to.Steady, err = t.steady(ctx); return err }},
		{"measure memory", true, func() (err error) { full, err = t.memory(ctx); return err }},
		{"change leaders", true, func() (err error) { to.Change, err = t.change(ctx); return err }},
		{
			"stop all leaders", all && many,
			func() (err error) { to.AllLeaders, err = t.stopAllLeaders(ctx); return err },
		},
		{"restart etcd", all, func() (err error) { to.Restart, err = t.restart(ctx); return err }},
		{"stand by again", all, func() (err error) { to.After, err = t.steady(ctx); return err }},
		{"leave", true, func() (err error) { to.Leave, err = t.leave(ctx); return err }},
	} {
		if !step.wants {
			continue
		}
		if err := step.take(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	to.Memory = full.per(empty, float64(t.shape.candidates()))
	return nil
}

// until waits for f to return nil.
func until(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, waitTimeout)
	defer cancel()
	return harness.Until(ctx, f)
}

// settled waits until etcd serves every watch, one of each candidate's queue, and returns what was
// counted then.
func (t *trial) settled(ctx context.Context) (c count, err error) {
	watches := float64(t.shape.candidates())
	err = until(ctx, func() (err error) {
		if c, err = t.sample(ctx); err == nil && c.watchers != watches {
			err = fmt.Errorf("etcd serves %v watches of %v", c.watchers, watches)
		}
		if err != nil {
			_ = harness.Wait(ctx, 20*time.Millisecond) // reading metrics costs etcd 2 ms
		}
		return err
	})
	return c, err
}

// burst measures what many do at once. do returns when the last one is done, and read then what
// was counted.
func (t *trial) burst(ctx context.Context, do func(*Burst) error,
	read func(context.Context) (count, error),
) (*Burst, error) {
	before, err := t.sample(ctx)
	if err != nil {
		return nil, err
	}
	b, terms, began := &Burst{}, t.begun(), harness.Now()
	if err := do(b); err != nil {
		return nil, err
	}
	if b.Seconds == 0 {
		b.Seconds = (harness.Now() - began).Seconds()
	}
	after, err := read(ctx)
	b.Count, b.Terms = after.since(before), t.begun()-terms
	return b, err
}

// join starts all candidates at once.
func (t *trial) join(ctx context.Context) (*Burst, error) {
	return t.burst(ctx, func(*Burst) error {
		return t.startAll(ctx, slices.Collect(t.all()))
	}, t.settled)
}

// startAll starts candidates at once, and waits until each candidate is in place.
func (t *trial) startAll(ctx context.Context, candidates []*candidate) error {
	for _, c := range candidates {
		if err := c.start(); err != nil {
			return err
		}
	}
	return until(ctx, t.inPlace)
}

// leave stops all candidates at once.
func (t *trial) leave(ctx context.Context) (*Burst, error) {
	var last count
	b, err := t.burst(ctx, func(*Burst) error {
		return stopAll(ctx, slices.Collect(t.all()))
	}, func(ctx context.Context) (_ count, err error) {
		last, err = t.sample(ctx)
		return last, err
	})
	if err == nil {
		b.Left = last.keys
	}
	return b, err
}

// stopAll stops candidates at once, and waits until they have stopped.
func stopAll(ctx context.Context, candidates []*candidate) error {
	for _, c := range candidates {
		c.stop()
	}
	for _, c := range candidates {
		if err := c.wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

// steady measures for one TTL, in which each candidate does a whole number of everything.
func (t *trial) steady(ctx context.Context) (*Steady, error) {
	before, err := t.sample(ctx)
	if err != nil {
		return nil, err
	}
	r := &renewals{start: harness.Now(), count: make([]atomic.Int64, t.ttl/tenth)}
	t.renewals.Store(r)
	defer t.renewals.Store(nil)
	if err := harness.Wait(ctx, t.ttl); err != nil {
		return nil, err
	}
	after, err := t.sample(ctx)
	return &Steady{Count: after.since(before), Peak: r.peak()}, err
}

// memory is what this process and etcd take, candidates or none.
func (t *trial) memory(ctx context.Context) (Memory, error) {
	c, err := t.sample(ctx)
	if err != nil {
		return Memory{}, err
	}
	debug.FreeOSMemory() // after a collection
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	rss, err := resident()
	return Memory{
		Resident: rss, Heap: float64(m.HeapAlloc), Stack: float64(m.StackInuse),
		Goroutines:   float64(runtime.NumGoroutine()),
		EtcdResident: c.resident, EtcdGoroutines: c.goroutines,
	}, err
}

// per is what each of n candidates adds.
func (m Memory) per(empty Memory, n float64) Memory {
	return Memory{
		Resident:       (m.Resident - empty.Resident) / n,
		Heap:           (m.Heap - empty.Heap) / n,
		Stack:          (m.Stack - empty.Stack) / n,
		Goroutines:     (m.Goroutines - empty.Goroutines) / n,
		EtcdResident:   (m.EtcdResident - empty.EtcdResident) / n,
		EtcdGoroutines: (m.EtcdGoroutines - empty.EtcdGoroutines) / n,
	}
}

// change stops one leader after the other, at an even pace: in the first half of each step the
// leader goes, in the second a new candidate comes.
func (t *trial) change(ctx context.Context) (ch Change, err error) {
	step := t.ttl / changes
	first, err := t.sample(ctx)
	if err != nil {
		return ch, err
	}
	began, before := harness.Now(), first
	for i := range changes {
		start := harness.Now()
		empty, took, err := t.switchOver(ctx, i%t.shape.Elections)
		if err != nil {
			return ch, err
		}
		ch.Times = append(ch.Times, took)
		gone, err := t.sampleAt(ctx, start+step/2)
		if err != nil {
			return ch, err
		}
		if err := t.startAll(ctx, []*candidate{empty}); err != nil {
			return ch, err
		}
		back, err := t.sampleAt(ctx, start+step)
		if err != nil {
			return ch, err
		}
		ch.Stops.add(gone.since(before), 1)
		ch.Returns.add(back.since(gone), 1)
		before = back
	}
	whole := (harness.Now() - began + t.ttl - 1) / t.ttl * t.ttl
	if err := harness.Wait(ctx, began+whole-harness.Now()); err != nil {
		return ch, err
	}
	last, err := t.settled(ctx)
	ch.All = last.since(first)
	return ch, err
}

func (t *trial) sampleAt(ctx context.Context, at time.Duration) (count, error) {
	if err := harness.Wait(ctx, at-harness.Now()); err != nil {
		return count{}, err
	}
	return t.sample(ctx)
}

// switchOver stops a leader and waits until the next one leads. It returns the one that has
// stopped and how long it took, in milliseconds.
func (t *trial) switchOver(ctx context.Context, election int) (*candidate, float64, error) {
	old, stopped := t.leader(election).candidate, harness.Now()
	old.stop()
	next, err := t.nextLeader(ctx, election, stopped)
	if err == nil {
		err = old.wait(ctx)
	}
	return old, harness.Milliseconds(next - stopped), err
}

// nextLeader waits until someone leads who did not at a moment, and returns since when.
func (t *trial) nextLeader(ctx context.Context, election int, after time.Duration,
) (at time.Duration, err error) {
	err = until(ctx, func() error {
		if at = t.leader(election).at; at <= after {
			return fmt.Errorf("election %d has no next leader", election)
		}
		return nil
	})
	return at, err
}

// stopAllLeaders stops the leaders of all elections at once, and has new candidates follow them
// when that is measured.
func (t *trial) stopAllLeaders(ctx context.Context) (*Burst, error) {
	var old []*candidate
	for e := range t.elections {
		old = append(old, t.leader(e).candidate)
	}
	b, err := t.burst(ctx, func(b *Burst) error {
		began, last := harness.Now(), time.Duration(0)
		if err := stopAll(ctx, old); err != nil {
			return err
		}
		for e := range t.elections {
			at, err := t.nextLeader(ctx, e, began)
			if err != nil {
				return err
			}
			b.Times = append(b.Times, harness.Milliseconds(at-began))
			last = max(last, at)
		}
		b.Seconds = (last - began).Seconds()
		return nil
	}, t.sample)
	if err != nil {
		return nil, err
	}
	if err := t.startAll(ctx, old); err != nil {
		return nil, err
	}
	_, err = t.settled(ctx)
	return b, err
}

// restart restarts etcd, in less time than a lease has, and waits until all candidates have found
// their way back.
func (t *trial) restart(ctx context.Context) (*Burst, error) {
	terms, stopped := t.begun(), harness.Now()
	if err := t.member.Restart(ctx); err != nil {
		return nil, err
	}
	up := harness.Now()
	err := until(ctx, func() error { return errors.Join(t.renewedSince(up), t.inPlace()) })
	if err != nil {
		return nil, err
	}
	b := &Burst{Outage: (up - stopped).Seconds(), Seconds: (harness.Now() - up).Seconds()}
	b.Count, err = t.settled(ctx) // etcd counts from nothing again
	b.Terms = t.begun() - terms
	return b, err
}
