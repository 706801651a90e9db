package election

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
)

// members are the endpoints of etcd, each with a connection of its own. So we decide which member
// is asked, and not a balancer. The balancer of etcd's client takes one member after the other, and
// keeps using a connection on which nothing arrives any more.
type members struct {
	hosts []*host // those of the endpoints that name one
	mu    sync.Mutex
	known []*member // more are added when a name has more addresses
	// current is the index of the member that gave the last good answer. Requests go there first.
	current atomic.Int32
	auth    *auth // nil: none
	// closing counts the connections that are being closed. That can take a while if nobody
	// answers.
	closing sync.WaitGroup
}

// windowSize is how many bytes etcd may send before we have read the first of them.
const windowSize = 1 << 20

// errClosed is what a request gets after members.close.
var errClosed = errors.New("connections to etcd are closed")

func newMembers(cfg Config) (*members, error) {
	if len(cfg.Endpoints) == 0 {
		return nil, errors.New("no endpoints")
	}
	creds, err := newCredentials(cfg.TLS)
	if err != nil {
		return nil, err
	}
	ms := &members{}
	if cfg.Username != "" && cfg.Password != nil {
		ms.auth = newAuth(cfg, ms)
	}
	for _, endpoint := range cfg.Endpoints {
		transport := creds
		if !strings.HasPrefix(endpoint, "https://") {
			transport = newPlainCredentials()
		}
		h := newHost(endpoint, cfg)
		if h != nil {
			h.add = func(number int) { ms.add(cfg, endpoint, h, number, transport) }
			ms.hosts = append(ms.hosts, h)
		}
		ms.add(cfg, endpoint, h, 0, transport)
	}
	// Many candidates have the same list, and should not all begin with the same member.
	ms.current.Store(rand.Int32N(int32(len(cfg.Endpoints))))
	return ms, nil
}

// add makes one more member. number is its number among the members of the host, if the endpoint
// has a host name.
func (ms *members) add(
	cfg Config, endpoint string, h *host, number int,
	transport credentials.TransportCredentials,
) {
	m := &member{endpoint: endpoint, host: h, number: number, auth: ms.auth}
	options := []grpc.DialOption{
		grpc.WithConnectParams(grpc.ConnectParams{
			// gRPC's own backoff goes up to two minutes.
			Backoff: backoff.Config{
				BaseDelay:  100 * time.Millisecond,
				Multiplier: 1.6,
				Jitter:     0.2,
				MaxDelay:   time.Second,
			},
			MinConnectTimeout: cfg.DialTimeout,
		}),
		// gRPC would measure the link with a ping for each answer. That would wake us up once more.
		grpc.WithStaticConnWindowSize(windowSize), grpc.WithStaticStreamWindowSize(windowSize),
		// As in etcd's client: an answer can be bigger than gRPC's default of 4 MB.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		grpc.WithTransportCredentials(counted{transport, &m.connections}),
	}
	switch {
	case h != nil:
		options = append(options, h.dialer(number))
	case cfg.Dial != nil:
		options = append(options, grpc.WithContextDialer(cfg.Dial))
	}
	if ms.auth != nil {
		options = append(options,
			grpc.WithPerRPCCredentials(ms.auth), grpc.WithChainUnaryInterceptor(m.intercept))
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

// all returns the members known so far. None is ever removed.
func (ms *members) all() []*member {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	return ms.known
}

// reset replaces the connection of m, on which nothing arrives any more. When the network is back,
// a new connection is made at once. On the old one the kernel would wait for its next
// retransmission, for up to two minutes. The old one stays in use until the new one is up: if only
// some packets are lost, it may be the first to work again.
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

// replace waits until the new connection is up or closed. Then it closes the old one, which ends
// the requests that wait on it.
func (ms *members) replace(m *member, next *clientv3.Client) {
	conn := next.ActiveConnection()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		if state == connectivity.Shutdown {
			return
		}
		conn.Connect()
		conn.WaitForStateChange(context.Background(), state) // ends when conn is closed, too
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

// closeClient closes in the background, because gRPC waits seconds for its last message to be
// written.
func (ms *members) closeClient(client *clientv3.Client) {
	if client != nil {
		ms.closing.Go(func() { _ = client.Close() })
	}
}

// close ends all connections. It waits for them only briefly: those on which nobody answers end by
// themselves.
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
