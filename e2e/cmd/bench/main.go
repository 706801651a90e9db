//go:build linux

// Bench measures how leasehold moves a job, beside what one usually writes with etcd's own
// packages (e2e/cmd/stockloop) and etcdctl lock: the same faults, the same job, one etcd member on
// loopback, in one run and in turns.
//
//	bin/bench [-n 50] [-only stop,kill,…] [-json FILE]   measure and report
//	bin/bench -report FILE                               the report of a run
//	bin/bench -demo OUTPUT -readme README.md   put what make demo said into the README
//
// Times are from the fault to the next job's first instruction, both read from CLOCK_BOOTTIME;
// whether the old job has exited by then is the witness's word. The programs measured are those
// beside this one in bin/.
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
	"time"

	"leasehold/e2e/harness"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	n := flags.Int("n", 50,
		"planned hand-overs to measure; the number of other trials follows from it")
	only := flags.String("only", strings.Join(parts, ","), "what to measure")
	idle := flags.Duration("idle", time.Minute,
		"for how long to measure the CPU of candidates that do nothing")
	out := flags.String("json", "bin/bench.json", "where to write what was measured")
	report := flags.String("report", "", "print the report of such a file, and measure nothing")
	demo := flags.String("demo", "", "the output of make demo, for -readme")
	readme := flags.String("readme", "",
		"put that into this file, between its markers, and measure nothing")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	ctx, stop := harness.Interruptible()
	defer stop()
	err := func() error {
		switch {
		case *report != "":
			r, err := harness.ReadJSON[results](*report)
			if err != nil {
				return err
			}
			return writeReport(os.Stdout, r)
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
	return harness.ExitCode("bench", err)
}

// parts are what there is to measure.
var parts = []string{"stop", "kill", "tls", "auth", "size", "idle"}

// bench is what all parts use.
type bench struct {
	etcd     harness.Etcd
	programs *harness.Programs
	witness  *harness.Witness
	dir      string // temporary
	results  *results
}

// measure measures the wanted parts, and reports what it has also when it is interrupted.
func measure(ctx context.Context, n int, idle time.Duration, wanted []string, out string) error {
	b, err := newBench(ctx)
	if err != nil {
		return err
	}
	defer b.close()
	err = b.measure(ctx, n, idle, wanted)
	if r := b.results; len(r.Samples)+len(r.Memory)+len(r.CPU) > 0 {
		err = errors.Join(err, harness.WriteJSON(out, r), writeReport(os.Stdout, r))
	}
	return err
}

func newBench(ctx context.Context) (*bench, error) {
	b := &bench{results: &results{Binaries: map[string]int64{}}}
	var err error
	if b.programs, err = harness.ProgramsBeside(); err != nil {
		return nil, err
	}
	if b.etcd, b.results.About, err = harness.FindEtcdAndAbout(ctx); err != nil {
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

func (b *bench) measure(ctx context.Context, n int, idle time.Duration, wanted []string) error {
	want := func(part string) bool { return slices.Contains(wanted, part) }
	if err := b.measureExec(ctx, min(n, 30)); err != nil {
		return err
	}
	plain, err := b.newTestbed(ctx, "plain")
	if err != nil {
		return err
	}
	defer plain.Close()
	for _, k := range kinds {
		if want(k.part) {
			if err := plain.inTurns(ctx, k, n, harness.Implementations); err != nil {
				return err
			}
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
	for _, via := range []string{"tls", "auth"} {
		if want(via) {
			if err := b.measureVia(ctx, via, max(1, n/5)); err != nil {
				return err
			}
		}
	}
	return nil
}

// measureVia repeats what takes milliseconds over TLS or with auth, of which the stock loop knows
// nothing.
func (b *bench) measureVia(ctx context.Context, via string, n int) error {
	t, err := b.newTestbed(ctx, via)
	if err != nil {
		return err
	}
	defer t.Close()
	for _, k := range kinds {
		with := []harness.Implementation{harness.Leasehold}
		if k.Name == "stop" {
			with = append(with, harness.EtcdctlLock)
		}
		k.share = 1
		if err := t.inTurns(ctx, k, n, with); err != nil {
			return err
		}
	}
	return nil
}

// measureExec measures what every implementation pays: from the start of the job's process to its
// first instruction.
func (b *bench) measureExec(ctx context.Context, n int) error {
	for i := range n {
		identity := fmt.Sprintf("exec-%d", i)
		job := exec.CommandContext(ctx, b.programs.Testjob, "exit=0")
		job.Env = []string{
			harness.WitnessVariable + "=" + b.witness.Addr, "LEASEHOLD_IDENTITY=" + identity,
		}
		at := harness.Now()
		if out, err := job.CombinedOutput(); err != nil {
			return fmt.Errorf("run the test job: %w: %s", err, strings.TrimSpace(string(out)))
		}
		err := b.witness.Wait(ctx, func(lives []harness.Life) bool {
			i := slices.IndexFunc(lives, func(l harness.Life) bool { return l.Candidate == identity })
			if i >= 0 {
				b.results.Exec = append(b.results.Exec, harness.Milliseconds(lives[i].Started-at))
			}
			return i >= 0
		})
		if err != nil {
			return err
		}
	}
	return nil
}
