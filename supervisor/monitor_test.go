//go:build linux

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"leasehold/supervisor/check"
	"leasehold/supervisor/ipc"
)

// monitored is a Supervisor whose job runs, with a monitor, and no guard.
func monitored(t *testing.T, cfg HealthConfig) (*Supervisor, <-chan *UnhealthyError) {
	t.Helper()
	s := &Supervisor{
		cfg: Config{
			Health: cfg, Changed: func() {}, Freeze: true,
			Logger: slog.New(slog.DiscardHandler),
		},
		outbox: ipc.Outbox{FD: -1}, job: job{pidfd: -1},
		metrics: newMetrics(prometheus.NewRegistry()),
	}
	s.log = s.cfg.Logger
	s.mu.Lock()
	s.job.term.StopAt = forever
	s.job.shown.StartedAt = time.Now()
	s.healthBegins(ipc.JobReady{})
	s.transition(JobRunning, "test")
	s.mu.Unlock()
	unhealthy, stop := s.startMonitor()
	t.Cleanup(func() {
		stop()
		s.monitors.Wait()
	})
	return s, unhealthy
}

func (s *Supervisor) setState(to JobState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if to == JobFrozen {
		s.job.health.freezes++
	}
	s.transition(to, "test")
}

// A check that passes only after its interval, and one that can't be made, do the job no harm.
func TestMonitor_OwnTroubles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var results atomic.Int64
		s, unhealthy := monitored(t, HealthConfig{
			Interval: time.Second, Retries: 1,
			Check: func(context.Context) error {
				switch n := results.Add(1); {
				case n == 1:
					time.Sleep(1500 * time.Millisecond)
				case n > 2:
					return fmt.Errorf("%w: no memory", check.ErrNoResult)
				}
				return nil
			},
		})
		time.Sleep(time.Minute)
		if s.health() != HealthGood || len(unhealthy) != 0 {
			t.Errorf("%s after %d checks", s.health(), results.Load())
		}
	})
}

// A job that is thawed is not judged by a check that has waited for it while it was frozen.
func TestMonitor_Freeze(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		frozen := make(chan struct{})
		var first atomic.Bool
		s, unhealthy := monitored(t, HealthConfig{
			Interval: time.Second, Retries: 1, Watchdog: 10 * time.Second,
			Check: func(ctx context.Context) error {
				if first.CompareAndSwap(false, true) {
					return nil
				}
				select {
				case <-frozen:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(3 * time.Second):
					return errors.New("no answer")
				}
			},
		})
		time.Sleep(1500 * time.Millisecond) // the second check is under way
		s.setState(JobFrozen)
		time.Sleep(time.Minute)
		close(frozen)
		s.setState(JobRunning)
		time.Sleep(8 * time.Second)
		if s.health() != HealthGood || len(unhealthy) != 0 {
			t.Errorf("it is %s after a freeze", s.health())
		}
		time.Sleep(3 * time.Second)
		if len(unhealthy) != 1 {
			t.Error("it has missed the watchdog since, and nobody has noticed")
		}
	})
}

// A job that is not ready in time is unhealthy, also if it sends WATCHDOG=1.
func TestMonitor_NeverReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, unhealthy := monitored(t, HealthConfig{
			Interval: time.Second, Retries: 3, StartPeriod: 10 * time.Second, Notify: true,
			Check: func(context.Context) error { return nil },
		})
		time.Sleep(12900 * time.Millisecond)
		if len(unhealthy) != 0 {
			t.Error("too early")
		}
		time.Sleep(200 * time.Millisecond)
		if len(unhealthy) != 1 {
			t.Fatal("not found")
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.job.health.wellAt != 0 {
			t.Error("it counts as well, and was never ready")
		}
	})
}

// Checks that fail while the job starts do not count, however many there are. Once one has passed,
// the start period is over, and they do. If none passes, the job is unhealthy after that period.
func TestMonitor_StartPeriod(t *testing.T) {
	for name, row := range map[string]struct {
		passes int64 // which check passes; all others fail, one a second
		after  time.Duration
	}{
		"late":  {20, 22 * time.Second}, // 19 have failed, and then three
		"early": {2, 4 * time.Second},
		"never": {-1, 33 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var n atomic.Int64
				_, unhealthy := monitored(t, HealthConfig{
					Interval: time.Second, Retries: 3, StartPeriod: 30 * time.Second,
					Check: func(context.Context) error {
						if n.Add(1) == row.passes {
							return nil
						}
						return errors.New("no answer")
					},
				})
				time.Sleep(row.after - 100*time.Millisecond)
				if len(unhealthy) != 0 {
					t.Fatalf("too early: %v", <-unhealthy)
				}
				time.Sleep(200 * time.Millisecond)
				if len(unhealthy) != 1 {
					t.Errorf("not found after %d checks", n.Load())
				}
			})
		})
	}
}

// Checks leave nothing in memory.
func TestMonitor_Memory(t *testing.T) {
	size := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	var n atomic.Int64
	done := make(chan struct{})
	var before, after uint64 // measured within a check, while no other one is under way
	_, _ = monitored(t, HealthConfig{
		Interval: time.Nanosecond, Retries: 1, StartPeriod: time.Hour,
		Check: func(context.Context) error {
			switch n.Add(1) {
			case 1000:
				before = size()
			case 21000:
				after = size()
				close(done)
			}
			return nil
		},
	})
	<-done
	if grown := int64(after) - int64(before); grown > 1<<20 {
		t.Errorf("20,000 checks have left %d bytes", grown)
	}
}
