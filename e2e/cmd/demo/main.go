//go:build linux

// Demo shows in half a minute what leasehold is for: three candidates, each on
// a road of its own to a real etcd, and what becomes of the job when the leader
// is killed, stopped and cut off. All times are the witness': each job holds a
// connection to it while it lives.
//
//	bin/demo        run it
//	bin/demo job    what each candidate runs as its job
//
// It uses bin/leasehold, which is built beside it. However it ends, nothing of
// it is left.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

const (
	election = "demo/report"
	ttl      = 5 * time.Second
	patience = 30 * time.Second // for what takes a tenth of it on a slow machine
	interval = 400 * time.Millisecond
	counts   = 4 // that a job is watched for before the next fault
	cutOff   = "was cut off"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	if len(args) == 1 && args[0] == "job" {
		return job()
	}
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 1
	}
	leasehold := flags.String("leasehold", filepath.Join(filepath.Dir(self), "leasehold"), "the daemon")
	if err := flags.Parse(args); err != nil {
		return 64
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	d := &demo{leasehold: *leasehold, self: self, narrator: &narrator{out: os.Stdout}}
	err = d.play(ctx)
	switch {
	case ctx.Err() != nil:
		fmt.Println("\nstopped; nothing is left running")
		return 130
	case err != nil:
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		for _, c := range d.started {
			fmt.Fprintf(os.Stderr, "log of candidate %s:\n%s", c.Identity, c.Log())
		}
		return 1
	}
	return 0
}

// A demo is the stage: etcd, the witness, the candidates and their roads.
type demo struct {
	leasehold, self string
	narrator        *narrator

	witness *harness.Witness
	etcd    *harness.Cluster
	roads   map[string]*harness.Proxy
	running map[string]*harness.Candidate
	started []*harness.Candidate // also those that have ended
}

func (d *demo) play(ctx context.Context) (err error) {
	// What a killed daemon leaves behind for an instant becomes a child of
	// this process, so that it is found at the end.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper of what is started: %w", err)
	}
	defer killDescendants()

	server, err := harness.FindEtcdServer(ctx, os.Stdout)
	if err != nil {
		return err
	}
	version, err := exec.CommandContext(ctx, server, "--version").Output()
	if err != nil {
		return fmt.Errorf("ask %s for its version: %w", server, err)
	}
	name, _, _ := strings.Cut(string(version), "\n")
	name = strings.Replace(strings.ToLower(name), " version:", "", 1)

	if d.witness, err = harness.NewWitness(); err != nil {
		return err
	}
	defer d.witness.Close()
	if d.etcd, err = harness.StartCluster(ctx, harness.ClusterConfig{Etcd: harness.Etcd{Server: server}}); err != nil {
		return err
	}
	defer d.etcd.Close()
	d.roads, d.running = map[string]*harness.Proxy{}, map[string]*harness.Candidate{}
	defer d.closeCandidates()
	defer d.narrator.listen("") // no word of the job that ends with the demo

	d.narrator.say("", "%s, three candidates, each on its own road to it, TTL %v", name, ttl)
	begin := harness.Now()
	for _, identity := range []string{"a", "b", "c"} {
		if err := d.start(identity); err != nil {
			return err
		}
		if identity == "a" { // first in the queue
			first, err := d.leader(ctx, harness.Life{})
			if err != nil {
				return err
			}
			d.narrator.say(ago(first.Started-begin), "a leads (token %d)", first.Token)
			d.narrator.listen(jobName(first.Candidate, first.Token))
		} else if err := d.standby(ctx, identity); err != nil {
			return err
		}
	}
	if err := d.faults(ctx); err != nil {
		return err
	}
	if overlaps := d.witness.Overlaps(); len(overlaps) > 0 {
		return fmt.Errorf("two jobs lived at once: %v", overlaps)
	}
	d.narrator.listen("")
	d.narrator.say("", "%d jobs, one after the other: no two lived at once", len(d.witness.Terms()))
	return nil
}

// faults are the three acts. In each the leader is lost in another way.
func (d *demo) faults(ctx context.Context) error {
	job, err := d.watch(ctx)
	if err != nil {
		return err
	}
	job, err = d.next(ctx, job, "was killed with SIGKILL", func(c *harness.Candidate) error {
		d.narrator.say("", "the daemon of %s gets SIGKILL", c.Identity)
		return c.Signal(syscall.SIGKILL)
	})
	if err != nil {
		return err
	}
	job, err = d.next(ctx, job, "was stopped with SIGTERM", func(c *harness.Candidate) error {
		d.narrator.say("", "the daemon of %s gets SIGTERM", c.Identity)
		return c.Signal(syscall.SIGTERM)
	})
	if err != nil {
		return err
	}
	cut := job.Candidate
	_, err = d.next(ctx, job, cutOff, func(c *harness.Candidate) error {
		d.narrator.say("", "the road of %s goes dark: its connections stay, nothing passes", c.Identity)
		d.roads[c.Identity].Cut(harness.BothWays)
		return nil
	})
	if err != nil {
		return err
	}
	healed := harness.Now()
	d.roads[cut].Recover()
	if err := d.standby(ctx, cut); err != nil {
		return err
	}
	d.narrator.say(ago(harness.Now()-healed), "%s stands by: its road is back", cut)
	return nil
}

// next brings the leader down, tells what became of its job and who leads, and
// starts its daemon again if that has ended.
func (d *demo) next(ctx context.Context, before harness.Life, how string, fault func(*harness.Candidate) error) (harness.Life, error) {
	old := d.running[before.Candidate]
	at := harness.Now()
	if err := fault(old); err != nil {
		return harness.Life{}, err
	}
	dead, err := d.dead(ctx, before)
	if err != nil {
		return harness.Life{}, err
	}
	if how == cutOff {
		d.narrator.say(ago(dead-at), "%s has stopped its job, for it can't know if it still leads", before.Candidate)
	}
	job, err := d.leader(ctx, before)
	if err != nil {
		return harness.Life{}, err
	}
	if job.Started < dead {
		return harness.Life{}, fmt.Errorf("%s led while the job of %s still lived", job.Candidate, before.Candidate)
	}
	d.narrator.say(ago(job.Started-at), "%s leads (token %d); %s %s, its job was dead %s earlier",
		job.Candidate, job.Token, before.Candidate, how, ago(job.Started-dead))
	d.narrator.listen(jobName(job.Candidate, job.Token))
	if _, err := d.watch(ctx); err != nil {
		return harness.Life{}, err
	}
	select {
	case <-old.Ended():
		if err := d.start(before.Candidate); err != nil {
			return harness.Life{}, err
		}
		return job, d.standby(ctx, before.Candidate)
	default:
		return job, nil
	}
}

// dead waits for the end of the job of a term and returns when that was.
func (d *demo) dead(ctx context.Context, of harness.Life) (time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("the job of %s lives after %v", of.Candidate, patience))
	defer cancel()
	return d.witness.WaitForDead(ctx, of)
}

// leader waits for the job of a term after the given one.
func (d *demo) leader(ctx context.Context, before harness.Life) (harness.Life, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("nobody leads within %v", patience))
	defer cancel()
	return d.witness.WaitForNext(ctx, before)
}

// watch lets the leader's job count for a while.
func (d *demo) watch(ctx context.Context) (harness.Life, error) {
	timer := time.NewTimer(counts * interval)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return harness.Life{}, context.Cause(ctx)
	}
	return d.leader(ctx, harness.Life{})
}

func (d *demo) standby(ctx context.Context, identity string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("candidate %s does not stand by within %v", identity, patience))
	defer cancel()
	return d.running[identity].WaitStatus(ctx, "/standby", http.StatusOK)
}

func (d *demo) start(identity string) error {
	if d.roads[identity] == nil {
		_, addr, _ := strings.Cut(d.etcd.Endpoints()[0], "://")
		road, err := harness.StartProxy(addr, 0)
		if err != nil {
			return err
		}
		d.roads[identity] = road
	}
	c, err := harness.StartCandidate(harness.CandidateConfig{
		Binary: d.leasehold, Election: election, Identity: identity, TTL: ttl,
		Endpoints: []string{"http://" + d.roads[identity].Addr()},
		Job:       []string{d.self, "job"},
		Witness:   d.witness,
		Prepare:   func(cmd *exec.Cmd) { cmd.Stdout = &jobLines{to: d.narrator} },
	})
	if err != nil {
		return err
	}
	d.running[identity] = c
	d.started = append(d.started, c)
	return nil
}

func (d *demo) closeCandidates() {
	for _, r := range d.roads {
		r.Recover() // a daemon that reaches etcd ends at once
	}
	var all sync.WaitGroup
	for _, c := range d.started {
		all.Go(c.Close)
	}
	all.Wait()
	for _, r := range d.roads {
		r.Close()
	}
}

// killDescendants ends what is still left of killed daemons.
func killDescendants() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	left := errors.New("left")
	if harness.Until(ctx, func() error {
		for _, pid := range harness.Children(os.Getpid()) {
			var status unix.WaitStatus
			_, _ = unix.Wait4(pid, &status, unix.WNOHANG, nil)
		}
		if len(harness.Children(os.Getpid())) > 0 {
			return left
		}
		return nil
	}) == nil {
		return
	}
	for _, pid := range harness.Descendants(os.Getpid()) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}
