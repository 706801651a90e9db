package health

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestProbe(t *testing.T) {
	hang := make(chan struct{})
	mux := http.NewServeMux()
	answer := func(path string, code int, body string) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "/500")
			w.WriteHeader(code)
			_, _ = w.Write([]byte(body))
		})
	}
	answer("/200", 200, "ok")
	answer("/302", 302, "")
	answer("/404", 404, "")
	answer("/500", 500, "no\x1b[31m "+strings.Repeat("x", 1<<20))
	mux.HandleFunc("/hangs", func(http.ResponseWriter, *http.Request) { <-hang })
	mux.HandleFunc("/drips", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(500)
		_ = http.NewResponseController(w).Flush()
		<-hang
	})
	plain, secure := httptest.NewServer(mux), httptest.NewTLSServer(mux)
	defer plain.Close()
	defer secure.Close()
	defer close(hang)
	// It accepts nothing.
	silent, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	before := runtime.NumGoroutine()
	defer func() { // a connection that hangs ends with its request, or soon after
		for end := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > before+4; {
			if time.Now().After(end) {
				t.Errorf("%d goroutines, and %d before", runtime.NumGoroutine(), before)
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	for range 20 {
		if Probe("https://"+silent.Addr().String(), 100*time.Millisecond)(t.Context()) == nil {
			t.Error("one that says nothing passes")
		}
	}
	const short, long = time.Second, 10 * time.Second
	for _, row := range []struct {
		url, want string
		timeout   time.Duration
	}{
		{plain.URL + "/200", "", long},
		{secure.URL + "/200", "", long},
		{plain.URL + "/302", "", long},
		{plain.URL + "/404", "404 Not Found", long},
		{plain.URL + "/500", "500 Internal Server Error: no\uFFFD[31m xxx", long},
		{plain.URL + "/hangs", "exceeded", short},
		{plain.URL + "/drips", "500 Internal Server Error", short},
		{"http://127.0.0.1:1/", "refused", long},
	} {
		began := time.Now()
		err := Probe(row.url, row.timeout)(context.Background())
		switch {
		case row.want == "" && err == nil:
		case row.want == "" || err == nil || !strings.Contains(err.Error(), row.want):
			t.Errorf("%s: %v, want %q", row.url, err, row.want)
		case len(err.Error()) > 500:
			t.Errorf("%s: %d bytes", row.url, len(err.Error()))
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s: took %v", row.url, took)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if Probe(plain.URL+"/200", time.Second)(ctx) == nil {
		t.Error("passes although its context has ended")
	}
}
