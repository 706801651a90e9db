//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"leasehold/e2e/harness"
)

// shape is how many candidates a trial has.
type shape struct {
	Elections int `json:"elections"`
	Size      int `json:"size"` // candidates in each
	// Full: with a restart of etcd and, in many elections, with all leaders stopped at once.
	Full bool `json:"full"`
	// TTL and DialTimeout are settings of the daemon.
	TTL         time.Duration `json:"-"`
	DialTimeout time.Duration `json:"-"`
	// AtATime is how many candidates join at once; 0: all.
	AtATime int `json:"at_a_time,omitempty"`
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
	Join       *Burst  `json:"join"`   // all at once, or Shape.AtATime
	Steady     *Burst  `json:"steady"` // nobody comes or goes
	Memory     Memory  `json:"memory"`
	Change     Change  `json:"change"`                // one leader after the other is stopped
	AllLeaders *Burst  `json:"all_leaders,omitempty"` // are stopped at once
	Restart    *Burst  `json:"restart,omitempty"`     // of etcd
	After      *Burst  `json:"after,omitempty"`       // the restart, as Steady
	Leave      *Burst  `json:"leave"`                 // all at once
	// Naive are the times of Change with naive clients, in milliseconds.
	Naive []float64 `json:"naive_ms,omitempty"`
	// Lost are the terms that ended against the candidate's will, by cause; Warnings are what was
	// warned of, by message.
	Lost     map[string]int `json:"lost"`
	Warnings map[string]int `json:"warnings"`
}

// Burst is what many do at once, or all do in a while.
type Burst struct {
	// Seconds is until the last one is done: it stands in the queue, leads, has left, or has
	// renewed its lease.
	Seconds float64   `json:"seconds"`
	Count   count     `json:"count"` // until etcd serves all watches
	Times   []float64 `json:"times_ms,omitempty"`
	// Outage is for how long etcd was down; Terms are those that began since.
	Outage float64 `json:"outage_seconds,omitempty"`
	Terms  int64   `json:"terms,omitempty"`
	// Left are the keys of those whose lease could not be revoked in time: etcd removes them when
	// it expires.
	Left float64 `json:"left_keys,omitempty"`
	// Peak is the largest number of renewals in a tenth of a second.
	Peak int64 `json:"peak_renewals,omitempty"`
}

// Memory is what a candidate takes, in bytes, beyond what the process takes without any.
type Memory struct {
	Resident     float64 `json:"resident"`
	Heap         float64 `json:"heap"`
	Stack        float64 `json:"stack"`
	Goroutines   float64 `json:"goroutines"`
	EtcdResident float64 `json:"etcd_resident"`
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

// changes is how many leaders are stopped one after the other.
const changes = 100

// trial is what takes place.
type trial struct {
	Trial
	*fleet
	member *harness.Member
}

// carryOut carries out a trial with an etcd of its own, and prints what it measured.
func carryOut(ctx context.Context, s shape) error {
	etcd, err := harness.FindEtcd(ctx, os.Stderr)
	if err != nil {
		return err
	}
	cluster, err := harness.StartCluster(ctx, harness.ClusterConfig{Etcd: etcd})
	if err != nil {
		return err
	}
	defer cluster.Close()
	// All candidates have one heap here, and each collection scans it whole, and holds up all of
	// them. A daemon has only its own.
	debug.SetGCPercent(1000)
	debug.SetMemoryLimit(8 << 30)
	t := &trial{
		Trial: Trial{Shape: s, TTL: s.TTL.Seconds()},
		fleet: newFleet(cluster.Endpoints(), s), member: cluster.Members[0],
	}
	defer func() { // each stops in bounded time, whatever etcd does
		_ = stopAll(context.Background(), t.all...)
	}()
	if err := t.measure(ctx); err != nil {
		return err
	}
	t.Lost, t.Warnings = t.lost, t.warnings
	return json.NewEncoder(os.Stdout).Encode(t.Trial)
}

// measure takes the steps of a trial in turn.
func (t *trial) measure(ctx context.Context) error {
	n := float64(t.Shape.candidates())
	for _, step := range []struct {
		name string
		skip bool
		take func(context.Context) error
	}{
		{"measure memory", false, t.addMemory(-1 / n)},
		{"join", false, t.join},
		{"stand by", false, t.steady(&t.Steady)},
		{"measure memory", false, t.addMemory(1 / n)},
		{"change leaders", false, t.change},
		{"stop all leaders", !t.Shape.Full || t.Shape.Elections == 1, t.stopAllLeaders},
		{"restart etcd", !t.Shape.Full, t.restart},
		{"stand by again", !t.Shape.Full, t.steady(&t.After)},
		{"leave", false, t.leave},
		{"naive clients", t.Shape.Elections > 1, t.naive},
	} {
		if step.skip {
			continue
		}
		began := time.Now()
		if err := step.take(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		fmt.Fprintf(os.Stderr, "  %s: %v, %d terms lost so far\n",
			step.name, time.Since(began).Round(time.Millisecond), t.losses())
	}
	return nil
}

// until waits for f to return nil. Thousands of candidates take minutes.
func until(ctx context.Context, f func() error) error {
	return harness.UntilWithin(ctx, 10*time.Minute, "not done", f)
}

// settled waits until etcd serves every watch, and returns what was counted then. A candidate has
// two: of its queue and of what steers the election or, in a crowd, of two keys.
func (t *trial) settled(ctx context.Context) (c count, err error) {
	want := 2 * len(t.all)
	err = until(ctx, func() error {
		m, err := t.metrics(ctx)
		watches := m["etcd_debugging_mvcc_watcher_total"]
		if err == nil && watches != float64(want) {
			err = fmt.Errorf("etcd serves %v watches of %v", watches, want)
		}
		if err != nil {
			_ = harness.Wait(ctx, 20*time.Millisecond) // reading metrics costs etcd 2 ms
			return err
		}
		c, err = m.count()
		return err
	})
	return c, err
}

// burst measures what many do at once. do returns when the last one is done, and read then what
// was counted.
func (t *trial) burst(ctx context.Context, do func() error,
	read func(context.Context) (count, error),
) (*Burst, error) {
	before, err := t.sample(ctx)
	if err != nil {
		return nil, err
	}
	began := harness.Now()
	if err := do(); err != nil {
		return nil, err
	}
	took := harness.Now() - began
	after, err := read(ctx)
	return &Burst{Seconds: took.Seconds(), Count: after.since(before)}, err
}

// join starts all candidates.
func (t *trial) join(ctx context.Context) (err error) {
	t.Join, err = t.burst(ctx, func() error { return t.startInTurn(ctx, t.all) }, t.settled)
	return err
}

// startInTurn starts as many candidates at once as the shape says, and the next ones when these
// are in place.
func (t *trial) startInTurn(ctx context.Context, candidates []*candidate) error {
	atATime := t.Shape.AtATime
	if atATime == 0 {
		atATime = len(candidates)
	}
	for some := range slices.Chunk(candidates, atATime) {
		if err := t.startAll(ctx, some...); err != nil {
			return err
		}
	}
	return nil
}

// leave stops all candidates at once.
func (t *trial) leave(ctx context.Context) (err error) {
	t.Leave, err = t.burst(ctx, func() error { return stopAll(ctx, t.all...) }, t.sample)
	if err != nil {
		return err
	}
	m, err := t.metrics(ctx)
	t.Leave.Left = m["etcd_debugging_mvcc_keys_total"]
	return err
}

// steady measures for one TTL, in which each candidate does a whole number of everything.
func (t *trial) steady(to **Burst) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		began := harness.Now()
		*to, err = t.burst(ctx, func() error { return harness.Wait(ctx, t.Shape.TTL) }, t.sample)
		if err == nil {
			(*to).Peak = t.peak(began, began+t.Shape.TTL)
		}
		return err
	}
}

// addMemory adds to Memory what this process and etcd take now, times a factor.
func (t *trial) addMemory(factor float64) func(context.Context) error {
	return func(ctx context.Context) error {
		etcd, err := t.metrics(ctx)
		if err != nil {
			return err
		}
		debug.FreeOSMemory() // after a collection
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		rss, err := resident()
		t.Memory.Resident += factor * rss
		t.Memory.Heap += factor * float64(m.HeapAlloc)
		t.Memory.Stack += factor * float64(m.StackInuse)
		t.Memory.Goroutines += factor * float64(runtime.NumGoroutine())
		t.Memory.EtcdResident += factor * etcd["process_resident_memory_bytes"]
		return err
	}
}

// change stops one leader after the other, at an even pace: in the first half of each step the
// leader goes, in the second a new candidate comes.
func (t *trial) change(ctx context.Context) error {
	ttl := t.Shape.TTL
	step := ttl / changes
	first, err := t.sample(ctx)
	if err != nil {
		return err
	}
	began, before := harness.Now(), first
	for i := range changes {
		start := harness.Now()
		old, took, err := t.switchOver(ctx, i%t.Shape.Elections, 1)
		if err != nil {
			return err
		}
		t.Change.Times = append(t.Change.Times, took...)
		gone, err := t.sampleAt(ctx, start+step/2)
		if err != nil {
			return err
		}
		if err := t.startAll(ctx, old...); err != nil {
			return err
		}
		back, err := t.sampleAt(ctx, start+step)
		if err != nil {
			return err
		}
		t.Change.Stops.add(gone.since(before), 1)
		t.Change.Returns.add(back.since(gone), 1)
		before = back
	}
	whole := (harness.Now() - began + ttl - 1) / ttl * ttl
	if err := harness.Wait(ctx, began+whole-harness.Now()); err != nil {
		return err
	}
	last, err := t.settled(ctx)
	t.Change.All = last.since(first)
	return err
}

func (t *trial) sampleAt(ctx context.Context, at time.Duration) (count, error) {
	if err := harness.Wait(ctx, at-harness.Now()); err != nil {
		return count{}, err
	}
	return t.sample(ctx)
}

// switchOver stops the leaders of n elections at once, from a number on, and waits until the next
// ones lead. It returns those that have stopped, and how long each election took, in milliseconds.
func (t *trial) switchOver(ctx context.Context, first, n int,
) (old []*candidate, took []float64, err error) {
	elections := t.leaders[first : first+n]
	for i := range elections {
		old = append(old, elections[i].Load().candidate)
	}
	began := harness.Now()
	if err := stopAll(ctx, old...); err != nil {
		return nil, nil, err
	}
	for i := range elections {
		err := until(ctx, func() error {
			if elections[i].Load().at <= began {
				return fmt.Errorf("election %d has no next leader", first+i)
			}
			return nil
		})
		if err != nil {
			return nil, nil, err
		}
		took = append(took, harness.Milliseconds(elections[i].Load().at-began))
	}
	return old, took, nil
}

// stopAllLeaders stops the leaders of all elections at once, and has new candidates follow them
// when that is measured.
func (t *trial) stopAllLeaders(ctx context.Context) error {
	var old []*candidate
	var took []float64
	b, err := t.burst(ctx, func() (err error) {
		old, took, err = t.switchOver(ctx, 0, t.Shape.Elections)
		return err
	}, t.sample)
	if err != nil {
		return err
	}
	b.Times, b.Seconds = took, slices.Max(took)/1000
	t.AllLeaders = b
	if err := t.startInTurn(ctx, old); err != nil {
		return err
	}
	_, err = t.settled(ctx)
	return err
}

// restart restarts etcd, in less time than a lease has, and waits until all candidates have found
// their way back.
func (t *trial) restart(ctx context.Context) error {
	terms, stopped := t.terms.Load(), harness.Now()
	if err := t.member.Restart(ctx); err != nil {
		return err
	}
	up := harness.Now()
	err := until(ctx, func() error { return errors.Join(t.renewedSince(up), t.inPlace()) })
	if err != nil {
		return err
	}
	b := &Burst{Outage: (up - stopped).Seconds(), Seconds: (harness.Now() - up).Seconds()}
	b.Count, err = t.settled(ctx) // etcd counts from nothing again
	b.Terms = t.terms.Load() - terms
	t.Restart = b
	return err
}
