package simetcd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
)

// Dial connects to a member, for a client whose name does not matter.
func (c *Cluster) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return c.Dialer("client")(ctx, addr)
}

// Dialer returns what a client of that name connects with, for grpc.WithContextDialer.
func (c *Cluster) Dialer(client string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (net.Conn, error) {
		for _, m := range c.members {
			if m.addr == addr {
				return m.connect(ctx, client)
			}
		}
		return nil, fmt.Errorf("no member of the cluster has the address %s", addr)
	}
}

func (m *member) connect(ctx context.Context, client string) (net.Conn, error) {
	if err := sleep(ctx, m.c.jitter(m.c.cfg.Latency, Connect, client, m.name)); err != nil {
		return nil, err
	}
	v := m.c.verdict(client, m.name, Connect)
	if v.DropRequest || v.DropAnswer {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if err := sleep(ctx, v.Delay+v.AnswerDelay); err != nil {
		return nil, err
	}
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	if !m.running || m.c.closed {
		return nil, &net.OpError{
			Op: "dial", Net: "sim", Addr: addr{m.name, 0},
			Err: syscall.ECONNREFUSED,
		}
	}
	there, back := newPipe(), newPipe()
	near := &conn{in: back, out: there, client: client, remote: addr{m.addr, 0}}
	far := &conn{in: there, out: back, client: client, remote: addr{client, m.incarnation}}
	far.stall(m.paused)
	m.conns = append(m.conns, far)
	m.accept <- far
	return near, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// verdict asks Config.Network.
func (c *Cluster) verdict(client, member, method string) Verdict {
	if c.cfg.Network == nil {
		return Verdict{}
	}
	c.network.Lock()
	defer c.network.Unlock()
	return c.cfg.Network(client, member, method)
}

// arrive returns when the message from a client has arrived. It does not look at ctx before that:
// what a client has sent is on its way, even if the client has given up.
func (m *member) arrive(ctx context.Context, method string, msg any) (Verdict, error) {
	client := from(ctx).name
	time.Sleep(m.c.travel("request", client, m.name, method, msg))
	v := m.c.verdict(client, m.name, method)
	time.Sleep(v.Delay)
	if v.DropRequest {
		return v, m.never(ctx)
	}
	for {
		// A member that is paused reads it when it is resumed, and what has come meanwhile not all
		// at the same moment.
		came := time.Now()
		err := m.wait(context.WithoutCancel(ctx), incarnationOf(ctx), 0,
			func() (bool, error) { return true, nil })
		if err != nil || time.Now().Equal(came) {
			return v, err
		}
		time.Sleep(m.c.travel("wake", client, m.name, method, msg))
	}
}

// never returns when the client has given up, or the member has crashed.
func (m *member) never(ctx context.Context) error {
	return m.wait(ctx, incarnationOf(ctx), 0, func() (bool, error) { return false, nil })
}

// again carries out a request for the second time.
func (m *member) again(ctx context.Context, handle func(context.Context)) {
	m.c.background.Go(func() {
		time.Sleep(m.c.jitter(m.c.cfg.Latency, "again", from(ctx).name, m.name))
		handle(context.WithoutCancel(ctx))
	})
}

// depart returns when the answer has arrived at the client. The verdict is that on the request. If
// nobody asked, as for the events of a watch, it is nil, and the network is asked now.
func (m *member) depart(ctx context.Context, v *Verdict, method string, msg any) error {
	client := from(ctx).name
	time.Sleep(m.c.travel("answer", client, m.name, method, msg))
	if v == nil {
		now := m.c.verdict(client, m.name, method)
		v = &now
	}
	time.Sleep(v.AnswerDelay)
	if v.DropAnswer {
		return m.never(ctx)
	}
	return nil
}

// travel is the time that a message travels.
func (c *Cluster) travel(what, client, member, method string, msg any) time.Duration {
	var content string
	if m, ok := msg.(proto.Message); ok {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			panic(err)
		}
		content = string(b)
	} else {
		content = fmt.Sprint(msg) // an error is a message too
	}
	return c.jitter(c.cfg.Latency, what, client, member, method, content)
}

// jitter is a duration up to most. It depends on the seed, on what it is for, and on the time.
func (c *Cluster) jitter(most time.Duration, what ...string) time.Duration {
	return 1 + time.Duration(c.hash(what...)%uint64(most))
}

func (c *Cluster) hash(what ...string) uint64 {
	h := fnv.New64a()
	_ = binary.Write(h, binary.BigEndian, []uint64{c.cfg.Seed, uint64(time.Now().UnixNano())})
	for _, s := range what {
		_, _ = io.WriteString(h, s+"\x00")
	}
	// FNV's last bytes hardly change its high bits.
	x := h.Sum64()
	x ^= x >> 32
	x *= 0xd6e8feb86659fd93
	return x ^ x>>32
}

// addr is the address of a client or member. A client's has the member's incarnation.
type addr struct {
	name        string
	incarnation int
}

func (addr) Network() string  { return "sim" }
func (a addr) String() string { return a.name }

// from is the client that made the request.
func from(ctx context.Context) addr {
	p, _ := peer.FromContext(ctx)
	return p.Addr.(addr)
}

func incarnationOf(ctx context.Context) int { return from(ctx).incarnation }

// conn is one end of a connection. It buffers all that is written, as net.Pipe does not: both ends
// of HTTP/2 begin with a write.
type conn struct {
	in, out *pipe
	client  string
	remote  addr
}

func (c *conn) Read(p []byte) (int, error)  { return c.in.read(p) }
func (c *conn) Write(p []byte) (int, error) { return c.out.write(p) }

// Close ends the connection. The other end reads what was written before.
func (c *conn) Close() error {
	c.in.close(net.ErrClosed, net.ErrClosed)
	c.out.close(io.EOF, syscall.EPIPE)
	return nil
}

func (c *conn) reset() {
	c.in.close(syscall.ECONNRESET, syscall.ECONNRESET)
	c.out.close(syscall.ECONNRESET, syscall.ECONNRESET)
	c.stall(false)
}

// stall holds up everything that is on the connection: it was made while the member was paused.
func (c *conn) stall(stalled bool) {
	c.in.stall(stalled)
	c.out.stall(stalled)
}

func (c *conn) LocalAddr() net.Addr  { return c.remote }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// gRPC sets deadlines only for its handshakes, which end when the client closes the connection.

// SetDeadline implements net.Conn. It has no effect.
func (c *conn) SetDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.Conn. It has no effect.
func (c *conn) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline implements net.Conn. It has no effect.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// pipe is one direction of a connection. Its readers wait for a sync.Cond, on which a goroutine is
// durably blocked for synctest.
type pipe struct {
	mu                sync.Mutex
	changed           *sync.Cond
	buf               []byte
	stalled           bool
	readErr, writeErr error
}

func newPipe() *pipe {
	p := &pipe{}
	p.changed = sync.NewCond(&p.mu)
	return p
}

func (p *pipe) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.stalled || len(p.buf) == 0 && p.readErr == nil {
		p.changed.Wait()
	}
	if p.readErr != nil && (len(p.buf) == 0 || !errors.Is(p.readErr, io.EOF)) {
		return 0, p.readErr
	}
	n := copy(b, p.buf)
	p.buf = p.buf[n:]
	return n, nil
}

func (p *pipe) write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.writeErr != nil {
		return 0, p.writeErr
	}
	p.buf = append(p.buf, b...)
	p.changed.Broadcast()
	return len(b), nil
}

func (p *pipe) close(readErr, writeErr error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.readErr == nil {
		p.readErr, p.writeErr = readErr, writeErr
		p.changed.Broadcast()
	}
}

func (p *pipe) stall(stalled bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stalled = stalled
	p.changed.Broadcast()
}

// listener hands a member's connections to its gRPC server.
type listener struct {
	conns  chan *conn
	closed chan struct{}
	once   sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr { return addr{} }
