//go:build linux

package simetcd

import (
	"context"
	"flag"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"

	"leasehold/e2e/harness"
)

var (
	scripts = flag.Int("scripts", 200, "how many scripts to compare with a real etcd")
	first   = flag.Uint64("first", 1, "the first script's seed")
)

// atOnce is how many scripts a real etcd plays at a time.
const atOnce = 100

// The same scripts get the same answers from the simulated etcd as from a real one.
func TestSameAsEtcd(t *testing.T) {
	if testing.Short() {
		t.Skip("needs etcd")
	}
	cluster := harness.NewTestCluster(t, harness.ClusterConfig{})
	var conns []*grpc.ClientConn
	for range 3 {
		conns = append(conns, newConn(cluster.Endpoints()[0], nil))
	}
	defer closeAll(conns)
	lines, different := 0, 0
	// In parts, so that the transcripts of not too many are kept.
	for part := range slices.Chunk(seeds(), 1000) {
		want := playAll(t.Context(), part, conns)
		for _, seed := range part {
			got := playSimulated(t, seed)
			lines += len(got)
			if !compareTranscripts(t, seed, got, want[seed]) {
				if different++; different == 3 {
					t.FailNow()
				}
			}
		}
	}
	t.Logf("%d scripts with %d answers and watches: %d scripts differ", *scripts, lines, different)
}

func seeds() (all []uint64) {
	for i := range *scripts {
		all = append(all, *first+uint64(i))
	}
	return all
}

// playAll plays the scripts on a real etcd: those that compact one after the other.
func playAll(
	ctx context.Context, seeds []uint64, conns []*grpc.ClientConn,
) map[uint64][]string {
	transcripts := map[uint64][]string{}
	var mu sync.Mutex
	var playing sync.WaitGroup
	free := make(chan struct{}, atOnce)
	for _, seed := range seeds {
		if compacts(seed) {
			continue
		}
		free <- struct{}{}
		playing.Go(func() {
			transcript := play(ctx, seed, conns)
			mu.Lock()
			transcripts[seed] = transcript
			mu.Unlock()
			<-free
		})
	}
	playing.Wait()
	for _, seed := range seeds {
		if compacts(seed) {
			transcripts[seed] = play(ctx, seed, conns)
		}
	}
	return transcripts
}

// playSimulated plays the script on a simulated etcd of three members, with a client at each.
func playSimulated(t *testing.T, seed uint64) (transcript []string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := New(Config{Seed: seed})
		defer c.Close()
		var conns []*grpc.ClientConn
		for _, url := range c.Endpoints() {
			conns = append(conns, newConn(url, c.Dial))
		}
		defer closeAll(conns)
		transcript = play(t.Context(), seed, conns)
	})
	return transcript
}

func compareTranscripts(t *testing.T, seed uint64, got, want []string) bool {
	t.Helper()
	for i := range max(len(got), len(want)) {
		g, w := "nothing", "nothing"
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if g != w {
			t.Errorf("-first %d -scripts 1: answer %d differs\n simulated: %s\n real etcd: %s",
				seed, i, g, w)
			return false
		}
	}
	return true
}
