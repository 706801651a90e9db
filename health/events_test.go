//go:build linux

package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"leasehold/e2e/harness"
)

// newSubscriber subscribes to the server, by way of the address.
func newSubscriber(t *testing.T, addr, lastID string) *harness.EventStream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	s, err := harness.Subscribe(ctx, "http://"+addr+"/events", lastID)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); s.Close() })
	return s
}

// next returns the next event and the token in it.
func next(t *testing.T, s *harness.EventStream) (id string, st status) {
	t.Helper()
	e, err := s.Next()
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(e.Data), &st); err != nil {
		t.Fatalf("%q: %v", e.Data, err)
	}
	return e.ID, st
}

// lead makes the server's candidate the leader with that token.
func (ts *testServer) lead(token int64) {
	s := leading(func(s *Snapshot) { s.Leader.Token = token })
	ts.snapshot.Store(&s)
	ts.server.Changed()
}

func (ts *testServer) streams() int { return int(ts.server.events.count.Load()) }

// TestEvents: a client gets the present status and each change of it, through a TCP proxy and
// through an HTTP proxy that keeps what it gets for a while. The end of the server ends the stream.
func TestEvents(t *testing.T) {
	ts := newTestServer(t, leading())
	tcp, err := harness.StartProxy("127.0.0.1:0", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tcp.Close)
	reverse := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: ts.addr})
	reverse.FlushInterval = time.Hour
	reverse.Transport = &http.Transport{DisableKeepAlives: true}
	front := httptest.NewServer(reverse)
	t.Cleanup(front.Close)

	for name, addr := range map[string]string{
		"direct": ts.addr, "TCP proxy": tcp.Addr(), "HTTP proxy": front.Listener.Addr().String(),
	} {
		ts.lead(17)
		s := newSubscriber(t, addr, "")
		seen := map[string]bool{}
		for token := int64(17); token < 22; token++ {
			id, st := next(t, s)
			if st.State != Leading || st.Leader.Token != token || seen[id] {
				t.Fatalf("%s: event %q: %+v, want token %d and a new id", name, id, st, token)
			}
			if d := st.Deadlines; d.Now != 100 || d.StopAt != 110 || d.End != 115 {
				t.Errorf("%s: deadlines %+v", name, d)
			}
			seen[id] = true
			ts.lead(token + 1)
		}
		// What is no change is no event.
		id, _ := next(t, s)
		ts.now.Add(int64(time.Millisecond))
		ts.lead(22)
		ts.lead(23)
		if again, st := next(t, s); again == id || st.Leader.Token != 23 {
			t.Errorf("%s: after %s comes %s, token %d", name, id, again, st.Leader.Token)
		}
		ts.now.Store(int64(100 * time.Second))
		s.Close()
	}

	ctx, cancel := context.WithCancel(t.Context())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	registry := prometheus.NewRegistry()
	other := New(Config{
		Logger: ts.server.cfg.Logger, Registerer: registry, Gatherer: registry,
		Snapshot: ts.server.cfg.Snapshot, Now: ts.server.cfg.Now,
	})
	go func() { done <- other.Run(ctx, l) }()
	s := newSubscriber(t, l.Addr().String(), "")
	next(t, s)
	cancel()
	if e, err := s.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("after the server's end: %+v, %v", e, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// seenTerms returns the next terms of a stream, the latest first.
func seenTerms(t *testing.T, s *harness.EventStream) (seen []SeenTerm) {
	t.Helper()
	e, err := s.NextOf("terms")
	if err == nil {
		err = json.Unmarshal([]byte(e.Data), &seen)
	}
	if err != nil || e.ID != "" {
		t.Fatalf("terms %+v: %v", e, err)
	}
	return seen
}

// TestEvents_Terms: whoever subscribes learns who has led before, and who leads from then on.
func TestEvents_Terms(t *testing.T) {
	ts := newTestServer(t, leading())
	ts.lead(17)
	nobody := standbyOf(nil)
	ts.snapshot.Store(&nobody)
	ts.server.Changed()
	other := standbyOf(&Leader{Identity: "b", Token: 18})
	ts.snapshot.Store(&other)
	ts.server.Changed()
	s := newSubscriber(t, ts.addr, "")
	seen := seenTerms(t, s)
	if len(seen) != 2 || seen[0].Identity != "b" || seen[0].Token != 18 || seen[0].Until != nil ||
		seen[1].Token != 17 || seen[1].Until == nil || *seen[1].Until < seen[1].Since {
		t.Errorf("terms: %+v", seen)
	}
	// It is not known for a while who leads, and then it is the same.
	ts.snapshot.Store(&nobody)
	ts.server.Changed()
	if seen = seenTerms(t, s); seen[0].Until == nil {
		t.Errorf("terms: %+v", seen)
	}
	ts.snapshot.Store(&other)
	ts.server.Changed()
	if again := seenTerms(t, s); len(again) != 2 || again[0].Until != nil ||
		again[0].Since != seen[0].Since {
		t.Errorf("terms: %+v", again)
	}
	for token := int64(19); token <= 18+maxTerms; token++ {
		ts.lead(token)
		if seen = seenTerms(t, s); seen[0].Token != token || seen[0].Until != nil ||
			seen[1].Until == nil {
			t.Errorf("terms after token %d: %+v", token, seen[:2])
		}
	}
	if len(seen) != maxTerms {
		t.Errorf("%d terms are kept, want %d", len(seen), maxTerms)
	}
	if id, st := next(t, s); id == "" || st.Leader.Token != 18+maxTerms {
		t.Errorf("the status after them: %q, %+v", id, st.Leader)
	}
	// The longest names that a candidate keeps, each byte escaped, fit into a stream's buffer.
	for token := int64(100); token < 100+maxTerms; token++ {
		long := standbyOf(&Leader{Identity: strings.Repeat("\x1b", 256), Token: token})
		ts.snapshot.Store(&long)
		ts.server.Changed()
	}
	s = newSubscriber(t, ts.addr, "")
	if seen = seenTerms(t, s); len(seen) != maxTerms || len(seen[0].Identity) != 256 {
		t.Errorf("%d terms, a name of %d bytes", len(seen), len(seen[0].Identity))
	}
	if _, st := next(t, s); st.Leader.Token != 99+maxTerms {
		t.Errorf("the status after them: %+v", st.Leader)
	}
}

// TestEvents_TermsInOrder: who led before does not come back because somebody looked earlier, and
// notes it later.
func TestEvents_TermsInOrder(t *testing.T) {
	var leader atomic.Int64
	var slow atomic.Bool // The next look takes until goOn is closed.
	looked, goOn := make(chan struct{}), make(chan struct{})
	e := newEvents(func() (Snapshot, time.Duration) {
		s := standbyOf(&Leader{Identity: "a", Token: leader.Load()})
		if slow.CompareAndSwap(true, false) {
			close(looked)
			<-goOn
		}
		return s, 0
	}, "")
	leader.Store(17)
	e.noteChange()
	old, now := e.present()
	leader.Store(18)
	e.noteChange()
	e.mu.Lock()
	e.update(old, now)
	e.mu.Unlock()
	e.noteChange()

	slow.Store(true)
	var noted sync.WaitGroup
	noted.Go(e.noteChange)
	<-looked
	leader.Store(19)
	second := make(chan struct{})
	noted.Go(func() { e.noteChange(); close(second) })
	select {
	case <-second: // It did not wait for the first one.
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	noted.Wait()
	e.noteChange()
	var tokens []int64
	for _, term := range e.terms.seen {
		tokens = append(tokens, term.Token)
	}
	if want := []int64{19, 18, 17}; !slices.Equal(tokens, want) {
		t.Errorf("terms %v, want %v", tokens, want)
	}
}

// standbyOf is the state of a candidate that waits.
func standbyOf(leader *Leader) Snapshot {
	return leading(standby, func(s *Snapshot) { s.Leader = leader })
}

// TestEvents_Deadlines: that stop-at passes is an event, although nothing else changes.
func TestEvents_Deadlines(t *testing.T) {
	ts := newTestServer(t, leading())
	ts.now.Store(int64(110*time.Second - 500*time.Millisecond))
	s := newSubscriber(t, ts.addr, "")
	if _, st := next(t, s); st.State != Leading {
		t.Fatalf("state %s", st.State)
	}
	time.Sleep(100 * time.Millisecond) // Now it is no longer the new subscriber that is looked at.
	began := time.Now()
	ts.now.Store(int64(110 * time.Second))
	if _, st := next(t, s); st.State != Stopping {
		t.Errorf("state %s after stop-at", st.State)
	}
	if took := time.Since(began); took > quietTime/2 {
		t.Errorf("the event came after %v, with a sign of life", took)
	}
}

// TestEvents_LastEventID: whoever comes back gets the present status, unless it has that one. The
// id of another process means nothing.
func TestEvents_LastEventID(t *testing.T) {
	ts := newTestServer(t, leading())
	s := newSubscriber(t, ts.addr, "")
	first, _ := next(t, s)
	s.Close()
	same := newSubscriber(t, ts.addr, first)
	ts.lead(18)
	second, st := next(t, same)
	if second == first || st.Leader.Token != 18 {
		t.Errorf("after %s comes %s, with token %d", first, second, st.Leader.Token)
	}
	ts.lead(19)
	process, number, _ := strings.Cut(second, "-")
	for _, lastID := range []string{first, second, "", "x", "00000000-" + number, process} {
		if _, st := next(t, newSubscriber(t, ts.addr, lastID)); st.Leader.Token != 19 {
			t.Errorf("after %q comes token %d", lastID, st.Leader.Token)
		}
	}
}

// TestEvents_Crowd: a thousand subscribers all get every event. No more than the limit are served,
// probes are answered meanwhile, and whoever leaves makes room.
func TestEvents_Crowd(t *testing.T) {
	ts := newTestServer(t, leading())
	limit := ts.server.events.limit
	if limit < 1000 {
		if os.Getenv("E2E_NO_SKIP") == "1" {
			t.Fatal("needs a limit of 4000 open files, and E2E_NO_SKIP=1 forbids to skip")
		}
		t.Skipf("skipped: with this limit of open files %d streams can be open", limit)
	}
	began := time.Now()
	ready := make(chan struct{}, limit)
	slowest := make(chan time.Duration, limit)
	changed := make(chan struct{})
	var at time.Time
	var all sync.WaitGroup
	streams := make([]*harness.EventStream, limit)
	for i := range limit {
		all.Go(func() {
			s, err := harness.Subscribe(t.Context(), "http://"+ts.addr+"/events", "")
			for err != nil && t.Context().Err() == nil { // replaced in the rush
				s, err = harness.Subscribe(t.Context(), "http://"+ts.addr+"/events", "")
			}
			if err != nil {
				t.Error(err)
				return
			}
			streams[i] = s
			for _, token := range []string{"17", "18"} {
				e, err := s.Next()
				if err != nil || !strings.Contains(e.Data, `"token":`+token) {
					t.Errorf("subscriber %d gets %q, %v, want token %s", i, e.Data, err, token)
				}
				if token == "17" {
					ready <- struct{}{}
				}
			}
			<-changed
			slowest <- time.Since(at)
		})
	}
	for range limit {
		<-ready
	}
	t.Logf("%d subscribers after %v", limit, time.Since(began))

	resp, err := http.Get("http://" + ts.addr + "/events")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" ||
		!strings.Contains(string(body), "/status") {
		t.Errorf("one subscriber too many: %s %v %s", resp.Status, resp.Header, body)
	}
	for _, path := range []string{"/livez", "/leader", "/status", "/metrics"} {
		if got := ts.do(t, "GET", path); got.code != http.StatusOK {
			t.Errorf("%s beside %d subscribers: %d %s", path, limit, got.code, got.body)
		}
	}
	at = time.Now()
	ts.lead(18)
	took := time.Since(at)
	close(changed)
	all.Wait()
	close(slowest)
	worst := slices.Max(slices.Collect(func(yield func(time.Duration) bool) {
		for d := range slowest {
			if !yield(d) {
				return
			}
		}
	}))
	t.Logf("noting a change took %v; the last of %d has it after %v", took, limit, worst)
	for _, s := range streams[:limit/2] {
		s.Close()
	}
	for token := int64(19); ts.streams() > limit/2; token++ {
		ts.lead(token)
		time.Sleep(time.Millisecond)
	}
	if _, st := next(t, newSubscriber(t, ts.addr, "")); st.Leader.Token < 19 {
		t.Errorf("token %d", st.Leader.Token)
	}
	for _, s := range streams[limit/2:] {
		s.Close()
	}
}

// TestEvents_SlowReader: a subscriber that does not read is dropped. Another one gets every event
// meanwhile, and nobody who notes a change waits.
func TestEvents_SlowReader(t *testing.T) {
	ts := newTestServer(t, leading())
	slow, err := net.Dial("tcp", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	_ = slow.(*net.TCPConn).SetReadBuffer(4 << 10)
	_, _ = io.WriteString(slow, "GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
	s := newSubscriber(t, ts.addr, "")
	next(t, s)
	for ts.streams() < 2 {
		time.Sleep(time.Millisecond)
	}
	token := int64(17)
	for ts.streams() == 2 {
		token++
		began := time.Now()
		ts.lead(token)
		if took := time.Since(began); took > time.Second {
			t.Errorf("noting a change took %v", took)
		}
		if _, st := next(t, s); st.Leader.Token != token {
			t.Fatalf("token %d, want %d", st.Leader.Token, token)
		}
		if token > 100_000 {
			t.Fatal("a subscriber that does not read is kept")
		}
	}
	t.Logf("dropped after %d events", token-17)
	// What it got is whole events, in order, and then the end.
	_ = slow.SetReadDeadline(time.Now().Add(10 * time.Second))
	text, _ := io.ReadAll(slow)
	for i, want := 0, 17; want < 20; want++ {
		at := strings.Index(string(text[i:]), fmt.Sprintf(`"token":%d`, want))
		if at < 0 {
			t.Fatalf("the slow subscriber has not got token %d: %.2000s", want, text)
		}
		i += at
	}
}

// TestEvents_Talker: a subscriber that sends something is dropped, at once or with the next event,
// and so is one that has closed its side. What it sends takes no memory.
func TestEvents_Talker(t *testing.T) {
	ts := newTestServer(t, leading())
	const request = "GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
	for name, talk := range map[string]func(*net.TCPConn){
		"more":            func(c *net.TCPConn) { _, _ = io.WriteString(c, "x") },
		"a megabyte":      func(c *net.TCPConn) { _, _ = c.Write(make([]byte, 1<<20)) },
		"another request": func(c *net.TCPConn) { _, _ = io.WriteString(c, request) },
		"the end":         func(c *net.TCPConn) { _ = c.CloseWrite() },
	} {
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(conn, request)
		for ts.streams() < 1 {
			time.Sleep(time.Millisecond)
		}
		ended := make(chan struct{})
		go func() { talk(conn.(*net.TCPConn)); close(ended) }()
		for token := int64(18); ts.streams() > 0; token++ {
			if token > 100 { // less than fills its buffer
				t.Fatalf("%s: the subscriber is kept", name)
			}
			ts.lead(token)
			time.Sleep(2 * settleTime)
		}
		<-ended // What does not fit is not taken: the write ends with an error.
		_ = conn.Close()
	}
}

// TestEvents_Quiet: a stream on which nothing happens has signs of life.
func TestEvents_Quiet(t *testing.T) {
	ts := newTestServer(t, Snapshot{State: Connecting})
	s, err := net.Dial("tcp", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, _ = io.WriteString(s, "GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
	for ts.streams() < 1 {
		time.Sleep(time.Millisecond)
	}
	e := ts.server.events
	e.mu.Lock()
	e.sent = e.sent.Add(-quietTime)
	e.mu.Unlock()
	e.wake()
	_ = s.SetReadDeadline(time.Now().Add(10 * time.Second))
	var text strings.Builder
	for !strings.HasSuffix(text.String(), "}\n\nevent: alive\ndata:\n\n") {
		b := make([]byte, 4096)
		n, err := s.Read(b)
		text.Write(b[:n])
		if err != nil {
			t.Fatalf("%v: %s", err, text.String())
		}
	}
	if !strings.Contains(text.String(), "retry: ") {
		t.Errorf("no time to wait before a client comes back: %s", text.String())
	}
}
