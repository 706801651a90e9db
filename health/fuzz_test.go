package health

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
)

// plain reports whether a terminal shows the text as it is. It may have several lines.
func plain(text string) bool {
	return utf8.ValidString(text) &&
		!strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) })
}

// FuzzRequest: every request gets one of the documented answers, a small one, and only from the
// paths that there are. A request for a stranger's host name gets neither status nor metrics.
func FuzzRequest(f *testing.F) {
	for _, request := range []string{
		"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", "OPTIONS /leader HTTP/1.0\r\n\r\n",
		"HEAD / HTTP/1.0\r\n\r\n",
		"GET /status HTTP/1.1\r\nHost: evil.example:80\r\n\r\n",
		"POST /readyz HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /metrics HTTP/1.1\r\nHost: [::1]:4040\r\nAccept-Encoding: gzip\r\nAccept: */*\r\n\r\n",
		"GET //evil.example/..//status?x HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
		"CONNECT evil.example:80 HTTP/1.1\r\n\r\n",
		"GET http://evil.example/status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
		"GET /standby HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
		"GET /%2fstatus HTTP/1.1\r\nHost:\r\n\r\n", "GET /%2f HTTP/1.0\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n\r\n",
		"GET /events HTTP/1.0\r\n\r\n",
		"GET /events HTTP/1.1\r\nHost: evil.example\r\n\r\n", "OPTIONS /events HTTP/1.0\r\n\r\n",
		"GET //?#%zz HTTP/1.0\r\n\r\n", "GET http:x HTTP/1.0\r\n\r\n",
		"CONNECT /%2f HTTP/1.0\r\n\r\n", "HEAD /./%2f/..%2F HTTP/1.0\r\n\r\n",
		"GET //" + strings.Repeat("\"", 3500) + " HTTP/1.0\r\n\r\n",
	} {
		f.Add([]byte(request))
	}
	registry := prometheus.NewRegistry()
	handler := New(Config{
		Logger: slog.New(slog.DiscardHandler), Registerer: registry, Gatherer: registry,
		Snapshot: func() Snapshot { return leading() },
		Now:      func() time.Duration { return 100 * time.Second },
		Version:  "v1", Name: "here.example",
	}).handler
	f.Fuzz(func(t *testing.T, request []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(request)))
		if err != nil {
			return // net/http answers 400 by itself
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		got := w.Result()
		defer got.Body.Close()
		body, err := io.ReadAll(got.Body)
		if err != nil {
			t.Fatal(err)
		}
		path, asked := r.URL.Path, slices.Contains([]string{"GET", "HEAD", "OPTIONS"}, r.Method)
		if r.URL.EscapedPath() != path && path == "//" {
			path = "/" // net/http's mux takes /%2f for / and does not clean it
		}
		known := slices.ContainsFunc(Endpoints(), func(e Endpoint) bool { return e.Path == path })
		secret := path == "/" || path == "/status" || path == "/metrics" || path == "/events"
		ok := false
		switch got.StatusCode {
		case http.StatusOK:
			ok = known && asked && path != "/standby" && (!secret || isOurs(r.Host)) &&
				got.Header.Get("Content-Type") != ""
		case http.StatusServiceUnavailable:
			ok = asked && path == "/standby" && got.Header.Get("Cache-Control") == "no-store"
		case http.StatusNotImplemented: // The recorder has no connection.
			ok = r.Method == "GET" && path == "/events" && isOurs(r.Host)
		case http.StatusMisdirectedRequest:
			ok = asked && secret
		case http.StatusMethodNotAllowed:
			ok = !asked && got.Header.Get("Allow") == "GET, HEAD, OPTIONS"
		case http.StatusNotFound:
			ok = !known
		case http.StatusBadRequest:
			ok = r.RequestURI == "*"
		case http.StatusMovedPermanently, http.StatusTemporaryRedirect:
			// net/http cleans paths. It must lead to no other host. The query is as it was asked.
			location, _, _ := strings.Cut(got.Header.Get("Location"), "?")
			to, err := url.Parse(location)
			ok = err == nil && !known && to.Host == "" && to.Scheme == "" &&
				strings.HasPrefix(to.Path, "/") && !strings.HasPrefix(to.Path, "//")
		}
		// A redirection may have each byte of the path as five.
		if !ok || len(body) > 16<<10+5*len(request) ||
			r.Method == http.MethodOptions && known && len(body) > 0 {
			t.Errorf("%q: %d %q %.200q", request, got.StatusCode, got.Header, body)
		}
	})
}

// isOurs reports whether no web page can have this host name: it is empty, an address, localhost,
// or the name in LEASEHOLD_LISTEN, with a port or without.
func isOurs(host string) bool {
	names := []string{host}
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		names = append(names, host[:i])
	}
	return slices.ContainsFunc(names, func(name string) bool {
		name = strings.Trim(name, "[]")
		_, err := netip.ParseAddr(name)
		return err == nil || name == "" || strings.EqualFold(name, "localhost") ||
			strings.EqualFold(name, "here.example")
	})
}

// FuzzAnswer: whatever listens where a daemon should, leasehold check says yes to a 200 and no to a
// 503 alone, ends soon, and shows little of the answer, and nothing that does something to a
// terminal.
func FuzzAnswer(f *testing.F) {
	for _, answer := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n",
		"HTTP/1.1 503 x\r\n\r\nconnecting: \x1b[2J\u009b\n\nx",
		"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx",
		"HTTP/1.0 404 \x1b[2J\r\n\r\n", "SSH-2.0-OpenSSH_9.2\x1b\r\n",
		"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nok\n\r\n0\r\n\r\n", "",
		"HTTP/1.1 101 x\r\n\r\nx",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 5000) + "\r\n\r\n",
	} {
		f.Add([]byte(answer))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = l.Close() })
	var now atomic.Pointer[[]byte]
	go serveAnswers(l, &now)
	f.Fuzz(func(t *testing.T, answer []byte) {
		now.Store(&answer)
		var out bytes.Buffer
		err := Check(t.Context(), l.Addr().String(), "leader", &out)
		switch {
		case err == nil:
			if !bytes.Contains(answer, []byte(" 200")) {
				t.Errorf("%q is a yes", answer)
			}
		case errors.Is(err, ErrNo):
			if !bytes.Contains(answer, []byte(" 503")) {
				t.Errorf("%q is a no", answer)
			}
		case !errors.Is(err, ErrNoAnswer):
			t.Errorf("%q: %v", answer, err)
		}
		if err != nil && (!plain(err.Error()) || len(err.Error()) > 2200) {
			t.Errorf("%q: %q", answer, err)
		}
		if !plain(out.String()) || out.Len() > 3*(4<<10) {
			t.Errorf("%q: %q", answer, out.String())
		}
	})
}

// serveAnswers gives each client the answer of now, whatever it asks for.
func serveAnswers(l net.Listener, now *atomic.Pointer[[]byte]) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		// Not one after the other: a client that gave up must not delay the next.
		go func() {
			defer func() { _ = conn.Close() }()
			_, _ = http.ReadRequest(bufio.NewReader(conn))
			_, _ = conn.Write(*now.Load())
		}()
	}
}
