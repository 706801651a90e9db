package election

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
)

// members are the endpoints of etcd, each with a connection of its own, so that which member is asked is decided here and not
// by a balancer: etcd's client takes turns per request, and a connection on which nothing arrives any more stays in its round.
type members struct {
	hosts []*host // those of the endpoints that name one
	mu    sync.Mutex
	known []*member // more may be added, when a name has more addresses
	// current is the index of the member that gave the last good answer. Requests go there first.
	current atomic.Int32
	auth    *auth // nil: none
	// closing counts the connections and watchers that are being closed, which can take a while when nobody answers.
	closing sync.WaitGroup
}

// errClosed is what a request gets after members.close.
var errClosed = errors.New("connections to etcd are closed")

func newMembers(cfg Config) (*members, error) {
	creds, err := newCredentials(cfg.TLS)
	if err != nil {
		return nil, err
	}
	ms := &members{}
	if cfg.Username != "" && cfg.Password != nil {
		ms.auth = newAuth(cfg, ms)
	}
	add := func(endpoint string, h *host, number int) {
		m := &member{endpoint: endpoint, host: h, number: number, auth: ms.auth}
		options := []grpc.DialOption{
			// gRPC's own backoff goes up to two minutes.
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
				MinConnectTimeout: cfg.DialTimeout,
			}),
			// As in etcd's client: an answer can be bigger than gRPC's default of 4 MB.
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		}
		if strings.HasPrefix(endpoint, "https://") {
			options = append(options, grpc.WithTransportCredentials(creds))
		}
		if h != nil {
			options = append(options, h.dialer(number))
		}
		if ms.auth != nil {
			options = append(options, grpc.WithPerRPCCredentials(ms.auth), grpc.WithChainUnaryInterceptor(m.intercept))
		}
		m.dial = func(more ...grpc.DialOption) (*clientv3.Client, error) {
			return clientv3.New(clientv3.Config{
				Endpoints:   []string{endpoint},
				DialOptions: slices.Concat(options, more),
				Logger:      zap.NewNop(),
				// Requests are repeated here, on another member.
				MaxUnaryRetries: 1,
			})
		}
		ms.mu.Lock()
		defer ms.mu.Unlock()
		ms.known = append(ms.known, m)
	}
	for _, endpoint := range cfg.Endpoints {
		h := newHost(endpoint, cfg.lookup)
		if h != nil {
			h.add = func(number int) { add(endpoint, h, number) }
			ms.hosts = append(ms.hosts, h)
		}
		add(endpoint, h, 0)
	}
	if len(cfg.Endpoints) == 0 {
		return nil, errors.New("no endpoints")
	}
	// Many candidates have the same list: they should not all begin with the same member.
	ms.current.Store(rand.Int32N(int32(len(cfg.Endpoints))))
	return ms, nil
}

// all returns the members there are by now. None is ever removed.
func (ms *members) all() []*member {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	return ms.known
}

// reset replaces the connection of m, on which nothing arrives any more: when the network is back, a new one is made at once,
// whereas the kernel would wait for its next retransmission, which can be two minutes away. Until the new one is up the old one
// stays in use, for where packets are only lost now and then it may be the first to be good again.
func (ms *members) reset(m *member) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.client == nil || m.next != nil || m.auth != nil && m.auth.busy() {
		return
	}
	next, err := m.dial()
	if err != nil {
		return
	}
	m.next = next
	ms.closing.Go(func() { ms.replace(m, next) })
}

// replace waits until the new connection is up, or closed, and then closes the old one, and with it whatever waits there.
func (ms *members) replace(m *member, next *clientv3.Client) {
	conn := next.ActiveConnection()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		if state == connectivity.Shutdown {
			return
		}
		conn.Connect()
		conn.WaitForStateChange(context.Background(), state) // ends when the connection is closed, too
	}
	m.mu.Lock()
	old := m.client
	if m.next == next {
		m.client, m.next = next, nil
	} else {
		old = nil
	}
	m.mu.Unlock()
	ms.closeClient(old)
}

// closeClient closes in the background, for gRPC waits seconds for its last word to be written.
func (ms *members) closeClient(client *clientv3.Client) {
	if client != nil {
		ms.closing.Go(func() { _ = client.Close() })
	}
}

// close ends all connections. It waits for them only briefly: those that nobody answers on end by themselves.
func (ms *members) close() {
	if ms.auth != nil {
		ms.auth.close()
	}
	for _, m := range ms.all() {
		m.mu.Lock()
		client, next := m.client, m.next
		m.client, m.next, m.closed = nil, nil, true
		m.mu.Unlock()
		ms.closeClient(client)
		ms.closeClient(next)
	}
	done := make(chan struct{})
	go func() {
		ms.closing.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(100 * time.Millisecond):
	}
}

// member is one endpoint of etcd. Its connection is made when first needed.
type member struct {
	endpoint string
	host     *host // nil: the endpoint is an address
	number   int   // of the member among those of the host
	dial     func(more ...grpc.DialOption) (*clientv3.Client, error)
	auth     *auth // shared by all members; nil: none

	mu     sync.Mutex
	client *clientv3.Client
	next   *clientv3.Client // which is to replace it, while that is not up; else nil
	closed bool
}

// name is the endpoint, and which of its addresses.
func (m *member) name() string {
	if m.host == nil || m.host.address(m.number) == "" {
		return m.endpoint
	}
	return m.endpoint + " (" + m.host.address(m.number) + ")"
}

// open returns the client of the connection, which it makes if there is none. It does not wait for the connection to be up:
// a request does, until the first attempt to connect has failed.
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
	ttl  time.Duration
	term uint64 // the raft term of the member that answered, read before the renewal was carried out
}

// renew renews the lease once. It does not use etcd's KeepAliveOnce, which repeats itself without a pause while a member is
// unavailable.
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
		// When Send says io.EOF the stream has ended, and Recv says why.
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil && !errors.Is(err, io.EOF) {
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
		r = renewal{ttl: time.Duration(resp.TTL) * time.Second, term: resp.GetHeader().GetRaftTerm()}
		return nil
	})
	return r, rpctypes.Error(err)
}

// reading is what a linearizable read of one key shows.
type reading struct {
	created int64 // the key's create revision, 0 when there is no such key
	lease   int64 // that it is bound to
	term    uint64
}

// read reads the key, linearizably. Not the key only: from 3.7 on etcd does not show its lease then.
func (m *member) read(ctx context.Context, key string) (reading, error) {
	conn, err := m.conn()
	if err != nil {
		return reading{}, err
	}
	resp, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		return reading{}, rpctypes.Error(err)
	}
	r := reading{term: resp.GetHeader().GetRaftTerm()}
	if len(resp.Kvs) > 0 {
		r.created, r.lease = resp.Kvs[0].CreateRevision, resp.Kvs[0].Lease
	}
	return r, nil
}

// readBoth reads twice in one linearizable transaction.
func (m *member) readBoth(ctx context.Context, one, other *pb.RangeRequest) (header *pb.ResponseHeader, a, b []*mvccpb.KeyValue, err error) {
	conn, err := m.conn()
	if err != nil {
		return nil, nil, nil, err
	}
	resp, err := pb.NewKVClient(conn).Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_RequestRange{RequestRange: one}},
		{Request: &pb.RequestOp_RequestRange{RequestRange: other}},
	}})
	if err != nil {
		return nil, nil, nil, rpctypes.Error(err)
	}
	return resp.Header, resp.Responses[0].GetResponseRange().Kvs, resp.Responses[1].GetResponseRange().Kvs, nil
}

// remove deletes the key if it has that create revision; 0: whichever it has.
func (m *member) remove(ctx context.Context, key string, created int64) error {
	conn, err := m.conn()
	if err != nil {
		return err
	}
	var only []*pb.Compare
	if created != 0 {
		only = []*pb.Compare{{
			Key: []byte(key), Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL,
			TargetUnion: &pb.Compare_CreateRevision{CreateRevision: created},
		}}
	}
	_, err = pb.NewKVClient(conn).Txn(ctx, &pb.TxnRequest{
		Compare: only,
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)}}}},
	})
	return rpctypes.Error(err)
}

// revoke revokes the lease. That etcd does not know it is as good.
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

// memberError says which member answered so.
type memberError struct {
	endpoint string
	err      error
}

func (e *memberError) Error() string {
	if other := (*memberError)(nil); errors.As(e.err, &other) {
		return other.Error() // of another member, which was asked for a token
	}
	s, ok := status.FromError(e.err)
	switch {
	case errors.Is(e.err, context.DeadlineExceeded), errors.Is(e.err, context.Canceled),
		ok && (s.Code() == codes.DeadlineExceeded || s.Code() == codes.Canceled):
		return e.endpoint + ": no answer"
	case ok:
		// Without gRPC's wrappings: rpc error: code = … desc = connection error: desc = "transport: …"
		message := s.Message()
		if i := strings.LastIndex(message, `desc = "`); i >= 0 {
			message = strings.TrimSuffix(message[i+len(`desc = "`):], `"`)
		}
		return e.endpoint + ": " + strings.TrimPrefix(message, "transport: Error while dialing: ")
	}
	return e.endpoint + ": " + e.err.Error()
}

func (e *memberError) Unwrap() error { return e.err }

// authError says why there is no token. It says nothing of the member that one is needed for.
type authError struct{ error }

func (e authError) Unwrap() error { return e.error }

// unavailable reports whether the member can't be reached, or says itself that it can't serve now.
func unavailable(err error) bool {
	if errors.As(err, &authError{}) {
		return false
	}
	var said rpctypes.EtcdError
	if errors.As(err, &said) {
		return said.Code() == codes.Unavailable
	}
	return status.Code(err) == codes.Unavailable
}

// first asks the current member, and when it has not answered after hedgeDelay the next one as well, and so on; a failure brings
// the next at once. The delay is shorter where ctx would end before all have been asked, with as much time left for the last one.
// The first good answer counts, and whoever gave it is current from then on. The other requests are cancelled and not waited for.
// When none has come in time the next member is current, so that the same one is not asked first again. What is asked must be
// harmless when done twice.
func first[T any](ctx context.Context, ms *members, hedgeDelay time.Duration, ask func(context.Context, *member) (T, error)) (T, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		from int
		got  T
		err  error
	}
	answers := make(chan answer)
	start, asked, answered := int(ms.current.Load()), map[int]bool{}, map[int]bool{}
	next := func() {
		all := ms.all() // more may have been added meanwhile
		for i := range all {
			i = (start + i) % len(all)
			if asked[i] {
				continue
			}
			asked[i] = true
			go func() {
				got, err := ask(ctx, all[i])
				select {
				case answers <- answer{i, got, err}:
				case <-ctx.Done():
				}
			}()
			return
		}
	}
	delay := func() time.Duration {
		if end, ok := ctx.Deadline(); ok {
			return min(hedgeDelay, time.Until(end)/time.Duration(1+len(ms.all())-len(asked)))
		}
		return hedgeDelay
	}
	var errs []error
	next()
	hedge := time.NewTimer(delay())
	defer hedge.Stop()
	for {
		select {
		case a := <-answers:
			if a.err == nil {
				ms.current.Store(int32(a.from))
				return a.got, nil
			}
			answered[a.from] = true
			errs = append(errs, &memberError{ms.all()[a.from].name(), a.err})
			if len(errs) == len(ms.all()) {
				ms.lookAgain()
				return a.got, errors.Join(errs...)
			}
			next()
			hedge.Reset(delay())
		case <-hedge.C:
			next()
			hedge.Reset(delay())
		case <-ctx.Done():
			all := ms.all()
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				ms.current.CompareAndSwap(int32(start), int32((start+1)%len(all)))
				ms.lookAgain()
			}
			for i, m := range all {
				if asked[i] && !answered[i] {
					errs = append(errs, &memberError{m.name(), ctx.Err()})
				}
			}
			var none T
			return none, errors.Join(errs...)
		}
	}
}
