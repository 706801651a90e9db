//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

// A Contestant is one candidate in a trial, on a node and in a cgroup of its
// own: nothing that it starts can get out of that.
type Contestant struct {
	*harness.Candidate
	Node  *harness.Node
	Roads []*harness.Proxy // to each member, where the row is Proxied

	cgroup string
	of     entrant
}

// start starts a candidate.
func (t *Trial) start(identity string, job []string) (*Contestant, error) {
	c := &Contestant{of: t.Of}
	t.contestants = append(t.contestants, c) // whatever becomes of it, it will be ended
	var err error
	if c.Node, err = t.Network.Node(identity); err != nil {
		return nil, err
	}
	endpoints := t.Etcd.Endpoints()
	if t.Row.Proxied {
		for i, e := range endpoints {
			scheme, addr, _ := strings.Cut(e, "://")
			road, err := harness.StartProxyOn(t.Network.Host, addr, 0)
			if err != nil {
				return nil, err
			}
			c.Roads = append(c.Roads, road)
			endpoints[i] = scheme + "://" + road.Addr()
		}
	}
	if c.cgroup, err = makeCgroup(); err != nil {
		return nil, err
	}
	dir, err := os.Open(c.cgroup)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	cfg := t.Of.Config(harness.Candidacy{
		Programs: harness.ProgramsIn(t.programs), Etcd: t.Etcd, Endpoints: endpoints, Election: t.Election, Identity: identity,
		TTL: t.Row.ttl(), Job: job, Witness: t.Witness,
	})
	cfg.Node, cfg.UID = c.Node, t.Of.uid
	if t.Of.ours() {
		cfg.Env = append(cfg.Env, "LEASEHOLD_STOP_GRACE=500ms")
		if t.Row.Auth {
			cfg.Env = append(cfg.Env, "LEASEHOLD_USERNAME="+authUser, "LEASEHOLD_PASSWORD="+authPassword)
		}
		cfg.Env = append(cfg.Env, t.Row.Env...)
	}
	cfg.Prepare = func(cmd *exec.Cmd) {
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	if t.Row.Change != nil {
		if err := t.Row.Change(t, &cfg); err != nil {
			return nil, err
		}
	}
	c.Candidate, err = harness.StartCandidate(cfg)
	return c, err
}

// Dark has nothing pass between the contestant and the given nodes, all
// members' without any. Its connections stay.
func (t *Trial) Dark(c *Contestant, nodes ...*harness.Node) error {
	if len(nodes) == 0 {
		nodes = t.Etcd.Nodes()
	}
	return noLoss(t.Network.Cut)(harness.LinksBetween(c.Node, nodes...)...)
}

// Freeze stops every process of the contestant at one stroke, its job's too.
func (c *Contestant) Freeze(ctx context.Context) error { return c.freeze(ctx, "1") }

// Thaw ends that.
func (c *Contestant) Thaw(ctx context.Context) error { return c.freeze(ctx, "0") }

func (c *Contestant) freeze(ctx context.Context, to string) error {
	if err := os.WriteFile(filepath.Join(c.cgroup, "cgroup.freeze"), []byte(to), 0); err != nil {
		return err
	}
	return harness.Until(ctx, func() error { return c.event("frozen " + to) })
}

// event is an error while the cgroup's events do not hold the line.
func (c *Contestant) event(line string) error {
	events, err := os.ReadFile(filepath.Join(c.cgroup, "cgroup.events"))
	if err == nil && !slices.Contains(strings.Split(string(events), "\n"), line) {
		err = fmt.Errorf("%s is not %q but %q", c.cgroup, line, events)
	}
	return err
}

// processes are all that live in the cgroup and below.
func (c *Contestant) processes() []int {
	var pids []int
	for _, dir := range tree(c.cgroup) {
		text, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")) // it may just have gone
		for _, word := range strings.Fields(string(text)) {
			if pid, err := strconv.Atoi(word); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// name says what a process is.
func name(pid int) string {
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // it may just have ended
	return fmt.Sprintf("%d (%s)", pid, strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " ")))
}

// wake ends whatever holds the contestant's processes up.
func (c *Contestant) wake(ctx context.Context) {
	if c.cgroup == "" {
		return
	}
	_ = c.Thaw(ctx) // the kill that may follow needs no thaw
	for _, pid := range c.processes() {
		_ = syscall.Kill(pid, syscall.SIGCONT) // it may just have ended
	}
	for _, road := range c.Roads {
		road.Recover()
	}
}

// leave asks a contestant to end and reports what of it is left then.
func (c *Contestant) leave(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := c.of.Stop(c.Candidate); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	if _, err := c.Wait(ctx); err != nil {
		return fmt.Errorf("%s did not end after SIGTERM", c.Identity)
	}
	if err := harness.Until(ctx, func() error { return c.event("populated 0") }); err != nil {
		var left []string
		for _, pid := range c.processes() {
			left = append(left, name(pid))
		}
		return fmt.Errorf("%s has left processes: %s", c.Identity, strings.Join(left, ", "))
	}
	return nil
}

// end ends the contestant and all that it may have left behind.
func (c *Contestant) end(ctx context.Context) error {
	var err error
	if c.cgroup != "" {
		err = removeCgroup(ctx, c.cgroup)
	}
	if c.Candidate != nil {
		_, errWait := c.Wait(ctx)
		err = errors.Join(err, errWait)
	}
	for _, road := range c.Roads {
		road.Close()
	}
	if c.Node != nil {
		c.Node.Close()
	}
	return err
}

var cgroups atomic.Int64 // keeps their names apart

// makeCgroup makes a cgroup whose name tells whose it is.
func makeCgroup() (string, error) {
	mount := harness.Cgroup2()
	if mount == "" {
		return "", errors.New("no cgroup v2 is mounted")
	}
	dir := filepath.Join(mount, fmt.Sprintf("faults-%d-%d", os.Getpid(), cgroups.Add(1)))
	return dir, os.Mkdir(dir, 0o755)
}

// removeCgroup kills all that is in a cgroup and removes it.
func removeCgroup(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return harness.Until(ctx, func() error {
		err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
		for _, d := range slices.Backward(tree(dir)) {
			err = errors.Join(err, os.Remove(d))
		}
		return err
	})
}

// tree lists a directory and all below, the outer ones first.
func tree(dir string) []string {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append(dirs, path)
		}
		return nil // what has just gone is not there
	})
	return dirs
}

// removeLeftovers removes the cgroups of earlier runs that came to no end of
// their own.
func removeLeftovers(ctx context.Context) error {
	found, err := filepath.Glob(filepath.Join(harness.Cgroup2(), "faults-*-*"))
	for _, dir := range found {
		owner := strings.Split(filepath.Base(dir), "-")[1]
		if _, gone := os.Stat("/proc/" + owner); gone != nil {
			err = errors.Join(err, removeCgroup(ctx, dir))
		}
	}
	return err
}
