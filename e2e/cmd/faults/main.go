//go:build linux

// Faults runs leasehold, a stock loop (e2e/cmd/stockloop) and etcdctl lock through
// every fault of a table, against real etcd processes, and reads from their
// jobs' own connections when each job lived.
//
//	bin/faults [-n 3] [-peers-n 1] [-rows a,b,…] [-ci] [-parallel 8] [-json FILE]
//	bin/faults -text FILE                       the report of a run
//	bin/faults -table FILE                      its table in Markdown
//	bin/faults -picture FILE -svg docs/faults.svg
//	bin/faults -table FILE -readme README.md    picture and short table into the README
//
// It needs root: candidates and members of etcd are in network namespaces of
// their own, candidates in cgroups of their own. The programs under test are
// those beside this one in bin/. The exit code is 1 when leasehold broke a
// promise, or a trial came to no end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

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
	into := flags.String("into", "", "put the rows that are run in their place in such a file of an earlier run, of as many trials")
	text := flags.String("text", "", "print the report of such a file, and run nothing")
	table := flags.String("table", "", "print the Markdown table of such a file, and run nothing")
	picture := flags.String("picture", "", "draw such a file, and run nothing")
	svg := flags.String("svg", "docs/faults.svg", "where to draw it, and a short one beside it: -short.svg")
	readme := flags.String("readme", "", "put picture and short table into this file, between their markers")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	for _, file := range []struct {
		path string
		use  func(*Results) error
	}{
		{*text, func(r *Results) error { return r.writeText(os.Stdout) }},
		{*picture, func(r *Results) error { return r.draw(*svg) }},
		{*table, func(r *Results) error {
			if *readme != "" {
				return r.refresh(*readme)
			}
			return r.writeTable(os.Stdout)
		}},
	} {
		if file.path == "" {
			continue
		}
		r, err := readResults(file.path)
		if err == nil {
			err = file.use(r)
		}
		return exit(err)
	}

	wanted, err := choose(*only, *ci)
	if err != nil {
		return exit(err)
	}
	if *only == "?" {
		for _, r := range rows {
			fmt.Printf("%-28s %s\n", r.Name, r.About)
		}
		return 0
	}
	inside, code := harness.EnterNetwork()
	if !inside {
		return code
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	return exit(measure(ctx, wanted, *n, *peersN, max(1, *parallel), *out, *into))
}

func exit(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		return 1
	}
	return 0
}

// choose finds the rows by their names.
func choose(only string, ci bool) ([]*Row, error) {
	var chosen []*Row
	names := strings.FieldsFunc(only, func(r rune) bool { return r == ',' || r == ' ' })
	for i := range rows {
		if (only == "" || only == "?" || slices.Contains(names, rows[i].Name)) && (!ci || rows[i].CI) {
			chosen = append(chosen, &rows[i])
			names = slices.DeleteFunc(names, func(n string) bool { return n == rows[i].Name })
		}
	}
	if len(names) > 0 && only != "?" {
		return nil, fmt.Errorf("no row %s; -rows ? lists them", strings.Join(names, ", "))
	}
	return chosen, nil
}

// measure runs the rows and reports what it has also when it is interrupted.
func measure(ctx context.Context, wanted []*Row, n, peersN, parallel int, out, into string) error {
	h, err := newRunner(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(wanted, (*Row).slowsDisks) {
		if _, err := exec.LookPath("strace"); err != nil {
			return fmt.Errorf("slow disks down (Debian's package strace): %w", err)
		}
	}
	begin := time.Now()
	h.results.N, h.results.PeersN = n, peersN
	for _, r := range wanted {
		h.results.Rows = append(h.results.Rows, RowInfo{
			Name: r.Name, Group: r.Group, About: r.About, TTL: r.ttl().Seconds(), Members: r.shape().members,
			Promise: r.Promise, Untouched: r.Untouched, Either: r.Either, Short: r.CI,
		})
	}
	if slices.ContainsFunc(wanted, func(r *Row) bool { return r.Shifted }) {
		if h.shifted, err = buildShifted(ctx, h.programs); err != nil {
			return err
		}
	}
	err = h.runAll(ctx, wanted, n, peersN, parallel)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	h.results.Minutes = time.Since(begin).Minutes()
	if len(h.results.Samples) > 0 {
		err = errors.Join(err, h.results.write(out), h.results.writeText(os.Stdout))
	}
	if err == nil && into != "" {
		err = h.results.replaceIn(into)
	}
	if v := h.results.violations(); len(v) > 0 {
		err = errors.Join(err, fmt.Errorf("%d violations", len(v)))
	}
	return err
}

// runner is what all trials use.
type runner struct {
	etcd     harness.Etcd
	programs string // their directory
	shifted  string // that of those whose wall clock can jump

	mu      sync.Mutex
	results *Results
	total   int // trials to be made

	bearing   sync.Mutex
	burden    *burden // nil without one
	burdenFor *Row
}

func newRunner(ctx context.Context) (*runner, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if _, err := exec.LookPath("nft"); err != nil {
		return nil, fmt.Errorf("cut networks (Debian's package nftables): %w", err)
	}
	if harness.Cgroup2() == "" {
		return nil, errors.New("keep candidates in cgroups of their own: no cgroup v2 is mounted")
	}
	h := &runner{programs: filepath.Dir(self), results: &Results{}}
	if h.etcd, err = harness.FindEtcd(ctx, os.Stderr); err != nil {
		return nil, err
	}
	if h.results.About, err = harness.AboutThisRun(ctx, h.etcd); err != nil {
		return nil, err
	}
	return h, removeLeftovers(ctx)
}

// A batch is some trials of one entrant in one row.
type batch struct {
	row   *Row
	of    entrant
	first int // index of the first
	n     int
}

// mostInBatch bounds for how long one lane works while the others have nothing
// left to do.
const mostInBatch = 5

// abreast is how many trials of a row that is alone run side by side.
const abreast = 4

// runAll runs first the trials that must be alone, one after the other, then
// row by row those that may have their like beside them, and then all others
// in lanes side by side.
func (h *runner) runAll(ctx context.Context, wanted []*Row, n, peersN, parallel int) error {
	var alone, others queue
	var rowsAlone []*queue
	for _, row := range wanted {
		to := &others
		if row.Alone == RowAlone {
			to = &queue{}
			rowsAlone = append(rowsAlone, to)
		}
		for _, e := range entrants {
			left, to := n, to
			if !e.ours() {
				left = peersN
			}
			if row.alone(e) {
				to = &alone
			}
			for first := 0; row.takesPart(e) && left > 0; {
				b := batch{row, e, first, min(left, mostInBatch)}
				first, left = first+b.n, left-b.n
				h.total += b.n
				to.batches = append(to.batches, b)
			}
		}
	}
	err := h.lanes(ctx, &alone, 1)
	for _, q := range rowsAlone {
		err = errors.Join(err, h.lanes(ctx, q, min(abreast, parallel)))
	}
	return errors.Join(err, h.lanes(ctx, &others, parallel))
}

// lanes works a queue off.
func (h *runner) lanes(ctx context.Context, q *queue, n int) error {
	defer h.unburden()
	errs := make([]error, n)
	var lanes sync.WaitGroup
	for i := range errs {
		lanes.Go(func() { errs[i] = h.lane(ctx, q) })
	}
	lanes.Wait()
	return errors.Join(errs...)
}

// queue gives out batches.
type queue struct {
	mu      sync.Mutex
	batches []batch
}

// take gives the next batch, if possible one for the given shape.
func (q *queue) take(preferred shape) (batch, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.batches) == 0 {
		return batch{}, false
	}
	i := max(0, slices.IndexFunc(q.batches, func(b batch) bool { return b.row.shape() == preferred }))
	b := q.batches[i]
	q.batches = slices.Delete(q.batches, i, i+1)
	return b, true
}

// lane makes one trial after the other, on a stage that it keeps as long as it
// is of the right shape.
func (h *runner) lane(ctx context.Context, q *queue) error {
	var s *Stage
	leave := func() {
		if s != nil {
			s.close()
		}
		s = nil
	}
	defer leave()
	for ctx.Err() == nil {
		var now shape
		if s != nil {
			now = s.shape
		}
		b, more := q.take(now)
		if !more {
			return nil
		}
		for i := range b.n {
			if s != nil && s.shape != b.row.shape() {
				leave()
			}
			var err error
			if s == nil {
				s, err = h.newStage(ctx, b.row.shape())
			}
			if err == nil {
				err = h.bear(ctx, b.row)
			}
			sample := Sample{Row: b.row.Name, Candidate: b.of.Title}
			if err == nil {
				sample = s.trial(ctx, b.row, b.of, b.first+i)
			} else {
				sample.Failure = fmt.Sprintf("make a stage: %v", err)
			}
			if ctx.Err() != nil {
				return nil
			}
			h.note(sample)
			if sample.Failure != "" { // whatever it was, it shall not befall the next
				leave()
			}
		}
	}
	return nil
}

// note keeps a sample and tells of it.
func (h *runner) note(s Sample) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.results.Samples = append(h.results.Samples, s)
	outcome := fmt.Sprintf("dead %s, next %s", spanOf(s.Dead), spanOf(s.Next))
	if s.Overlap > 0 {
		outcome += ", both alive " + harness.Span(s.Overlap)
	}
	if s.Failure != "" {
		outcome = "no outcome: " + s.Failure
	}
	for _, v := range s.Violations {
		outcome += "\n    VIOLATED: " + v
	}
	fmt.Fprintf(os.Stderr, "%d/%d %s, %s: %s\n", len(h.results.Samples), h.total, s.Row, s.Candidate, outcome)
	if s.evidence != "" {
		fmt.Fprintln(os.Stderr, s.evidence)
	}
}
