//go:build linux

// Soak injects faults drawn from a seed, one after another and overlapping, into five candidates in
// one election, whose jobs misbehave at random, and into the three members of their etcd, and
// checks all the time that leasehold keeps its promise. The first violation ends it, with the seed,
// the schedule and what happened last. It needs root, cgroup v2 and nft.
//
//	bin/soak [-seed N] [-faults 60] [-ttl 3s] [-json FILE]
//	bin/soak -contender stockloop   the same with the stock loop: shows that the checker can fail
//	bin/soak -schedule -seed N [-faults 60]   print what a seed holds, and do nothing
//	bin/soak -from FILE [-summary docs/soak.md]   print a run's figures, or write the document
//
// Each candidate and each member of etcd is on a network node of its own. Two of the candidates are
// an ordinary user's and have no cgroup for their job. The programs are those beside this one in
// bin/.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"leasehold/e2e/harness"
)

func main() { os.Exit(command(os.Args[1:])) }

// settings are what a run is made of. The same settings make the same schedule.
type settings struct {
	seed           uint64
	faults         int
	ttl            time.Duration
	implementation harness.Implementation
}

// implementations are those of -contender.
var implementations = map[string]harness.Implementation{
	"leasehold": harness.Leasehold, "stockloop": harness.StockLoop,
}

func command(args []string) int {
	set := settings{}
	flags := flag.NewFlagSet("soak", flag.ContinueOnError)
	flags.Uint64Var(&set.seed, "seed", 0,
		"what the schedule is drawn from; 0: chosen at random, and printed")
	flags.IntVar(&set.faults, "faults", 60, "how many faults")
	flags.DurationVar(&set.ttl, "ttl", 3*time.Second, "the candidates' TTL")
	name := flags.String("contender", "leasehold",
		"leasehold, or stockloop, which is to be found guilty")
	schedule := flags.Bool("schedule", false, "print the schedule, and do nothing")
	out := flags.String("json", "bin/soak.json", "where to write the figures")
	log := flags.String("log", "bin/soak.log", "where to write down everything that happened")
	from := flags.String("from", "", "print the figures of such a file, and do nothing")
	summary := flags.String("summary", "", "with -from: write the document about them")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	var known bool
	set.implementation, known = implementations[*name]
	switch {
	case flags.NArg() > 0 || set.faults < 1 || !known:
		flags.Usage()
		return 64
	case *from != "":
		return complain(reportFrom(*from, *summary))
	case os.Getenv(harness.NetworkVariable) != "":
		return complain(inside(set, *name, *out, *log))
	}
	if set.seed == 0 {
		set.seed = 1 + rand.Uint64N(1_000_000)
		args = append(args, fmt.Sprint("-seed=", set.seed))
	}
	if *schedule {
		for _, f := range draw(set) {
			fmt.Println(f)
		}
		return 0
	}
	return outside(args)
}

func complain(err error) int { return harness.ExitCode("soak", err) }

// The program runs twice: outside it makes what has a name, a directory and a cgroup, and removes
// it however the one inside its own network has ended.
const cgroupVariable = "SOAK_CGROUP"

func outside(args []string) int {
	ctx := context.Background()
	if os.Geteuid() != 0 || harness.Cgroup2() == "" {
		return complain(errors.New("this needs root and cgroup v2"))
	}
	_ = complain(sweep(ctx))
	dir, err := harness.TempDir(fmt.Sprintf("leasehold-soak-%d-", os.Getpid()))
	if err != nil {
		return complain(err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // in the temporary directory; nothing depends on it
	cgroup, err := harness.NewCgroup("soak")
	if err != nil {
		return complain(err)
	}
	defer func() { _ = complain(cgroup.Remove(ctx)) }()
	err = errors.Join(os.Setenv("TMPDIR", dir), os.Setenv(cgroupVariable, cgroup.Path))
	if err != nil {
		return complain(err)
	}
	os.Args = append(os.Args[:1], args...)
	_, code := harness.EnterNetwork()
	return code
}

// sweep removes what soaks have left that were killed themselves.
func sweep(ctx context.Context) error {
	err := harness.RemoveLeftovers(ctx, "soak")
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), "leasehold-soak-*-*")) // a good pattern
	for _, path := range dirs {
		pid := strings.Split(filepath.Base(path), "-")[2]
		if _, gone := os.Stat("/proc/" + pid); errors.Is(gone, os.ErrNotExist) {
			_ = os.RemoveAll(path) // in the temporary directory; nothing depends on it
		}
	}
	return err
}

func inside(set settings, name, out, log string) error {
	ctx, stop := harness.Interruptible()
	defer stop()
	fmt.Printf("soak: seed %d, %d faults, TTL %v, %s\n", set.seed, set.faults, set.ttl, name)
	r, err := newRun(ctx, set)
	if err != nil {
		return err
	}
	defer r.close()
	err = r.soak(ctx)
	res := r.results(name)
	var broken *violation
	if errors.As(err, &broken) {
		res.Violation = broken.what
		fmt.Printf("\nVIOLATION at %s: %s\n", r.clock(broken.at), broken.what)
		fmt.Printf("again: bin/soak -seed %d -faults %d -ttl %v -contender %s\n",
			r.seed, r.faults, r.ttl, name)
		r.tell(os.Stdout, broken.at+time.Second, 10, 40, broken.involves)
		err = errors.New("a promise was broken; see above, and all of it in " + log)
	}
	return errors.Join(err, r.tellAll(log), harness.WriteJSON(out, res), writeReport(os.Stdout, res))
}

// tell writes the schedule, the last events before a moment, and the ends of the logs of those
// involved.
func (r *run) tell(
	w io.Writer, until time.Duration, events, lines int, involved func(string) bool,
) {
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) } // see tellAll
	p("\nschedule:\n")
	for _, f := range r.schedule {
		p("  %s\n", f)
	}
	all := r.check.eventsUntil(until)
	p("\nthe last of %d events (+0 is %s):\n", len(all), r.wall.Format("15:04:05.000"))
	for _, e := range all[max(0, len(all)-events):] {
		p("  %s  %s\n", r.clock(e.at), e.text)
	}
	for _, c := range r.candidates {
		if !involved(c.name) {
			continue
		}
		for _, d := range c.lastRuns() {
			log := strings.Split(strings.TrimRight(d.Log(), "\n"), "\n")
			p("\nlog of %s, started at %s with a job that does %q:\n",
				c.name, r.clock(d.began), strings.Join(d.words, " "))
			for _, l := range log[max(0, len(log)-lines):] {
				p("  %s\n", l)
			}
		}
	}
}

// tellAll writes down everything there is to know of a run. Flush reports what went wrong.
func (r *run) tellAll(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	const all = 1 << 30
	w := bufio.NewWriter(f)
	r.tell(w, harness.Now(), all, all, func(string) bool { return true })
	for _, m := range r.members {
		_, _ = fmt.Fprintf(w, "\nlog of etcd member %s:\n%s", m.Name, m.Log())
	}
	return errors.Join(w.Flush(), f.Close())
}
