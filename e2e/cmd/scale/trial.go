//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"leasehold/e2e/harness"
)

// shape is how many candidates a trial has.
type shape struct {
	Elections int  `json:"elections"`
	Size      int  `json:"size"` // candidates in each
	Full      bool `json:"full"` // with a restart of etcd and, where there are many elections, all leaders stopped at once
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
	Join       Burst   `json:"join"` // all at once
	Steady     Steady  `json:"steady"`
	Memory     Memory  `json:"memory"`
	Change     Change  `json:"change"`                // one leader after the other is stopped
	AllLeaders *Burst  `json:"all_leaders,omitempty"` // are stopped at once
	Restart    *Burst  `json:"restart,omitempty"`     // of etcd
	After      *Steady `json:"after,omitempty"`       // the restart
	Leave      Burst   `json:"leave"`                 // all at once
	// Lost are the terms that ended against the candidate's will, by cause; Warnings are what was warned of, by message.
	Lost     map[string]int `json:"lost"`
	Warnings map[string]int `json:"warnings"`
}

// Burst is what many do at once.
type Burst struct {
	// Seconds is until the last one is done: it stands in the queue, leads, has left, or has renewed its lease.
	Seconds float64   `json:"seconds"`
	Count   count     `json:"count"` // until etcd serves all watches
	Times   []float64 `json:"times_ms,omitempty"`
	// Outage is for how long etcd was down.
	Outage float64 `json:"outage_seconds,omitempty"`
	Terms  int     `json:"terms"` // begun meanwhile
	// Left are the keys of those whose lease could not be revoked in time: etcd removes them when it expires.
	Left float64 `json:"left_keys,omitempty"`
}

// Steady is a while in which nobody comes or goes.
type Steady struct {
	Count count `json:"count"`
	// Peak is the largest number of renewals in a tenth of a second.
	Peak int64 `json:"peak_renewals"`
}

// Memory is what a candidate takes, in bytes, beyond what the process takes
// without any.
type Memory struct {
	Resident       float64 `json:"resident"`
	Heap           float64 `json:"heap"`
	Stack          float64 `json:"stack"`
	Goroutines     float64 `json:"goroutines"`
	EtcdResident   float64 `json:"etcd_resident"`
	EtcdGoroutines float64 `json:"etcd_goroutines"`
}

// Change is what it costs to stop a leader and to have a new candidate follow
// it at the end of the queue.
type Change struct {
	Times []float64 `json:"times_ms"` // from the stop to the next leader's Lead
	// Stops and Returns are counted apart, each summed up over all changes; All is the whole time, a multiple of the TTL.
	Stops   count `json:"stops"`
	Returns count `json:"returns"`
	All     count `json:"all"`
}

// patience is for how long anything is waited for.
const patience = 2 * time.Minute

// changes is how many leaders are stopped one after the other.
const changes = 100

// stage is where a trial takes place.
type stage struct {
	*crowd
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
	st := &stage{newCrowd(cluster.Endpoints(), s, ttl), newMeter(cluster.Members[0]), s}
	defer st.close()

	t := &Trial{Shape: s, TTL: ttl.Seconds()}
	if err := st.measure(ctx, t); err != nil {
		return nil, err
	}
	_, t.Lost, t.Warnings = st.counts()
	return t, nil
}

func (st *stage) measure(ctx context.Context, t *Trial) error {
	empty, err := st.memory(ctx)
	if err != nil {
		return err
	}
	if t.Join, err = st.join(ctx, st.all); err != nil {
		return fmt.Errorf("join: %w", err)
	}
	if t.Steady, err = st.steady(ctx); err != nil {
		return fmt.Errorf("stand by: %w", err)
	}
	full, err := st.memory(ctx)
	if err != nil {
		return err
	}
	t.Memory = full.per(empty, float64(st.shape.candidates()))
	if t.Change, err = st.change(ctx); err != nil {
		return fmt.Errorf("change leaders: %w", err)
	}
	if st.shape.Full {
		if st.shape.Elections > 1 {
			if t.AllLeaders, err = st.stopAllLeaders(ctx); err != nil {
				return fmt.Errorf("stop all leaders: %w", err)
			}
		}
		if t.Restart, err = st.restart(ctx); err != nil {
			return fmt.Errorf("restart etcd: %w", err)
		}
		after, err := st.steady(ctx)
		if err != nil {
			return fmt.Errorf("stand by: %w", err)
		}
		t.After = &after
	}
	if t.Leave, err = st.leave(ctx); err != nil {
		return fmt.Errorf("leave: %w", err)
	}
	return nil
}

// until waits for f to return nil.
func until(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return harness.Until(ctx, f)
}

// settled waits until etcd serves every watch, one of each candidate's queue
// and one of each standby's predecessor, and returns what was counted then.
func (st *stage) settled(ctx context.Context) (count, error) {
	watches := float64(2*st.shape.candidates() - st.shape.Elections)
	var c count
	err := until(ctx, func() error {
		var g gauges
		var err error
		if c, g, err = st.sample(ctx); err == nil && g.watchers != watches {
			err = fmt.Errorf("etcd serves %v watches of %v", g.watchers, watches)
		}
		if err != nil {
			_ = harness.Wait(ctx, 20*time.Millisecond) // reading metrics costs etcd 2 ms
		}
		return err
	})
	return c, err
}

// join starts candidates at once.
func (st *stage) join(ctx context.Context, some func(func(*seat) error) error) (Burst, error) {
	before, _, err := st.sample(ctx)
	if err != nil {
		return Burst{}, err
	}
	terms, _, _ := st.counts()
	began := harness.Now()
	if err := some((*seat).sit); err != nil {
		return Burst{}, err
	}
	if err := until(ctx, st.inPlace); err != nil {
		return Burst{}, err
	}
	b := Burst{Seconds: (harness.Now() - began).Seconds()}
	after, err := st.settled(ctx)
	b.Count = after.since(before)
	b.Terms, _, _ = st.counts()
	b.Terms -= terms
	return b, err
}

// steady measures for one TTL, in which each candidate does a whole number of
// everything.
func (st *stage) steady(ctx context.Context) (Steady, error) {
	b := newBeats(st.ttl)
	before, _, err := st.sample(ctx)
	if err != nil {
		return Steady{}, err
	}
	st.beats.Store(b)
	defer st.beats.Store(nil)
	if err := harness.Wait(ctx, st.ttl); err != nil {
		return Steady{}, err
	}
	after, _, err := st.sample(ctx)
	return Steady{Count: after.since(before), Peak: b.peak()}, err
}

// memory is what this process and etcd take, candidates or none.
func (st *stage) memory(ctx context.Context) (Memory, error) {
	_, g, err := st.sample(ctx)
	if err != nil {
		return Memory{}, err
	}
	debug.FreeOSMemory() // after a collection
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	rss, err := resident()
	return Memory{
		Resident: rss, Heap: float64(m.HeapAlloc), Stack: float64(m.StackInuse), Goroutines: float64(runtime.NumGoroutine()),
		EtcdResident: g.resident, EtcdGoroutines: g.goroutines,
	}, err
}

// per is what each of n candidates adds.
func (m Memory) per(empty Memory, n float64) Memory {
	return Memory{
		Resident: (m.Resident - empty.Resident) / n, Heap: (m.Heap - empty.Heap) / n, Stack: (m.Stack - empty.Stack) / n,
		Goroutines:   (m.Goroutines - empty.Goroutines) / n,
		EtcdResident: (m.EtcdResident - empty.EtcdResident) / n, EtcdGoroutines: (m.EtcdGoroutines - empty.EtcdGoroutines) / n,
	}
}

// handOver stops a leader and waits until the next one leads. It returns the
// seat that is empty now and how long it took, in milliseconds.
func (st *stage) handOver(ctx context.Context, election int) (*seat, float64, error) {
	old := st.leader(election)
	stopped := harness.Now()
	old.seat.leave()
	var next leader
	err := until(ctx, func() error {
		if next = st.leader(election); next.at <= stopped {
			return errors.New("the next leader does not lead yet")
		}
		return nil
	})
	if err == nil {
		err = old.seat.left(ctx)
	}
	return old.seat, harness.Milliseconds(next.at - stopped), err
}

// change stops one leader after the other, at an even pace: in the first half
// of each step the leader goes, in the second a new candidate comes.
func (st *stage) change(ctx context.Context) (Change, error) {
	var ch Change
	step := st.ttl / changes
	first, _, err := st.sample(ctx)
	if err != nil {
		return ch, err
	}
	began := harness.Now()
	before := first
	for i := range changes {
		start := harness.Now()
		empty, took, err := st.handOver(ctx, i%st.shape.Elections)
		if err != nil {
			return ch, err
		}
		ch.Times = append(ch.Times, took)
		if err := harness.Wait(ctx, start+step/2-harness.Now()); err != nil {
			return ch, err
		}
		gone, _, err := st.sample(ctx)
		if err != nil {
			return ch, err
		}
		if err := empty.sit(); err != nil {
			return ch, err
		}
		if err := until(ctx, st.inPlace); err != nil {
			return ch, err
		}
		if err := harness.Wait(ctx, start+step-harness.Now()); err != nil {
			return ch, err
		}
		back, _, err := st.sample(ctx)
		if err != nil {
			return ch, err
		}
		ch.Stops.add(gone.since(before))
		ch.Returns.add(back.since(gone))
		before = back
	}
	whole := (harness.Now() - began + st.ttl - 1) / st.ttl * st.ttl
	if err := harness.Wait(ctx, began+whole-harness.Now()); err != nil {
		return ch, err
	}
	last, err := st.settled(ctx)
	ch.All = last.since(first)
	return ch, err
}

// stopAllLeaders stops the leaders of all elections at once, and has new
// candidates follow them when that is measured.
func (st *stage) stopAllLeaders(ctx context.Context) (*Burst, error) {
	before, _, err := st.sample(ctx)
	if err != nil {
		return nil, err
	}
	var old []*seat
	for e := range st.seats {
		old = append(old, st.leader(e).seat)
	}
	began := harness.Now()
	for _, s := range old {
		s.leave()
	}
	for _, s := range old {
		if err := s.left(ctx); err != nil {
			return nil, err
		}
	}
	b := &Burst{}
	last := time.Duration(0)
	for e := range st.seats {
		if err := until(ctx, func() error {
			next := st.leader(e)
			if next.at <= began {
				return fmt.Errorf("election %d has no leader", e)
			}
			b.Times = append(b.Times, harness.Milliseconds(next.at-began))
			last = max(last, next.at)
			return nil
		}); err != nil {
			return nil, err
		}
	}
	b.Seconds, b.Terms = (last - began).Seconds(), len(b.Times)
	after, _, err := st.sample(ctx)
	if err != nil {
		return nil, err
	}
	b.Count = after.since(before)
	_, err = st.join(ctx, func(f func(*seat) error) error {
		for _, s := range old {
			if err := f(s); err != nil {
				return err
			}
		}
		return nil
	})
	return b, err
}

// restart restarts etcd, in less time than a lease has, and waits until all
// candidates have found their way back.
func (st *stage) restart(ctx context.Context) (*Burst, error) {
	terms, _, _ := st.counts()
	stopped := harness.Now()
	if err := st.member.Restart(ctx); err != nil {
		return nil, err
	}
	up := harness.Now()
	if err := until(ctx, func() error { return errors.Join(st.renewedSince(up), st.inPlace()) }); err != nil {
		return nil, err
	}
	b := &Burst{Outage: (up - stopped).Seconds(), Seconds: (harness.Now() - up).Seconds()}
	var err error
	b.Count, err = st.settled(ctx) // etcd counts from nothing again
	b.Terms, _, _ = st.counts()
	b.Terms -= terms
	return b, err
}

// leave stops all candidates at once.
func (st *stage) leave(ctx context.Context) (Burst, error) {
	before, _, err := st.sample(ctx)
	if err != nil {
		return Burst{}, err
	}
	terms, _, _ := st.counts()
	began := harness.Now()
	_ = st.all(func(s *seat) error { s.leave(); return nil })
	if err := st.all(func(s *seat) error { return s.left(ctx) }); err != nil {
		return Burst{}, err
	}
	b := Burst{Seconds: (harness.Now() - began).Seconds()}
	b.Terms, _, _ = st.counts()
	b.Terms -= terms
	after, g, err := st.sample(ctx)
	b.Count, b.Left = after.since(before), g.keys
	return b, err
}
