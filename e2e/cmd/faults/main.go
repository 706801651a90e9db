//go:build linux

// Faults runs leasehold, a stock loop (e2e/cmd/stockloop) and etcdctl lock through
// every fault of a table, against real etcd processes, and reads from their
// jobs' own connections when each job lived.
//
//	bin/faults [-n 3] [-peers-n 1] [-rows a,b,…] [-ci] [-parallel 8] [-json FILE]
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
	"os/exec"
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
	parallel := flags.Int("parallel", 8, "trials side by side")
	out := flags.String("json", "bin/faults.json", "where to write what was seen")
	into := flags.String("into", "", "put the rows that are run in their place in such a file "+
		"of an earlier run, of as many trials")
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

	wanted, err := choose(*only, *ci)
	if err != nil {
		return exit(err)
	}
	if *only == "?" {
		for _, s := range scenarios {
			fmt.Printf("%-34s %s\n", s.Name, s.About)
		}
		return 0
	}
	inside, code := harness.EnterNetwork()
	if !inside {
		return code
	}
	ctx, stop := harness.Interruptible()
	defer stop()
	return exit(measure(ctx, wanted, *n, *peersN, max(1, *parallel), *out, *into))
}

func exit(err error) int { return harness.ExitCode("faults", err) }

// choose finds the scenarios by their names.
func choose(only string, ci bool) ([]*Scenario, error) {
	var chosen []*Scenario
	all := only == "" || only == "?"
	names := strings.FieldsFunc(only, func(r rune) bool { return r == ',' || r == ' ' })
	for i := range scenarios {
		s := &scenarios[i]
		if (all || slices.Contains(names, s.Name)) && (!ci || s.CI) {
			chosen = append(chosen, s)
			names = slices.DeleteFunc(names, func(n string) bool { return n == s.Name })
		}
	}
	if len(names) > 0 && !all {
		return nil, fmt.Errorf("no row %s; -rows ? lists them", strings.Join(names, ", "))
	}
	return chosen, nil
}

// measure runs the scenarios and reports what it has also when it is interrupted.
func measure(
	ctx context.Context, wanted []*Scenario, n, peersN, parallel int, out, into string,
) error {
	r, err := newRunner(ctx, wanted)
	if err != nil {
		return err
	}
	begin := time.Now()
	r.results.N, r.results.PeersN = n, peersN
	for _, s := range wanted {
		r.results.Rows = append(r.results.Rows, RowInfo{
			Name: s.Name, Group: s.Group, About: s.About, TTL: s.ttl().Seconds(),
			Members: max(1, s.Etcd.Members), Promise: s.Promise, Short: s.CI,
			NoFailover: s.Expect == NoFailover, MayFailover: s.Expect == MayFailover,
		})
	}
	err = r.runAll(ctx, wanted, n, peersN, parallel)
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

	stressing sync.Mutex
	stress    *fault.Stress // nil without
	stressFor *Scenario
}

func newRunner(ctx context.Context, wanted []*Scenario) (*runner, error) {
	r := &runner{results: &Results{}}
	var err error
	if r.programs, err = harness.ProgramsBeside(); err != nil {
		return nil, err
	}
	if _, err := exec.LookPath("nft"); err != nil {
		return nil, fmt.Errorf("cut networks (Debian's package nftables): %w", err)
	}
	if harness.Cgroup2() == "" {
		return nil, errors.New("keep candidates in cgroups of their own: no cgroup v2 is mounted")
	}
	if slices.ContainsFunc(wanted, (*Scenario).slowsDisks) {
		if _, err := exec.LookPath("strace"); err != nil {
			return nil, fmt.Errorf("slow disks down (Debian's package strace): %w", err)
		}
	}
	if r.etcd, r.results.About, err = harness.FindEtcdAndAbout(ctx); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(wanted, (*Scenario).jumps) {
		if r.jumping, err = fault.BuildJumping(ctx, r.programs.Beside("clock")); err != nil {
			return nil, err
		}
	}
	return r, harness.RemoveLeftovers(ctx, cgroupPrefix)
}

// A batch is some trials of one variant in one scenario.
type batch struct {
	scenario *Scenario
	of       variant
	first    int // index of the first
	n        int
}

// mostInBatch bounds for how long one lane works while the others have nothing
// left to do.
const mostInBatch = 5

// abreast is how many trials of a scenario that is alone run side by side.
const abreast = 4

// runAll runs first the trials that must be alone, one after the other, then
// scenario by scenario those that may have their like beside them, and then all
// others in lanes side by side.
func (r *runner) runAll(ctx context.Context, wanted []*Scenario, n, peersN, parallel int) error {
	var alone, others queue
	var scenariosAlone []*queue
	for _, s := range wanted {
		to := &others
		if s.Isolation == ScenarioAlone {
			to = &queue{}
			scenariosAlone = append(scenariosAlone, to)
		}
		for _, v := range variants {
			left, to := n, to
			if !v.Ours() {
				left = peersN
			}
			if s.alone(v) {
				to = &alone
			}
			for first := 0; s.has(v) && left > 0; {
				b := batch{s, v, first, min(left, mostInBatch)}
				first, left = first+b.n, left-b.n
				r.total += b.n
				to.batches = append(to.batches, b)
			}
		}
	}
	err := r.lanes(ctx, &alone, 1)
	for _, q := range scenariosAlone {
		err = errors.Join(err, r.lanes(ctx, q, min(abreast, parallel)))
	}
	return errors.Join(err, r.lanes(ctx, &others, parallel))
}

// lanes works a queue off.
func (r *runner) lanes(ctx context.Context, q *queue, n int) error {
	defer r.endStress()
	errs := make([]error, n)
	var lanes sync.WaitGroup
	for i := range errs {
		lanes.Go(func() { errs[i] = r.lane(ctx, q) })
	}
	lanes.Wait()
	return errors.Join(errs...)
}

// queue gives out batches.
type queue struct {
	mu      sync.Mutex
	batches []batch
}

// take gives the next batch, if possible one for the given etcd.
func (q *queue) take(preferred etcd) (batch, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.batches) == 0 {
		return batch{}, false
	}
	same := func(b batch) bool { return b.scenario.Etcd == preferred }
	i := max(0, slices.IndexFunc(q.batches, same))
	b := q.batches[i]
	q.batches = slices.Delete(q.batches, i, i+1)
	return b, true
}

// lane makes one trial after the other, on a testbed that it keeps as long as the
// scenarios need the same etcd.
func (r *runner) lane(ctx context.Context, q *queue) error {
	var bed *harness.Testbed
	var has etcd
	leave := func() {
		if bed != nil {
			bed.Close()
		}
		bed, has = nil, etcd{}
	}
	defer leave()
	for ctx.Err() == nil {
		b, more := q.take(has)
		if !more {
			return nil
		}
		for i := range b.n {
			if has != b.scenario.Etcd {
				leave()
			}
			var err error
			if bed == nil {
				has = b.scenario.Etcd
				bed, err = r.newTestbed(ctx, has)
			}
			if err == nil {
				err = r.startStress(ctx, b.scenario)
			}
			sample := Sample{Row: b.scenario.Name, Candidate: b.of.Title}
			if err == nil {
				sample = r.trial(ctx, bed, b.scenario, b.of, b.first+i)
			} else {
				sample.Failure = fmt.Sprintf("make a testbed: %v", err)
			}
			if ctx.Err() != nil {
				return nil
			}
			r.note(sample)
			if sample.Failure != "" { // whatever it was, the next trial shall not have it
				leave()
			}
		}
	}
	return nil
}

func (r *runner) newTestbed(ctx context.Context, of etcd) (*harness.Testbed, error) {
	return harness.NewTestbed(ctx, harness.TestbedConfig{
		Cluster: harness.ClusterConfig{
			Etcd: r.etcd, Size: of.Members, Flags: strings.Fields(of.Flags),
		},
		Isolated: true, Prefix: prefix, Auth: of.Auth,
	})
}

// startStress starts the scenario's stress, unless it is there, and ends any other.
func (r *runner) startStress(ctx context.Context, s *Scenario) (err error) {
	r.stressing.Lock()
	defer r.stressing.Unlock()
	if r.stressFor == s && r.stress != nil && r.stress.Running() {
		return nil
	}
	r.endStress()
	if s.Stress != nil {
		r.stress, err = s.Stress(ctx, r)
		r.stressFor = s
	}
	return err
}

func (r *runner) endStress() {
	if r.stress != nil {
		r.stress.End()
	}
	r.stress, r.stressFor = nil, nil
}

// stressed returns an error unless the scenario's stress was there to the end.
func (r *runner) stressed(s *Scenario) error {
	r.stressing.Lock()
	defer r.stressing.Unlock()
	if s.Stress != nil && (r.stress == nil || !r.stress.Running()) {
		return errors.New("the stress ended early: did the kernel run out of memory?")
	}
	return nil
}

// note keeps a sample and tells of it.
func (r *runner) note(s Sample) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.results.Samples = append(r.results.Samples, s)
	outcome := fmt.Sprintf("old job ended %s, next %s", duration(s.Dead), duration(s.Next))
	if s.Overlap > 0 {
		outcome += ", both alive " + harness.Span(s.Overlap)
	}
	if s.Failure != "" {
		outcome = "no outcome: " + s.Failure
	}
	for _, v := range s.Violations {
		outcome += "\n    VIOLATED: " + v
	}
	fmt.Fprintf(os.Stderr, "%d/%d %s, %s: %s\n",
		len(r.results.Samples), r.total, s.Row, s.Candidate, outcome)
	if s.evidence != "" {
		fmt.Fprintln(os.Stderr, s.evidence)
	}
}
