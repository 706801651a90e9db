package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"leasehold/e2e/sim"
)

// shrink finds a short list of the run's faults with which it still fails, by delta debugging: it
// leaves out parts of the list, smaller ones again and again. It describes the result.
func shrink(ctx context.Context, binary string, failed sim.Summary) string {
	faults := sim.NewSchedule(failed.Seed, perRun).Faults
	kept := make([]int, len(faults))
	for i := range kept {
		kept[i] = i
	}
	last := failed
	fails := func(kept []int) bool {
		s := child{binary: binary, seed: failed.Seed, keep: list(kept)}.run(ctx)
		if len(s.Violations) == 0 {
			return false
		}
		last = s
		return true
	}
	for size := len(kept) / 2; size > 0; {
		without := false
		for from := 0; from < len(kept); {
			fewer := slices.Delete(slices.Clone(kept), from, min(from+size, len(kept)))
			if fails(fewer) {
				kept, without = fewer, true
			} else {
				from += size
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
	fmt.Fprintf(&b, "the log: bin/sim -seed %d -keep %s", failed.Seed, list(kept))
	return b.String()
}

// list is never empty, because an empty one would mean all faults.
func list(kept []int) string {
	text, err := json.Marshal(append([]int{}, kept...))
	if err != nil {
		panic(err)
	}
	return string(text)
}
