//go:build linux

package app

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"leasehold/config"
	"leasehold/e2e/harness"
	"leasehold/election"
)

// grantCallbacks notes when a lease is about to be asked for.
type grantCallbacks struct{ asked chan struct{} }

func (h *grantCallbacks) Leased(id int64, _ time.Duration) {
	if id != 0 {
		close(h.asked)
	}
}
func (h *grantCallbacks) Entered(string, int64)       {}
func (h *grantCallbacks) Ended(error, error)          {}
func (h *grantCallbacks) Releasing(int64) error       { return nil }
func (h *grantCallbacks) Extended(election.Deadlines) {}
func (h *grantCallbacks) Suspend() bool               { return false }
func (h *grantCallbacks) Lead(ctx context.Context, _ election.Term) error {
	<-ctx.Done()
	return nil
}

// TestStop_DuringTheGrant: a stop while etcd is granting the lease, which may
// happen after the lease was asked to be revoked, leaves no lease behind.
func TestStop_DuringTheGrant(t *testing.T) {
	etcd := harness.NewTestCluster(t, harness.ClusterConfig{})
	cfg := load(t, config.ForElect, "ELECTION=jobs/grant", "IDENTITY=a",
		"ENDPOINTS="+etcd.Endpoints()[0], "TTL=300s")
	const stops = 600
	for i := range stops {
		callbacks := &grantCallbacks{asked: make(chan struct{})}
		ec := cfg.ElectionConfig(slog.New(slog.DiscardHandler))
		ec.Callbacks = callbacks
		candidate, err := election.New(ec)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancelCause(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- candidate.Run(ctx) }()
		<-callbacks.asked
		<-time.After(time.Duration(i%60) * 50 * time.Microsecond)
		stop(errPlannedStop)
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
	leases, err := etcd.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(leases) > 0 {
		t.Errorf("%d of %d stops left a lease", len(leases), stops)
	}
}
