//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// withFreeze adds the scenarios that lose contact with etcd, with a leader whose job is frozen
// then. If another candidate leads, the fault ends, so that the leader learns of it.
func withFreeze(scenarios []Scenario) []Scenario {
	all := slices.Clone(scenarios)
	for _, row := range []struct {
		of, about string
		check     func(*Trial) error
		expect    Expect
	}{
		{"link-unreachable", "etcd is unreachable: every packet is lost", frozen, Failover},
		{"link-one-way-out", "packets to etcd are lost", frozen, Failover},
		{"link-one-way-in", "packets from etcd are lost", frozen, Failover},
		{"link-lossy", "the link to etcd loses 30 % of the packets for 8 s", nil, MayFailover},
		{
			"link-lossy-long", "the link to etcd loses 30 % of the packets for 20 s, " +
				"with the default TTL", nil, MayFailover,
		},
		{"all-stopped", "all members are stopped for two TTLs", frozen, NoFailover},
		{
			"quorum-lost", "two of three members are killed, and started again after 8 s",
			frozen, NoFailover,
		},
		{"disks-slow", "the disks of all members of etcd are slow", nil, MayFailover},
		{
			"stale-acknowledgement", "the leader reaches only one member, etcd's leader, and " +
				"that hangs for most of the leader's time", nil, MayFailover,
		},
		{
			"stale-acknowledgement-unreachable", "a member that was etcd's leader hangs, and is " +
				"unreachable as soon as it has woken", nil, Failover,
		},
		{
			"stale-acknowledgement-isolated", "a member that was etcd's leader hangs, and when " +
				"it wakes it acknowledges renewals for another second", nil, Failover,
		},
		{
			"stale-acknowledgement-isolated-long", "the same with a long TTL", nil, Failover,
		},
		{"guard-hung-unreachable", "the guard hangs, and etcd is unreachable", nil, Failover},
		{
			"elector-killed-unreachable", "the elector is killed, and etcd is unreachable",
			frozen, Failover,
		},
		{
			"elector-hung-unreachable", "the elector hangs, and etcd is unreachable",
			frozen, Failover,
		},
		{
			"spawner-hung-unreachable", "the spawner hangs, and etcd is unreachable",
			frozen, Failover,
		},
		{"gigabytes", "the job has 4 GB of memory; etcd is unreachable", nil, Failover},
		{
			"orphans", "the job has thousands of orphans and three fork loops; etcd is unreachable",
			nil, Failover,
		},
		{
			"starved-cpu", "64 busy loops on the machine, while etcd is unreachable", nil, Failover,
		},
		{
			"starved-memory", "nearly all memory is taken, while etcd is unreachable",
			nil, Failover,
		},
		{
			"suspend", "the leader's machine is suspended past its TTL and resumed", nil, Failover,
		},
	} {
		i := slices.IndexFunc(scenarios, func(s Scenario) bool { return s.Name == row.of })
		s := scenarios[i]
		s.Name, s.Group, s.About = s.Name+"-freeze", "freeze", row.about
		s.Freeze, s.User, s.CI, s.Without = true, false, row.of == "all-stopped", noPeers
		s.Check, s.Expect, s.Job.ByThreads = row.check, row.expect, false
		if s.Duration == 0 && s.Expect == Failover {
			s.Duration = untilNextJob
		}
		all = append(all, s)
	}
	return all
}

// frozen: the job was frozen, and not killed at kill-by.
func frozen(t *Trial) error {
	at := time.Duration(t.frozenAt.Load())
	if at == 0 {
		return errors.New("the job is not frozen")
	}
	t.Figure("frozen after", at-t.Began)
	return nil
}

// watchFrozen finds the moment from which on the leader's job ran no instruction any more: it was
// frozen, and killed while it was, or SIGKILL has reached it. It is 0 when ctx ends first.
func (t *Trial) watchFrozen(ctx context.Context) error {
	found, err := filepath.Glob(filepath.Join(t.Machine.Cgroup.Path, "leasehold-*"))
	if err != nil || len(found) != 1 {
		return fmt.Errorf("the job's cgroup: %q, %w", found, err)
	}
	job := harness.Cgroup{Path: found[0]}
	ended := make(chan time.Duration, 1) // closed when the watch has ended
	t.death = ended
	go func() {
		defer close(ended)
		defer harness.RealTime(1)()
		pause, since := unix.NsecToTimespec(200_000), time.Duration(0)
		for ctx.Err() == nil {
			_ = unix.Nanosleep(&pause, nil)
			frozen, now := job.Frozen(), harness.Now()
			switch {
			case harness.Killed(t.Job.Pid):
				if since == 0 {
					since = now
				}
				ended <- since
				return
			case !frozen:
				since = 0
			case since == 0:
				since = now
				t.frozenAt.CompareAndSwap(0, int64(now))
			}
			t.frozenSince.Store(int64(since))
		}
	}()
	return nil
}
