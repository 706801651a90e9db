//go:build linux

// Demo shows in half a minute what leasehold is for: three candidates, each with a link of its own
// to a real etcd, and what becomes of the job when the leader is killed, stopped and cut off. All
// times are the witness's: each job holds a connection to it while it lives.
//
//	bin/demo        run it
//	bin/demo job    what each candidate runs as its job
//
// It uses bin/leasehold, which is built beside it. However it ends, nothing of it is left.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

const (
	election = "demo/report"
	ttl      = 5 * time.Second
	interval = 400 * time.Millisecond
	counts   = 4 // that a job is watched for before the next fault
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	if len(args) == 1 && args[0] == "job" {
		return harness.ExitCode("job", job())
	}
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	self, err := os.Executable()
	if err != nil {
		return harness.ExitCode("demo", err)
	}
	beside := filepath.Join(filepath.Dir(self), "leasehold")
	leasehold := flags.String("leasehold", beside, "the daemon")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	ctx, stop := harness.Interruptible()
	defer stop()
	d := &demo{
		programs: &harness.Programs{Leasehold: *leasehold, Testjob: self},
		machines: map[string]*harness.Machine{}, narrator: &narrator{out: os.Stdout},
	}
	err = d.play(ctx)
	switch {
	case ctx.Err() != nil:
		fmt.Println("\nstopped; nothing is left running")
		return 130
	case err != nil:
		fmt.Fprintln(os.Stderr)
		for _, m := range d.started {
			err = fmt.Errorf("%w\nlog of candidate %s:\n%s", err, m.Name, m.Log())
		}
	}
	return harness.ExitCode("demo", err)
}

// A demo is etcd, the witness, and the candidates on their machines.
type demo struct {
	programs *harness.Programs
	narrator *narrator

	testbed  *harness.Testbed
	witness  *harness.Witness
	machines map[string]*harness.Machine // with the candidate that runs there now
	started  []harness.Machine           // also with those that have ended
}

func (d *demo) play(ctx context.Context) (err error) {
	// What a killed daemon leaves behind for an instant becomes a child of this process, so that it
	// is found at the end.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper of what is started: %w", err)
	}
	defer killDescendants()
	etcd := harness.Etcd{}
	if etcd.Server, err = harness.FindEtcdServer(ctx, os.Stdout); err != nil {
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
	d.testbed, err = harness.NewTestbed(ctx, harness.TestbedConfig{
		Cluster: harness.ClusterConfig{Etcd: etcd},
	})
	if err != nil {
		return err
	}
	defer d.testbed.Close()
	defer d.close()
	defer d.narrator.listen("") // no word of the job that ends with the demo

	d.narrator.say("", "etcd %s, three candidates, each with its own link to it, TTL %v",
		about.Etcd, ttl)
	begin := harness.Now()
	for _, name := range []string{"a", "b", "c"} {
		m, err := d.testbed.NewMachine(harness.MachineConfig{Name: name, Proxied: true})
		if err != nil {
			return err
		}
		d.machines[name] = m
		if err := d.start(m); err != nil {
			return err
		}
		if name != "a" {
			if err := d.standby(ctx, m); err != nil {
				return err
			}
			continue
		}
		first, err := d.leader(ctx, harness.Life{}) // first in the queue
		if err != nil {
			return err
		}
		d.narrator.say(ago(first.Started-begin), "a leads (token %d)", first.Token)
		d.narrator.listen(jobName(first.Candidate, first.Token))
	}
	return d.faults(ctx)
}

// acts are the faults. In each the leader is lost in another way.
var acts = []struct {
	fault                   fault.Fault
	before, what, was, then string
}{
	{fault.Killed(harness.Guard), "the daemon of %s gets SIGKILL", "", "was killed with SIGKILL", ""},
	{fault.Stop(), "the daemon of %s gets SIGTERM", "", "was stopped with SIGTERM", ""},
	{
		fault.Unreachable(), "etcd is unreachable for %s: its connections stay, nothing passes",
		"%s has stopped its job, for it can't know if it still leads", "was cut off",
		"%s stands by: it reaches etcd again",
	},
}

func (d *demo) faults(ctx context.Context) error {
	job, err := d.watch(ctx)
	for _, act := range acts {
		if err != nil {
			return err
		}
		m, old := d.machines[job.Candidate], job
		d.narrator.say("", act.before, m.Name)
		on := &fault.Target{Testbed: d.testbed, Machine: m, TTL: ttl}
		if err := act.fault.Start(ctx, on); err != nil {
			return err
		}
		dead, err := d.exited(ctx, old)
		if err != nil {
			return err
		}
		if act.what != "" {
			d.narrator.say(ago(dead-on.Began), act.what, m.Name)
		}
		if job, err = d.leader(ctx, old); err != nil {
			return err
		}
		d.narrator.say(ago(job.Started-on.Began),
			"%s leads (token %d); %s %s, its job had exited %s earlier",
			job.Candidate, job.Token, m.Name, act.was, ago(job.Started-dead))
		d.narrator.listen(jobName(job.Candidate, job.Token))
		if _, err := d.watch(ctx); err != nil {
			return err
		}
		if !m.Running() {
			if err := d.start(m); err != nil {
				return err
			}
		}
		recovered := harness.Now()
		if err := errors.Join(act.fault.End(ctx, on), d.standby(ctx, m)); err != nil {
			return err
		}
		if act.then != "" {
			d.narrator.say(ago(harness.Now()-recovered), act.then, m.Name)
		}
	}
	if err != nil {
		return err
	}
	history := check.NewHistory(d.witness.Lives())
	if overlaps := history.Overlaps(check.Lived(harness.Now())); len(overlaps) > 0 {
		return fmt.Errorf("two jobs lived at once: %v", overlaps)
	}
	d.narrator.listen("")
	d.narrator.say("", "%d jobs, one after the other: no two lived at once", len(history))
	return nil
}

// within bounds the wait for what takes a tenth of the time on a slow machine.
func within(ctx context.Context, otherwise string, args ...any,
) (context.Context, context.CancelFunc) {
	what := fmt.Errorf("%s after %v", fmt.Sprintf(otherwise, args...), harness.WaitTimeout)
	return context.WithTimeoutCause(ctx, harness.WaitTimeout, what)
}

// exited waits for the end of the job of a term and returns when that was.
func (d *demo) exited(ctx context.Context, of harness.Life) (time.Duration, error) {
	ctx, cancel := within(ctx, "the job of %s lives", of.Candidate)
	defer cancel()
	return d.witness.WaitForDead(ctx, of)
}

// leader waits for the job of a term after the given one.
func (d *demo) leader(ctx context.Context, before harness.Life) (harness.Life, error) {
	ctx, cancel := within(ctx, "nobody leads")
	defer cancel()
	return d.witness.WaitForNext(ctx, before)
}

func (d *demo) standby(ctx context.Context, m *harness.Machine) error {
	ctx, cancel := within(ctx, "candidate %s does not stand by", m.Name)
	defer cancel()
	return m.WaitStatus(ctx, "/standby", http.StatusOK)
}

// watch lets the leader's job count for a while.
func (d *demo) watch(ctx context.Context) (harness.Life, error) {
	if err := harness.Wait(ctx, counts*interval); err != nil {
		return harness.Life{}, err
	}
	return d.leader(ctx, harness.Life{})
}

func (d *demo) start(m *harness.Machine) error {
	err := m.Start(harness.Leasehold, harness.Candidacy{
		Programs: d.programs, Election: election, TTL: ttl, Job: []string{"job"}, Witness: d.witness,
	}, func(cfg *harness.CandidateConfig) error {
		cfg.Prepare = func(cmd *exec.Cmd) { cmd.Stdout = &jobLines{to: d.narrator} }
		return nil
	})
	if err == nil {
		d.started = append(d.started, *m)
	}
	return err
}

func (d *demo) close() {
	var all sync.WaitGroup
	for _, m := range d.machines {
		m.SetReachable(true)                                 // a daemon that reaches etcd ends at once
		all.Go(func() { _ = m.Close(context.Background()) }) // killDescendants ends what is left
	}
	all.Wait()
}

// killDescendants ends what is still left of killed daemons.
func killDescendants() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := harness.Until(ctx, func() error {
		for _, pid := range harness.Children(os.Getpid()) {
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		if len(harness.Children(os.Getpid())) > 0 {
			return errors.New("left")
		}
		return nil
	})
	if err == nil {
		return
	}
	for _, pid := range harness.Descendants(os.Getpid()) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}
