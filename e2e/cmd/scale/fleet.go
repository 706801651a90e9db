//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"leasehold/e2e/harness"
	"leasehold/election"
)

// errPlannedStop is what a candidate is stopped with, as by SIGTERM.
var errPlannedStop = errors.New("asked to stop")

// fleet is all candidates of a trial, by election.
type fleet struct {
	endpoints []string
	ttl       time.Duration
	elections [][]*candidate
	renewals  atomic.Pointer[renewals] // nil while nobody counts

	mu       sync.Mutex
	leaders  []leader // by election
	terms    int      // begun
	lost     map[string]int
	warnings map[string]int
}

// leader is who was told last to lead an election, and when.
type leader struct {
	*candidate
	at time.Duration
}

// candidate is one of a fleet. When it has stopped it can be started again, as a new one.
type candidate struct {
	*election.Candidate // the one that was started last
	fleet               *fleet
	election, number    int
	cancel              context.CancelCauseFunc // nil while it is stopped
	ended               chan error              // what Run returned
}

func newFleet(endpoints []string, s shape, ttl time.Duration) *fleet {
	f := &fleet{
		endpoints: endpoints, ttl: ttl, leaders: make([]leader, s.Elections),
		lost: map[string]int{}, warnings: map[string]int{},
	}
	for e := range s.Elections {
		var all []*candidate
		for i := range s.Size {
			all = append(all, &candidate{fleet: f, election: e, number: i})
		}
		f.elections = append(f.elections, all)
	}
	return f
}

func (f *fleet) all() iter.Seq[*candidate] {
	return func(yield func(*candidate) bool) {
		for _, candidates := range f.elections {
			for _, c := range candidates {
				if !yield(c) {
					return
				}
			}
		}
	}
}

// start starts a candidate as the daemon does by default.
func (c *candidate) start() (err error) {
	c.Candidate, err = election.New(election.Config{
		Endpoints: c.fleet.endpoints,
		Election:  fmt.Sprintf("scale/%04d", c.election),
		Identity:  fmt.Sprintf("machine-%04d.example.com", c.number),
		TTL:       c.fleet.ttl, LossGrace: -1, Margin: -1, Wait: -1,
		DialTimeout: time.Second,
		Now:         harness.Now,
		Logger:      slog.New(counter{c.fleet}),
		Registerer:  prometheus.NewRegistry(),
		Callbacks:   c,
		Changed:     c.changed,
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	running, ended := c.Candidate, make(chan error, 1)
	c.cancel, c.ended = cancel, ended
	go func() { ended <- running.Run(ctx) }()
	return nil
}

// stop has the candidate stop. wait waits until it has.
func (c *candidate) stop() { c.cancel(errPlannedStop) }

func (c *candidate) wait(ctx context.Context) error {
	select {
	case err := <-c.ended:
		c.cancel = nil
		return err
	case <-ctx.Done():
		return fmt.Errorf("wait for a candidate to stop: %w", context.Cause(ctx))
	}
}

// close stops every candidate that runs and waits for it.
func (f *fleet) close() {
	for c := range f.all() {
		if c.cancel != nil {
			c.stop()
		}
	}
	for c := range f.all() {
		if c.cancel != nil {
			_ = c.wait(context.Background()) // Run returns in bounded time, whatever etcd does
		}
	}
}

// Leased implements election.Callbacks.
func (c *candidate) Leased(int64, time.Duration) {}

// Extended implements election.Callbacks.
func (c *candidate) Extended(election.Deadlines) {}

// Lead implements election.Callbacks: it leads without a job.
func (c *candidate) Lead(ctx context.Context, _ election.Term) error {
	f, now := c.fleet, harness.Now()
	f.mu.Lock()
	f.leaders[c.election] = leader{c, now}
	f.terms++
	f.mu.Unlock()
	<-ctx.Done()
	if cause := context.Cause(ctx); !errors.Is(cause, errPlannedStop) {
		f.mu.Lock()
		f.lost[cause.Error()]++
		f.mu.Unlock()
	}
	return nil
}

// changed is called at each renewal, and at little else while nobody comes or goes.
func (c *candidate) changed() {
	if r := c.fleet.renewals.Load(); r != nil {
		r.add(harness.Now())
	}
}

func (f *fleet) leader(election int) leader {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leaders[election]
}

// begun is the number of terms that have begun.
func (f *fleet) begun() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.terms
}

// troubles returns how many terms were lost, by cause, and what was warned of, by message.
func (f *fleet) troubles() (lost, warnings map[string]int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.lost), maps.Clone(f.warnings)
}

// inPlace is an error unless each candidate stands by or leads, and each election has one leader.
func (f *fleet) inPlace() error {
	leading, others := 0, 0
	for c := range f.all() {
		switch c.Snapshot().State {
		case election.Leading:
			leading++
		case election.Standby:
		default:
			others++
		}
	}
	if leading != len(f.elections) || others > 0 {
		return fmt.Errorf("%d leaders in %d elections, %d candidates not in the queue",
			leading, len(f.elections), others)
	}
	return nil
}

// renewedSince is an error unless each candidate's lease was renewed by a request sent after that
// moment.
func (f *fleet) renewedSince(t time.Duration) error {
	for c := range f.all() {
		if s := c.Snapshot(); s.Deadlines.End-s.TTL <= t {
			return errors.New("a candidate has not renewed its lease")
		}
	}
	return nil
}

// renewals counts those of each tenth of a second.
type renewals struct {
	start time.Duration
	count []atomic.Int64
}

const tenth = 100 * time.Millisecond

func (r *renewals) add(now time.Duration) {
	if i := int((now - r.start) / tenth); i < len(r.count) {
		r.count[i].Add(1)
	}
}

// peak is the largest count.
func (r *renewals) peak() int64 {
	most := int64(0)
	for i := range r.count {
		most = max(most, r.count[i].Load())
	}
	return most
}

// counter is a log handler that counts warnings by message.
type counter struct{ *fleet }

// Enabled implements slog.Handler, at the daemon's own default level.
func (counter) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

// Handle implements slog.Handler.
func (c counter) Handle(_ context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		c.mu.Lock()
		c.warnings[r.Message]++
		c.mu.Unlock()
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (c counter) WithAttrs([]slog.Attr) slog.Handler { return c }

// WithGroup implements slog.Handler.
func (c counter) WithGroup(string) slog.Handler { return c }
