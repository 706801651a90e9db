//go:build linux

package main

import (
	"context"
	"errors"
	"syscall"
)

// stop is the planned stop.
func stop(_ context.Context, t *Trial) error { return t.Of.Stop(t.Leader.Candidate) }

// guardGets sends a signal to the process that was started: of leasehold, the
// guard.
func guardGets(sig syscall.Signal) func(context.Context, *Trial) error {
	return func(_ context.Context, t *Trial) error { return t.Leader.Signal(sig) }
}

func electorGets(sig syscall.Signal) func(context.Context, *Trial) error {
	return func(_ context.Context, t *Trial) error {
		elector, err := t.Leader.Elector()
		if err != nil {
			return err
		}
		t.Begin() // to find it takes milliseconds
		return syscall.Kill(elector, sig)
	}
}

func spawnerGets(sig syscall.Signal) func(context.Context, *Trial) error {
	return func(_ context.Context, t *Trial) error {
		spawner, err := t.Leader.Spawner()
		if err != nil {
			return err
		}
		t.Begin() // to find it takes milliseconds
		return syscall.Kill(spawner, sig)
	}
}

// andDark cuts the leader off from etcd as well.
func andDark(strike func(context.Context, *Trial) error) func(context.Context, *Trial) error {
	return func(ctx context.Context, t *Trial) error { return errors.Join(strike(ctx, t), t.Dark(t.Leader)) }
}

// daemonRows are faults of the daemon's own processes.
var daemonRows = []Row{
	{Name: "stop", Group: "daemon", About: "planned stop (SIGTERM)",
		Alone: AllAlone, CI: true, User: true, Strike: stop},
	{Name: "guard-killed", Group: "daemon", About: "the daemon (of ours, the guard) is killed with SIGKILL",
		Alone: OursAlone, CI: true, User: true, Strike: guardGets(syscall.SIGKILL)},
	{Name: "guard-hung", Group: "daemon", About: "the daemon (of ours, the guard) hangs (SIGSTOP)",
		Alone: OursAlone, User: true, Strike: guardGets(syscall.SIGSTOP)},
	{Name: "guard-hung-dark", Group: "daemon", About: "the daemon (of ours, the guard) hangs, and its road to etcd is dark",
		CI: true, User: true, Strike: andDark(guardGets(syscall.SIGSTOP))},
	{Name: "elector-killed", Group: "daemon", About: "the elector, the guard's child, is killed with SIGKILL",
		Ours: true, Alone: OursAlone, CI: true, User: true, Strike: electorGets(syscall.SIGKILL)},
	{Name: "elector-hung", Group: "daemon", About: "the elector hangs (SIGSTOP)",
		Ours: true, User: true, Strike: electorGets(syscall.SIGSTOP)},
	{Name: "elector-hung-dark", Group: "daemon", About: "the elector hangs, and its road to etcd is dark",
		Ours: true, Strike: andDark(electorGets(syscall.SIGSTOP))},
	{Name: "spawner-killed", Group: "daemon", About: "the spawner, between guard and job, is killed with SIGKILL",
		Ours: true, Alone: OursAlone, CI: true, User: true, Strike: spawnerGets(syscall.SIGKILL)},
	{Name: "spawner-hung-unreachable", Group: "daemon", About: "the spawner hangs, and etcd is unreachable",
		Ours: true, User: true, Strike: andDark(spawnerGets(syscall.SIGSTOP))},
}
