package election

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"google.golang.org/grpc"
)

// Only this file uses etcd's concurrency package. The Election of that package decides what is in
// etcd: the key's name and value, and the transaction that puts it. So etcdctl elect, and every
// program that uses that package, can take part in the same election.
//
// The package's Session is not safe enough to renew the lease, and its Campaign returns nil even if
// its own key is gone (https://github.com/etcd-io/etcd/issues/19597). So type lease renews the
// lease, and standby verifies a won campaign. The Election gets a client that has only two parts:
//
//	Election.Campaign
//	   ├─ Txn: put the key         campaignKV asks all members, as every request does
//	   └─ Range: who is ahead?     campaignKV lets the queue answer, once nobody is
//
// The campaign therefore has no watch and no read of its own: the queue's watch wakes it.

// newElection makes an election on the lease. Its resources are freed when ctx ends.
func newElection(
	ctx context.Context, name string, lease int64, kv *campaignKV,
) (*concurrency.Election, error) {
	client := clientv3.NewCtxClient(ctx)
	client.KV = clientv3.NewKVFromKVClient(kv, nil)
	client.Lease = keptLease{}
	session, err := concurrency.NewSession(client, concurrency.WithLease(clientv3.LeaseID(lease)))
	if err != nil {
		return nil, fmt.Errorf("make the session: %w", err)
	}
	return concurrency.NewElection(session, name), nil
}

// campaignKV is the key-value store that a campaign sees.
type campaignKV struct {
	pb.KVClient // nil: a campaign calls no other method

	members             *members
	hedgeDelay, timeout time.Duration
	// put is called with the key's create revision when the key is known to be in etcd.
	put func(created int64)
	// waitUntilFirst returns nil once no key is ahead of ours.
	waitUntilFirst func(context.Context) error
}

// errNoDelete refuses to delete the key.
var errNoDelete = errors.New("a campaign deletes no key")

// Txn puts the key, or finds that an earlier attempt has put it. Several members may be asked: the
// second one that carries it out finds what the first one has put.
//
// A campaign that fails, or is cancelled, also wants to delete the key. Only a release may do that,
// because it has to be announced.
func (kv *campaignKV) Txn(
	ctx context.Context, in *pb.TxnRequest, opts ...grpc.CallOption,
) (*pb.TxnResponse, error) {
	for _, op := range in.Success {
		if op.GetRequestDeleteRange() != nil {
			return nil, errNoDelete
		}
	}
	ctx, cancel := context.WithTimeout(ctx, kv.timeout)
	defer cancel()
	resp, err := hedge(ctx, kv.members, kv.hedgeDelay,
		func(ctx context.Context, m *member) (*pb.TxnResponse, error) {
			conn, err := m.conn()
			if err != nil {
				return nil, err
			}
			resp, err := pb.NewKVClient(conn).Txn(ctx, in, opts...)
			return resp, rpctypes.Error(err)
		})
	if err != nil {
		return nil, err
	}
	// Only the transaction that puts the key compares its create revision with 0.
	if len(in.Compare) == 1 && in.Compare[0].Target == pb.Compare_CREATE &&
		in.Compare[0].GetCreateRevision() == 0 {
		if resp.Succeeded {
			kv.put(resp.Header.Revision)
		} else if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
			kv.put(kvs[0].CreateRevision)
		}
	}
	return resp, nil
}

// Range is the campaign's question who is next ahead. It answers only when nobody is, so that the
// campaign has nobody to watch.
func (kv *campaignKV) Range(
	ctx context.Context, _ *pb.RangeRequest, _ ...grpc.CallOption,
) (*pb.RangeResponse, error) {
	if err := kv.waitUntilFirst(ctx); err != nil {
		return nil, err
	}
	return &pb.RangeResponse{Header: &pb.ResponseHeader{}}, nil
}

// keptLease is the lease as concurrency.NewSession sees it. NewSession calls no other method.
type keptLease struct{ clientv3.Lease }

// KeepAlive implements clientv3.Lease. The channel is closed when ctx ends.
func (keptLease) KeepAlive(
	ctx context.Context, _ clientv3.LeaseID,
) (<-chan *clientv3.LeaseKeepAliveResponse, error) {
	alive := make(chan *clientv3.LeaseKeepAliveResponse)
	context.AfterFunc(ctx, func() { close(alive) })
	return alive, nil
}
