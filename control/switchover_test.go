package control_test

import (
	"testing"

	"leasehold/control"
)

// TestAskSwitchover_Late: a request that etcd gets when the leader has gone is not there. Who leads
// then was not asked, and would be taken for what came of it.
func TestAskSwitchover_Late(t *testing.T) {
	etcd, theirs := newTestEtcd(t)
	ctx := t.Context()
	const election, first, second = "jobs/asked", "jobs/asked/a", "jobs/asked/b"
	for _, key := range []string{first, second} {
		if _, err := theirs.Put(ctx, key, key); err != nil {
			t.Fatal(err)
		}
	}
	for _, gone := range []bool{true, false} {
		p, err := control.ReadProgress(ctx, etcd, election)
		if err == nil && gone {
			_, err = theirs.Delete(ctx, first)
		}
		if err == nil {
			err = control.AskSwitchover(ctx, etcd, election, control.Switchover{ID: "1"}, 0, p)
		}
		if err == nil {
			p, err = control.ReadProgress(ctx, etcd, election)
		}
		if err != nil {
			t.Fatal(err)
		}
		if p.Leader != second || (p.Asked == nil) != gone {
			t.Errorf("the leader has gone: %v; it is %s now, asked %+v", gone, p.Leader, p.Asked)
		}
	}
}
