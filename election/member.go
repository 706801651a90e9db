package election

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// member is one endpoint of etcd. Its connection is made when first needed.
type member struct {
	endpoint string
	host     *host // nil: the endpoint is an address
	number   int   // of the member among those of the host
	dial     func(more ...grpc.DialOption) (*clientv3.Client, error)
	auth     *auth // shared by all members; nil: none
	// connections counts how often one was made, or tried to be.
	connections atomic.Int64

	mu     sync.Mutex
	client *clientv3.Client
	next   *clientv3.Client // it replaces client once it is connected; else nil
	closed bool
}

// name is the endpoint, with the address if its host is a name.
func (m *member) name() string {
	if m.host == nil || m.host.address(m.number) == "" {
		return m.endpoint
	}
	return m.endpoint + " (" + m.host.address(m.number) + ")"
}

// open returns the client of the connection. It makes one if there is none. It does not wait until
// the connection is up. A request does, until the first attempt to connect has failed.
func (m *member) open() (*clientv3.Client, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, errClosed
	}
	if m.client == nil {
		client, err := m.dial()
		if err != nil {
			return nil, fmt.Errorf("connect: %w", err)
		}
		m.client = client
	}
	return m.client, nil
}

func (m *member) conn() (*grpc.ClientConn, error) {
	client, err := m.open()
	if err != nil {
		return nil, err
	}
	return client.ActiveConnection(), nil
}

// renewal is what a member answers to a renewal.
type renewal struct {
	ttl      time.Duration
	raftTerm uint64 // the member's, read before it carried out the renewal
}

// renew renews the lease once. It does not use etcd's KeepAliveOnce, which repeats itself without a
// pause while a member is unavailable.
func (m *member) renew(ctx context.Context, id int64) (renewal, error) {
	conn, err := m.conn()
	if err != nil {
		return renewal{}, err
	}
	var r renewal
	err = m.authenticated(ctx, func() error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := pb.NewLeaseClient(conn).LeaseKeepAlive(ctx)
		if err != nil {
			return err
		}
		// If Send returns io.EOF, the stream has ended, and Recv returns the reason.
		err = stream.Send(&pb.LeaseKeepAliveRequest{ID: id})
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		_ = stream.CloseSend() // a failure shows in Recv
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if resp.TTL <= 0 {
			return rpctypes.ErrLeaseNotFound
		}
		r = renewal{
			ttl:      time.Duration(resp.TTL) * time.Second,
			raftTerm: cmp.Or(resp.GetHeader().GetRaftTerm(), unconfirmed),
		}
		return nil
	})
	return r, rpctypes.Error(err)
}

// reading is what a linearizable read of one key shows.
type reading struct {
	created  int64 // the key's create revision, 0 when there is no such key
	lease    int64 // that it is bound to
	raftTerm uint64
}

// read reads the key, linearizably. It does not use KeysOnly, because from 3.7 on etcd does not
// show the lease then.
func (m *member) read(ctx context.Context, key string) (reading, error) {
	conn, err := m.conn()
	if err != nil {
		return reading{}, err
	}
	resp, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		return reading{}, rpctypes.Error(err)
	}
	return newReading(resp.GetHeader(), resp.Kvs), nil
}

func newReading(header *pb.ResponseHeader, kvs []*mvccpb.KeyValue) reading {
	r := reading{raftTerm: header.GetRaftTerm()}
	if len(kvs) > 0 {
		r.created, r.lease = kvs[0].CreateRevision, kvs[0].Lease
	}
	return r
}

// readAll makes several reads in one transaction. It is linearizable, unless each read is
// serializable.
func (m *member) readAll(
	ctx context.Context, ranges ...*pb.RangeRequest,
) (*pb.ResponseHeader, [][]*mvccpb.KeyValue, error) {
	txn := &pb.TxnRequest{}
	for _, r := range ranges {
		txn.Success = append(txn.Success,
			&pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}})
	}
	resp, err := m.txn(ctx, txn)
	if err != nil {
		return nil, nil, err
	}
	var all [][]*mvccpb.KeyValue
	for _, r := range resp.Responses {
		all = append(all, r.GetResponseRange().Kvs)
	}
	return resp.Header, all, nil
}

// txn carries out a transaction.
func (m *member) txn(ctx context.Context, in *pb.TxnRequest) (*pb.TxnResponse, error) {
	conn, err := m.conn()
	if err != nil {
		return nil, err
	}
	resp, err := pb.NewKVClient(conn).Txn(ctx, in)
	return resp, rpctypes.Error(err)
}

// remove deletes the key if it has that create revision; 0: whichever it has. In the same
// transaction it puts another one; nil: it does not.
func (m *member) remove(
	ctx context.Context, key string, created int64, put *pb.PutRequest,
) error {
	only := &pb.Compare{
		Key: []byte(key), Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL,
		TargetUnion: &pb.Compare_CreateRevision{CreateRevision: created},
	}
	if created == 0 {
		only.Result = pb.Compare_GREATER // it is there
	}
	_, err := m.txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{only}, Success: deleteAndPut([]string{key}, put),
	})
	return err
}

// deleteAndPut are the operations that delete keys and put one; nil: they put none.
func deleteAndPut(keys []string, put *pb.PutRequest) (ops []*pb.RequestOp) {
	for _, key := range keys {
		ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{
			RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)},
		}})
	}
	if put != nil {
		ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}})
	}
	return ops
}

// revoke revokes the lease. It also succeeds if etcd does not know the lease.
func (m *member) revoke(ctx context.Context, id int64) error {
	conn, err := m.conn()
	if err != nil {
		return err
	}
	_, err = pb.NewLeaseClient(conn).LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: id})
	if err = rpctypes.Error(err); errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return nil
	}
	return err
}
