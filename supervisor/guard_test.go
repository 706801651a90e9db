//go:build linux

package supervisor_test

import (
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestGuard_PlannedStop(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		r := newRig(t, "plain", uid)
		r.tell("lead 1h 2h")
		r.waitJobs(1)
		r.endPlanned()
	})
}

func TestGuard_DeadlinesWithoutRenewal(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, job := range []string{"plain", "stubborn", "daemonize", "threads"} {
			t.Run(job, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, job, uid)
				processes := 1
				if job == "daemonize" {
					processes = 2
				}
				r.lead(processes, 600*time.Millisecond, 900*time.Millisecond)
				r.waitSaid("led <nil>")
				r.requireDead()
				r.tell("exit 76")
				r.waitExit(76)
			})
		}
	})
}

func TestGuard_ExtendMovesDeadlinesUntilStopAt(t *testing.T) {
	r := newRig(t, "stubborn", 0)
	r.lead(1, 2*time.Second, time.Hour)
	for range 5 {
		r.tell("extend 2s 1h")
		time.Sleep(500 * time.Millisecond)
	}
	r.mu.Lock()
	alive := len(r.alive)
	r.mu.Unlock()
	if alive != 1 {
		t.Fatal("the job was stopped although its deadlines were moved")
	}
	time.Sleep(2100 * time.Millisecond) // stop-at passes, and the job ignores the stop signal
	r.tell("extend 1h 2h")
	r.tell("end lost")
	r.waitSaid("led")
	r.requireDead()
	r.tell("exit 0")
	r.waitExit(0)
}

func TestGuard_ElectorKilled(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, job := range []string{"plain", "stubborn", "daemonize"} {
			t.Run(job, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, job, uid)
				r.tell("lead 1h 2h")
				r.waitJobs(1)
				if job == "daemonize" {
					r.waitJobs(2)
				}
				r.loseElectors()
				r.waitSaid("revoke " + strconv.FormatInt(r.lease, 16))
				r.requireDead()
				r.waitExit(exitLost)
			})
		}
	})
}

func TestGuard_ElectorStoppedPastKillBy(t *testing.T) {
	r := newRig(t, "stubborn", 0)
	r.lead(1, 500*time.Millisecond, 700*time.Millisecond)
	r.killElector(unix.SIGSTOP)
	r.replaced(1)
	r.waitSaid("led")
	r.requireDead()
	r.tell("exit 76")
	r.waitExit(76)
}

func TestGuard_JobEndsByItself(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		t.Run("code", func(t *testing.T) {
			r := newRig(t, "exit-5", uid)
			r.tell("lead 1h 2h")
			r.waitSaid("led the job exited with code 5")
			r.tell("exit 5")
			r.waitExit(5)
		})
		t.Run("leaves a process behind", func(t *testing.T) {
			r := newRig(t, "leave-behind", uid)
			r.tell("lead 1h 2h")
			r.waitSaid("led the job exited with code 0")
			r.requireDead()
			r.tell("exit 0")
			r.waitExit(0)
		})
		t.Run("not executable", func(t *testing.T) {
			r := newRig(t, "plain", uid, "TEST_PATH=/etc/passwd")
			r.tell("lead 1h 2h")
			r.waitSaid("led the job could not be started: permission denied")
			r.tell("exit 126")
			r.waitExit(126)
		})
	})
}

func TestGuard_SecondSignalKills(t *testing.T) {
	r := newRig(t, "stubborn", 0)
	r.tell("lead 1h 2h")
	r.waitJobs(1)
	_ = unix.Kill(r.guard.Process.Pid, unix.SIGTERM)
	r.waitSaid("signal 15")
	r.tell("end planned")
	_ = unix.Kill(r.guard.Process.Pid, unix.SIGTERM)
	r.waitSaid("led <nil>")
	r.requireDead()
	r.tell("exit 0")
	r.waitExit(0)
}
