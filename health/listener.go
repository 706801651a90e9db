package health

import (
	"container/list"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// maxConns is far more than probes need. Connections use at most a quarter of the files that
	// may be open: a daemon that can't open another file cannot reach etcd.
	maxConns = 256
	// restTimeout is how long a connection may be idle before a new one replaces it, if maxConns
	// are open. A probe behind 1,000 slow clients waits three times that long. An honest client on
	// a busy machine needs less.
	restTimeout = 100 * time.Millisecond
)

// boundedListener bounds the connections that are open at once. If all slots are taken, it closes
// the connection that has been idle longest, and accepts the next one once a slot is free. So many
// slow clients neither use up the daemon's files and memory nor keep probes waiting for long. A
// burst of honest requests is served one after the other.
type boundedListener struct {
	net.Listener
	slots  int
	freed  chan struct{} // Holds one signal that a slot may be free.
	closed chan struct{}
	once   sync.Once

	mu    sync.Mutex
	order *list.List // of *slot, the one that has been idle longest first.
	byRaw map[net.Conn]*list.Element
}

type slot struct {
	conn  net.Conn
	moved time.Time // When its state last changed.
}

func newBoundedListener(l net.Listener) *boundedListener {
	return &boundedListener{
		Listener: l,
		slots:    int(min(maxConns, max(8, openFiles()/4))),
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
	b.byRaw[conn] = b.order.PushBack(&slot{conn: conn, moved: time.Now()})
	return conn, nil
}

// makeRoom frees a slot if none is free, or returns how long to wait before it can.
func (b *boundedListener) makeRoom() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.order.Len() < b.slots {
		return 0
	}
	oldest := b.order.Front().Value.(*slot)
	if rested := time.Since(oldest.moved); rested < restTimeout {
		return restTimeout - rested
	}
	b.forget(oldest.conn)
	_ = oldest.conn.Close()
	return 0
}

// noteState notes a change of a connection's state. The server calls it at each change.
func (b *boundedListener) noteState(conn net.Conn, state http.ConnState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch state {
	case http.StateNew, http.StateActive, http.StateIdle:
		if e, ok := b.byRaw[conn]; ok {
			e.Value.(*slot).moved = time.Now()
			b.order.MoveToBack(e)
		}
	case http.StateClosed, http.StateHijacked:
		b.forget(conn)
	}
}

// forget frees a connection's slot. The caller holds the lock.
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
