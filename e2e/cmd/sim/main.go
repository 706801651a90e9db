// Sim runs the simulation of e2e/sim: the real election package against a simulated etcd, under
// seeded faults. The same seed gives the same run, byte for byte. docs/simulation.md explains it.
//
//	bin/sim [-seed N] [-faults 20000]     many runs of 200 faults, with the seeds N, N+1, ...
//	bin/sim -seed N -log                  one run, and its log
//	bin/sim -patch FILE -seed N -log      the same, with a bug of e2e/sim/mutations put back
//	bin/sim -mutations                    put bugs back, one at a time: each has to be found
//
// The first run that fails is shrunk: what is printed is its seed and the faults that are needed.
// It is run from the top of the repository, and compiles the simulation with Go's compiler.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

const perRun = 200 // faults

func main() { os.Exit(command(os.Args[1:])) }

func command(args []string) int {
	flags := flag.NewFlagSet("sim", flag.ContinueOnError)
	seed := flags.Uint64("seed", 1, "of the first run")
	faults := flags.Int("faults", 20_000, "how many faults")
	procs := flags.Int("procs", runtime.NumCPU(), "how many runs at a time")
	keep := flags.String("keep", "", "run only these faults of the first run: [3,17]")
	log := flags.Bool("log", false, "print the log of the first run")
	patch := flags.String("patch", "", "put the bug of this patch back")
	mutations := flags.Bool("mutations", false, "put bugs back, one at a time")
	if err := flags.Parse(args); err != nil || flags.NArg() > 0 {
		return 64
	}
	ctx := context.Background()
	if *mutations {
		return complain(findMutations(ctx, *seed, *procs))
	}
	binary := binaryOf(*patch)
	if err := build(ctx, binary, *patch); err != nil {
		return complain(err)
	}
	if *log || *keep != "" {
		return complain(show(ctx, child{binary: binary, seed: *seed, keep: *keep, log: true}))
	}
	began := time.Now()
	if err := repeat(ctx, child{binary: binary, seed: *seed}); err != nil {
		return complain(err)
	}
	figures, failed := search(ctx, binary, *seed, (*faults+perRun-1)/perRun, *procs)
	fmt.Println(figures.report(time.Since(began)))
	if failed == nil {
		return 0
	}
	fmt.Println(shrink(ctx, binary, *failed))
	return 1
}

func binaryOf(patch string) string {
	if patch == "" {
		return filepath.Join("bin", "sim.test")
	}
	return filepath.Join("bin", "sim-"+strings.TrimSuffix(filepath.Base(patch), ".patch")+".test")
}

func complain(err error) int {
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "sim:", err)
	return 1
}

// findMutations requires that each mutation is found within a minute.
func findMutations(ctx context.Context, seed uint64, procs int) error {
	patches, err := filepath.Glob("e2e/sim/mutations/*.patch")
	if err != nil {
		return err
	}
	missed := 0
	for _, patch := range patches {
		name := strings.TrimSuffix(filepath.Base(patch), ".patch")
		binary := binaryOf(patch)
		began := time.Now()
		if err := build(ctx, binary, patch); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		built := time.Now()
		within, cancel := context.WithTimeout(ctx, time.Minute)
		figures, failed := search(within, binary, seed, 1_000_000, procs)
		cancel()
		fmt.Printf("%-24s compiled in %4.1f s, ", name, built.Sub(began).Seconds())
		if failed == nil {
			missed++
			fmt.Printf("NOT FOUND in %d faults\n", figures.faults)
			continue
		}
		fmt.Printf("found in %4.1f s, %5d faults, seed %d: %s\n", time.Since(built).Seconds(),
			figures.faults, failed.Seed, failed.Violations[0])
	}
	if missed > 0 || len(patches) == 0 {
		return fmt.Errorf("%d of %d mutations were not found", missed, len(patches))
	}
	return nil
}
