// Sim runs the simulation of e2e/sim: the real election package against a simulated etcd, under
// seeded faults. The same seed gives the same run, byte for byte. docs/simulation.md explains it.
//
//	bin/sim [-seed N] [-faults 20000]     many runs of 200 faults, with the seeds N, N+1, ...
//	bin/sim -seed N -log                  one run, and its log
//	bin/sim -only KIND                    runs with faults of one kind
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
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"leasehold/e2e/sim"
)

const perRun = 200 // faults

func main() { os.Exit(command(os.Args[1:])) }

func command(args []string) int {
	flags := flag.NewFlagSet("sim", flag.ContinueOnError)
	seed := flags.Uint64("seed", 1, "of the first run")
	faults := flags.Int("faults", 20_000, "how many faults")
	procs := flags.Int("procs", runtime.NumCPU(), "how many runs at a time")
	keep := flags.String("keep", "", "run only these faults of the first run: [3,17]")
	only := flags.String("only", "", "this kind of fault alone, one after the other")
	log := flags.Bool("log", false, "print the log of the first run")
	patch := flags.String("patch", "", "put the bug of this patch back")
	mutations := flags.Bool("mutations", false, "put bugs back, one at a time")
	if err := flags.Parse(args); err != nil || flags.NArg() > 0 {
		return 64
	}
	if !sim.IsKind(*only) {
		fmt.Fprintf(os.Stderr,
			"sim: -only: there is no fault %q; e2e/sim/fault.go lists them\n", *only)
		return 64
	}
	ctx := context.Background()
	if *mutations {
		return complain(findMutations(ctx, *seed, *procs))
	}
	first := child{binary: binaryOf(*patch), patch: *patch, only: *only, seed: *seed}
	if err := build(ctx, first.binary, *patch); err != nil {
		return complain(err)
	}
	if *log || *keep != "" {
		first.keep, first.log = *keep, true
		return complain(show(ctx, first))
	}
	if err := repeat(ctx, first); err != nil {
		return complain(err)
	}
	began := time.Now()
	figures, failed := search(ctx, first, (*faults+perRun-1)/perRun, *procs)
	fmt.Println(figures.report(time.Since(began)))
	if failed == nil {
		return 0
	}
	fmt.Printf("seed %d: %s\nlooking for the shortest list of faults that fails\n",
		failed.Seed, strings.Join(failed.Violations, "\n"))
	fmt.Println(shrink(ctx, first, *failed, *procs))
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

// findWithin is for how long a mutation is looked for. On an idle machine it takes some seconds.
const findWithin = 5 * time.Minute

// findMutations requires that each mutation is found in time, by what its patch says.
func findMutations(ctx context.Context, seed uint64, procs int) error {
	patches, err := filepath.Glob("e2e/sim/mutations/*.patch")
	if err != nil {
		return err
	}
	missed := 0
	for _, patch := range patches {
		c := child{binary: binaryOf(patch), patch: patch, seed: seed}
		text, err := os.ReadFile(patch)
		if err != nil {
			return err
		}
		by, err := regexp.Compile(header(text, "Found"))
		if err != nil {
			return fmt.Errorf("%s: Found: %w", patch, err)
		}
		if by.String() == "" {
			return fmt.Errorf("%s has no line Found: that says by what it is found", patch)
		}
		if c.only = header(text, "Faults"); !sim.IsKind(c.only) {
			return fmt.Errorf("%s: there is no fault %q", patch, c.only)
		}
		if first := header(text, "Seed"); first != "" {
			if c.seed, err = strconv.ParseUint(first, 10, 64); err != nil {
				return fmt.Errorf("%s: Seed: %w", patch, err)
			}
		}
		began := time.Now()
		if err := build(ctx, c.binary, patch); err != nil {
			return fmt.Errorf("%s: %w", patch, err)
		}
		fmt.Printf("%-21s compiled in %4.1f s, ",
			strings.TrimSuffix(filepath.Base(patch), ".patch"), time.Since(began).Seconds())
		if !find(ctx, c, by, procs) {
			missed++
		}
	}
	if missed > 0 || len(patches) == 0 {
		return fmt.Errorf("%d of %d mutations were not found", missed, len(patches))
	}
	return nil
}

// header returns a line of a patch's head. Found is a pattern of the violation by which the bug is
// found. Faults is the one kind of fault that it needs, if it is too rare among all others. Seed is
// of the first run, if it would take too long to come to it.
func header(patch []byte, name string) string {
	for line := range strings.Lines(string(patch)) {
		if text, found := strings.CutPrefix(line, name+": "); found {
			return strings.TrimSpace(text)
		}
	}
	return ""
}

// find reports whether the first run that fails in time fails by such a violation.
func find(ctx context.Context, c child, by *regexp.Regexp, procs int) bool {
	ctx, cancel := context.WithTimeout(ctx, findWithin)
	defer cancel()
	began := time.Now()
	figures, failed := search(ctx, c, 1_000_000, procs)
	if failed == nil {
		fmt.Printf("NOT FOUND in %d runs\n", figures.runs)
		return false
	}
	fmt.Printf("found in %4.1f s, %3d runs, seed %d: ",
		time.Since(began).Seconds(), figures.runs, failed.Seed)
	i := slices.IndexFunc(failed.Violations, by.MatchString)
	if i < 0 {
		fmt.Printf("NOT BY %v: %q\n", by, failed.Violations)
		return false
	}
	fmt.Println(failed.Violations[i])
	return true
}
