//go:build linux

package supervisor_test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor"
)

func TestSupervisor_GuardKilled(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
			for _, job := range []string{"plain", "stubborn", "daemonize", "threads"} {
				t.Run(job+"/"+unix.SignalName(sig), func(t *testing.T) {
					t.Parallel()
					r := newRig(t, job, uid)
					if sig == unix.SIGSTOP { // which matters only near kill-by
						r.tell("lead 4s 5s")
					} else {
						r.tell("lead 1h 2h")
					}
					r.waitJobs(1)
					if job == "daemonize" {
						r.waitJobs(2)
					}
					_ = unix.Kill(r.guard.Process.Pid, sig)
					r.waitSaid("led " + supervisor.ErrGuardLost.Error())
					r.requireDead()
					r.waitSaid("run " + supervisor.ErrGuardLost.Error())
					r.waitExit(-1)
					r.tell("exit 70")
				})
			}
		}
	})
}

// TestSupervisor_SilentGuard: silence alone costs the job nothing. It does where the guard had to
// act.
func TestSupervisor_SilentGuard(t *testing.T) {
	stopped := func(t *testing.T, lead string) *rig {
		t.Parallel()
		r := newRig(t, "stubborn", 0)
		r.tell(lead)
		r.waitJobs(1)
		_ = unix.Kill(r.guard.Process.Pid, unix.SIGSTOP)
		return r
	}
	taken := func(r *rig) {
		r.t.Helper()
		r.waitSaid("led " + supervisor.ErrGuardLost.Error())
		r.requireDead()
		r.waitExit(-1)
		r.tell("exit 70")
	}
	t.Run("far from kill-by", func(t *testing.T) {
		r := stopped(t, "lead 1h 2h")
		time.Sleep(testTTL / 2) // five times what it may take to answer elsewhere
		_ = unix.Kill(r.guard.Process.Pid, unix.SIGCONT)
		r.waitJobs(1)
		r.tell("end lost")
		r.waitSaid("led <nil>")
		r.requireDead()
		r.tell("exit 0")
		r.waitExit(0)
	})
	t.Run("a loss", func(t *testing.T) {
		r := stopped(t, "lead 1h 2h")
		began := boottime.Now()
		r.tell("end lost")
		taken(r)
		if took := boottime.Now() - began; took > 4*time.Second {
			t.Errorf("it took %v", took)
		} else {
			t.Logf("it took %v", took)
		}
	})
	t.Run("near the kill-by that it knows", func(t *testing.T) {
		r := stopped(t, "lead 4s 5s")
		r.tell("extend 1h 2h")
		taken(r)
	})
}

// TestSupervisor_GuardKilledSpawnerStopped: two faults at once, after which the lease must not stay
// for ever.
func TestSupervisor_GuardKilledSpawnerStopped(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		r := newRig(t, "daemonize", uid)
		r.tell("lead 1h 2h")
		r.waitJobs(2)
		_ = unix.Kill(r.spawner(), unix.SIGSTOP)
		_ = unix.Kill(r.guard.Process.Pid, unix.SIGKILL)
		r.waitSaid("led " + supervisor.ErrGuardLost.Error())
		r.requireDead()
		r.waitSaid("run " + supervisor.ErrGuardLost.Error())
		r.tell("exit 70")
	})
}

// TestSupervisor_GuardAndSpawnerKilled: then the elector has only the job's cgroup. What it can't
// kill keeps the lease for ever, so it has to kill a process whose main thread has exited, too.
func TestSupervisor_GuardAndSpawnerKilled(t *testing.T) {
	needCgroup(t)
	for _, job := range []string{"daemonize", "daemonize-threads"} {
		t.Run(job, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, job, 0)
			r.tell("lead 1h 2h")
			r.waitJobs(2)
			spawner := r.spawner()
			// Stopped, neither of them acts on the other's end.
			for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} {
				_ = unix.Kill(r.guard.Process.Pid, sig)
				_ = unix.Kill(spawner, sig)
			}
			r.waitSaid("led " + supervisor.ErrGuardLost.Error())
			r.requireDead()
			r.waitSaid("run " + supervisor.ErrGuardLost.Error())
			r.waitExit(-1)
			r.tell("exit 70")
		})
	}
}
