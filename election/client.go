package election

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// Client makes requests to etcd that are not those of a candidate.
type Client struct {
	cfg     Config
	members *members
	timeout time.Duration // of a request
	delay   time.Duration // hedgeDelay
	// current is its own: what a write needs of etcd, a renewal may not need.
	current *atomic.Int32
}

// Connect makes a client. Of cfg it needs the endpoints, and how to reach them. It connects when it
// first makes a request.
func Connect(cfg Config) (*Client, error) {
	ms, timeout, err := queryMembers(cfg)
	if err != nil {
		return nil, err
	}
	return &Client{
		cfg: cfg, members: ms, timeout: timeout, delay: queryDelay(timeout), current: &ms.current,
	}, nil
}

// startBeside calls Config.Beside, and returns what ends it.
func (c *Candidate) startBeside(ctx context.Context, ms *members) (end func()) {
	beside := c.cfg.Beside
	if beside == nil {
		return func() {}
	}
	client := &Client{
		cfg: c.cfg, members: ms, timeout: c.cfg.requestTimeout(), delay: c.cfg.hedgeDelay(),
		current: &atomic.Int32{},
	}
	client.current.Store(ms.current.Load())
	bctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		beside(bctx, client)
	}()
	return func() {
		cancel()
		<-ended
	}
}

// Close closes the connections.
func (c *Client) Close() { c.members.close() }

// Txn carries out a transaction. If a member does not answer soon, others are asked as well: so it
// has to be harmless if it is carried out twice.
func (c *Client) Txn(ctx context.Context, in *pb.TxnRequest) (*pb.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return hedgeFrom(ctx, c.members, c.current, c.delay,
		func(ctx context.Context, m *member) (*pb.TxnResponse, error) { return m.txn(ctx, in) })
}

// Grant asks for a lease of that time, in whole seconds. Nobody renews it. It returns its id, and
// the TTL that etcd has granted.
func (c *Client) Grant(ctx context.Context, ttl time.Duration) (int64, time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	id := newLeaseID()
	seconds := int64((ttl + time.Second - 1) / time.Second)
	got, err := hedgeFrom(ctx, c.members, c.current, c.delay,
		func(ctx context.Context, m *member) (int64, error) {
			conn, err := m.conn()
			if err != nil {
				return 0, err
			}
			resp, err := pb.NewLeaseClient(conn).LeaseGrant(ctx,
				&pb.LeaseGrantRequest{TTL: seconds, ID: id})
			if err = rpctypes.Error(err); errors.Is(err, rpctypes.ErrLeaseExist) {
				return seconds, nil // another member was faster
			}
			return resp.GetTTL(), err
		})
	return id, time.Duration(got) * time.Second, err
}

// Revoke revokes a lease.
func (c *Client) Revoke(ctx context.Context, id int64) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	_, err := hedgeFrom(ctx, c.members, c.current, c.delay,
		func(ctx context.Context, m *member) (struct{}, error) {
			return struct{}{}, m.revoke(ctx, id)
		})
	return err
}

// MayPass reports whether a request that has failed with this error may succeed later: etcd did not
// answer, or could not serve it.
func MayPass(err error) bool {
	return unavailable(err) || errors.Is(err, context.DeadlineExceeded)
}

// Explain returns the error of a request in one line, with a remedy if we know one. The request
// needs a permission (read, write or readwrite) on keys: "the key x", "the prefix x/".
func (c *Client) Explain(err error, permission, keys string) error {
	return explained{c.cfg.explainKeys(err, permission, keys), err}
}

// explained is an error with a text of ours.
type explained struct {
	text string
	error
}

func (e explained) Error() string { return e.text }
func (e explained) Unwrap() error { return e.error }
