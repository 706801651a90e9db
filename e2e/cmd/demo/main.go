//go:build linux

// Demo shows in half a minute what leasehold is for: three candidates, each with a link of its own
// to a real etcd, and what becomes of the job when the leader is killed, stopped and cut off. All
// times are the witness's: each job holds a connection to it while it lives.
//
//	bin/demo                     run it
//	bin/demo -readme README.md   and put what it tells into the README
//
// It uses bin/leasehold and bin/testjob, which are built beside it. However it ends, nothing of it
// is left.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

const (
	ttl      = 5 * time.Second
	interval = 400 * time.Millisecond // from one count of a job to the next
	counts   = 4                      // for which a job is watched before the next fault
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	readme := flags.String("readme", "", "put what is told into this file too, between its markers")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	ctx, stop := harness.Interruptible()
	defer stop()
	d := &demo{machines: map[string]*harness.Machine{}}
	err := d.play(ctx)
	switch {
	case ctx.Err() != nil:
		fmt.Println("\nstopped; nothing is left running")
		return 130
	case err != nil:
		fmt.Fprintln(os.Stderr)
		for _, c := range d.started {
			err = fmt.Errorf("%w\nlog of candidate %s:\n%s", err, c.Identity, c.Log())
		}
	case *readme != "":
		story := "```\n" + d.story.String() + "```\n"
		err = harness.Refresh(*readme, map[string]string{"demo": story})
	}
	return harness.ExitCode("demo", err)
}

// A demo is etcd, the witness, and the candidates on their machines.
type demo struct {
	narrator
	programs *harness.Programs
	testbed  *harness.Testbed
	witness  *harness.Witness
	machines map[string]*harness.Machine // with the candidate that runs there now
	started  []*harness.Candidate        // also those that have ended
}

func (d *demo) play(ctx context.Context) (err error) {
	// What a killed daemon leaves behind for an instant becomes a child of this process, so that it
	// is found at the end.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper of what is started: %w", err)
	}
	defer killDescendants()
	if d.programs, err = harness.ProgramsBeside(); err != nil {
		return err
	}
	etcd, err := harness.FindEtcdServer(ctx, os.Stdout)
	if err != nil {
		return err
	}
	about, err := harness.AboutThisRun(ctx, etcd)
	if err != nil {
		return err
	}
	if d.witness, err = harness.NewWitness(); err != nil {
		return err
	}
	defer d.witness.Close()
	cfg := harness.TestbedConfig{
		Cluster: harness.ClusterConfig{Etcd: etcd}, Programs: d.programs,
	}
	if d.testbed, err = harness.NewTestbed(ctx, cfg); err != nil {
		return err
	}
	defer d.testbed.Close()
	defer d.close()
	defer d.listen(harness.Life{}) // no word of the job that ends with the demo

	d.say(0, "etcd %s, three candidates, each with its own link to it, TTL %v", about.Etcd, ttl)
	ctx, cancel := context.WithTimeoutCause(ctx, 4*harness.WaitTimeout,
		errors.New("the demo came to no end"))
	defer cancel()
	job, err := d.begin(ctx)
	for _, f := range failures {
		if err == nil {
			job, err = d.fail(ctx, f, job)
		}
	}
	if err != nil {
		return err
	}
	lives := d.witness.Lives()
	if overlaps := check.Overlaps(lives); len(overlaps) > 0 {
		return fmt.Errorf("two jobs lived at once: %v", overlaps)
	}
	d.listen(harness.Life{})
	d.say(0, "%d jobs, one after the other: no two lived at once", len(check.NewHistory(lives)))
	return nil
}

// begin starts the candidates and returns the job of the first.
func (d *demo) begin(ctx context.Context) (job harness.Life, err error) {
	begin := harness.Now()
	for _, name := range []string{"a", "b", "c"} {
		if d.machines[name], err = d.testbed.NewMachine(harness.MachineConfig{
			Name: name, Proxied: true,
		}); err != nil {
			return job, err
		}
		if err := d.start(d.machines[name]); err != nil {
			return job, err
		}
		if name != "a" {
			err = d.standby(ctx, name)
		} else if job, err = d.witness.WaitForNext(ctx, job); err == nil {
			d.say(job.Started-begin, "a leads (token %d)", job.Token)
			d.listen(job)
		}
		if err != nil {
			return job, err
		}
	}
	return job, harness.Wait(ctx, counts*interval)
}

// A failure is how the leader is lost, and how that is told.
type failure struct {
	fault                         fault.Fault
	begins, jobEnds, was, standby string
}

var failures = []failure{
	{
		fault:  fault.Killed(harness.Guard),
		begins: "the daemon of %s gets SIGKILL", was: "was killed with SIGKILL",
	},
	{
		fault:  fault.Stop(),
		begins: "the daemon of %s gets SIGTERM", was: "was stopped with SIGTERM",
	},
	{
		fault:   fault.Unreachable(),
		begins:  "etcd is unreachable for %s: its connections stay, nothing passes",
		jobEnds: "%s has stopped its job, because it can't know if it still leads",
		was:     "was cut off", standby: "%s stands by: it reaches etcd again",
	},
}

// fail has the leader fail, and returns the next job.
func (d *demo) fail(ctx context.Context, f failure, old harness.Life) (harness.Life, error) {
	m := d.machines[old.Candidate]
	d.say(0, f.begins, m.Name)
	on := &fault.Target{Testbed: d.testbed, Machine: m, TTL: ttl}
	if err := f.fault.Start(ctx, on); err != nil {
		return old, err
	}
	ended, err := d.witness.WaitForDead(ctx, old)
	if err != nil {
		return old, err
	}
	if f.jobEnds != "" {
		d.say(ended-on.Began, f.jobEnds, m.Name)
	}
	job, err := d.witness.WaitForNext(ctx, old)
	if err != nil {
		return old, err
	}
	d.say(job.Started-on.Began, "%s leads (token %d); %s %s, its job had exited %s earlier",
		job.Candidate, job.Token, m.Name, f.was, span(job.Started-ended))
	d.listen(job)
	if err := harness.Wait(ctx, counts*interval); err != nil {
		return old, err
	}
	if !m.Running() {
		if err := d.start(m); err != nil {
			return old, err
		}
	}
	recovers := harness.Now()
	err = errors.Join(f.fault.End(ctx, on), d.standby(ctx, m.Name))
	if err == nil && f.standby != "" {
		d.say(harness.Now()-recovers, f.standby, m.Name)
	}
	return job, err
}

func (d *demo) standby(ctx context.Context, name string) error {
	return d.machines[name].WaitStatus(ctx, "/standby", http.StatusOK)
}

func (d *demo) start(m *harness.Machine) error {
	err := m.Start(harness.Leasehold, harness.CandidateConfig{
		Election: "demo/report", TTL: ttl, Witness: d.witness,
		Job: []string{"count=" + interval.String()},
	}, func(cfg *harness.CandidateConfig) error {
		cfg.Prepare = func(cmd *exec.Cmd) { cmd.Stdout = &d.narrator }
		return nil
	})
	if err == nil {
		d.started = append(d.started, m.Candidate)
	}
	return err
}

func (d *demo) close() {
	var all sync.WaitGroup
	for _, m := range d.machines {
		m.SetReachable(true) // a daemon that reaches etcd ends at once
		all.Go(func() {
			_ = m.Close(context.Background()) // killDescendants ends what is left
		})
	}
	all.Wait()
}

// killDescendants ends what is still left of killed daemons.
func killDescendants() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = harness.Until(ctx, func() error { // there is nobody left to tell
		left := harness.Descendants(os.Getpid())
		for _, pid := range left {
			_ = unix.Kill(pid, unix.SIGKILL)
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		if len(left) > 0 {
			return errors.New("left")
		}
		return nil
	})
}
