package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"leasehold/e2e/sim"
)

// child is a process that makes one run. A second run in the same process would not be the same:
// what the first one has left in caches and pools changes how often the runtime draws a number.
type child struct {
	binary string
	patch  string // that was applied to it; "": none
	seed   uint64
	keep   string // "": all faults
	only   string // this kind of fault; "": all kinds
	log    bool
}

// hangs is after which time a child counts as failed. It is real time: within a bubble it stands
// still only if a goroutine never waits.
const hangs = 5 * time.Minute

func (c child) command(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.binary, "-test.run", "^TestSimulation$", "-test.timeout", "0",
		"-seed", fmt.Sprint(c.seed), "-runs", "1", "-faults", fmt.Sprint(perRun),
		"-keep", c.keep, "-only", c.only, fmt.Sprintf("-log=%v", c.log))
	// Garbage is collected between runs only.
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "GOGC=off")
	return cmd
}

// run makes the run. It has violations if it failed, also if it crashed.
func (c child) run(ctx context.Context) (s sim.Summary) {
	limited, cancel := context.WithTimeout(ctx, hangs)
	defer cancel()
	cmd := c.command(limited)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	for line := range strings.Lines(out.String()) {
		text, found := strings.CutPrefix(line, "sim: ")
		if found && json.Unmarshal([]byte(text), &s) == nil {
			return s
		}
	}
	if limited.Err() != nil && ctx.Err() == nil {
		used := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
		err = fmt.Errorf("no end after %v, and %v on a CPU: it hangs, or the machine is too busy",
			hangs, used)
	}
	rest := out.String()
	return sim.Summary{
		Seed: c.seed, Violations: []string{fmt.Sprintf("%v: %s", err, rest[:min(len(rest), 4000)])},
	}
}

// show makes one run and prints its log.
func show(ctx context.Context, c child) error {
	cmd := c.command(ctx)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// figures are those of many runs.
type figures struct {
	runs, faults, terms int
	virtual, recovery   time.Duration
}

func (f *figures) report(took time.Duration) string {
	return fmt.Sprintf("%d runs, %d faults, %d jobs started in %.1f hours of virtual time; "+
		"%.1f s, %.0f faults a second; longest recovery %.1f s",
		f.runs, f.faults, f.terms, f.virtual.Hours(), took.Seconds(),
		float64(f.faults)/took.Seconds(), f.recovery.Seconds())
}

func (f *figures) add(s sim.Summary) {
	f.runs++
	f.faults += s.Faults
	f.terms += s.Terms
	f.virtual += s.Virtual
	f.recovery = max(f.recovery, s.Recovery)
}

// search makes that many runs, several at a time, until one fails. The first one is given.
func search(
	ctx context.Context, first child, runs, procs int,
) (f figures, failed *sim.Summary) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex
	next, end := first.seed, first.seed+uint64(runs)
	var working sync.WaitGroup
	for range procs {
		working.Go(func() {
			mu.Lock()
			defer mu.Unlock()
			for ctx.Err() == nil && next < end {
				c := first
				c.seed = next
				next++
				mu.Unlock()
				s := c.run(ctx)
				mu.Lock()
				if ctx.Err() != nil {
					return
				}
				f.add(s)
				if len(s.Violations) > 0 {
					failed = &s
					cancel()
				}
			}
		})
	}
	working.Wait()
	return f, failed
}

// repeat makes the run twice, and requires that its log is the same, byte for byte.
func repeat(ctx context.Context, c child) error {
	if a, b := c.run(ctx), c.run(ctx); a.Digest != b.Digest || a.Digest == "" {
		return fmt.Errorf("seed %d has not given the same run twice: %+v, %+v", c.seed, a, b)
	}
	return nil
}
