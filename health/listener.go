package health

import (
	"container/list"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// maxConns is far more than probes need. No more than a quarter of the files that may be open go to connections, since a
	// daemon without a file to spare can't reach etcd.
	maxConns = 256

	// patience is how long a connection may rest before it is closed in favour of a new one, when all places are taken. A probe
	// behind 1,000 slow clients waits three times that long; an honest client of a busy machine needs less.
	patience = 100 * time.Millisecond
)

// boundedListener bounds the connections that are open at once. When all places are taken, the next one is accepted only once
// one is free, and the connection that has rested longest loses its own. So a crowd of slow clients neither eats the daemon's
// files and memory nor keeps probes waiting for long, while a burst of honest requests is served in turn.
type boundedListener struct {
	net.Listener
	places int
	freed  chan struct{} // Holds one signal that a place may be free.
	closed chan struct{}
	once   sync.Once

	mu    sync.Mutex
	order *list.List // of *place, the one that has rested longest first.
	byRaw map[net.Conn]*list.Element
}

type place struct {
	conn  net.Conn
	moved time.Time // When its state last changed.
}

func newBoundedListener(l net.Listener) *boundedListener {
	return &boundedListener{
		Listener: l,
		places:   int(min(maxConns, max(8, openFiles()/4))),
		freed:    make(chan struct{}, 1),
		closed:   make(chan struct{}),
		order:    list.New(),
		byRaw:    map[net.Conn]*list.Element{},
	}
}

// Accept implements net.Listener.
func (b *boundedListener) Accept() (net.Conn, error) {
	for {
		wait := b.makeRoom()
		if wait <= 0 {
			break
		}
		retry := time.NewTimer(wait)
		select {
		case <-b.freed:
		case <-retry.C:
		case <-b.closed:
			return nil, net.ErrClosed
		}
		retry.Stop()
	}
	conn, err := b.Listener.Accept()
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.byRaw[conn] = b.order.PushBack(&place{conn: conn, moved: time.Now()})
	return conn, nil
}

// makeRoom sees to a free place, or says how long to wait before there can be one.
func (b *boundedListener) makeRoom() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.order.Len() < b.places {
		return 0
	}
	oldest := b.order.Front().Value.(*place)
	if rested := time.Since(oldest.moved); rested < patience {
		return patience - rested
	}
	b.forget(oldest.conn)
	_ = oldest.conn.Close()
	return 0
}

// noteState is told by the server of each change of a connection's state.
func (b *boundedListener) noteState(conn net.Conn, state http.ConnState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch state {
	case http.StateNew, http.StateActive, http.StateIdle:
		if e, ok := b.byRaw[conn]; ok {
			e.Value.(*place).moved = time.Now()
			b.order.MoveToBack(e)
		}
	case http.StateClosed, http.StateHijacked:
		b.forget(conn)
	}
}

// forget frees a connection's place. The caller holds the lock.
func (b *boundedListener) forget(conn net.Conn) {
	e, ok := b.byRaw[conn]
	if !ok {
		return
	}
	b.order.Remove(e)
	delete(b.byRaw, conn)
	select {
	case b.freed <- struct{}{}:
	default:
	}
}

// Close implements net.Listener.
func (b *boundedListener) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.Listener.Close()
}
