//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
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
var errPlannedStop = errors.New("told to stop")

// crowd is all candidates of a trial: elections with the same number of seats
// each. Whoever leaves a seat can be followed by a new candidate there.
type crowd struct {
	endpoints []string
	ttl       time.Duration
	seats     [][]*seat // by election
	beats     atomic.Pointer[beats]

	mu       sync.Mutex
	leaders  []leader // by election
	terms    int      // begun
	lost     map[string]int
	warnings map[string]int
}

// leader is who was told last to lead an election, and when.
type leader struct {
	seat *seat
	at   time.Duration
}

// seat is a candidate's place in the crowd.
type seat struct {
	crowd     *crowd
	election  int
	number    int
	candidate *election.Candidate
	stop      context.CancelCauseFunc
	ended     chan error // what Run returned
}

func newCrowd(endpoints []string, s shape, ttl time.Duration) *crowd {
	c := &crowd{endpoints: endpoints, ttl: ttl, leaders: make([]leader, s.Elections), lost: map[string]int{}, warnings: map[string]int{}}
	for e := range s.Elections {
		seats := make([]*seat, s.Size)
		for i := range seats {
			seats[i] = &seat{crowd: c, election: e, number: i}
		}
		c.seats = append(c.seats, seats)
	}
	return c
}

// all calls f for each seat.
func (c *crowd) all(f func(*seat) error) error {
	for _, seats := range c.seats {
		for _, s := range seats {
			if err := f(s); err != nil {
				return err
			}
		}
	}
	return nil
}

// sit starts a candidate as the daemon does by default.
func (s *seat) sit() error {
	candidate, err := election.New(election.Config{
		Endpoints: s.crowd.endpoints,
		Election:  fmt.Sprintf("scale/%04d", s.election),
		Identity:  fmt.Sprintf("machine-%04d.example.com", s.number),
		TTL:       s.crowd.ttl, LossGrace: -1, Margin: -1, Wait: -1,
		DialTimeout: time.Second,
		Now:         harness.Now,
		Logger:      slog.New(warned{s.crowd}),
		Registerer:  prometheus.NewRegistry(),
		Callbacks:   s,
		Changed:     s.changed,
	})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(context.Background())
	ended := make(chan error, 1)
	s.candidate, s.stop, s.ended = candidate, stop, ended
	go func() { ended <- candidate.Run(ctx) }()
	return nil
}

// leave tells the candidate to stop. left waits until it has.
func (s *seat) leave() { s.stop(errPlannedStop) }

func (s *seat) left(ctx context.Context) error {
	select {
	case err := <-s.ended:
		s.stop = nil
		return err
	case <-ctx.Done():
		return fmt.Errorf("wait for a candidate to stop: %w", context.Cause(ctx))
	}
}

// close stops every candidate that runs and waits for it.
func (c *crowd) close() {
	running := func(f func(*seat)) {
		_ = c.all(func(s *seat) error {
			if s.stop != nil {
				f(s)
			}
			return nil
		})
	}
	running((*seat).leave)
	running(func(s *seat) { _ = s.left(context.Background()) }) // Run returns in bounded time, whatever etcd does
}

// Leased implements election.Callbacks.
func (s *seat) Leased(int64, time.Duration) {}

// Extended implements election.Callbacks.
func (s *seat) Extended(election.Deadlines) {}

// Lead implements election.Callbacks: it leads without a job.
func (s *seat) Lead(ctx context.Context, _ election.Term) error {
	now := harness.Now()
	s.crowd.mu.Lock()
	s.crowd.leaders[s.election] = leader{s, now}
	s.crowd.terms++
	s.crowd.mu.Unlock()
	<-ctx.Done()
	if cause := context.Cause(ctx); !errors.Is(cause, errPlannedStop) {
		s.crowd.mu.Lock()
		s.crowd.lost[cause.Error()]++
		s.crowd.mu.Unlock()
	}
	return nil
}

// changed is called at each renewal, and at little else while nobody comes or
// goes.
func (s *seat) changed() {
	if b := s.crowd.beats.Load(); b != nil {
		b.beat(harness.Now())
	}
}

func (c *crowd) leader(election int) leader {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leaders[election]
}

// counts returns how many terms were begun, how many lost, by cause, and what
// was warned of.
func (c *crowd) counts() (terms int, lost, warnings map[string]int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.terms, maps.Clone(c.lost), maps.Clone(c.warnings)
}

// inPlace says whether each candidate stands by or leads, and each election has
// one leader.
func (c *crowd) inPlace() error {
	leading, others := 0, 0
	_ = c.all(func(s *seat) error {
		switch s.candidate.Snapshot().State {
		case election.Leading:
			leading++
		case election.Standby:
		default:
			others++
		}
		return nil
	})
	if leading != len(c.seats) || others > 0 {
		return fmt.Errorf("%d leaders in %d elections, %d candidates not in the queue", leading, len(c.seats), others)
	}
	return nil
}

// renewedSince says whether each candidate's lease was renewed by a request
// sent after that moment.
func (c *crowd) renewedSince(t time.Duration) error {
	return c.all(func(s *seat) error {
		if snap := s.candidate.Snapshot(); snap.Deadlines.End-snap.TTL <= t {
			return errors.New("a candidate has not renewed its lease")
		}
		return nil
	})
}

// beats counts what happens in each tenth of a second.
type beats struct {
	start time.Duration
	count []atomic.Int64
}

const beatTime = 100 * time.Millisecond

func newBeats(during time.Duration) *beats {
	return &beats{start: harness.Now(), count: make([]atomic.Int64, during/beatTime)}
}

func (b *beats) beat(now time.Duration) {
	if i := int((now - b.start) / beatTime); i < len(b.count) {
		b.count[i].Add(1)
	}
}

// peak is the largest count.
func (b *beats) peak() int64 {
	most := int64(0)
	for i := range b.count {
		most = max(most, b.count[i].Load())
	}
	return most
}

// warned is a log handler that counts warnings by message.
type warned struct{ crowd *crowd }

// Enabled implements slog.Handler, at the daemon's own default level.
func (warned) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }

// Handle implements slog.Handler.
func (w warned) Handle(_ context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		w.crowd.mu.Lock()
		w.crowd.warnings[r.Message]++
		w.crowd.mu.Unlock()
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (w warned) WithAttrs([]slog.Attr) slog.Handler { return w }

// WithGroup implements slog.Handler.
func (w warned) WithGroup(string) slog.Handler { return w }
