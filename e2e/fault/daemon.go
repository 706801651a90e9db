//go:build linux

package fault

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

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
		defer func() { _ = held.Release() }()
		on.Begin() // to find it took milliseconds
		return held.Kill()
	}}
}

// ElectorsKilled kills so many electors, each when it has taken the place of the one before. The
// fault begins with the last one.
func ElectorsKilled(n int) Fault {
	return Fault{Name: "electors-killed", Inject: func(ctx context.Context, on *Target) error {
		for replaced := range n {
			if replaced > 0 {
				ctx, cancel := context.WithTimeout(ctx, harness.WaitTimeout)
				err := on.Machine.WaitReplaced(ctx, float64(replaced))
				cancel()
				if err != nil {
					return err
				}
			}
			if err := Killed(harness.Elector).Inject(ctx, on); err != nil {
				return err
			}
		}
		return nil
	}}
}

// Reloaded has the daemon reload. Nothing is new, and its elector is replaced all the same.
func Reloaded() Fault {
	return Fault{Name: "reloaded", Inject: func(ctx context.Context, on *Target) error {
		ctx, cancel := context.WithTimeout(ctx, harness.WaitTimeout)
		defer cancel()
		// Where it can be answered: its socket is one of the machine's network.
		reload, err := harness.StartChild("reload", on.Machine.Node,
			exec.Command(on.Programs.Leasehold, "reload", strconv.Itoa(on.Machine.Guard())))
		if err != nil {
			return err
		}
		defer reload.Kill()
		if code, err := reload.Wait(ctx); err != nil || code != 0 {
			return fmt.Errorf("leasehold reload ended with %d, %w: %s", code, err, reload.Log())
		}
		return nil
	}}
}

// StopElectorKilled asks the candidate to end, and kills its elector while the job stops. The fault
// begins with the stop.
func StopElectorKilled(after time.Duration) Fault {
	return Fault{Name: "stop-elector-killed", Inject: func(ctx context.Context, on *Target) error {
		began := harness.Now()
		if err := on.Machine.Stop(); err != nil {
			return err
		}
		if err := harness.Wait(ctx, after); err != nil {
			return err
		}
		err := Killed(harness.Elector).Inject(ctx, on)
		on.Began = began
		return err
	}}
}

// KilledUnreachable kills a process as soon as the machine is cut off from etcd.
func KilledUnreachable(p harness.Process) Fault {
	return Both(string(p)+"-killed-unreachable", Unreachable(), Killed(p))
}

// AllKilled kills everything of the machine at once: the daemon's processes, and the job.
func AllKilled() Fault {
	return Fault{Name: "all-killed", Inject: func(_ context.Context, on *Target) error {
		return on.Machine.Cgroup.Kill()
	}}
}

// AllKilledStarted is AllKilled of a candidate that has a state file, and is started again after a
// while. The fault's figure is how long after its beginning that was.
func AllKilledStarted(after time.Duration) Fault {
	f := AllKilled()
	f.Name += "-started"
	f.Configure = func(on *Target, cfg *harness.CandidateConfig) error {
		on.Machine.Fresh = true
		dir, err := on.Machine.StateDir(cfg.UID)
		cfg.Env = append(cfg.Env, "LEASEHOLD_STATE_DIR="+dir)
		return err
	}
	kill := f.Inject
	f.Inject = func(ctx context.Context, on *Target) error {
		if err := kill(ctx, on); err != nil {
			return err
		}
		if _, err := on.Machine.Wait(ctx); err != nil {
			return err
		}
		if err := harness.Wait(ctx, after-(harness.Now()-on.Began)); err != nil {
			return err
		}
		on.Figure(StartedAgain, harness.Now()-on.Began)
		return on.Machine.StartAgain()
	}
	return f
}

// StartedAgain is the figure of AllKilledStarted.
const StartedAgain = "daemon started again"

// Hung stops one of the daemon's processes with SIGSTOP: it lives and does nothing.
func Hung(p harness.Process) Fault {
	var held *os.Process
	return Fault{
		Name: string(p) + "-hung",
		Inject: func(_ context.Context, on *Target) (err error) {
			if held, err = hold(on.Machine, p); err != nil {
				return err
			}
			on.Begin()
			return held.Signal(syscall.SIGSTOP)
		},
		Recover: func(context.Context, *Target) error {
			if held == nil {
				return nil
			}
			_ = held.Signal(syscall.SIGCONT) // it may have been killed meanwhile
			return held.Release()
		},
	}
}

// HungUnreachable stops a process as Hung does, and cuts the machine off from etcd.
func HungUnreachable(p harness.Process) Fault {
	f := Both(string(p)+"-hung-unreachable", Hung(p), Unreachable())
	f.Verify = nil // what hangs may be what would have sent a packet
	return f
}

// Suspended freezes the machine: the daemon and its job can't run, and their timers go on.
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

// hold finds one of the daemon's processes. A signal to what it returns hits no other that has got
// its pid. Programs other than leasehold have but the process that was started.
func hold(m *harness.Machine, p harness.Process) (*os.Process, error) {
	if !m.Implementation.Ours() {
		p = harness.Guard
	}
	pid, err := m.Pid(p)
	if err != nil {
		return nil, err
	}
	held, err := os.FindProcess(pid) // holds it by a pidfd
	if err != nil {
		return nil, fmt.Errorf("hold the %s of %s: %w", p, m.Name, err)
	}
	if again, err := m.Pid(p); err != nil || again != pid {
		_ = held.Release()
		return nil, fmt.Errorf("%s has another %s now", m.Name, p)
	}
	return held, nil
}
