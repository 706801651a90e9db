//go:build linux

package fault

import (
	"context"
	"fmt"
)

// LeaseRevoked revokes the leader's lease, as `etcdctl lease revoke` does.
func LeaseRevoked() Fault {
	return Fault{Name: "lease-revoked", Inject: func(ctx context.Context, on *Target) error {
		_, err := on.Client.Revoke(ctx, on.Leading.Lease)
		return err
	}}
}

// KeyDeleted deletes the leader's key, as `etcdctl del` does.
func KeyDeleted() Fault {
	return Fault{Name: "key-deleted", Inject: func(ctx context.Context, on *Target) error {
		deleted, err := on.Client.Delete(ctx, on.Leading.Key)
		if err == nil && deleted.Deleted != 1 {
			err = fmt.Errorf("there was no key %s to be deleted", on.Leading.Key)
		}
		return err
	}}
}
