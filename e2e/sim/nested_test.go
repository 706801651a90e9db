package sim

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"leasehold/e2e/sim/simetcd"
	elect "leasehold/election"
)

// leads leads until the term ends.
type leads struct{ began chan elect.Term }

func (leads) Leased(int64, time.Duration) {}
func (leads) Entered(string, int64)       {}
func (leads) Ended(error, error)          {}
func (leads) Releasing(int64) error       { return nil }
func (leads) Extended(elect.Deadlines)    {}
func (leads) Suspend() bool               { return false }
func (l leads) Lead(ctx context.Context, t elect.Term) error {
	l.began <- t
	<-ctx.Done()
	return nil
}

// TestNested_GoneLongAgo: a member that is cut off still shows a nested election that is gone. No
// candidate may be refused for that.
func TestNested_GoneLongAgo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dropped atomic.Int32
		c := simetcd.New(simetcd.Config{
			Network: func(client, member, method string) (v simetcd.Verdict) {
				// Only the member that is cut off answers the first search.
				v.DropRequest = client == "a" && member != "m3" &&
					method == pb.KV_Txn_FullMethodName && dropped.Add(1) <= 2
				return v
			},
		})
		defer c.Close()
		c.Elect(1)
		other, err := clientv3.New(clientv3.Config{
			Endpoints: c.Endpoints()[:1], Logger: zap.NewNop(),
			DialOptions: []grpc.DialOption{grpc.WithContextDialer(c.Dial)},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		lease, err := other.Grant(t.Context(), 60)
		if err != nil {
			t.Fatal(err)
		}
		key := fmt.Sprintf("jobs/backup/%x", lease.ID)
		if _, err := other.Put(t.Context(), key, "x", clientv3.WithLease(lease.ID)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // all members have it
		c.Isolate(3)
		if _, err := other.Revoke(t.Context(), lease.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)

		start, began := time.Now(), make(chan elect.Term, 1)
		candidate, err := elect.New(elect.Config{
			Endpoints: c.Endpoints(), Election: "jobs", Identity: "a", TTL: 5 * time.Second,
			LossGrace: -1, Margin: -1, Wait: -1, DialTimeout: time.Second, Dial: c.Dialer("a"),
			Now:    func() time.Duration { return time.Since(start) },
			Logger: slog.New(slog.DiscardHandler), Callbacks: leads{began},
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- candidate.Run(ctx) }()
		select {
		case <-began:
		case err := <-ended:
			t.Fatalf("Run returned %v", err)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if dropped.Load() < 2 {
			t.Errorf("%d requests dropped: another member has answered first", dropped.Load())
		}
	})
}
