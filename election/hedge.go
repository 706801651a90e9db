package election

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"
	"time"
)

// hedge asks the current member. If that has not answered after hedgeDelay, hedge asks the next one
// as well, and so on. After a failure it asks the next one at once. The delay is shorter if ctx
// would otherwise end before all members have been asked, and leaves the last one as much time.
//
// The first good answer counts, and its member is the current one from then on. hedge cancels the
// other requests and does not wait for them. If no answer comes in time, the next member becomes
// the current one, so that the same member is not asked first again. Because several members may
// carry out the request, it must be harmless if it is done twice.
func hedge[T any](
	ctx context.Context, ms *members, hedgeDelay time.Duration,
	ask func(context.Context, *member) (T, error),
) (T, error) {
	return hedgeFrom(ctx, ms, &ms.current, hedgeDelay, ask)
}

// hedgeFrom does the same with a current member of its own.
func hedgeFrom[T any](
	ctx context.Context, ms *members, current *atomic.Int32, hedgeDelay time.Duration,
	ask func(context.Context, *member) (T, error),
) (T, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h := hedged[T]{
		members: ms, current: current, ask: ask, start: int(current.Load()),
		asked: map[int]bool{}, answered: map[int]bool{}, answers: make(chan hedgeAnswer[T]),
	}
	delay := func() time.Duration {
		left := time.Duration(len(ms.all()) - len(h.asked))
		if end, ok := ctx.Deadline(); ok && left > 0 {
			return min(hedgeDelay, time.Until(end)/(1+left))
		}
		return hedgeDelay
	}
	h.next(ctx)
	timer := time.NewTimer(delay())
	defer timer.Stop()
	for {
		select {
		case a := <-h.answers:
			if a.err == nil {
				current.Store(int32(a.from))
				return a.got, nil
			}
			h.answered[a.from] = true
			h.errs = append(h.errs, &memberError{ms.all()[a.from].name(), a.err})
			if len(h.errs) == len(ms.all()) {
				ms.lookAgain()
				return a.got, errors.Join(h.errs...)
			}
		case <-timer.C:
		case <-ctx.Done():
			var none T
			return none, h.unanswered(ctx)
		}
		h.next(ctx)
		timer.Reset(delay())
	}
}

// hedged is one request that is made over all members.
type hedged[T any] struct {
	members         *members
	current         *atomic.Int32
	ask             func(context.Context, *member) (T, error)
	start           int // the member that was asked first
	asked, answered map[int]bool
	answers         chan hedgeAnswer[T]
	errs            []error
}

type hedgeAnswer[T any] struct {
	from int
	got  T
	err  error
}

// next asks the next member, if there is one that was not asked.
func (h *hedged[T]) next(ctx context.Context) {
	all := h.members.all() // more may have been added meanwhile
	for i := range all {
		i = (h.start + i) % len(all)
		if h.asked[i] {
			continue
		}
		h.asked[i] = true
		go func() {
			growStack()
			got, err := h.ask(ctx, all[i])
			select {
			case h.answers <- hedgeAnswer[T]{i, got, err}:
			case <-ctx.Done():
			}
		}()
		return
	}
}

// unanswered returns why the request has no good answer when ctx has ended.
func (h *hedged[T]) unanswered(ctx context.Context) error {
	all := h.members.all()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		h.current.CompareAndSwap(int32(h.start), int32((h.start+1)%len(all)))
		h.members.lookAgain()
	}
	for i, m := range all {
		if h.asked[i] && !h.answered[i] {
			h.errs = append(h.errs, &memberError{m.name(), ctx.Err()})
		}
	}
	return errors.Join(h.errs...)
}

// growStack gives a new goroutine the stack that a request or a start needs, at once. Otherwise it
// grows in four steps on the way, each with a copy.
//
//go:noinline
func growStack() {
	var frame [8 << 10]byte
	runtime.KeepAlive(&frame)
}
