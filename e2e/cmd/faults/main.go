//go:build linux

// Faults runs leasehold, a naive client (e2e/cmd/naiveclient) and etcdctl lock through
// every fault of a table, against real etcd processes, and reads from their
// jobs' own connections when each job lived.
//
//	bin/faults [-n 3] [-peers-n 1] [-rows a,b,…] [-ci] [-parallel 8] [-json FILE] [-hooks]
//	bin/faults -docs FILE     the pages of a run: docs/faults.*, and its part of README.md
//
// It needs root: candidates and members of etcd are in network namespaces of their own, candidates
// in cgroups of their own. The programs under test are those beside this one in bin/. The exit code
// is 1 when leasehold broke a promise, or a trial came to no end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("faults", flag.ContinueOnError)
	n := flags.Int("n", 3, "trials of leasehold in each row")
	peersN := flags.Int("peers-n", 1, "trials of each of the others")
	only := flags.String("rows", "", "the rows to run, all without; \"?\" lists them")
	ci := flags.Bool("ci", false, "only those rows that CI runs")
	hooks := flags.Bool("hooks", false, "leasehold has hooks that move an address to the leader's "+
		"machine, which must never be on two; no trials of the others")
	parallel := flags.Int("parallel", 8, "trials side by side")
	out := flags.String("json", "bin/faults.json", "where to write what was seen")
	into := flags.String("into", "", "put the rows that are run into such a file of an earlier "+
		"run, of as many trials")
	docs := flags.String("docs", "",
		"write the pages of such a file into the working directory, and run nothing")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	if *docs != "" {
		r, err := harness.ReadJSON[Results](*docs)
		if err == nil {
			err = r.publish(".")
		}
		return exit(err)
	}
	if *only == "?" {
		for _, s := range scenarios {
			fmt.Printf("%-34s %s\n", s.Name, s.About)
		}
		return 0
	}
	wanted, err := choose(*only, *ci)
	if err != nil {
		return exit(err)
	}
	inside, code := harness.EnterNetwork()
	if !inside {
		return code
	}
	if *hooks {
		wanted, *peersN = withHooks(wanted), 0
	}
	ctx, stop := harness.Interruptible()
	defer stop()
	return exit(measure(ctx, wanted, *n, *peersN, *hooks, max(1, *parallel), *out, *into))
}

func exit(err error) int { return harness.ExitCode("faults", err) }

// choose finds the scenarios by their names.
func choose(only string, ci bool) (chosen []*Scenario, err error) {
	names := strings.FieldsFunc(only, func(r rune) bool { return r == ',' || r == ' ' })
	for _, name := range names {
		if !slices.ContainsFunc(scenarios, func(s Scenario) bool { return s.Name == name }) {
			err = errors.Join(err, fmt.Errorf("no row %s; -rows ? lists them", name))
		}
	}
	for i := range scenarios {
		s := &scenarios[i]
		if (only == "" || slices.Contains(names, s.Name)) && (!ci || s.CI) {
			chosen = append(chosen, s)
		}
	}
	return chosen, err
}

// measure runs the scenarios and reports what it has also when it is interrupted.
func measure(
	ctx context.Context, wanted []*Scenario, n, peersN int, hooks bool, parallel int,
	out, into string,
) error {
	r, err := newRunner(ctx, wanted)
	if err != nil {
		return err
	}
	begin := time.Now()
	r.results.N, r.results.PeersN, r.results.Hooks = n, peersN, hooks
	for _, s := range wanted {
		r.results.Rows = append(r.results.Rows, s.info())
	}
	err = r.runAll(ctx, wanted, parallel)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	r.results.Minutes = time.Since(begin).Minutes()
	if len(r.results.Samples) > 0 {
		err = errors.Join(err, r.results.write(out), r.results.writeText(os.Stdout))
	}
	if err == nil && into != "" {
		err = r.results.replaceIn(into)
	}
	if v := r.results.Violations(); len(v) > 0 {
		err = errors.Join(err, fmt.Errorf("%d violations", len(v)))
	}
	return err
}

const (
	prefix       = "faults/" // of elections
	cgroupPrefix = "faults"
)

// runner is what all trials use.
type runner struct {
	etcd     harness.Etcd
	programs *harness.Programs
	jumping  *harness.Programs // of scenarios that need them

	mu      sync.Mutex
	results *Results
	total   int // trials to be made
}

func newRunner(ctx context.Context, wanted []*Scenario) (*runner, error) {
	r := &runner{results: &Results{}}
	var err error
	if r.programs, err = harness.ProgramsBeside(); err != nil {
		return nil, err
	}
	if harness.Cgroup2() == "" {
		return nil, errors.New("keep candidates in cgroups of their own: no cgroup v2 is mounted")
	}
	if r.etcd, r.results.About, err = harness.FindEtcdAndAbout(ctx); err != nil {
		return nil, err
	}
	if r.results.Version, err = r.programs.Version(ctx); err != nil {
		return nil, err
	}
	jumps := func(s *Scenario) bool { return strings.HasPrefix(s.Name, "wall-clock") }
	if slices.ContainsFunc(wanted, jumps) {
		if r.jumping, err = fault.BuildJumping(ctx, r.programs.Beside("clock")); err != nil {
			return nil, err
		}
	}
	return r, harness.RemoveLeftovers(ctx, cgroupPrefix)
}
