//go:build linux

package harness

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
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

// Proxy is a link to a TCP endpoint that can be cut as a network is cut: the
// connections stay and nothing arrives, not even that the other end has
// closed. New connections are accepted while the link is cut (a network with
// a proxy or a firewall in it does that too), and receive nothing.
type Proxy struct {
	listener net.Listener
	target   string
	done     chan struct{} // closed by Close
	wait     sync.WaitGroup

	mu       sync.Mutex
	delay    time.Duration
	conns    map[net.Conn]struct{}
	toServer gate
	toClient gate
}

// gate is open when its channel is closed.
type gate struct{ open chan struct{} }

func (g *gate) cut() {
	select {
	case <-g.open:
		g.open = make(chan struct{})
	default: // cut already
	}
}

func (g *gate) resume() {
	select {
	case <-g.open:
	default:
		close(g.open)
	}
}

// StartProxy listens on a free port of 127.0.0.1 in front of target, a
// host:port. Each piece of data arrives later by delay.
func StartProxy(target string, delay time.Duration) (*Proxy, error) {
	return StartProxyOn("127.0.0.1", target, delay)
}

// StartProxyOn is StartProxy on another address of this machine.
func StartProxyOn(host, target string, delay time.Duration) (*Proxy, error) {
	var l net.Listener
	for attempt := 0; ; attempt++ {
		port, err := FreePort()
		if err != nil {
			return nil, err
		}
		// A process that was being forked while FreePort looked has the port until its exec.
		if l, err = net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port))); err == nil {
			break
		}
		if attempt == 10 {
			return nil, fmt.Errorf("start a proxy for %s: %w", target, err)
		}
	}
	return newProxy(l, target, delay), nil
}

// StartProxyAt is StartProxy at a host:port of this machine.
func StartProxyAt(addr, target string) (*Proxy, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("start a proxy for %s: %w", target, err)
	}
	return newProxy(l, target, 0), nil
}

func newProxy(l net.Listener, target string, delay time.Duration) *Proxy {
	open := make(chan struct{})
	close(open)
	p := &Proxy{
		listener: l, target: target, delay: delay,
		done:     make(chan struct{}),
		conns:    map[net.Conn]struct{}{},
		toServer: gate{open}, toClient: gate{open},
	}
	p.wait.Go(p.accept)
	return p
}

// Addr is the proxy's host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// SetDelay changes by how much later the data arrives that comes from now on.
func (p *Proxy) SetDelay(delay time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = delay
}

// Cut passes nothing on in the given direction until Recover.
func (p *Proxy) Cut(d Direction) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d&ToServer != 0 {
		p.toServer.cut()
	}
	if d&ToClient != 0 {
		p.toClient.cut()
	}
}

// Recover passes on what was held and all that follows.
func (p *Proxy) Recover() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.toServer.resume()
	p.toClient.resume()
}

// Drop closes every connection, as a firewall that rejects or a restarted load
// balancer does. New ones are accepted.
func (p *Proxy) Drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // reset at once rather than finish politely
		}
		_ = c.Close()
	}
}

// Close ends the proxy and its connections.
func (p *Proxy) Close() {
	close(p.done)
	_ = p.listener.Close()
	p.Drop()
	p.wait.Wait()
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		if !p.keep(client) {
			return
		}
		p.wait.Go(func() { p.serve(client) })
	}
}

// keep notes a connection for Drop and Close. It is false after Close.
func (p *Proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.done:
		_ = c.Close()
		return false
	default:
		p.conns[c] = struct{}{}
		return true
	}
}

func (p *Proxy) forget(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	_ = c.Close()
}

func (p *Proxy) serve(client net.Conn) {
	defer p.forget(client)
	if !p.pass(ToServer) {
		return
	}
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return // the client sees its connection closed
	}
	if !p.keep(server) {
		return
	}
	defer p.forget(server)
	var both sync.WaitGroup
	both.Go(func() { p.copy(server, client, ToServer) })
	both.Go(func() { p.copy(client, server, ToClient) })
	both.Wait()
}

// piece is what one read has brought, and when it is due at the other end.
type piece struct {
	data []byte
	err  error
	due  time.Time
}

// copy keeps the order of what it passes on, but does not let one piece's delay
// add to the next one's: a slow link is not a narrow one.
func (p *Proxy) copy(dst, src net.Conn, d Direction) {
	pieces := make(chan piece, 1024)
	var reader sync.WaitGroup
	defer reader.Wait()
	defer func() { _ = src.SetReadDeadline(time.Unix(1, 0)) }()
	stopped := make(chan struct{})
	defer close(stopped)
	reader.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := src.Read(buf)
			p.mu.Lock()
			due := time.Now().Add(p.delay)
			p.mu.Unlock()
			select {
			case pieces <- piece{slices.Clone(buf[:n]), err, due}:
			case <-stopped:
				return
			}
			if err != nil {
				return
			}
		}
	})
	for {
		var next piece
		select {
		case next = <-pieces:
		case <-p.done:
			return
		}
		if wait := time.Until(next.due); wait > 0 {
			select {
			case <-time.After(wait):
			case <-p.done:
				return
			}
		}
		if !p.pass(d) {
			return
		}
		if len(next.data) > 0 {
			if _, err := dst.Write(next.data); err != nil {
				_ = src.Close()
				return
			}
		}
		switch {
		case errors.Is(next.err, io.EOF):
			if tcp, ok := dst.(*net.TCPConn); ok {
				_ = tcp.CloseWrite() // the other direction may go on
			}
			return
		case next.err != nil:
			_ = dst.Close()
			return
		}
	}
}

// pass waits until the link is open in the given direction. It is false once
// the proxy is closed.
func (p *Proxy) pass(d Direction) bool {
	for {
		p.mu.Lock()
		open := p.toServer.open
		if d == ToClient {
			open = p.toClient.open
		}
		p.mu.Unlock()
		select {
		case <-open:
			return true
		case <-p.done:
			return false
		}
	}
}
