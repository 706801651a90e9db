//go:build linux

package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"testing"
	"time"

	"leasehold/config"
	"leasehold/e2e/harness"
	"leasehold/election"
)

// usage is what a process holds on to.
type usage struct {
	goroutines, descriptors int
	heap                    int64
}

func (u usage) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %d KiB of heap",
		u.goroutines, u.descriptors, u.heap>>10)
}

func newUsage(t *testing.T) usage {
	t.Helper()
	// Twice: what a finalizer or a pool lets go of is collected by the second.
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return usage{runtime.NumGoroutine(), len(open), int64(m.HeapAlloc)}
}

// TestElect_HundredTerms: a daemon that loses and wins a hundred times holds on
// to no more than one that did so ten times.
func TestElect_HundredTerms(t *testing.T) {
	if testing.Short() {
		t.Skip("takes ten seconds")
	}
	etcd := harness.NewTestCluster(t, harness.ClusterConfig{})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cfg := load(t, config.ForElect, "ELECTION=jobs/terms", "IDENTITY=a",
		"ENDPOINTS="+etcd.Endpoints()[0], "TTL=60s", "STOP_GRACE=0s", "LISTEN=127.0.0.1:0")
	running, stop := context.WithCancelCause(context.Background())
	told := make(chan struct{}, 1)
	d, err := wire(running, stop, parts{
		cfg: cfg, log: slog.New(slog.DiscardHandler), version: "VERSION",
		metrics: newMetrics(cfg.Election),
		changed: make(chan struct{}, 1), callbacks: &leaseCallbacks{force: make(chan struct{})},
		status: func(string) { signalChange(told) },
		listen: func(address string) (net.Listener, error) { return bind(ctx, address) },
	})
	if err != nil {
		t.Fatal(err)
	}
	candidate := d.candidate
	ended := make(chan error, 1)
	go func() { ended <- d.group.Run() }()
	defer func() {
		stop(errPlannedStop)
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()

	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second,
	}
	term := func(before int64) int64 {
		t.Helper()
		for {
			if s := candidate.Snapshot(); s.Leading && s.Leader != nil && s.Leader.Token > before {
				return s.Leader.Token
			}
			select {
			case <-told:
			case <-ctx.Done():
				t.Fatalf("no term after the one with token %d: %+v", before, candidate.Snapshot())
			}
		}
	}
	// What remains after n terms, once all of the last loss has been cleared up.
	after := func(at int, worst usage) usage {
		t.Helper()
		var u usage
		err := harness.Until(ctx, func() error {
			u = newUsage(t)
			more := u.goroutines > worst.goroutines || u.descriptors > worst.descriptors ||
				u.heap > worst.heap
			if worst != (usage{}) && more {
				return errors.New("more than before")
			}
			return nil
		})
		if err != nil {
			t.Errorf("after term %d: %v, want %v at most", at, u, worst)
		} else {
			t.Logf("after term %d: %v", at, u)
		}
		return u
	}
	token := term(0)
	var tenth usage
	for n := 1; n <= 100; n++ {
		resp, err := client.Get("http://" + d.listening.String() + "/leader")
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("/leader in term %d: %s", n, resp.Status)
		}
		if 5 <= n && n <= 10 { // one goroutine more or less is by chance
			u := after(n, usage{})
			tenth.goroutines = max(tenth.goroutines, u.goroutines)
			tenth.descriptors = max(tenth.descriptors, u.descriptors)
			tenth.heap = u.heap
		}
		if n == 100 {
			break
		}
		s := candidate.Snapshot()
		if n%2 == 0 {
			_, err = etcd.Etcdctl(ctx, "del", s.Leader.Key)
		} else {
			_, err = etcd.Etcdctl(ctx, "lease", "revoke", fmt.Sprintf("%x", s.LeaseID))
		}
		if err != nil {
			t.Fatal(err)
		}
		token = term(token)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	ctx = short
	tenth.heap += 1 << 20
	after(100, tenth)
	if s := candidate.Snapshot(); s.State != election.Leading {
		t.Errorf("state %s", s.State)
	}
}
