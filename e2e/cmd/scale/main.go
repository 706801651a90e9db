//go:build linux

// Scale measures what many candidates cost etcd: one election with 10, 100 and 1,000 candidates,
// and 1,000 elections with two. The candidates are those of package election, each with a lease
// and a connection of its own as a daemon has it, but without a job, and all of a trial in one
// process. etcd is one real member on loopback, a new one for each trial.
//
//	bin/scale [-candidates 1000] [-elections 1000] [-json FILE]   measure and report
//	bin/scale -doc docs/scale.md [-json FILE]   put such a report into the document
//
// Requests and events are those that etcd counts itself, in its /metrics.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("scale", flag.ContinueOnError)
	candidates := flags.Int("candidates", 1000,
		"candidates in the largest election; 0: none of these trials")
	elections := flags.Int("elections", 1000, "elections of two; 0: none")
	ttl := flags.Duration("ttl", 15*time.Second,
		"the candidates' TTL, of at most 15s; most of the run's time is a multiple of it")
	out := flags.String("json", "bin/scale.json",
		"where to write what was measured, or where -doc finds it")
	doc := flags.String("doc", "",
		"put the figures into this file, between their markers, and measure nothing")
	trial := flags.String("trial", "",
		"for scale itself: carry out one trial and print what it measured")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	ctx, stop := harness.Interruptible()
	defer stop()
	switch {
	case *doc != "":
		return harness.ExitCode("scale", refresh(*doc, *out))
	case *trial != "":
		return harness.ExitCode("scale", printTrial(ctx, *trial, *ttl))
	}
	return harness.ExitCode("scale", measure(ctx, shapes(*candidates, *elections), *ttl, *out))
}

// shapes are those of the trials.
func shapes(candidates, elections int) []shape {
	var all []shape
	for n := 10; n < candidates; n *= 10 {
		all = append(all, shape{Elections: 1, Size: n})
	}
	if candidates > 0 {
		all = append(all, shape{Elections: 1, Size: candidates, Full: true})
	}
	if elections > 0 {
		all = append(all, shape{Elections: elections, Size: 2, Full: true})
	}
	return all
}

// measure carries out all trials, one after the other, and reports those that it has also when it
// is interrupted.
func measure(ctx context.Context, shapes []shape, ttl time.Duration, out string) error {
	_, about, err := harness.FindEtcdAndAbout(ctx)
	if err != nil {
		return err
	}
	r, began := &results{About: about}, time.Now()
	for i, s := range shapes {
		fmt.Fprintf(os.Stderr, "%d of %d: %v\n", i+1, len(shapes), s)
		var t *Trial
		if t, err = startTrial(ctx, s, ttl); err != nil {
			err = fmt.Errorf("%v: %w", s, err)
			break
		}
		r.Trials = append(r.Trials, t)
	}
	r.Seconds = time.Since(began).Seconds()
	if len(r.Trials) > 0 {
		err = errors.Join(err, harness.WriteJSON(out, r), writeReport(os.Stdout, r))
	}
	return err
}

// startTrial carries out a trial in a process of its own, so that the memory of one is not that of
// another.
func startTrial(ctx context.Context, s shape, ttl time.Duration) (*Trial, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	wanted, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "-trial", string(wanted), "-ttl", ttl.String())
	var stdout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it ends its etcd
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		return nil, err
	}
	var t Trial
	if err := json.Unmarshal(stdout.Bytes(), &t); err != nil {
		return nil, fmt.Errorf("read what the trial measured: %w", err)
	}
	return &t, nil
}

func printTrial(ctx context.Context, wanted string, ttl time.Duration) error {
	var s shape
	if err := json.Unmarshal([]byte(wanted), &s); err != nil {
		return fmt.Errorf("read -trial: %w", err)
	}
	t, err := carryOut(ctx, s, ttl)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(t)
}
