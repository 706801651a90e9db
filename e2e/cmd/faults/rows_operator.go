//go:build linux

package main

import (
	"context"
	"fmt"
)

// operatorRows are what somebody does to the election by hand. Etcd hands the
// leadership on at once, and the old leader learns of it at the same moment as
// the next one: nobody can promise more than that it is quick.
var operatorRows = []Row{
	{Name: "lease-revoked", Group: "operator", About: "the leader's lease is revoked (etcdctl lease revoke)",
		Promise: Operator, Alone: OursAlone, CI: true, User: true, Strike: revokeLease},
	{Name: "key-deleted", Group: "operator", About: "the leader's key is deleted (etcdctl del)",
		Promise: Operator, Alone: OursAlone, CI: true, User: true, Strike: deleteKey},
}

func revokeLease(ctx context.Context, t *Trial) error {
	_, err := t.Client.Revoke(ctx, t.Lease)
	return err
}

func deleteKey(ctx context.Context, t *Trial) error {
	deleted, err := t.Client.Delete(ctx, t.Key)
	if err == nil && deleted.Deleted != 1 {
		err = fmt.Errorf("there was no key %s to be deleted", t.Key)
	}
	return err
}
