package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"

	"leasehold/e2e/sim"
)

// shrink finds a short list of the run's faults with which it still fails, by delta debugging: it
// leaves out parts of the list, smaller ones again and again. It describes the result.
func shrink(ctx context.Context, c child, failed sim.Summary, procs int) string {
	c.seed = failed.Seed
	faults := sim.NewSchedule(c.seed, perRun, c.only).Faults
	kept := make([]int, len(faults))
	for i := range kept {
		kept[i] = i
	}
	last := failed
	for size := len(kept) / 2; size > 0; {
		without := false
		for from := 0; from < len(kept); {
			tries := fewer(kept, from, size, procs)
			if i, s := firstToFail(ctx, c, tries); i < 0 {
				from += size * len(tries)
			} else {
				kept, last, without = tries[i], s, true
				from += size * i
			}
		}
		if !without || size > 1 {
			size /= 2
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d fails: %s\n", failed.Seed, failed.Violations[0])
	fmt.Fprintf(&b, "with these %d of its %d faults it does: %s\n",
		len(kept), len(faults), last.Violations[0])
	for _, i := range kept {
		fmt.Fprintf(&b, "  %3d %v\n", i, faults[i])
	}
	options := ""
	if c.only != "" {
		options = " -only " + c.only
	}
	if c.patch != "" {
		options += " -patch " + c.patch
	}
	fmt.Fprintf(&b, "the log: bin/sim%s -seed %d -keep %s", options, c.seed, list(kept))
	return b.String()
}

// fewer returns some shorter lists. Each leaves out that many faults, the first one those at from.
func fewer(kept []int, from, size, lists int) (all [][]int) {
	for ; from < len(kept) && len(all) < lists; from += size {
		all = append(all, slices.Delete(slices.Clone(kept), from, min(from+size, len(kept))))
	}
	return all
}

// firstToFail makes a run with each list of faults, all at the same time. It returns the number of
// the first one that fails; -1: none does.
func firstToFail(ctx context.Context, c child, lists [][]int) (int, sim.Summary) {
	got := make([]sim.Summary, len(lists))
	var running sync.WaitGroup
	for i, kept := range lists {
		running.Go(func() {
			c := c
			c.keep = list(kept)
			got[i] = c.run(ctx)
		})
	}
	running.Wait()
	for i, s := range got {
		if len(s.Violations) > 0 {
			return i, s
		}
	}
	return -1, sim.Summary{}
}

// list is never empty, because an empty one would mean all faults.
func list(kept []int) string {
	text, err := json.Marshal(append([]int{}, kept...))
	if err != nil {
		panic(err)
	}
	return string(text)
}
