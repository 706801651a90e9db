//go:build linux

package harness

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// Direction is one direction of a connection, or both.
type Direction int

// The directions, as seen by the client that dialled the proxy.
const (
	ToServer Direction = 1 << iota
	ToClient
	BothWays = ToServer | ToClient
)

// Proxy is a link to a TCP endpoint that can be cut as a network is cut: the connections stay and
// nothing arrives, not even that the other end has closed. New connections are accepted while the
// link is cut (a network with a proxy or a firewall in it does that too), and receive nothing.
type Proxy struct {
	listener net.Listener
	target   string
	wait     sync.WaitGroup

	mu      sync.Mutex
	changed sync.Cond // of what follows
	delay   time.Duration
	cut     Direction
	closed  bool
	conns   map[net.Conn]bool
}

// StartProxy listens on a host:port of this machine in front of target, another.
func StartProxy(listen, target string) (*Proxy, error) {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, fmt.Errorf("start a proxy for %s: %w", target, err)
	}
	p := &Proxy{listener: l, target: target, conns: map[net.Conn]bool{}}
	p.changed.L = &p.mu
	p.wait.Go(p.accept)
	return p, nil
}

// Addr is the proxy's host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// SetDelay changes by how much later the data arrives that comes from now on.
func (p *Proxy) SetDelay(delay time.Duration) { p.change(func() { p.delay = delay }) }

// Cut passes nothing on in the given direction until Recover.
func (p *Proxy) Cut(d Direction) { p.change(func() { p.cut |= d }) }

// Recover passes on what was held and all that follows.
func (p *Proxy) Recover() { p.change(func() { p.cut = 0 }) }

// Drop closes every connection, as a firewall that rejects or a restarted load balancer does. New
// ones are accepted.
func (p *Proxy) Drop() {
	p.change(func() {
		for c := range p.conns {
			if tcp, ok := c.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0) // reset at once rather than finish politely
			}
			_ = c.Close()
		}
	})
}

// Close ends the proxy and its connections.
func (p *Proxy) Close() {
	p.change(func() { p.closed = true })
	_ = p.listener.Close()
	p.Drop()
	p.wait.Wait()
}

func (p *Proxy) change(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	p.changed.Broadcast()
}

// pass waits until the link is open in the given direction. It is false once the proxy is closed.
func (p *Proxy) pass(d Direction) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.cut&d != 0 && !p.closed {
		p.changed.Wait()
	}
	return !p.closed
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.wait.Go(func() { p.serve(client) })
	}
}

func (p *Proxy) serve(client net.Conn) {
	defer p.keep(client)()
	if !p.pass(ToServer) {
		return
	}
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return // the client sees its connection closed
	}
	defer p.keep(server)()
	var both sync.WaitGroup
	both.Go(func() { p.copy(server, client, ToServer) })
	both.Go(func() { p.copy(client, server, ToClient) })
	both.Wait()
}

// keep notes a connection for Drop and Close, until forget.
func (p *Proxy) keep(c net.Conn) (forget func()) {
	p.change(func() {
		p.conns[c] = true
		if p.closed {
			_ = c.Close()
		}
	})
	return func() {
		p.change(func() { delete(p.conns, c) })
		_ = c.Close()
	}
}

// piece is what one read has brought, and when it is due at the other end.
type piece struct {
	data []byte
	due  time.Time
}

// copy keeps the order of what it passes on, but does not let one piece's delay add to the next
// one's: a slow link is not a narrow one.
func (p *Proxy) copy(dst, src net.Conn, d Direction) {
	pieces := make(chan piece, 1024)
	var ended error // why the pieces end
	go func() {
		defer close(pieces)
		buf := make([]byte, 64<<10)
		for {
			n, err := src.Read(buf)
			p.mu.Lock()
			due := time.Now().Add(p.delay)
			p.mu.Unlock()
			pieces <- piece{slices.Clone(buf[:n]), due}
			if err != nil {
				ended = err
				return
			}
		}
	}()
	for next := range pieces {
		time.Sleep(time.Until(next.due))
		if p.pass(d) {
			if _, err := dst.Write(next.data); err == nil {
				continue
			}
		}
		_ = src.Close() // which ends the pieces
		for range pieces {
		}
		return
	}
	if tcp, ok := dst.(*net.TCPConn); ok && errors.Is(ended, io.EOF) {
		_ = tcp.CloseWrite() // the other direction may go on
		return
	}
	_ = dst.Close()
}
