//go:build linux

// Bench measures how leasehold moves a job, beside what one usually writes with etcd's own
// packages (e2e/cmd/naiveclient) and etcdctl lock: the same faults, the same job, one etcd member
// on loopback, in one run and in turns.
//
//	bin/bench [-n 50] [-only 'stop, plain|size']
//	bin/bench -doc docs/bench.md docs/bench-before.json docs/bench-after.json
//
// Times are from the fault to the next job's first instruction, both read from CLOCK_BOOTTIME;
// whether the old job has exited by then is the witness's word. An elector that is killed moves no
// job: its time is until the next elector has renewed the lease, as /metrics shows that. The
// programs measured are those beside this one in bin/.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"

	"leasehold/e2e/harness"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	n := flags.Int("n", 50,
		"planned hand-overs to measure; the number of other trials follows from it")
	only := flags.String("only", "", "measure what matches this pattern, of size, stop, plain, "+
		"kill, plain, kill-elector, plain and the same with tls and auth")
	page := flags.String("doc", "", "write the figures of two earlier runs into this page, and "+
		"measure nothing: -doc docs/bench.md BEFORE.json AFTER.json")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	if *page != "" {
		return harness.ExitCode("bench", compare(*page, flags.Arg(0), flags.Arg(1)))
	}
	ctx, stop := harness.Interruptible()
	defer stop()
	return harness.ExitCode("bench", measure(ctx, *n, *only))
}

// bench is what all parts use.
type bench struct {
	n        int
	only     *regexp.Regexp
	etcd     harness.Etcd
	programs *harness.Programs
	witness  *harness.Witness
	dir      string // temporary
	count    int    // of identities and elections given out
	results  results
}

// measure measures everything, and reports what it has also when it is interrupted.
func measure(ctx context.Context, n int, only string) (err error) {
	b := &bench{n: n, results: results{Binaries: map[string]int64{}}}
	if b.only, err = regexp.Compile(only); err != nil {
		return err
	}
	if b.programs, err = harness.ProgramsBeside(); err != nil {
		return err
	}
	if b.etcd, b.results.About, err = harness.FindEtcdAndAbout(ctx); err != nil {
		return err
	}
	if b.results.Version, err = b.programs.Version(ctx); err != nil {
		return err
	}
	if b.dir, err = harness.TempDir("leasehold-bench-"); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.dir) }() // in the temporary directory; nothing depends on it
	if b.witness, err = harness.NewWitness(); err != nil {
		return err
	}
	defer b.witness.Close()
	err = b.measureExec(ctx, min(n, 30))
	for _, via := range vias {
		if err == nil {
			err = b.measureVia(ctx, via)
		}
	}
	r := &b.results
	if len(r.Samples)+len(r.Memory)+len(r.CPU) == 0 {
		return cmp.Or(err, fmt.Errorf("nothing is measured with -n %d -only %q", n, only))
	}
	return errors.Join(err, harness.WriteJSON("bin/bench.json", r), writeReport(os.Stdout, r))
}

// measureExec measures what every implementation pays: from the start of the job's process to its
// first instruction.
func (b *bench) measureExec(ctx context.Context, n int) error {
	for i := range n {
		identity := fmt.Sprintf("exec-%d", i)
		job := exec.CommandContext(ctx, b.programs.Testjob)
		job.Env = []string{
			harness.WitnessVariable + "=" + b.witness.Addr, "LEASEHOLD_IDENTITY=" + identity,
		}
		at := harness.Now()
		if err := job.Start(); err != nil {
			return fmt.Errorf("run the test job: %w", err)
		}
		life, err := b.job(ctx, identity, harness.WaitTimeout)
		_ = job.Process.Kill() // it has done what it is for
		_ = job.Wait()
		if err != nil {
			return err
		}
		b.results.Exec = append(b.results.Exec, harness.Milliseconds(life.Started-at))
	}
	return nil
}
