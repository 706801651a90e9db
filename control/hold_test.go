package control_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"leasehold/control"
)

// lateEtcd keeps the transactions that change something, and does not carry them out.
type lateEtcd struct {
	control.Etcd
	late []*pb.TxnRequest
}

var errNoAnswer = errors.New("no answer")

func (e *lateEtcd) Txn(ctx context.Context, in *pb.TxnRequest) (*pb.TxnResponse, error) {
	if slices.ContainsFunc(in.Success, func(op *pb.RequestOp) bool {
		return op.GetRequestRange() == nil
	}) {
		e.late = append(e.late, in)
		return nil, errNoAnswer
	}
	return e.Etcd.Txn(ctx, in)
}

// TestHold_Late: a hold that etcd gets after a release does nothing, whether that release has found
// a hold or none. So does a release that etcd gets after another hold.
func TestHold_Late(t *testing.T) {
	etcd, _ := newTestEtcd(t)
	ctx := t.Context()
	hold := control.Hold{By: "me", Since: time.Now().UTC(), Reason: "late"}
	held := func(want string) {
		t.Helper()
		p, err := control.ReadProgress(ctx, etcd, testElection)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if p.Hold != nil {
			got = p.Hold.Reason
		}
		if got != want {
			t.Errorf("held: %q, want %q", got, want)
		}
	}
	set := func(reason string) {
		t.Helper()
		h := control.Hold{By: "you", Since: time.Now().UTC(), Reason: reason}
		if _, _, err := control.SetHold(ctx, etcd, testElection, h, 0); err != nil {
			t.Fatal(err)
		}
	}
	release := func(was bool) {
		t.Helper()
		last, err := control.Release(ctx, etcd, testElection)
		if err != nil || (last != nil) != was {
			t.Errorf("release: %v, %v", last, err)
		}
	}
	for _, before := range []string{"", "another"} {
		if before != "" {
			set(before)
		}
		delayed := &lateEtcd{Etcd: etcd}
		_, _, err := control.SetHold(ctx, delayed, testElection, hold, 0)
		if !errors.Is(err, errNoAnswer) || len(delayed.late) != 1 {
			t.Fatalf("%v, %d requests", err, len(delayed.late))
		}
		release(before != "")
		if resp, err := etcd.Txn(ctx, delayed.late[0]); err != nil || resp.Succeeded {
			t.Errorf("the late hold: %v, %v", resp, err)
		}
		held("")
	}

	set("first")
	delayed := &lateEtcd{Etcd: etcd}
	if _, err := control.Release(ctx, delayed, testElection); !errors.Is(err, errNoAnswer) {
		t.Fatal(err)
	}
	release(true)
	set("second")
	if resp, err := etcd.Txn(ctx, delayed.late[0]); err != nil || resp.Succeeded {
		t.Errorf("the late release: %v, %v", resp, err)
	}
	held("second")
}
