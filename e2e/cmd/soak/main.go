//go:build linux

// Soak lets faults drawn from a seed, one after another and overlapping, loose
// on five candidates in one election, whose jobs misbehave at random, and on
// the three members of their etcd, and checks all the time that leasehold keeps
// its promise. The first violation ends it, with the seed, the schedule and
// what happened last. It needs root, cgroup v2 and nft.
//
//	bin/soak [-seed N] [-faults 60] [-ttl 3s] [-json FILE]
//	bin/soak -contender stockloop               the same against the stock loop: shows that the checker can fail
//	bin/soak -schedule -seed N [-faults 60]     print what a seed holds, and do nothing
//	bin/soak -from FILE [-summary docs/soak.md] print a run's figures, or put them into the document
//
// Each candidate and each member of etcd is on a network node of its own. Two
// of the candidates are an ordinary user's and have no cgroup for their job.
// The programs are those beside this one in bin/.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

func main() { os.Exit(run(os.Args[1:])) }

// settings are what a run is made of. The same settings make the same schedule.
type settings struct {
	seed      uint64
	faults    int
	ttl       time.Duration
	contender string
}

const (
	leasehold = "leasehold"
	stockloop = "stockloop"
)

func run(args []string) int {
	set := settings{}
	flags := flag.NewFlagSet("soak", flag.ContinueOnError)
	flags.Uint64Var(&set.seed, "seed", 0, "what the schedule is drawn from; 0: chosen at random, and printed")
	flags.IntVar(&set.faults, "faults", 60, "how many faults")
	flags.DurationVar(&set.ttl, "ttl", 3*time.Second, "the candidates' TTL")
	flags.StringVar(&set.contender, "contender", leasehold, leasehold+", or "+stockloop+", which is to be found guilty")
	schedule := flags.Bool("schedule", false, "print the schedule, and do nothing")
	out := flags.String("json", "bin/soak.json", "where to write the figures")
	log := flags.String("log", "bin/soak.log", "where to write down everything that happened")
	from := flags.String("from", "", "print the figures of such a file, and do nothing")
	summary := flags.String("summary", "", "with -from: write the document about them")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	switch {
	case flags.NArg() > 0 || set.faults < 1 || set.contender != leasehold && set.contender != stockloop:
		flags.Usage()
		return 64
	case *from != "":
		return complain(reportFrom(*from, *summary))
	case os.Getenv(harness.NetworkVariable) != "":
		return inside(set, *out, *log)
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

func complain(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		return 1
	}
	return 0
}

// The program runs twice: outside it makes what has a name, a directory and a
// cgroup, and removes it however the one inside its own network has ended.
const cgroupVariable = "SOAK_CGROUP"

func outside(args []string) int {
	mount := harness.Cgroup2()
	if os.Geteuid() != 0 || mount == "" {
		return complain(errors.New("this needs root and cgroup v2"))
	}
	sweep(mount)
	dir, err := harness.TempDir(fmt.Sprintf("leasehold-soak-%d-", os.Getpid()))
	if err != nil {
		return complain(err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // in the temporary directory; nothing depends on it
	cgroup, err := os.MkdirTemp(mount, fmt.Sprintf("soak-%d-", os.Getpid()))
	if err != nil {
		return complain(err)
	}
	defer func() { _ = complain(removeCgroup(cgroup)) }()
	if err := errors.Join(os.Chmod(cgroup, 0o755), os.Setenv("TMPDIR", dir), os.Setenv(cgroupVariable, cgroup)); err != nil {
		return complain(err)
	}
	os.Args = append(os.Args[:1], args...)
	_, code := harness.EnterNetwork()
	return code
}

// sweep removes what soaks have left that were killed themselves.
func sweep(mount string) {
	cgroups, _ := filepath.Glob(filepath.Join(mount, "soak-*-*")) // the patterns are good
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), "leasehold-soak-*-*"))
	for _, path := range append(cgroups, dirs...) {
		pid := strings.Split(strings.TrimPrefix(filepath.Base(path), "leasehold-"), "-")[1]
		if _, err := os.Stat("/proc/" + pid); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		if slices.Contains(cgroups, path) {
			_ = complain(removeCgroup(path))
		} else {
			_ = os.RemoveAll(path) // in the temporary directory; nothing depends on it
		}
	}
}

// removeCgroup removes a cgroup with all that is in it.
func removeCgroup(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := harness.Until(ctx, func() error {
		var err error
		for _, d := range subtree(dir) {
			err = errors.Join(err, os.Remove(d))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("remove the cgroup of a run: %w", err)
	}
	return nil
}

// subtree lists a directory and those in it, the deepest first.
func subtree(dir string) []string {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append([]string{path}, dirs...)
		}
		return nil // what has just gone needs no visit
	})
	return dirs
}

func inside(set settings, out, log string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	fmt.Printf("soak: seed %d, %d faults, TTL %v, %s\n", set.seed, set.faults, set.ttl, set.contender)
	s, err := newStage(ctx, set)
	if err != nil {
		return complain(err)
	}
	defer s.close()
	err = s.soak(ctx)
	res := s.results()
	var broken *violation
	if errors.As(err, &broken) {
		res.Violation = broken.what
		fmt.Printf("\nVIOLATION at %s: %s\n", s.clock(broken.at), broken.what)
		fmt.Printf("again: bin/soak -seed %d -faults %d -ttl %v -contender %s\n", s.seed, s.faults, s.ttl, s.contender)
		s.tell(os.Stdout, broken.at+time.Second, 10, 40, broken.involves)
		err = errors.New("a promise was broken; see above, and all of it in " + log)
	}
	err = errors.Join(err, s.tellAll(log))
	data, errJSON := json.MarshalIndent(res, "", "\t")
	if errJSON == nil {
		errJSON = os.WriteFile(out, append(data, '\n'), 0o644)
	}
	return complain(errors.Join(err, errJSON, writeReport(os.Stdout, res)))
}

// tell writes the schedule, the last events before a moment, and the ends of
// the logs of those involved.
func (s *stage) tell(w io.Writer, until time.Duration, events, lines int, involved func(string) bool) {
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) } // tellAll sees at its close what went wrong
	p("\nschedule:\n")
	for _, f := range s.schedule {
		p("  %s\n", f)
	}
	all := s.check.eventsUntil(until)
	p("\nthe last of %d events (+0 is %s):\n", len(all), s.wall.Format("15:04:05.000"))
	for _, e := range all[max(0, len(all)-events):] {
		p("  %s  %s\n", s.clock(e.at), e.text)
	}
	for _, c := range s.candidates {
		if !involved(c.name) {
			continue
		}
		for _, r := range c.lastRuns() {
			log := strings.Split(strings.TrimRight(r.Log(), "\n"), "\n")
			p("\nlog of %s, started at %s with a job that does %q:\n", c.name, s.clock(r.began), strings.Join(r.words, " "))
			for _, l := range log[max(0, len(log)-lines):] {
				p("  %s\n", l)
			}
		}
	}
}

// tellAll writes down everything there is to know of a run.
func (s *stage) tellAll(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	const all = 1 << 30
	w := bufio.NewWriter(f)
	s.tell(w, harness.Now(), all, all, func(string) bool { return true })
	for _, m := range s.etcd.Members {
		_, _ = fmt.Fprintf(w, "\nlog of etcd member %s:\n%s", m.Name, m.Log()) // Flush tells
	}
	return errors.Join(w.Flush(), f.Close())
}
