//go:build linux

// Model checks the protocol of docs/model with spin.
//
//	bin/model [-ci] [-only PATTERN] [-limit 20m]
//	bin/model -update    the same, and keep what is found: figures, traces, pictures, tables
//	bin/model -docs      draw the pictures and tables of what is kept, and run nothing
//
// Each configuration must be searched to the end, without an error, and have the kept number of
// states. With each switch spin must find that the named property breaks, and the shortest trace
// to it must be the kept one. A search that is cut short has not passed. docs/model/README.md says
// more.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"leasehold/e2e/harness"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("model", flag.ContinueOnError)
	c := checker{out: os.Stdout, slow: 60, transitions: map[string]bool{}}
	only := flags.String("only", "", "the configurations and switches to run, by a pattern")
	docs := flags.Bool("docs", false, "draw what is kept, and run nothing")
	flags.StringVar(&c.dir, "dir", "docs/model", "where the model is")
	flags.BoolVar(&c.ci, "ci", false, "only what CI has the time for")
	flags.BoolVar(&c.update, "update", false, "keep what is found")
	flags.DurationVar(&c.limit, "limit", 20*time.Minute, "the longest time of a search")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	ctx, stop := harness.Interruptible()
	defer stop()
	var err error
	if c.only, err = regexp.Compile(*only); err == nil {
		err = c.load()
	}
	switch {
	case err != nil:
	case *docs:
		err = c.publish()
	default:
		err = c.check(ctx)
	}
	return harness.ExitCode("model", err)
}

// checker does all that one call of the program does.
type checker struct {
	dir         string
	ci, update  bool
	only        *regexp.Regexp
	limit       time.Duration
	slow        float64 // seconds: CI does not look for the shortest trace if that takes longer
	configs     *table
	switches    *table
	lock        sync.Mutex      // of what all searches write: errors, and
	out         io.Writer       // and
	transitions map[string]bool // that spin has seen: whether a configuration of CI takes it
}

// atOnce is the number of searches at a time. Each is one thread, and takes up to 600 MB.
const atOnce = 2

// check runs everything, also after something has failed.
func (c *checker) check(ctx context.Context) error {
	if err := needPrograms(); err != nil {
		return err
	}
	var errs []error
	var running sync.WaitGroup
	slots := make(chan bool, atOnce)
	try := func(row row, f func(context.Context, row) error) {
		if !c.only.MatchString(row.name()) {
			return
		}
		slots <- true
		running.Go(func() {
			defer func() { <-slots }()
			if ctx.Err() != nil {
				return
			}
			if err := f(ctx, row); err != nil {
				c.lock.Lock()
				defer c.lock.Unlock()
				errs = append(errs, fmt.Errorf("%s: %w", row.name(), err))
			}
		})
	}
	all := true // CI's configurations
	for _, row := range c.configs.rows {
		ci := row.get("ci") == "yes"
		all = all && (!ci || c.only.MatchString(row.name()))
		if ci || !c.ci {
			try(row, c.exhaust)
		}
	}
	for _, row := range c.switches.rows {
		try(row, c.turnOff)
	}
	running.Wait()
	if ctx.Err() != nil {
		return errors.Join(append(errs, errors.New("interrupted"))...)
	}
	errs = append(errs, c.checkTransitions(all && len(errs) == 0))
	if c.update {
		errs = append(errs, c.configs.write(), c.switches.write(), c.publish())
	}
	return errors.Join(errs...)
}

// search has also the options of the row, which come last: of two that contradict each other, gcc
// and pan take the last.
func (c *checker) search(row row, options ...string) search {
	return search{
		model:   filepath.Join(c.dir, row.get("model")),
		options: append(options, strings.Fields(row.get("options"))...), limit: c.limit,
	}
}

// exhaust searches all states of a configuration.
func (c *checker) exhaust(ctx context.Context, row row) error {
	r, err := c.search(row, hashTable, "-O1").run(ctx) // with -O2, gcc takes longer than it saves
	switch {
	case err != nil:
		return err
	case r.Violation != "":
		return fmt.Errorf("spin finds an error: %s\n%s", r.Violation, strings.Join(r.Trace, "\n"))
	case r.Cut != "":
		return fmt.Errorf("the search is not complete: %s", r.Cut)
	}
	c.lock.Lock()
	defer c.lock.Unlock()
	for _, t := range r.Transitions {
		c.transitions[t] = c.transitions[t] || row.get("ci") == "yes"
	}
	states := fmt.Sprint(r.States)
	_, _ = fmt.Fprintf(c.out, "%-28s %10s states %8.0f MB %7.1f s\n",
		row.name(), states, r.MB, r.Seconds)
	if c.update {
		row.set("states", states)
		row.set("MB", fmt.Sprintf("%.0f", r.MB))
		row.set("seconds", seconds(r.Seconds))
	} else if states != row.get("states") {
		return fmt.Errorf("%s states, and %s are kept: after a change of the model "+
			"or of its options run bin/model -update", states, row.get("states"))
	}
	return nil
}

// hashTable has 2^20 lists. pan's own choice is 2^24, which takes a second to set up.
const hashTable = "-w20"

func seconds(s float64) string { return fmt.Sprintf("%.1f", max(s, 0.1)) }

// turnOff searches with a switch for a trace to the property that then breaks: with -DBFS among the
// options for the shortest one. If CI has no time for that, any such trace will do, and the kept
// one must be one of the model.
func (c *checker) turnOff(ctx context.Context, row row) error {
	// The search is mostly done sooner than a compiler that optimizes.
	s := c.search(row, hashTable, "-O0", "-D"+row.name())
	slow := row.number("seconds") > c.slow
	if c.ci && slow {
		s.options = slices.DeleteFunc(s.options, func(o string) bool { return o == "-DBFS" })
	}
	r, err := s.run(ctx)
	if err == nil {
		err = violates(r, row.get("breaks"))
	}
	trace := r.Trace
	if err == nil && c.ci && slow {
		trace, err = c.replayKept(ctx, s, row)
	}
	if err != nil {
		return err
	}
	c.lock.Lock()
	defer c.lock.Unlock()
	_, _ = fmt.Fprintf(c.out, "%-28s %-12s after %3d steps %7.1f s\n",
		c.key(row), row.get("breaks"), len(trace), r.Seconds)
	if c.update {
		row.set("seconds", seconds(r.Seconds))
		return c.keep(row, r)
	}
	return c.compare(row, trace)
}

// replayKept returns the trace of the kept trail.
func (c *checker) replayKept(ctx context.Context, s search, row row) ([]string, error) {
	trail, err := os.ReadFile(c.kept(row, ".trail"))
	if err != nil {
		return nil, err
	}
	r, err := s.replayed(ctx, trail)
	if err == nil {
		err = violates(r, row.get("breaks"))
	}
	if err != nil {
		return nil, fmt.Errorf("the kept trail is no run of the model, "+
			"run bin/model -update: %w", err)
	}
	return r.Trace, nil
}

// checkTransitions compares those seen with the kept ones. If all configurations of CI have run,
// these must take each of them: a table that is too wide would let the daemon do what the model
// doesn't.
func (c *checker) checkTransitions(all bool) error {
	path := filepath.Join(c.dir, "transitions.txt")
	seen := slices.Sorted(maps.Keys(c.transitions))
	if c.update && all && len(seen) > 0 {
		if err := os.WriteFile(path, []byte(text(seen)), 0o644); err != nil {
			return err
		}
	}
	kept, err := lines(path)
	if errors.Is(err, os.ErrNotExist) && len(seen) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	for _, t := range seen {
		if !slices.Contains(kept, t) {
			err = errors.Join(err, fmt.Errorf("%s is new: run bin/model -update", t))
		}
	}
	for _, t := range kept {
		if all && !c.transitions[t] {
			err = errors.Join(err, fmt.Errorf("%s is taken by no configuration of CI: "+
				"run bin/model -update, or let CI run the one that takes it", t))
		}
	}
	return err
}
