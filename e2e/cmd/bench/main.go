//go:build linux

// Bench measures how leasehold moves a job, beside what one usually writes with
// etcd's own packages (e2e/cmd/stockloop) and etcdctl lock: the same faults, the
// same job, one etcd member on loopback, in one run and in turns.
//
//	bin/bench [-n 50] [-only stop,kill,…] [-json FILE]   measure and report
//	bin/bench -report FILE                               the report of a run
//	bin/bench -demo OUTPUT -readme README.md             put what make demo said into the README
//
// Times are from the fault to the next job's first instruction, both read from
// CLOCK_BOOTTIME; whether the old job is dead by then is the witness' word. The
// programs measured are those beside this one in bin/.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
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

func run(args []string) int {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	n := flags.Int("n", 50, "planned hand-overs to measure; the number of other trials follows from it")
	only := flags.String("only", strings.Join(parts, ","), "what to measure")
	idle := flags.Duration("idle", time.Minute, "for how long to measure the CPU of candidates that do nothing")
	out := flags.String("json", "bin/bench.json", "where to write what was measured")
	report := flags.String("report", "", "print the report of such a file, and measure nothing")
	demo := flags.String("demo", "", "the output of make demo, for -readme")
	readme := flags.String("readme", "", "put that into this file, between its markers, and measure nothing")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()

	err := func() error {
		switch {
		case *report != "":
			return withResults(*report, func(r *results) error { return writeReport(os.Stdout, r) })
		case *readme != "":
			return refresh(*readme, *demo)
		}
		wanted := strings.Split(*only, ",")
		for _, w := range wanted {
			if !slices.Contains(parts, w) {
				return fmt.Errorf("-only %s: there are %s", w, strings.Join(parts, ", "))
			}
		}
		return measure(ctx, *n, *idle, wanted, *out)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// parts are what there is to measure.
var parts = []string{"stop", "kill", "tls", "auth", "size", "idle"}

// measure measures the wanted parts, and reports what it has also when it is
// interrupted.
func measure(ctx context.Context, n int, idle time.Duration, wanted []string, out string) error {
	b, err := newBench(ctx)
	if err != nil {
		return err
	}
	defer b.close()
	err = b.measure(ctx, n, idle, wanted)
	if len(b.results.Samples)+len(b.results.Memory)+len(b.results.CPU) > 0 {
		data, errJSON := json.MarshalIndent(b.results, "", "\t")
		if errJSON == nil {
			errJSON = os.WriteFile(out, append(data, '\n'), 0o644)
		}
		err = errors.Join(err, errJSON, writeReport(os.Stdout, b.results))
	}
	return err
}

// bench is what all parts use.
type bench struct {
	etcd     harness.Etcd
	programs string // their directory
	witness  *harness.Witness
	dir      string // temporary
	results  *results
}

func newBench(ctx context.Context) (*bench, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b := &bench{programs: filepath.Dir(self)}
	if b.etcd, err = harness.FindEtcd(ctx, os.Stderr); err != nil {
		return nil, err
	}
	if b.results, err = aboutThisRun(ctx, b.etcd); err != nil {
		return nil, err
	}
	if b.dir, err = harness.TempDir("leasehold-bench-"); err != nil {
		return nil, err
	}
	if b.witness, err = harness.NewWitness(); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *bench) close() {
	if b.witness != nil {
		b.witness.Close()
	}
	_ = os.RemoveAll(b.dir) // in the temporary directory; nothing depends on it
}

func (b *bench) program(name string) string { return filepath.Join(b.programs, name) }

func (b *bench) measure(ctx context.Context, n int, idle time.Duration, wanted []string) error {
	want := func(part string) bool { return slices.Contains(wanted, part) }
	if err := b.measureExec(ctx, min(n, 30)); err != nil {
		return err
	}
	plain, err := b.newStage(ctx, "plain")
	if err != nil {
		return err
	}
	defer plain.close()
	for _, f := range faults {
		if !want(f.part) {
			continue
		}
		if err := plain.inTurns(ctx, f, n, harness.Implementations); err != nil {
			return err
		}
	}
	if want("size") {
		if err := b.measureBinaries(); err != nil {
			return err
		}
	}
	if want("size") || want("idle") {
		if !want("idle") {
			idle = 0
		}
		if err := plain.measureIdle(ctx, idle); err != nil {
			return err
		}
	}
	for _, road := range []string{"tls", "auth"} {
		if !want(road) {
			continue
		}
		if err := b.measureRoad(ctx, road, max(1, n/5)); err != nil {
			return err
		}
	}
	return nil
}

// measureRoad repeats what takes milliseconds over TLS or with auth, of which
// the stock loop knows nothing.
func (b *bench) measureRoad(ctx context.Context, road string, n int) error {
	s, err := b.newStage(ctx, road)
	if err != nil {
		return err
	}
	defer s.close()
	for _, f := range faults {
		with := []harness.Implementation{harness.Leasehold, harness.EtcdctlLock}
		switch f.Name {
		case "stop":
		case "kill", "kill-elector":
			with = []harness.Implementation{harness.Leasehold}
			f.share = 1
		default:
			continue
		}
		if err := s.inTurns(ctx, f, n, with); err != nil {
			return err
		}
	}
	return nil
}
