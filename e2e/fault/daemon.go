//go:build linux

package fault

import (
	"context"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// Stop asks the candidate to end: a planned stop.
func Stop() Fault {
	return Fault{Name: "stop", Inject: func(_ context.Context, on *Target) error {
		return on.Machine.Stop()
	}}
}

// StopTwice asks the candidate to end, and at once again: it is in a hurry.
func StopTwice() Fault {
	return Fault{Name: "stop-twice", Inject: func(_ context.Context, on *Target) error {
		err := on.Machine.Stop()
		_ = on.Machine.Stop() // it may have ended
		return err
	}}
}

// Killed kills one of the daemon's processes with SIGKILL.
func Killed(p harness.Process) Fault {
	return Fault{Name: string(p) + "-killed", Inject: func(_ context.Context, on *Target) error {
		held, err := hold(on.Machine, p)
		if err != nil {
			return err
		}
		defer held.release()
		on.Begin() // to find it took milliseconds
		return held.signal(syscall.SIGKILL)
	}}
}

// Hung stops one of the daemon's processes with SIGSTOP: it lives and does
// nothing.
func Hung(p harness.Process) Fault {
	held := process(-1)
	return Fault{
		Name: string(p) + "-hung",
		Inject: func(_ context.Context, on *Target) (err error) {
			if held, err = hold(on.Machine, p); err != nil {
				return err
			}
			on.Begin()
			return held.signal(syscall.SIGSTOP)
		},
		Recover: func(context.Context, *Target) error {
			_ = held.signal(syscall.SIGCONT) // it may have been killed meanwhile
			held.release()
			return nil
		},
	}
}

// HungUnreachable stops a process as Hung does, and cuts the machine off from
// etcd.
func HungUnreachable(p harness.Process) Fault {
	f := Both(string(p)+"-hung-unreachable", Hung(p), Unreachable())
	f.Verify = nil // what hangs may be what would have sent a packet
	return f
}

// Suspended freezes the machine: the daemon and its job can't run, and their
// timers go on.
func Suspended() Fault {
	return Fault{
		Name: "suspend",
		Inject: func(ctx context.Context, on *Target) error {
			err := on.Machine.Cgroup.Freeze(ctx)
			on.Frozen = append(on.Frozen, check.Interval{From: harness.Now(), To: check.Forever})
			return err
		},
		Recover: func(ctx context.Context, on *Target) error {
			on.Frozen[len(on.Frozen)-1].To = harness.Now()
			return on.Machine.Cgroup.Thaw(ctx)
		},
	}
}

// process is a descriptor of a process: a signal by it hits no other that has
// got its pid.
type process int

// hold finds one of the daemon's processes. Programs other than leasehold have
// but the one that was started.
func hold(m *harness.Machine, p harness.Process) (process, error) {
	if !m.Implementation.Ours() {
		p = harness.Guard
	}
	pid, err := m.Pid(p)
	if err != nil {
		return -1, err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("hold the %s of %s: %w", p, m.Name, err)
	}
	if again, err := m.Pid(p); err != nil || again != pid {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("%s has another %s now", m.Name, p)
	}
	return process(fd), nil
}

func (p process) signal(sig syscall.Signal) error {
	return unix.PidfdSendSignal(int(p), sig, nil, 0)
}

func (p process) release() {
	if p >= 0 {
		_ = unix.Close(int(p))
	}
}
