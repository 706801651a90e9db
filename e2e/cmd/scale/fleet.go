//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"leasehold/e2e/harness"
	"leasehold/election"
)

// errPlannedStop is what a candidate is stopped with, as by SIGTERM.
var errPlannedStop = errors.New("asked to stop")

// fleet is all candidates of a trial.
type fleet struct {
	endpoints []string
	ttl, dial time.Duration // the daemon's TTL and DIAL_TIMEOUT
	size      int           // of each election
	all       []*candidate
	leaders   []atomic.Pointer[leader] // by election
	terms     atomic.Int64             // begun
	waiting   *candidate               // that was not in place when we last looked; to ask it first

	mu       sync.Mutex
	renewals map[time.Duration]int64 // by tenth of a second
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

func newFleet(endpoints []string, s shape) *fleet {
	f := &fleet{
		endpoints: endpoints, ttl: s.TTL, dial: s.DialTimeout, size: s.Size,
		leaders:  make([]atomic.Pointer[leader], s.Elections),
		renewals: map[time.Duration]int64{}, lost: map[string]int{}, warnings: map[string]int{},
	}
	for i := range s.candidates() {
		f.all = append(f.all, &candidate{fleet: f, election: i / s.Size, number: i % s.Size})
	}
	return f
}

// start starts a candidate as the daemon does by default.
func (c *candidate) start() (err error) {
	c.Candidate, err = election.New(election.Config{
		Endpoints: c.fleet.endpoints,
		Election:  fmt.Sprintf("scale/%04d", c.election),
		Identity:  fmt.Sprintf("machine-%04d.example.com", c.number),
		TTL:       c.fleet.ttl, LossGrace: -1, Margin: -1, Wait: -1,
		DialTimeout: c.fleet.dial, Dial: c.dial,
		Now:        harness.Now,
		Logger:     slog.New(warningCounter{c.fleet}),
		Registerer: prometheus.NewRegistry(),
		Callbacks:  c,
		Changed:    c.changed,
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

// dial connects from an address of the candidate's own, as from a machine of its own. One address
// has only some 28,000 ports, and one that was used is not free again for a minute.
func (c *candidate) dial(ctx context.Context, address string) (net.Conn, error) {
	n := c.election*c.fleet.size + c.number
	from := net.IPv4(127, 1+byte(n>>16), byte(n>>8), byte(n))
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}
	return d.DialContext(ctx, "tcp", address)
}

// startAll starts candidates at once, and waits until each candidate is in place.
func (f *fleet) startAll(ctx context.Context, candidates ...*candidate) error {
	for _, c := range candidates {
		if err := c.start(); err != nil {
			return err
		}
	}
	return until(ctx, f.inPlace)
}

// stopAll stops candidates at once, if they run, and waits until they have stopped.
func stopAll(ctx context.Context, candidates ...*candidate) error {
	for _, c := range candidates {
		if c.cancel != nil {
			c.cancel(errPlannedStop)
		}
	}
	var err error
	for _, c := range candidates {
		if c.cancel == nil {
			continue
		}
		select {
		case errRun := <-c.ended:
			c.cancel = nil
			err = errors.Join(err, errRun)
		case <-ctx.Done():
			return fmt.Errorf("wait for a candidate to stop: %w", context.Cause(ctx))
		}
	}
	return err
}

// Leased implements election.Callbacks.
func (c *candidate) Leased(int64, time.Duration) {}

// Extended implements election.Callbacks.
func (c *candidate) Extended(election.Deadlines) {}

// Suspend implements election.Callbacks.
func (c *candidate) Suspend() bool { return false }

// Entered implements election.Callbacks.
func (c *candidate) Entered(string, int64) {}

// Ended implements election.Callbacks.
func (c *candidate) Ended(error, error) {}

// Releasing implements election.Callbacks.
func (c *candidate) Releasing(int64) error { return nil }

// Lead implements election.Callbacks: it leads without a job.
func (c *candidate) Lead(ctx context.Context, _ election.Term) error {
	f := c.fleet
	f.leaders[c.election].Store(&leader{c, harness.Now()})
	f.terms.Add(1)
	<-ctx.Done()
	if cause := context.Cause(ctx); !errors.Is(cause, errPlannedStop) {
		f.mu.Lock()
		f.lost[cause.Error()]++
		f.mu.Unlock()
	}
	return nil
}

// losses is the number of terms that ended against the candidate's will.
func (f *fleet) losses() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, times := range f.lost {
		n += times
	}
	return n
}

const tenth = 100 * time.Millisecond

// changed is called at each renewal, and at little else while nobody comes or goes.
func (c *candidate) changed() {
	c.fleet.mu.Lock()
	defer c.fleet.mu.Unlock()
	c.fleet.renewals[harness.Now()/tenth]++
}

// peak is the largest number of renewals in a tenth of a second between two moments.
func (f *fleet) peak(from, to time.Duration) (most int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for t := from/tenth + 1; t < to/tenth; t++ {
		most = max(most, f.renewals[t])
	}
	return most
}

// inPlace is an error unless each candidate that was started stands by or leads, and each election
// has one leader.
func (f *fleet) inPlace() error {
	if f.waiting != nil && !f.waiting.isInPlace() {
		return fmt.Errorf("a candidate of election %d is not in the queue",
			f.waiting.election)
	}
	states := map[election.State]int{}
	elections, candidates := 0, 0
	for _, c := range f.all {
		if c.cancel == nil { // it is stopped
			continue
		}
		states[c.Snapshot().State]++
		if !c.isInPlace() {
			f.waiting = c
		}
		elections, candidates = c.election+1, candidates+1
	}
	leading, standby := states[election.Leading], states[election.Standby]
	if leading != elections || leading+standby != candidates {
		return fmt.Errorf("%d leaders in %d elections, %d candidates not in the queue",
			leading, elections, candidates-leading-standby)
	}
	return nil
}

func (c *candidate) isInPlace() bool {
	s := c.Snapshot().State
	return s == election.Leading || s == election.Standby
}

// renewedSince is an error unless each candidate's lease was renewed by a request sent after that
// moment.
func (f *fleet) renewedSince(t time.Duration) error {
	for _, c := range f.all {
		if s := c.Snapshot(); s.Deadlines.End-s.TTL <= t {
			return errors.New("a candidate has not renewed its lease")
		}
	}
	return nil
}

// warningCounter is a log handler that counts warnings by message.
type warningCounter struct{ *fleet }

// Enabled implements slog.Handler, at the daemon's own default level.
func (warningCounter) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

// Handle implements slog.Handler.
func (w warningCounter) Handle(_ context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		w.mu.Lock()
		w.warnings[r.Message]++
		w.mu.Unlock()
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (w warningCounter) WithAttrs([]slog.Attr) slog.Handler { return w }

// WithGroup implements slog.Handler.
func (w warningCounter) WithGroup(string) slog.Handler { return w }
