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
)

// Etcd carries out requests. An election.Client is one. It may send a request twice, so each has to
// be harmless then.
type Etcd interface {
	Txn(ctx context.Context, in *pb.TxnRequest) (*pb.TxnResponse, error)
}
