package election

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestHedge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const hedgeDelay = 100 * time.Millisecond
		refused := errors.New("refused")
		type answers []func(context.Context) error
		for _, test := range []struct {
			name    string
			answers answers
			took    time.Duration
			from    int32
			err     error
		}{
			{"at once", answers{answerIn(10, nil), answerIn(0, nil)}, 10 * ms, 0, nil},
			{"unanswered", answers{answerIn(1e6, nil), answerIn(10, nil)}, 110 * ms, 1, nil},
			{"failed", answers{answerIn(10, refused), answerIn(10, nil)}, 20 * ms, 1, nil},
			{"two unanswered", answers{
				answerIn(1e6, nil), answerIn(1e6, nil), answerIn(5, nil),
			}, 205 * ms, 2, nil},
			{
				"all failed",
				answers{answerIn(10, refused), answerIn(10, refused)},
				20 * ms, 0, refused,
			},
			{"none", answers{
				answerIn(1e6, nil), answerIn(1e6, nil),
			}, time.Second, 1, context.DeadlineExceeded},
		} {
			members := &members{}
			for i := range test.answers {
				members.known = append(members.known, &member{endpoint: string(rune('a' + i))})
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			began := time.Now()
			_, err := hedge(
				ctx,
				members,
				hedgeDelay,
				func(ctx context.Context, m *member) (int, error) {
					return 0, test.answers[m.endpoint[0]-'a'](ctx)
				},
			)
			if took := time.Since(
				began,
			); took != test.took || !errors.Is(err, test.err) ||
				members.current.Load() != test.from {
				t.Errorf("%s: %v after %v from %d", test.name, err, took, members.current.Load())
			}
			cancel()
			synctest.Wait()
		}
	})
}

// However long the delay, all members are asked in time.
func TestHedge_AsksAllInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 2500 * ms
		for _, test := range []struct {
			members, hung int
			took          time.Duration
		}{{3, 1, 833333333}, {5, 2, 1000 * ms}, {5, 4, 2000 * ms}} {
			members := &members{}
			for range test.members {
				members.known = append(members.known, &member{})
			}
			ctx, cancel := context.WithTimeout(t.Context(), bound)
			began := time.Now()
			_, err := hedge(
				ctx,
				members,
				15*time.Second,
				func(ctx context.Context, m *member) (int, error) {
					if slices.Index(members.known, m) < test.hung {
						return 0, answerIn(1e6, nil)(ctx)
					}
					return 0, nil
				},
			)
			if took := time.Since(began); err != nil || took != test.took {
				t.Errorf(
					"%d of %d members hung: %v after %v, want an answer after %v", test.hung,
					test.members, err, took, test.took,
				)
			}
			cancel()
			synctest.Wait()
		}
	})
}

func answerIn(millis int, err error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-time.After(time.Duration(millis) * ms):
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// In a bubble the time stands still until all wait. So a wait that is ever shorter, and at last 0,
// would never let the deadline come.
func TestHedge_DeadlineInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 100 {
			members := &members{known: []*member{{endpoint: "a"}, {endpoint: "b"}}}
			ctx, cancel := context.WithTimeout(t.Context(), 250*ms)
			_, err := hedge(ctx, members, 100*ms,
				func(ctx context.Context, _ *member) (int, error) {
					return 0, answerIn(1e6, nil)(ctx)
				})
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		}
	})
}
