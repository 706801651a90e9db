//go:build linux

// Soak injects faults drawn from a seed, one after another and overlapping, into five candidates in
// one election, whose jobs misbehave at random, and into the three members of their etcd, and
// checks all the time that leasehold keeps its promise. The first violation ends it, with the seed,
// the schedule and what happened last. It needs root, cgroup v2 and nft.
//
//	bin/soak [-seed N] [-faults 60] [-ttl 3s] [-json FILE]
//	bin/soak -implementation naiveclient   shows that the checker can find somebody guilty
//	bin/soak -unguarded                    the same for bin/histories and the jobs' storage
//	bin/soak -misheld                      the same for starts in spite of a hold
//	bin/soak -schedule -seed N [-faults 60]   print what a seed holds, and do nothing
//	bin/soak -from FILE [-summary docs/soak.md]   print a run's figures, or write the document
//
// Each candidate and each member of etcd is on a network node of its own. Two of the candidates are
// an ordinary user's and have no cgroup for their job. Two of the others freeze a job that has lost
// contact. The programs are those beside this one in
// bin/.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
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
	name           string // of the implementation, as the flag has it
	implementation harness.Implementation
	unguarded      bool // the storage takes late writes, whatever their token is
	misheld        bool // the operator holds another election
}

func command(args []string) int {
	set := settings{}
	flags := flag.NewFlagSet("soak", flag.ContinueOnError)
	flags.Uint64Var(&set.seed, "seed", 0,
		"what the schedule is drawn from; 0: chosen at random, and printed")
	flags.IntVar(&set.faults, "faults", 60, "how many faults")
	flags.DurationVar(&set.ttl, "ttl", 3*time.Second, "the candidates' TTL")
	flags.StringVar(&set.name, "implementation", "leasehold",
		"leasehold, or naiveclient, which is to be found guilty")
	flags.BoolVar(&set.unguarded, "unguarded", false,
		"the storage takes late writes with any token, which bin/histories is to find guilty")
	flags.BoolVar(&set.misheld, "misheld", false,
		"the operator holds another election, which is to be found guilty")
	schedule := flags.Bool("schedule", false, "print the schedule, and do nothing")
	out := flags.String("json", "bin/soak.json", "where to write the figures")
	log := flags.String("log", "bin/soak.log", "where to write down everything that happened")
	history := flags.String("history", "bin/soak.history",
		"where to write what the jobs' storage did, and the lock")
	from := flags.String("from", "", "print the figures of such a file, and do nothing")
	summary := flags.String("summary", "", "with -from: write the document about them")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	var known bool
	set.implementation, known = map[string]harness.Implementation{
		"leasehold": harness.Leasehold, "naiveclient": harness.NaiveClient,
	}[set.name]
	if flags.NArg() > 0 || set.faults < 1 || !known {
		flags.Usage()
		return 64
	}
	if *from != "" {
		return complain(reportFrom(*from, *summary))
	}
	if set.seed == 0 {
		set.seed = 1 + rand.Uint64N(1_000_000)
	}
	if *schedule {
		for _, f := range draw(set) {
			fmt.Println(f.entry())
		}
		return 0
	}
	if os.Geteuid() != 0 || harness.Cgroup2() == "" {
		return complain(errors.New("this needs root and cgroup v2"))
	}
	inside, code := harness.EnterNetwork()
	if !inside {
		_ = complain(harness.RemoveLeftovers(context.Background(), "soak")) // if it was killed
		return code
	}
	return complain(soak(set, files{*out, *log, *history}))
}

func complain(err error) int { return harness.ExitCode("soak", err) }

// files are where a run leaves what it has found.
type files struct{ figures, log, history string }

func soak(set settings, to files) error {
	ctx, stop := harness.Interruptible()
	defer stop()
	_ = complain(harness.RemoveLeftovers(ctx, "soak"))
	fmt.Printf("soak: seed %d, %d faults, TTL %v, %s\n",
		set.seed, set.faults, set.ttl, set.name)
	r := &run{settings: set, schedule: draw(set)}
	defer r.close()
	if err := r.open(ctx); err != nil {
		return err
	}
	err := r.soak(ctx)
	res := r.results()
	var broken *violation
	if errors.As(err, &broken) {
		res.Violation = broken.what
		fmt.Printf("\nVIOLATION at %s: %s\n", r.check.clock(broken.at), broken.what)
		fmt.Printf("again: bin/soak -seed %d -faults %d -ttl %v -implementation %s\n",
			r.seed, r.faults, r.ttl, r.name)
		fmt.Print(r.tell(broken.at+time.Second, 10, 40, broken.involves))
		err = errors.New("a promise was broken; see above, and all of it in " + to.log)
	}
	fmt.Print(res.report())
	return errors.Join(err, harness.WriteJSON(to.figures, res), r.writeHistory(to.history),
		os.WriteFile(to.log, []byte(r.tellAll()), 0o644))
}

// tell is the schedule, the last events before a moment, and the ends of the logs of those
// involved.
func (r *run) tell(until time.Duration, events, lines int, involved func(string) bool) string {
	var text strings.Builder
	text.WriteString("\nschedule:\n")
	for _, f := range r.schedule {
		fmt.Fprintf(&text, "  %s\n", f.entry())
	}
	all := r.check.eventsUntil(until)
	fmt.Fprintf(&text, "\nthe last of %d events (+0 is %s):\n", len(all),
		r.check.wall(r.check.began).Format("15:04:05.000"))
	for _, e := range all[max(0, len(all)-events):] {
		fmt.Fprintf(&text, "  %s  %s\n", r.check.clock(e.at), e.text)
	}
	for _, c := range r.candidates {
		if !involved(c.name) {
			continue
		}
		for _, d := range c.runs {
			fmt.Fprintf(&text, "\nlog of %s, started at %s with a job that does %q:\n",
				c.name, r.check.clock(d.began), strings.Join(d.words, " "))
			log := strings.Split(strings.TrimRight(d.Log(), "\n"), "\n")
			for _, l := range log[max(0, len(log)-lines):] {
				fmt.Fprintf(&text, "  %s\n", l)
			}
		}
	}
	return text.String()
}

// tellAll is everything there is to know of a run.
func (r *run) tellAll() string {
	const all = 1 << 30
	text := r.tell(harness.Now(), all, all, func(string) bool { return true })
	for _, m := range r.Etcd.Members {
		text += fmt.Sprintf("\nlog of etcd member %s:\n%s", m.Name, m.Log())
	}
	return text
}
