package control

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Progress is what etcd shows of a switchover at one moment.
type Progress struct {
	// Leader is the identity of who is the first in the queue, and Token its fencing token. A hold
	// may keep it from leading. 0: the queue is empty.
	Leader string
	Token  int64
	Hold   *Hold       // nil: there is none
	Asked  *Switchover // the request; nil: there is none

	key string // the leader's
	mod int64  // Asked's mod revision
}

// ReadProgress reads the progress of a switchover.
func ReadProgress(ctx context.Context, etcd Etcd, election string) (p Progress, err error) {
	key := func(name string) *pb.RangeRequest { return &pb.RangeRequest{Key: []byte(name)} }
	kvs, err := readAll(ctx, etcd,
		oldest(election), key(HoldOf(election)), key(SwitchoverOf(election)))
	if err != nil {
		return p, err
	}
	if len(kvs[0]) > 0 {
		p.Leader, p.Token = sound(string(kvs[0][0].Value)), kvs[0][0].CreateRevision
		p.key = string(kvs[0][0].Key)
	}
	if len(kvs[1]) > 0 {
		p.Hold = &Hold{}
		_ = Decode(kvs[1][0].Value, p.Hold)
	}
	if len(kvs[2]) > 0 {
		p.Asked, p.mod = &Switchover{}, kvs[2][0].ModRevision
		_ = Decode(kvs[2][0].Value, p.Asked)
	}
	return p, nil
}

// AskSwitchover asks the leader of that progress for a switchover, unless somebody has asked since,
// or the leader has gone: then the next one would be taken for what came of the request.
// The request is bound to the lease. The next progress shows whether it is there.
func AskSwitchover(
	ctx context.Context, etcd Etcd, election string, asked Switchover, lease int64, p Progress,
) error {
	asked.Token = p.Token
	_, err := etcd.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{
			modified(SwitchoverOf(election), p.mod), created(p.key, p.Token),
		},
		Success: []*pb.RequestOp{put(SwitchoverOf(election), &asked, lease)},
	})
	return err
}

// WithdrawSwitchover withdraws the request of that progress, if nobody has answered since. It
// reports whether it did.
func WithdrawSwitchover(
	ctx context.Context, etcd Etcd, election string, p Progress,
) (bool, error) {
	return remove(ctx, etcd, SwitchoverOf(election), p.mod)
}

// oldest is a request for the first key in the queue of an election.
func oldest(election string) *pb.RangeRequest {
	keys := prefix(election + "/")
	keys.Limit = 1
	keys.SortTarget, keys.SortOrder = pb.RangeRequest_CREATE, pb.RangeRequest_ASCEND
	return keys
}

// readAll makes several reads in one transaction, linearizably.
func readAll(
	ctx context.Context, etcd Etcd, ranges ...*pb.RangeRequest,
) (all [][]*mvccpb.KeyValue, err error) {
	txn := &pb.TxnRequest{}
	for _, r := range ranges {
		txn.Success = append(txn.Success,
			&pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}})
	}
	resp, err := etcd.Txn(ctx, txn)
	if err != nil {
		return nil, err
	}
	for _, r := range resp.Responses {
		all = append(all, r.GetResponseRange().Kvs)
	}
	return all, nil
}
