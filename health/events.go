package health

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// maxStreams bounds the subscribers of /events. They use at most a quarter of the files that
	// may be open, and none of the connections that are kept for probes.
	maxStreams = 1024
	// streamBuffer is how many bytes the kernel keeps for a subscriber that does not read, and
	// receiveBuffer how many of what one sends, which is nothing. Linux takes twice that.
	streamBuffer, receiveBuffer = 32 << 10, 4 << 10
	// quietTime is how long a stream may be silent. Proxies close connections that are silent for
	// a minute, and a client can notice that a connection has died.
	quietTime = 10 * time.Second
	// settleTime is how long a change waits for others. The start of a job goes first.
	settleTime = 5 * time.Millisecond
	// vanishedAfter is after which time a client is dropped that takes nothing.
	vanishedAfter = 30 * time.Second
)

// events sends each change of the status to the subscribers of /events, as server-sent events
// (https://html.spec.whatwg.org/multipage/server-sent-events.html).
//
// One goroutine writes to all of them, and waits for none. An event that does not fit into a
// subscriber's buffer in the kernel closes its connection. So does whatever a subscriber sends,
// because nobody reads that. So it gets every change in order, except for what changes back within
// milliseconds, or learns that it has to connect again. It then gets the present status. What it
// has missed is not sent again: an old "leading" must not look like a new one.
type events struct {
	present func() (Snapshot, time.Duration)
	version string
	limit   int
	process string        // in each id: those of another process mean nothing here
	changed chan struct{} // Holds one signal that the status may have changed.
	count   atomic.Int64  // of streams
	terms   terms

	mu      sync.Mutex
	closed  bool
	streams map[*stream]struct{}
	last    string    // the last status, without the fields that change all the time
	told    string    // the terms that were last sent to all
	number  int       // of that status
	sent    time.Time // when something was last sent to all
}

// stream is the connection of a subscriber.
type stream struct {
	conn net.Conn
	raw  syscall.RawConn
}

func (s *stream) send(text []byte) bool { return sendNow(s.raw, text) }

func newEvents(present func() (Snapshot, time.Duration), version string) *events {
	return &events{
		present: present, version: version,
		limit:   int(min(maxStreams, max(8, openFiles()/4))),
		process: fmt.Sprintf("%08x", rand.Uint32()),
		changed: make(chan struct{}, 1), streams: map[*stream]struct{}{},
	}
}

// noteChange notes who leads, and has the subscribers get the status if it has changed. It never
// waits.
func (e *events) noteChange() {
	e.noteLeader()
	if e.count.Load() > 0 {
		e.wake()
	}
}

func (e *events) noteLeader() {
	e.terms.note(func() *Leader {
		s, _ := e.present()
		return s.Leader
	})
}

func (e *events) wake() {
	select {
	case e.changed <- struct{}{}:
	default:
	}
}

// run sends events until ctx ends. Then it closes all streams.
func (e *events) run(ctx context.Context) {
	defer e.close()
	for {
		timer := time.NewTimer(e.publish())
		select {
		case <-e.changed:
			timer.Reset(settleTime)
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// publish sends the status if it has changed, or a sign of life if nothing was sent for long. It
// returns after which time to look again.
func (e *events) publish() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.streams) == 0 {
		return time.Hour // subscribe wakes us
	}
	snapshot, now := e.present()
	switch event := e.update(snapshot, now); {
	case event != nil:
		e.broadcast(event)
	case time.Since(e.sent) >= quietTime:
		e.broadcast([]byte("event: alive\ndata:\n\n"))
	}
	wait := quietTime - time.Since(e.sent)
	// A deadline changes the status by itself (see Snapshot.update).
	for _, deadline := range []time.Duration{snapshot.StopAt, snapshot.End} {
		if deadline > now {
			wait = min(wait, deadline-now)
		}
	}
	return max(wait, time.Millisecond)
}

// update returns the event for the present status, or nil if the status has not changed. e.mu is
// held.
func (e *events) update(s Snapshot, now time.Duration) (event []byte) {
	st := s.status(now, e.version)
	text := encode(st.withoutClock(), "")
	if text == e.last {
		return nil
	}
	e.last = text
	e.number++
	e.noteLeader() // a deadline that passes may have changed it, and s may be old
	if terms := e.terms.json(); terms != e.told {
		e.told = terms
		event = termsEvent(terms)
	}
	return append(event, e.event(st)...)
}

// termsEvent is another event, so that whoever waits for a status does not get it. It has no id:
// the status after it has one.
func termsEvent(terms string) []byte { return fmt.Appendf(nil, "event: terms\ndata: %s\n", terms) }

func (e *events) id() string { return fmt.Sprintf("%s-%d", e.process, e.number) }

func (e *events) event(st status) []byte {
	return fmt.Appendf(nil, "id: %s\ndata: %s\n", e.id(), encode(st, ""))
}

// broadcast sends text to all, and drops whoever cannot take it. e.mu is held.
func (e *events) broadcast(text []byte) {
	e.sent = time.Now()
	for s := range e.streams {
		if !s.send(text) {
			delete(e.streams, s)
			_ = s.conn.Close()
		}
	}
	e.count.Store(int64(len(e.streams)))
}

func (e *events) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	for s := range e.streams {
		_ = s.conn.Close()
	}
	clear(e.streams)
	e.count.Store(0)
}

// serve answers /events. It takes the connection from the HTTP server, so that a subscriber costs
// neither a goroutine nor one of the connections that are for probes.
func (e *events) serve(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed || len(e.streams) >= e.limit {
		w.Header().Set("Retry-After", "5")
		write(w, http.StatusServiceUnavailable, "text/plain; charset=utf-8",
			fmt.Appendf(nil, "%d streams are open, and no more can be: ask /status\n",
				len(e.streams)))
		return
	}
	if r.Method != http.MethodGet {
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		write(w, http.StatusNotImplemented, "text/plain; charset=utf-8",
			[]byte("events need a connection of HTTP/1\n"))
		return
	}
	if buffered.Reader.Buffered() > 0 || !e.subscribe(conn, r.Header.Get("Last-Event-ID")) {
		_ = conn.Close()
	}
}

// subscribe sends the present status, unless that is the one that the client has, and what follows.
// It reports whether it could. e.mu is held.
func (e *events) subscribe(conn net.Conn, lastID string) bool {
	tcp, ok := conn.(*net.TCPConn)
	if !ok || tcp.SetDeadline(time.Time{}) != nil || tcp.SetWriteBuffer(streamBuffer) != nil ||
		tcp.SetReadBuffer(receiveBuffer) != nil {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil || setUserTimeout(raw) != nil {
		return false
	}
	snapshot, now := e.present()
	if event := e.update(snapshot, now); event != nil {
		e.broadcast(event)
	}
	// Not all come back at once when an elector has been replaced.
	text := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nDate: %s\r\nContent-Type: text/event-stream\r\n"+
		"Cache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\n"+
		"X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\nretry: %d\n\n",
		time.Now().UTC().Format(http.TimeFormat), 500+rand.N(1000))
	text = append(text, termsEvent(e.terms.json())...)
	if lastID != e.id() {
		text = append(text, e.event(snapshot.status(now, e.version))...)
	}
	s := &stream{conn, raw}
	if !s.send(text) {
		return false
	}
	e.streams[s] = struct{}{}
	e.count.Store(int64(len(e.streams)))
	e.wake() // The time until the next sign of life or deadline counts from now on.
	return true
}
