// Package control has the keys beside an election: what is known of its candidates, the hold, the
// request for a switchover, and the history. People and commands steer an election by them.
//
// No key of this package lies under the prefix of an election, where it would stand in the queue.
// The election works without them: where etcd's roles forbid them, it goes on, and what needs them
// says which permission is missing.
//
// Anybody may write these keys. What is read of them is bounded, and may be wrong: nothing here
// decides who leads.
package control

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Etcd carries out requests. An election.Client is one.
type Etcd interface {
	// Txn may send the request twice, so it has to be harmless then.
	Txn(ctx context.Context, in *pb.TxnRequest) (*pb.TxnResponse, error)
	// Explain returns the error of a request that needs a permission (read, write or readwrite) on
	// keys ("the key x", "the prefix x/"), in one line.
	Explain(err error, permission, keys string) error
}

// put is a request to put a value. lease 0: it is bound to none.
func put(key string, v Value, lease int64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
		RequestPut: &pb.PutRequest{Key: []byte(key), Value: Encode(v), Lease: lease},
	}}
}

// prefix is a request for all keys with the prefix.
func prefix(of string) *pb.RangeRequest {
	return &pb.RangeRequest{Key: []byte(of), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(of))}
}

// read reads keys, linearizably.
func read(
	ctx context.Context, etcd Etcd, keys *pb.RangeRequest,
) ([]*mvccpb.KeyValue, error) {
	resp, err := etcd.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_RequestRange{RequestRange: keys}},
	}})
	if err != nil {
		return nil, err
	}
	return resp.Responses[0].GetResponseRange().Kvs, nil
}
