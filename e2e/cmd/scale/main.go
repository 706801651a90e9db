//go:build linux

// Scale measures what many candidates cost etcd: one election with 10, 100 and 1,000 candidates,
// and 1,000 elections with two; or far more elections. The candidates are those of package
// election, each with a lease and a connection of its own as a daemon has it, but without a job,
// and all of a trial in one process. etcd is one real member on loopback, a new one for each trial.
//
//	bin/scale [-candidates 1000] [-elections 1000]   measure and report
//	bin/scale -large 5000                            so many elections with two, TTL 60 s
//	bin/scale -doc docs/scale.md                     put the last reports into the document
//
// Requests and events are those that etcd counts itself, in its /metrics.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

// Where the figures are kept.
const (
	file      = "bin/scale.json"
	largeFile = "bin/scale-large.json"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("scale", flag.ContinueOnError)
	candidates := flags.Int("candidates", 1000,
		"candidates in the largest election; 0: none of these trials")
	elections := flags.Int("elections", 1000, "elections of two; 0: none")
	large := flags.Int("large", 0,
		"so many elections of two with a TTL of a minute, and nothing else")
	doc := flags.String("doc", "",
		"put the last figures into this file, between their markers, and measure nothing")
	trial := flags.Int("trial", -1,
		"for scale itself: carry out the trial of this number and print what it measured")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	ctx, stop := harness.Interruptible()
	defer stop()
	all, to := shapes(*candidates, *elections), file
	if *large > 0 {
		to = largeFile
		all = []shape{{
			Elections: *large, Size: 2, Full: true, AtATime: atATime,
			TTL: time.Minute, DialTimeout: 10 * time.Second,
		}}
	}
	var err error
	switch {
	case *doc != "":
		err = refresh(*doc)
	case *trial >= 0:
		err = carryOut(ctx, all[*trial])
	default:
		err = measure(ctx, args, all, to)
	}
	return harness.ExitCode("scale", err)
}

// What a daemon has by default.
const (
	ttl         = 15 * time.Second
	dialTimeout = time.Second
)

// atATime is how many of the large trial's candidates join at once. All of them have one process
// here. If it has more to do at once than its CPUs can, their requests time out and are made again.
const atATime = 200

// shapes are those of the trials.
func shapes(candidates, elections int) []shape {
	var all []shape
	add := func(elections, size int, full bool) {
		all = append(all, shape{
			Elections: elections, Size: size, Full: full, TTL: ttl, DialTimeout: dialTimeout,
		})
	}
	for n := 10; n < candidates; n *= 10 {
		add(1, n, false)
	}
	if candidates > 0 {
		add(1, candidates, true)
	}
	if elections > 0 {
		add(elections, 2, true)
	}
	return all
}

// measure carries out all trials, one after the other, and reports those that it has also when it
// is interrupted.
func measure(ctx context.Context, args []string, shapes []shape, to string) error {
	_, about, err := harness.FindEtcdAndAbout(ctx)
	if err != nil {
		return err
	}
	r, began := &results{About: about}, time.Now()
	for i, s := range shapes {
		fmt.Fprintf(os.Stderr, "%d of %d: %v\n", i+1, len(shapes), s)
		var t Trial
		if err = startTrial(ctx, append(args, "-trial", strconv.Itoa(i)), &t); err != nil {
			err = fmt.Errorf("%v: %w", s, err)
			break
		}
		r.Trials = append(r.Trials, &t)
	}
	r.Seconds = time.Since(began).Seconds()
	if len(r.Trials) > 0 {
		fmt.Print(r.report())
		err = errors.Join(err, harness.WriteJSON(to, r))
	}
	return err
}

// startTrial carries out a trial in a process of its own, so that the memory of one is not that of
// another.
func startTrial(ctx context.Context, args []string, to *Trial) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it ends its etcd
	cmd.WaitDelay = 10 * time.Second
	measured, err := cmd.Output()
	if err != nil {
		return err
	}
	return json.Unmarshal(measured, to)
}
