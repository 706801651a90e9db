package sim

import (
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"testing"
)

var (
	seed    = flag.Uint64("seed", 1, "of the first run")
	runs    = flag.Int("runs", 6, "how many runs, each with the next seed")
	faults  = flag.Int("faults", 100, "in each run")
	keep    = flag.String("keep", "", "the numbers of the faults to keep, as JSON; empty: all")
	only    = flag.String("only", "", "this kind of fault; empty: all kinds")
	verbose = flag.Bool("log", false, "write the log of each run")
)

// One processor, and no garbage collection within a run: neither may change what comes next.
func single(t *testing.T) {
	t.Helper()
	before := runtime.GOMAXPROCS(1)
	percent := debug.SetGCPercent(-1)
	t.Cleanup(func() {
		runtime.GOMAXPROCS(before)
		debug.SetGCPercent(percent)
	})
}

func schedule(t *testing.T, seed uint64) Schedule {
	t.Helper()
	s := NewSchedule(seed, *faults, *only)
	if *keep != "" {
		var kept []int
		if err := json.Unmarshal([]byte(*keep), &kept); err != nil {
			t.Fatal(err)
		}
		all := s.Faults
		s.Faults = nil
		for _, i := range kept {
			s.Faults = append(s.Faults, all[i])
		}
	}
	return s
}

// TestSimulation runs seeded faults. make sim runs many more, always the same for the same seed.
func TestSimulation(t *testing.T) {
	single(t)
	for i := range *runs {
		s := schedule(t, *seed+uint64(i))
		r := Run(t, s)
		runtime.GC()
		sum, err := json.Marshal(Summary{
			s.Seed, len(s.Faults), r.Virtual, r.Recovery, r.Terms,
			fmt.Sprintf("%x", sha256.Sum256(r.Log)), r.Violations,
		})
		if err != nil {
			t.Fatal(err)
		}
		if *verbose {
			_, _ = os.Stdout.Write(r.Log)
		}
		fmt.Printf("sim: %s\n", sum)
		if len(r.Violations) > 0 {
			t.Fatalf("seed %d, %d faults: %q", s.Seed, len(s.Faults), r.Violations)
		}
	}
}
