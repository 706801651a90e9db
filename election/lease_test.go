package election

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// fakeEndpoint answers as a test has it. It records when it was asked, and that it is never asked
// twice at a time.
type fakeEndpoint struct {
	answer func(ctx context.Context) (renewal, error)
	show   func(ctx context.Context) (reading, error)

	now         func() time.Duration
	mu          sync.Mutex
	asked       []time.Duration
	reads       int
	outstanding context.Context // of the last renewal, while it has not been answered
	overlap     bool
}

func (e *fakeEndpoint) renew(ctx context.Context, _ int64) (renewal, error) {
	e.mu.Lock()
	e.asked = append(e.asked, e.now())
	e.overlap = e.overlap || e.outstanding != nil && e.outstanding.Err() == nil
	e.outstanding = ctx
	answer := e.answer
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		if e.outstanding == ctx {
			e.outstanding = nil
		}
		e.mu.Unlock()
	}()
	return answer(ctx)
}

func (e *fakeEndpoint) read(ctx context.Context, _ string) (reading, error) {
	e.mu.Lock()
	e.reads++
	show := e.show
	e.mu.Unlock()
	return show(ctx)
}

func (e *fakeEndpoint) set(answer func(context.Context) (renewal, error)) {
	e.mu.Lock()
	e.answer = answer
	e.mu.Unlock()
}

func good(term uint64) func(context.Context) (renewal, error) {
	return func(context.Context) (renewal, error) { return renewal{10 * time.Second, term}, nil }
}

func after(
	d time.Duration, answer func(context.Context) (renewal, error),
) func(context.Context) (renewal, error) {
	return func(ctx context.Context) (renewal, error) {
		select {
		case <-time.After(d):
			return answer(ctx)
		case <-ctx.Done():
			return renewal{}, ctx.Err()
		}
	}
}

func hang(ctx context.Context) (renewal, error) {
	<-ctx.Done()
	return renewal{}, ctx.Err()
}

func refuse(context.Context) (renewal, error) { return renewal{}, errors.New("refused") }

const testLeaseID = 1

func shows(created int64, raftTerm uint64) func(context.Context) (reading, error) {
	return func(context.Context) (reading, error) {
		return reading{created: created, lease: testLeaseID, raftTerm: raftTerm}, nil
	}
}

// testLease keeps a lease of 10 s (so: renewals every 2 s, the next endpoint after 500 ms, stop-at
// 7 s after sending) that was granted at time 0. It records what comes of it.
type testLease struct {
	*lease
	endpoints []*fakeEndpoint
	now       func() time.Duration
	stop      context.CancelFunc

	mu      sync.Mutex
	events  []string
	held    Deadlines
	suspect []string
}

func (l *testLease) record(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, fmt.Sprintf("%v ", l.now())+fmt.Sprintf(format, args...))
}

func (l *testLease) suspects() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.suspect)
}

type testEvents struct{ *testLease }

func (e testEvents) renewed(d Deadlines) {
	e.record("renewed until %v", d.End)
	e.mu.Lock()
	e.held = d
	e.mu.Unlock()
}
func (e testEvents) contactLost()     { e.record("contact lost") }
func (e testEvents) lost(cause error) { e.record("%v", cause) }
func (e testEvents) suspect(endpoint int, dead, late bool, _ error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.testLease.suspect = append(
		e.testLease.suspect,
		fmt.Sprintf("%v endpoint %d dead %v late %v", e.now(), endpoint, dead, late),
	)
}

func newTestLease(
	t *testing.T, created int64, answers ...func(context.Context) (renewal, error),
) *testLease {
	t.Helper()
	return newTestLeaseOf(t, 10*time.Second, created, answers...)
}

func newTestLeaseOf(
	t *testing.T, ttl time.Duration, created int64,
	answers ...func(context.Context) (renewal, error),
) *testLease {
	t.Helper()
	start := time.Now()
	l := &testLease{now: func() time.Duration { return time.Since(start) }}
	var endpoints []endpoint
	for _, answer := range answers {
		e := &fakeEndpoint{answer: answer, show: shows(created, 1), now: l.now}
		l.endpoints = append(l.endpoints, e)
		endpoints = append(endpoints, e)
	}
	m, err := newMetrics(nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	timing := NewTiming(ttl, -1, -1, 0)
	l.lease = newLease(leaseConfig{
		id: testLeaseID, key: "key", timing: timing,
		deadlines: timing.From(0), next: timing.RenewInterval(),
		endpoints: func() []endpoint { return endpoints }, current: new(atomic.Int32),
		now: l.now, early: func() time.Duration { return 0 },
		events: testEvents{l}, metrics: m, heartbeat: new(heartbeat),
	})
	l.confirmFrom(created)
	ctx, stop := context.WithCancel(t.Context())
	l.stop = stop
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		<-done
		for i, e := range l.endpoints {
			if e.overlap {
				t.Errorf("endpoint %d had two renewals at a time", i)
			}
		}
	})
	return l
}

// pass lets time go by until that moment.
func (l *testLease) pass(until time.Duration) {
	time.Sleep(until - l.now())
	synctest.Wait()
}

func (l *testLease) expect(t *testing.T, events ...string) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Equal(l.events, events) {
		t.Errorf("events:\n%q\nwant:\n%q", l.events, events)
	}
}

func expectAsked(t *testing.T, e *fakeEndpoint, at ...time.Duration) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if !slices.Equal(e.asked, at) {
		t.Errorf("asked at %v, want %v", e.asked, at)
	}
}

const ms = time.Millisecond

func TestLease_RenewsEveryInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, good(1), good(1))
		l.pass(6500 * ms)
		l.expect(t, "2s renewed until 12s", "4s renewed until 14s", "6s renewed until 16s")
		expectAsked(t, l.endpoints[0], 2*time.Second, 4*time.Second, 6*time.Second)
		expectAsked(t, l.endpoints[1])
		if l.endpoints[0].reads != 3 {
			t.Errorf("%d confirming reads of 3 renewals", l.endpoints[0].reads)
		}
		if !l.isConfirmed() {
			t.Error("the last renewal is not confirmed")
		}
	})
}

// Most standbys have nothing to lose: what they know is confirmed by the read that tells them to
// lead.
func TestLease_OfAStandbyIsNotConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 0, refuse, good(3))
		l.pass(5 * time.Second)
		l.expect(t, "2.5s renewed until 12.5s", "4.5s renewed until 14.5s")
		if n := l.endpoints[1].reads; n != 0 {
			t.Errorf("%d confirming reads", n)
		}
		if term := l.raftTerm.Load(); term != 3 {
			t.Errorf("raft term %d, want that of the last renewal", term)
		}
		l.endpoints[1].show = shows(7, 3)
		l.confirmFrom(7) // the next in line
		if l.isConfirmed() {
			t.Error("the last renewal is confirmed by none")
		}
		l.pass(7 * time.Second)
		if !l.isConfirmed() {
			t.Error("the next renewal is not confirmed")
		}
	})
}

func TestLease_CountsFromSending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, after(400*ms, good(1)))
		l.pass(5 * time.Second)
		l.expect(t, "2.4s renewed until 12s", "4.4s renewed until 14s")
	})
}

func TestLease_NextEndpointJoinsTheUnansweredOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, hang, good(1), good(1))
		l.pass(5 * time.Second)
		// The good reply counts with its own send time. From then on that endpoint is asked first.
		l.expect(t, "2.5s renewed until 12.5s", "4.5s renewed until 14.5s")
		expectAsked(t, l.endpoints[0], 2*time.Second)
		expectAsked(t, l.endpoints[1], 2500*ms, 4500*ms)
		expectAsked(t, l.endpoints[2])
		want := []string{"4s endpoint 0 dead true late true"}
		if !slices.Equal(l.suspects(), want) {
			t.Errorf("suspects: %q, want %q", l.suspects(), want)
		}
	})
}

func TestLease_SlowReplyStillCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// The first is answered late, but before the one that joined it.
		l := newTestLease(t, 7, after(800*ms, good(1)), after(1500*ms, good(1)))
		l.pass(3900 * ms)
		l.expect(t, "2.8s renewed until 12s")
		l.pass(4 * time.Second)
		// That one was sent later, so its good reply moves the deadline as well.
		l.expect(t, "2.8s renewed until 12s", "4s renewed until 12.5s")
	})
}

func TestLease_LateReplyToAnEarlyAttemptChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, after(1500*ms, good(1)), good(1))
		l.pass(4 * time.Second)
		l.expect(t, "2.5s renewed until 12.5s")
	})
}

func TestLease_FailureIsRepeatedElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, refuse, good(1), good(1))
		l.pass(3 * time.Second)
		l.expect(t, "2.5s renewed until 12.5s")
		expectAsked(t, l.endpoints[0], 2*time.Second)
		expectAsked(t, l.endpoints[1], 2500*ms)
	})
}

func TestLease_OneEndpointIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, hang)
		l.pass(4500 * ms)
		expectAsked(t, l.endpoints[0], 2*time.Second, 4*time.Second) // abandoned after an interval
		want := []string{"4s endpoint 0 dead true late false"}
		if !slices.Equal(l.suspects(), want) {
			t.Errorf("suspects: %q, want %q", l.suspects(), want)
		}
		l.endpoints[0].set(refuse)
		l.pass(7600 * ms)
		expectAsked(
			t, l.endpoints[0], 2*time.Second, 4*time.Second, 6*time.Second, 6500*ms, 7*time.Second,
			7500*ms,
		)
	})
}

func TestLease_ContactLostAtStopAt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, refuse, hang, refuse)
		l.pass(6999 * ms)
		l.expect(t)
		l.pass(7 * time.Second)
		l.expect(t, "7s contact lost")
		l.pass(30 * time.Second)
		l.expect(t, "7s contact lost")
	})
}

// A reply that arrives at the same moment as stop-at must not be taken first.
func TestLease_StopAtComesBeforeTheReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, refuse)
		// Attempts go out every 500 ms: the one of 6.5 s is answered at 7 s.
		l.pass(6400 * ms)
		l.endpoints[0].set(after(500*ms, good(1)))
		l.pass(7 * time.Second)
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(l.events) == 0 || l.events[0] != "7s contact lost" {
			t.Errorf("events: %q", l.events)
		}
	})
}

func TestLease_DeposedLeaderIsNotBelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, good(1))
		l.pass(3 * time.Second)
		// A leader of the past acknowledges at once, though all went well before. Its read is
		// answered by the new one.
		l.endpoints[0].mu.Lock()
		l.endpoints[0].show = shows(7, 2)
		l.endpoints[0].mu.Unlock()
		stale := 0
		l.endpoints[0].set(func(context.Context) (renewal, error) {
			if stale++; stale <= 2 {
				return renewal{10 * time.Second, 1}, nil
			}
			return renewal{10 * time.Second, 2}, nil
		})
		l.pass(5 * time.Second)
		l.expect(t, "2s renewed until 12s", "4s renewed until 14s")
		if stale != 3 || l.endpoints[0].reads != 1+3 {
			t.Errorf(
				"%d renewals and %d reads, want 3 of both, and one read before", stale,
				l.endpoints[0].reads,
			)
		}
	})
}

// Answers without a raft term confirm nothing. They are not asked for again without a pause.
func TestLease_NoRaftTerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, good(unconfirmed))
		l.endpoints[0].mu.Lock()
		l.endpoints[0].show = shows(7, 0)
		l.endpoints[0].mu.Unlock()
		l.pass(4*time.Second - time.Millisecond)
		l.expect(t)
		expectAsked(t, l.endpoints[0], 2*time.Second, 2500*time.Millisecond, 3*time.Second,
			3500*time.Millisecond)
	})
}

func TestLease_HungConfirmationIsAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, good(1), good(1))
		l.endpoints[0].show = func(ctx context.Context) (reading, error) {
			<-ctx.Done()
			return reading{}, ctx.Err()
		}
		l.endpoints[0].set(after(1100*ms, good(1)))
		l.endpoints[1].set(refuse)
		l.pass(3400 * ms)
		l.endpoints[1].set(good(1))
		l.pass(6 * time.Second)
		// The first was answered at 3.1 s, and never confirmed. The other endpoint went on.
		l.expect(t, "3.5s renewed until 13.5s", "5.5s renewed until 15.5s")
		if l.endpoints[0].reads != 1 {
			t.Errorf("%d confirming reads, want 1", l.endpoints[0].reads)
		}
	})
}

func TestLease_ConfirmationShowsAnotherKey(t *testing.T) {
	for _, created := range []int64{0, 8} {
		synctest.Test(t, func(t *testing.T) {
			l := newTestLease(t, 7, refuse)
			l.endpoints[0].show = shows(created, 1)
			l.pass(2100 * ms)
			l.endpoints[0].set(good(1))
			l.pass(5 * time.Second)
			l.expect(t, "2.5s "+ErrKeyDeleted.Error())
		})
	}
}

// Whoever writes to a key takes its lease from it.
func TestLease_ConfirmationShowsAnotherLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, refuse)
		l.endpoints[0].show = func(context.Context) (reading, error) {
			return reading{created: 7, raftTerm: 1}, nil
		}
		l.pass(2100 * ms)
		l.endpoints[0].set(good(1))
		l.pass(5 * time.Second)
		l.expect(t, "2.5s "+ErrKeyOverwritten.Error())
	})
}

func TestLease_Lost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(
			t, 7, hang,
			func(context.Context) (renewal, error) { return renewal{}, rpctypes.ErrLeaseNotFound },
		)
		l.pass(20 * time.Second)
		l.expect(t, "2.5s "+ErrLeaseLost.Error())
		expectAsked(t, l.endpoints[1], 2500*ms)
	})
}

func TestLease_RenewNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, after(300*ms, good(1)))
		l.pass(2100 * ms)
		// The one under way was sent before the demand, so it does not satisfy it.
		done := l.renewNow(t.Context())
		l.pass(2300 * ms)
		select {
		case <-done:
			t.Error("satisfied by a renewal that was sent before")
		default:
		}
		l.pass(2600 * ms)
		select {
		case <-done:
		default:
			t.Error("not renewed")
		}
		l.expect(t, "2.3s renewed until 12s", "2.6s renewed until 12.3s")
		l.pass(4500 * ms)
		expectAsked(t, l.endpoints[0], 2*time.Second, 2300*ms, 4300*ms)
	})
}

// While etcd does not answer, a candidate that has won demands a renewal again and again. Nobody
// waits for the old ones.
func TestLease_RenewNow_GivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, hang)
		for range 1000 {
			ctx, giveUp := context.WithTimeout(t.Context(), 2*time.Second)
			l.renewNow(ctx)
			l.pass(l.now() + 2500*ms)
			giveUp()
		}
		if n := len(l.demand); n > 1 {
			t.Errorf("%d demands are kept", n)
		}
	})
}

// Who has won waits for such a renewal, and gives up after 2.5 s: that must do also where two of
// five members hang.
func TestLease_RenewNow_LongTTL(t *testing.T) {
	for _, ttl := range []time.Duration{time.Minute, 5 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			l := newTestLeaseOf(t, ttl, 7, hang, hang, good(1), good(1), good(1))
			l.pass(5 * time.Second)
			done := l.renewNow(t.Context())
			l.pass(5*time.Second + HeartbeatInterval/2 - ms)
			select {
			case <-done:
			default:
				t.Errorf("TTL %v: not renewed", ttl)
			}
		})
	}
}

// After the end of a term renewals go on, so that a successor waits while something of the job is
// still alive.
func TestLease_RenewsAfterStopAt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, refuse)
		l.pass(7900 * ms)
		l.endpoints[0].set(good(1))
		l.pass(9 * time.Second)
		l.endpoints[0].set(refuse)
		l.pass(16 * time.Second)
		l.expect(t, "7s contact lost", "8s renewed until 18s", "15s contact lost")
	})
}
