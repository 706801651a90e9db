package health

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testServer is a server on a port of its own. Its clock stands at now.
type testServer struct {
	server   *Server
	addr     string
	snapshot atomic.Pointer[Snapshot]
	now      atomic.Int64
	log      lockedBuffer
	stop     func() // ends it; the end of the test does, too
}

func newTestServer(t *testing.T, s Snapshot) *testServer {
	t.Helper()
	ts := &testServer{}
	ts.snapshot.Store(&s)
	ts.now.Store(int64(100 * time.Second))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ts.addr = l.Addr().String()
	registry := prometheus.NewRegistry()
	ts.server = New(Config{
		Logger:     slog.New(slog.NewTextHandler(&ts.log, nil)),
		Registerer: registry, Gatherer: registry,
		Snapshot: func() Snapshot { return *ts.snapshot.Load() },
		Now:      func() time.Duration { return time.Duration(ts.now.Load()) },
		Version:  "v1",
		Name:     "here.example",
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ts.server.Run(ctx, l) }()
	ts.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("Run does not end")
		}
	})
	t.Cleanup(ts.stop)
	return ts
}

func (ts *testServer) do(t *testing.T, method, path string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+ts.addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		},
		Timeout: 5 * time.Second,
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return answer{resp.StatusCode, resp.Header, string(body)}
}

type answer struct {
	code   int
	header http.Header
	body   string
}

func TestServer_Methods(t *testing.T) {
	ts := newTestServer(t, leading())
	for _, c := range []struct {
		path string
		code int
	}{
		{"/livez", 200},
		{"/readyz", 200},
		{"/leader", 200},
		{"/standby", 503},
		{"/status", 200},
		{"/", 200},
		{"/metrics", 200},
		{"/nowhere", 404},
		{"/leader/", 404},
		{"/leader/x", 404},
	} {
		for _, method := range []string{"GET", "HEAD", "OPTIONS"} {
			got := ts.do(t, method, c.path)
			if got.code != c.code {
				t.Errorf("%s %s: %d, want %d", method, c.path, got.code, c.code)
			}
			if empty := got.body == ""; c.code != 404 && empty != (method != "GET") {
				t.Errorf("%s %s: body %q", method, c.path, got.body)
			}
			if method == "OPTIONS" && c.code != 404 &&
				got.header.Get("Allow") != "GET, HEAD, OPTIONS" {
				t.Errorf("%s %s: Allow %q", method, c.path, got.header.Get("Allow"))
			}
		}
		for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "TRACE", "NONSENSE"} {
			want := 405
			if c.code == 404 {
				want = 404
			}
			if got := ts.do(t, method, c.path); got.code != want {
				t.Errorf("%s %s: %d, want %d", method, c.path, got.code, want)
			}
		}
	}
}

func TestServer_EveryEndpointIsListed(t *testing.T) {
	ts := newTestServer(t, leading())
	for _, e := range Endpoints() {
		if ts.do(t, "HEAD", e.Path).code == 404 {
			t.Errorf("%s is listed and not there", e.Path)
		}
	}
}

func TestServer_Answers(t *testing.T) {
	ts := newTestServer(t, leading())
	if got := ts.do(t, "GET", "/leader"); got.body != "ok\n" {
		t.Errorf("/leader: %q", got.body)
	}
	ts.now.Store(int64(110 * time.Second))
	if got := ts.do(t, "GET", "/leader"); got.code != 503 ||
		got.body != "stopping: contact with etcd lost: stop-at has passed\n" {
		t.Errorf("/leader at stop-at: %d %q", got.code, got.body)
	}
	for _, path := range []string{"/", "/status"} {
		got := ts.do(t, "GET", path)
		var said struct{ Name, State string }
		if err := json.Unmarshal([]byte(got.body), &said); err != nil {
			t.Error(err)
		}
		if said.Name != "b" || said.State != Stopping ||
			got.header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %v %s", path, got.header, got.body)
		}
	}
	body := ts.do(t, "GET", "/metrics").body
	want := fmt.Sprintf("leasehold_build_info{goversion=%q,version=\"v1\"} 1", runtime.Version())
	if !strings.Contains(body, want) {
		t.Errorf("/metrics has no %s: %s", want, body)
	}
}

// TestServer_Metrics: the metrics are of the moment in which they are asked for.
func TestServer_Metrics(t *testing.T) {
	ts := newTestServer(t, leading())
	for _, c := range []struct {
		name     string
		snapshot Snapshot
		now      time.Duration
		want     map[string]float64
	}{
		{"leading", leading(), 100 * time.Second, map[string]float64{
			"ready": 1, "blocked": 0, "held": 0, "lease_ttl_seconds": 20, "fencing_token": 17,
			"candidates":                        1,
			"last_transition_timestamp_seconds": 1767319445.006,
		}},
		{"past stop-at", leading(), 110 * time.Second, map[string]float64{
			"ready": 0, "fencing_token": 17,
		}},
		{"past the lease's end", leading(), 115 * time.Second, map[string]float64{
			"ready": 0, "fencing_token": 0, "candidates": 0,
		}},
		{"third in the queue", leading(standby, func(s *Snapshot) {
			s.Queue = &Queue{Ahead: 2}
		}), 100 * time.Second, map[string]float64{"candidates": 3}},
		{"nothing", Snapshot{
			State: Connecting, Blocker: &Blocker{}, Hold: &Hold{},
		}, 0, map[string]float64{
			"ready": 0, "blocked": 1, "held": 1, "lease_ttl_seconds": 0, "fencing_token": 0,
			"last_transition_timestamp_seconds": 0,
		}},
	} {
		ts.snapshot.Store(&c.snapshot)
		ts.now.Store(int64(c.now))
		body := ts.do(t, "GET", "/metrics").body
		for name, want := range c.want {
			_, after, _ := strings.Cut(body, "\nleasehold_"+name+" ")
			text, _, _ := strings.Cut(after, "\n")
			if got, err := strconv.ParseFloat(text, 64); err != nil || got != want {
				t.Errorf("%s: leasehold_%s is %s, want %v", c.name, name, text, want)
			}
		}
	}
}

// TestServer_Host: a web page that gives its own name our address by DNS reads nothing, while
// probes are answered for any name.
func TestServer_Host(t *testing.T) {
	ts := newTestServer(t, leading())
	ask := func(method, path, host string) (int, string) {
		t.Helper()
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.WriteString(conn, method+" "+path+" "+host+"\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
		if err != nil {
			t.Fatalf("%s %s %q: %v", method, path, host, err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	for host, want := range map[string]int{
		"HTTP/1.0":                               200,
		"HTTP/1.0\r\nHost: evil.example":         421,
		"HTTP/1.1\r\nHost: evil.example":         421,
		"HTTP/1.1\r\nHost: evil.example:4040":    421,
		"HTTP/1.1\r\nHost: localhost.evil":       421,
		"HTTP/1.1\r\nHost: 127.0.0.1.evil":       421,
		"HTTP/1.1\r\nHost: evil:127.0.0.1":       421,
		"HTTP/1.1\r\nHost: [evil]":               421,
		"HTTP/1.1\r\nHost: localhost":            200,
		"HTTP/1.1\r\nHost: LocalHost:1":          200,
		"HTTP/1.1\r\nHost: 10.1.2.3":             200,
		"HTTP/1.1\r\nHost: 10.1.2.3:4040":        200,
		"HTTP/1.1\r\nHost: [::1]":                200,
		"HTTP/1.1\r\nHost: [fd00::1]:4040":       200,
		"HTTP/1.1\r\nHost: Here.Example":         200,
		"HTTP/1.1\r\nHost: here.example:9999":    200,
		"HTTP/1.1\r\nHost: sub.here.example:404": 421,
	} {
		for _, path := range []string{"/status", "/", "/metrics", "/livez", "/readyz", "/leader"} {
			want := want
			if strings.HasSuffix(path, "z") || path == "/leader" {
				want = 200
			}
			for _, method := range []string{"GET", "HEAD", "OPTIONS"} {
				code, body := ask(method, path, host)
				if code != want {
					t.Errorf("%s %s %q: %d, want %d", method, path, host, code, want)
				}
				if code == 421 && method == "GET" && !strings.Contains(body, "LEASEHOLD_LISTEN") {
					t.Errorf("%s %s %q: the answer does not say what to do: %q",
						method, path, host, body)
				}
			}
		}
	}
}

func TestServer_MalformedHTTP(t *testing.T) {
	ts := newTestServer(t, leading())
	for _, text := range []string{
		"\r\n\r\n", "\x00\x01\x02\x03\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n",
		"GET /leader HTTP/1.1\r\n\r\n", // No host.
		"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n",
		"GET " + strings.Repeat("/x", 1<<19) + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
		"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", // The beginning of a TLS handshake.
	} {
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.WriteString(conn, text)
		_ = conn.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
		_ = conn.Close()
	}
	// HAProxy's own check: HTTP/1.0, no Host.
	conn, err := net.Dial("tcp", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = io.WriteString(conn, "OPTIONS /leader HTTP/1.0\r\n\r\n")
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil ||
		!strings.Contains(line, " 200 ") {
		t.Errorf("HAProxy's check: %q, %v", line, err)
	}
	if text := ts.log.String(); text != "" {
		t.Errorf("clients can make the daemon log: %s", text)
	}
}

// TestServer_SlowClients: 1,000 connections that send a byte and no more neither pile up nor keep a
// probe waiting.
func TestServer_SlowClients(t *testing.T) {
	ts := newTestServer(t, leading())
	before := runtime.NumGoroutine()
	var crowd []net.Conn
	defer func() {
		for _, conn := range crowd {
			_ = conn.Close()
		}
	}()
	for i := range 1000 {
		conn, err := net.DialTimeout("tcp", ts.addr, 5*time.Second)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		crowd = append(crowd, conn)
		if i%2 == 0 {
			_, _ = io.WriteString(conn, "G")
		}
	}
	began := time.Now()
	if got := ts.do(t, "GET", "/leader"); got.code != 200 {
		t.Errorf("/leader: %d %s", got.code, got.body)
	}
	// Three times as many are ahead of it as are served at once. Each of these groups gives way
	// after restTimeout, and not only after ReadHeaderTimeout.
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("a probe among slow clients took %v", took)
	}
	if n := runtime.NumGoroutine() - before; n > maxConns+20 {
		t.Errorf("%d goroutines serve slow clients", n)
	}
	if text := ts.log.String(); text != "" {
		t.Errorf("clients can make the daemon log: %s", text)
	}
}

// TestServer_Burst: 1,000 honest requests at once are all answered. A client that a starved machine
// holds up between connecting and asking may lose its place, and tries again.
func TestServer_Burst(t *testing.T) {
	ts := newTestServer(t, leading())
	ask := func() error {
		conn, err := net.DialTimeout("tcp", ts.addr, 10*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(conn, "GET /leader HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		text, err := io.ReadAll(conn)
		if err == nil && !bytes.Contains(text, []byte("200 OK")) {
			err = fmt.Errorf("the answer is %q", text)
		}
		return err
	}
	var wg sync.WaitGroup
	var again atomic.Int64
	for range 1000 {
		wg.Go(func() {
			err := ask()
			for range 2 {
				if err != nil {
					again.Add(1)
					err = ask()
				}
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	// 138 were seen with the race detector on a machine that was short of processor time. A server
	// that does not serve in turn makes all but the first 256 try again.
	if n := again.Load(); n > 500 {
		t.Errorf("%d of 1000 requests had to be tried again", n)
	}
}

// TestServer_StopsWhileClientsStay: an idle client and a slow one do not hold up the end.
func TestServer_StopsWhileClientsStay(t *testing.T) {
	ts := newTestServer(t, leading()) // Its clean-up sees to it that Run ends.
	for _, text := range []string{"", "GET /lead", "GET /leader HTTP/1.1\r\nHost: x\r\n\r\n"} {
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = io.WriteString(conn, text)
	}
}

func TestServer_ListenerFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	registry := prometheus.NewRegistry()
	server := New(Config{
		Logger: slog.New(slog.DiscardHandler), Registerer: registry, Gatherer: registry,
	})
	if err := server.Run(t.Context(), l); err == nil {
		t.Error("no error from a closed listener")
	}
}

func TestCheck(t *testing.T) {
	ts := newTestServer(t, leading())
	_, port, _ := net.SplitHostPort(ts.addr)
	foreign, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/readyz" {
				http.NotFound(w, r)
				return
			}
			_, _ = io.WriteString(w, "\x1b[2J\u009b2J\nok")
		}),
		ReadHeaderTimeout: time.Second,
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(foreign) }()
	defer func() { server.Close(); <-served }()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // Never accepts.
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	t.Setenv("HTTP_PROXY", "http://"+closed.Addr().String())
	t.Setenv("http_proxy", "http://"+closed.Addr().String())

	for _, c := range []struct {
		listen, what string
		want         error
		says         string
	}{
		{ts.addr, "", nil, "ok\n"},
		{ts.addr, "live", nil, "ok\n"},
		{ts.addr, "ready", nil, "ok\n"},
		{ts.addr, "leader", nil, "ok\n"},
		{ts.addr, "standby", ErrNo, "leading\n"},
		{":" + port, "leader", nil, "ok\n"},
		{"0.0.0.0:" + port, "leader", nil, "ok\n"},
		{"localhost:" + port, "leader", nil, "ok\n"},
		{"off", "live", ErrNoAnswer, "nobody answers: LEASEHOLD_LISTEN is off"},
		{"nonsense", "live", ErrNoAnswer, "nobody answers: address nonsense"},
		{closed.Addr().String(), "live", ErrNoAnswer, "connection refused"},
		{foreign.Addr().String(), "live", ErrNoAnswer, "something else than leasehold listens"},
		{foreign.Addr().String(), "ready", nil, "�[2J�2J\nok\n"},
		{ts.addr, "nonsense", ErrNoAnswer, "can't be asked for"},
		{silent.Addr().String(), "live", ErrNoAnswer, "deadline exceeded"},
	} {
		var out bytes.Buffer
		began := time.Now()
		err := Check(t.Context(), c.listen, c.what, &out)
		text := out.String()
		if errors.Is(err, ErrNoAnswer) {
			text += err.Error()
		}
		if !errors.Is(err, c.want) || !strings.Contains(text, c.says) {
			t.Errorf("check %s at %s: %v, %q, want %v, %q",
				c.what, c.listen, err, text, c.want, c.says)
		}
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("check %s at %s took %v", c.what, c.listen, took)
		}
	}
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
