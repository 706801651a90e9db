package election

import (
	"context"
	"errors"
	"time"
)

// first asks the current member, and when it has not answered after hedgeDelay the next one as well, and so on; a failure brings
// the next at once. The delay is shorter where ctx would end before all have been asked, with as much time left for the last one.
// The first good answer counts, and whoever gave it is current from then on. The other requests are cancelled and not waited for.
// When none has come in time the next member is current, so that the same one is not asked first again. What is asked must be
// harmless when done twice.
func hedge[T any](ctx context.Context, ms *members, hedgeDelay time.Duration, ask func(context.Context, *member) (T, error)) (T, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		from int
		got  T
		err  error
	}
	answers := make(chan answer)
	start, asked, answered := int(ms.current.Load()), map[int]bool{}, map[int]bool{}
	next := func() {
		all := ms.all() // more may have been added meanwhile
		for i := range all {
			i = (start + i) % len(all)
			if asked[i] {
				continue
			}
			asked[i] = true
			go func() {
				got, err := ask(ctx, all[i])
				select {
				case answers <- answer{i, got, err}:
				case <-ctx.Done():
				}
			}()
			return
		}
	}
	delay := func() time.Duration {
		if end, ok := ctx.Deadline(); ok {
			return min(hedgeDelay, time.Until(end)/time.Duration(1+len(ms.all())-len(asked)))
		}
		return hedgeDelay
	}
	var errs []error
	next()
	hedge := time.NewTimer(delay())
	defer hedge.Stop()
	for {
		select {
		case a := <-answers:
			if a.err == nil {
				ms.current.Store(int32(a.from))
				return a.got, nil
			}
			answered[a.from] = true
			errs = append(errs, &memberError{ms.all()[a.from].name(), a.err})
			if len(errs) == len(ms.all()) {
				ms.lookAgain()
				return a.got, errors.Join(errs...)
			}
			next()
			hedge.Reset(delay())
		case <-hedge.C:
			next()
			hedge.Reset(delay())
		case <-ctx.Done():
			all := ms.all()
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				ms.current.CompareAndSwap(int32(start), int32((start+1)%len(all)))
				ms.lookAgain()
			}
			for i, m := range all {
				if asked[i] && !answered[i] {
					errs = append(errs, &memberError{m.name(), ctx.Err()})
				}
			}
			var none T
			return none, errors.Join(errs...)
		}
	}
}
