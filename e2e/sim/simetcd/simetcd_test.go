package simetcd

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

type dial = func(context.Context, string) (net.Conn, error)

// newConn makes a connection whose attempts are at times that nobody draws. dialer may be nil.
func newConn(url string, dialer dial) *grpc.ClientConn {
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second,
			},
			MinConnectTimeout: time.Second,
		}),
	}
	if dialer != nil {
		options = append(options, grpc.WithContextDialer(dialer))
	}
	target := "passthrough:///" + strings.TrimPrefix(url, "http://")
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		panic(err)
	}
	return conn
}

func closeAll(conns []*grpc.ClientConn) {
	for _, conn := range conns {
		_ = conn.Close()
	}
}

// newClient returns a client of the one member.
func newClient(t *testing.T, c *Cluster, member int) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: c.Endpoints()[member-1 : member], Logger: zap.NewNop(), MaxUnaryRetries: 1,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(c.Dial)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// Stock candidates elect each other, and a lease that is not renewed expires.
func TestConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(Config{Log: t.Logf})
		defer c.Close()
		ctx := t.Context()
		a, b := newClient(t, c, 2), newClient(t, c, 3)
		defer b.Close()
		first, err := concurrency.NewSession(a, concurrency.WithTTL(5))
		if err != nil {
			t.Fatal(err)
		}
		if err := concurrency.NewElection(first, "e").Campaign(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		second, err := concurrency.NewSession(b, concurrency.WithTTL(5))
		if err != nil {
			t.Fatal(err)
		}
		won := make(chan error, 1)
		go func() { won <- concurrency.NewElection(second, "e").Campaign(ctx, "b") }()
		time.Sleep(time.Minute)
		select {
		case err := <-won:
			t.Fatalf("b has won while a renews: %v", err)
		default:
		}
		a.Close()
		closed := time.Now()
		if err := <-won; err != nil {
			t.Fatal(err)
		}
		if d := time.Since(closed); d < 3*time.Second || d > 6*time.Second {
			t.Errorf("b has won %v after a's last renewal", d)
		}
		second.Close()
	})
}

func TestLeaseOfADeposedLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(Config{Log: t.Logf})
		defer c.Close()
		ctx := t.Context()
		one, two := newClient(t, c, 1), newClient(t, c, 2)
		defer one.Close()
		defer two.Close()
		lease, err := one.Grant(ctx, 5)
		if err != nil {
			t.Fatal(err)
		}
		before, err := one.Get(ctx, "k")
		if err != nil {
			t.Fatal(err)
		}
		c.Pause(1)
		c.Elect(2)
		c.Resume(1)
		stale, err := one.KeepAliveOnce(ctx, lease.ID)
		if err != nil || stale.TTL != 5 || stale.RaftTerm != before.Header.RaftTerm {
			t.Errorf("renewal at the deposed leader: %+v, %v", stale, err)
		}
		_, err = one.Get(ctx, "k")
		if !errors.Is(err, rpctypes.ErrLeaderChanged) {
			t.Errorf("read at the deposed leader: %v", err)
		}
		after, err := one.Get(ctx, "k")
		if err != nil || after.Header.RaftTerm <= stale.RaftTerm {
			t.Errorf("read when the deposed leader knows: %+v, %v", after, err)
		}
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		left, err := two.TimeToLive(ctx, lease.ID)
		if err != nil || left.TTL < 5 {
			t.Errorf("the new leader has not given the whole TTL: %+v, %v", left, err)
		}
	})
}
