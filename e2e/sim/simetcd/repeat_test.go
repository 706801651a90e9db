package simetcd

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The same seed gives the same run, byte for byte: what each client was answered, and when.
func TestSameSeedSameRun(t *testing.T) {
	for seed := range uint64(20) {
		one, two := disturbedRun(t, seed), disturbedRun(t, seed)
		if one != two {
			a, b := strings.Split(one, "\n"), strings.Split(two, "\n")
			for i := range min(len(a), len(b)) {
				if a[i] != b[i] {
					t.Fatalf("seed %d, line %d:\n%s\n%s", seed, i, a[i], b[i])
				}
			}
			t.Fatalf("seed %d: %d and %d lines", seed, len(a), len(b))
		}
		if n := strings.Count(one, "\n"); n < 300 {
			t.Errorf("seed %d: a run of only %d lines shows little", seed, n)
		}
	}
}

// disturbedRun has clients write, read, renew and watch at the same time, through a bad network,
// while the script makes faults. It returns all that happened.
func disturbedRun(t *testing.T, seed uint64) string {
	t.Helper()
	var run strings.Builder
	synctest.Test(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(seed, 1))
		start := time.Now()
		say := func(format string, args ...any) {
			fmt.Fprintf(&run, "%v "+format+"\n", append([]any{time.Since(start)}, args...)...)
		}
		c := New(Config{Seed: seed, Log: say, Network: badNetwork(seed)})
		logs := make([][]string, 4)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		var clients sync.WaitGroup
		for i := range logs {
			clients.Go(func() {
				disturbedClient(ctx, c, i, seed, func(format string, args ...any) {
					at := fmt.Sprintf("%12d ", time.Since(start))
					logs[i] = append(logs[i], at+fmt.Sprintf(format, args...))
				})
			})
		}
		for ctx.Err() == nil {
			time.Sleep(time.Duration(1 + rng.Int64N(int64(time.Second))))
			someFault(c, rng)
		}
		clients.Wait()
		c.Close() // from now on nobody else writes to run
		for _, log := range logs {
			slices.Sort(log) // in one client, goroutines that end at the same moment have no order
			run.WriteString(strings.Join(log, "\n") + "\n")
		}
	})
	return run.String()
}

func badNetwork(seed uint64) func(client, member, method string) Verdict {
	rng := rand.New(rand.NewPCG(seed, 2))
	return func(string, string, string) Verdict {
		return Verdict{
			Delay:       time.Duration(rng.Int64N(int64(100 * time.Millisecond))),
			DropRequest: rng.IntN(30) == 0,
			Duplicate:   rng.IntN(30) == 0,
			DropAnswer:  rng.IntN(30) == 0,
		}
	}
}

func someFault(c *Cluster, rng *rand.Rand) {
	member := 1 + rng.IntN(3)
	faults := []func(){
		func() { c.Elect(member) }, func() { c.Elect(member) }, func() { c.Elect(member) },
		func() { c.Pause(member) }, func() { c.Resume(member) },
		func() { c.Stop(member) }, func() { c.Start(member) },
		func() { c.Isolate(member) }, func() { c.Heal(member) },
		func() { c.Lag(member, time.Duration(rng.IntN(3))*time.Second) },
		func() { c.Compact() }, func() { c.NoLeader() },
	}
	faults[rng.IntN(len(faults))]()
}

// disturbedClient does four things at a time, over a connection to each member.
func disturbedClient(
	ctx context.Context, c *Cluster, number int, seed uint64, say func(string, ...any),
) {
	name := fmt.Sprint(number)
	rng := rand.New(rand.NewPCG(seed, 10+uint64(number)))
	var conns []*grpc.ClientConn
	for _, url := range c.Endpoints() {
		conns = append(conns, newConn(url, c.Dialer(name)))
	}
	defer closeAll(conns)
	var mu sync.Mutex // the order of answers is that of their times
	answered := func(what string, resp any, err error) {
		mu.Lock()
		defer mu.Unlock()
		if status.Code(err) == codes.DeadlineExceeded {
			err = context.DeadlineExceeded // either end may be the first to see it
		}
		say("client %d: %s: %v %v", number, what, resp, err)
	}
	var running sync.WaitGroup
	for i, conn := range conns {
		running.Go(func() {
			watchPrefix(ctx, conn, func(r any, err error) { answered("watch", r, err) })
		})
		key := fmt.Appendf(nil, "k%d", rng.IntN(3))
		id := 1 + rng.Int64N(4)
		pause := time.Duration(rng.Int64N(int64(time.Second)))
		running.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				request(ctx, conn, (n+i)%4, key, id, answered)
				time.Sleep(pause)
			}
		})
	}
	running.Wait()
}

func request(
	ctx context.Context, conn *grpc.ClientConn, kind int, key []byte, id int64,
	answered func(string, any, error),
) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	switch kind {
	case 0:
		resp, err := pb.NewLeaseClient(conn).LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: 2})
		answered("grant", resp, err)
	case 1:
		resp, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: key, Lease: id})
		answered("put", resp, err)
	case 2:
		r := &pb.RangeRequest{Key: key, Serializable: id == 1}
		resp, err := pb.NewKVClient(conn).Range(ctx, r)
		answered("range", resp, err)
	case 3:
		stream, err := pb.NewLeaseClient(conn).LeaseKeepAlive(ctx)
		var resp any
		if err == nil {
			_ = stream.Send(&pb.LeaseKeepAliveRequest{ID: id}) // a failure shows in Recv
			resp, err = stream.Recv()
		}
		answered("renew", resp, err)
	}
}

// watchPrefix watches until ctx ends, again and again.
func watchPrefix(ctx context.Context, conn *grpc.ClientConn, got func(any, error)) {
	for ctx.Err() == nil {
		stream, err := pb.NewWatchClient(conn).Watch(ctx)
		if err == nil {
			_ = stream.Send(&pb.WatchRequest{
				RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
					Key: []byte("k"), RangeEnd: []byte("l"), StartRevision: 1,
				}},
			}) // a failure shows in Recv
		}
		for err == nil {
			var resp *pb.WatchResponse
			resp, err = stream.Recv()
			got(resp, err)
		}
		time.Sleep(time.Second)
	}
}
