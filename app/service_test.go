//go:build linux

package app

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"leasehold/config"
	"leasehold/e2e/harness"
	"leasehold/election"
)

// apiServer plays the part of Kubernetes: one Service, and its EndpointSlice.
type apiServer struct {
	mu      sync.Mutex
	version int
	slice   map[string]any
	changed chan struct{} // closed and replaced at each write
	hangs   chan struct{} // nil: it answers; else until it is closed it does not
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	hangs := a.hangs
	a.mu.Unlock()
	if hangs != nil {
		<-hangs
	}
	body, _ := io.ReadAll(r.Body)
	a.mu.Lock()
	defer a.mu.Unlock()
	if strings.HasPrefix(r.URL.Path, "/api/v1/") {
		_, _ = io.WriteString(w, `{"metadata": {"name": "leader", "uid": "u"},
			"spec": {"ports": [{"port": 80, "targetPort": 8080}]}}`)
		return
	}
	var sent map[string]any
	_ = json.Unmarshal(body, &sent)
	version, _ := json.Marshal(a.version)
	switch {
	case r.Method == http.MethodGet && a.slice == nil:
		w.WriteHeader(http.StatusNotFound)
		return
	case r.Method == http.MethodPost && a.slice != nil, r.Method == http.MethodPut &&
		sent["metadata"].(map[string]any)["resourceVersion"] != string(version):
		w.WriteHeader(http.StatusConflict)
		return
	case r.Method != http.MethodGet:
		a.version++
		sent["metadata"].(map[string]any)["resourceVersion"] = strconv.Itoa(a.version)
		a.slice = sent
		close(a.changed)
		a.changed = make(chan struct{})
	}
	_ = json.NewEncoder(w).Encode(a.slice)
}

// wait waits until the address is the one that the Service routes to; "": until there is none.
func (a *apiServer) wait(ctx context.Context, t *testing.T, address string) {
	t.Helper()
	for {
		a.mu.Lock()
		text, _ := json.Marshal(a.slice["endpoints"])
		changed := a.changed
		a.mu.Unlock()
		if string(text) == "[]" && address == "" ||
			address != "" && strings.Contains(string(text), `["`+address+`"]`) {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("the endpoints are %s, want %q", text, address)
		}
	}
}

// Only the token of a term is one that the elector before may have written. A standby has a key,
// too.
func TestAdoptedToken(t *testing.T) {
	for want, a := range map[int64]*election.Adoption{
		0: {LeaseID: 1, Created: 5}, 7: {LeaseID: 1, Created: 7, Leading: true},
	} {
		if got := adoptedToken(a); got != want {
			t.Errorf("%+v: %d, want %d", a, got, want)
		}
	}
	if got := adoptedToken(nil); got != 0 {
		t.Errorf("nothing is adopted: %d", got)
	}
}

// TestElect_Service: the Service routes to the one that leads, then to the next one, and to nobody
// when that has gone, too. If the API server hangs, the next one leads as ever, and exits.
func TestElect_Service(t *testing.T) {
	etcd := harness.NewTestCluster(t, harness.ClusterConfig{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	api := &apiServer{changed: make(chan struct{})}
	server := httptest.NewTLSServer(api)
	defer server.Close()
	account := t.TempDir()
	authority := pem.EncodeToMemory(&pem.Block{
		Type: "CERTIFICATE", Bytes: server.Certificate().Raw,
	})
	for name, text := range map[string]string{
		"token": "t", "namespace": "n", "ca.crt": string(authority),
	} {
		if err := os.WriteFile(filepath.Join(account, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	host, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	t.Setenv("KUBERNETES_SERVICE_HOST", host)
	t.Setenv("KUBERNETES_SERVICE_PORT", port)

	start := func(name, address string) (d *daemon, stop func()) {
		cfg := load(t, config.ForElect, "ELECTION=jobs/service", "IDENTITY="+name,
			"ENDPOINTS="+etcd.Endpoints()[0], "STOP_GRACE=0s", "LISTEN=off",
			"KUBERNETES_SERVICE=leader", "KUBERNETES_POD_IP="+address)
		running, cancel := context.WithCancelCause(context.Background())
		d, err := wire(running, cancel, parts{
			cfg: cfg, log: slog.New(slog.DiscardHandler), version: "VERSION",
			metrics: newMetrics(cfg.Election), changed: make(chan struct{}, 1),
			callbacks: &leaseCallbacks{force: make(chan struct{})},
			status:    func(string) {}, account: account,
		})
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		group.Go(func() {
			if err := d.group.Run(); err != nil {
				t.Error(err)
			}
		})
		stop = func() {
			cancel(errPlannedStop)
			group.Wait()
		}
		t.Cleanup(stop)
		return d, stop
	}
	_, stopFirst := start("a", "10.0.0.1")
	api.wait(ctx, t, "10.0.0.1")
	_, stopSecond := start("b", "10.0.0.2")
	stopFirst()
	api.wait(ctx, t, "10.0.0.2")
	stopSecond()
	api.wait(ctx, t, "")

	hangs := make(chan struct{})
	defer close(hangs)
	api.mu.Lock()
	api.hangs = hangs
	api.mu.Unlock()
	third, stopThird := start("c", "10.0.0.3")
	if err := harness.Until(ctx, func() error {
		if s := third.candidate.Snapshot(); !s.Leading {
			return context.DeadlineExceeded
		}
		return nil
	}); err != nil {
		t.Fatal("while the API server hangs, nobody leads")
	}
	began := time.Now()
	stopThird()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("while the API server hangs, the exit takes %v", took)
	}
}
