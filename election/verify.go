package election

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// errOtherLease means that an etcd answers which does not have the lease, or not with that key.
var errOtherLease = errors.New("this etcd does not have the daemon's lease and key:" +
	" it is another cluster, or they were lost just now")

// Verify proves that the etcd of a configuration has the lease, and its key with that create
// revision. Every endpoint that answers must prove it, and at least one must answer: all of them
// must be members of the cluster that has granted the lease. The cluster's id would prove nothing,
// because clusters that are made alike have equal ones. Each member renews the lease once, which
// only lengthens it. Verify tries until ctx ends.
func Verify(ctx context.Context, cfg Config, leaseID, created int64) error {
	ms, timeout, err := queryMembers(cfg)
	if err != nil {
		return err
	}
	defer ms.close()
	key := cfg.keyOf(leaseID)
	var wait retry
	renewed := map[*member]*atomic.Bool{}
	for proven, asked := 0, 0; ; {
		all := ms.all() // more are known once a host name is resolved
		answers := make(chan error, len(all))
		for _, m := range all[asked:] {
			if renewed[m] == nil {
				renewed[m] = &atomic.Bool{}
			}
			was := renewed[m]
			go func() {
				ctx, cancel := context.WithTimeout(ctx, timeout)
				defer cancel()
				err := m.verify(ctx, was, leaseID, key, created)
				if err != nil {
					err = &memberError{m.name(), err}
				}
				answers <- err
			}()
		}
		var errs []error
		tryAgain := true
		for range all[asked:] {
			switch err := <-answers; {
			case err == nil:
				proven++
			case errors.Is(err, errOtherLease):
				return errors.New(oneLine(err))
			default:
				errs = append(errs, err)
				tryAgain = tryAgain &&
					(unavailable(err) || errors.Is(err, context.DeadlineExceeded))
			}
		}
		switch asked = len(all); {
		case asked < len(ms.all()):
			continue
		case proven > 0:
			return nil
		case !tryAgain || ctx.Err() != nil:
			return fmt.Errorf("verify the lease: %s", cfg.explain(errors.Join(errs...)))
		}
		asked = 0
		wait.sleep(ctx)
	}
}

// verify proves that the member's etcd has the lease and the key.
func (m *member) verify(
	ctx context.Context, renewed *atomic.Bool, leaseID int64, key string, created int64,
) error {
	if !renewed.Load() {
		_, err := m.renew(ctx, leaseID)
		switch {
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			return errOtherLease
		case err != nil:
			return err
		}
		renewed.Store(true)
	}
	switch read, err := m.read(ctx, key); {
	case err != nil:
		return err
	case read.created != created || read.lease != leaseID:
		return errOtherLease
	}
	return nil
}
