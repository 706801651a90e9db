//go:build linux

package supervisor_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor"
	"leasehold/supervisor/ipc"
)

// require fails unless the words are in what an elector has learned.
func require(t *testing.T, said string, words ...any) {
	t.Helper()
	for i := 0; i < len(words); i += 2 {
		if want := fmt.Sprintf(" %s=%v", words[i], words[i+1]); !strings.Contains(said+" ",
			want+" ") {
			t.Errorf("%q, want%s", said, want)
		}
	}
}

// countAlive counts the processes of the job.
func (r *rig) countAlive() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.alive)
}

// TestReplace_JobGoesOn: an elector that exits or hangs is replaced. The job is the same process
// before and after, and the next elector extends its deadlines, watches the guard, and ends the
// job.
func TestReplace_JobGoesOn(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
			for _, job := range []string{"plain", "daemonize"} {
				t.Run(job+"/"+unix.SignalName(sig), func(t *testing.T) {
					t.Parallel()
					ttl, stopAt := testTTL, 2500*time.Millisecond
					exited, silent := 1, 0
					if sig == unix.SIGSTOP {
						// The guard gives it up a quarter of the TTL before stop-at. A slow machine
						// needs much of that to start another one.
						ttl, stopAt = 5*testTTL, 6500*time.Millisecond
						exited, silent = 0, 1
					}
					r := newRig(t, job, uid, fmt.Sprint("TEST_TTL=", ttl))
					processes := 1
					if job == "daemonize" {
						processes = 2
					}
					r.lead(processes, stopAt, 2*stopAt)
					pid := r.pid("job")
					if job == "daemonize" {
						pid = number(r.waitSaid("job daemonize"))
					}
					began := boottime.Now()
					r.killElector(sig)
					said := r.replaced(1)
					t.Logf("replaced after %v", boottime.Now()-began)
					require(t, said, "job", int(ipc.JobRunning), "pid", pid, "ordered", false,
						"lease", r.lease, "releasing", false, "key", "election/abc", "created", 7,
						"starts", 1, "exited", exited, "silent", silent)
					r.tell("extend 1h 2h")
					time.Sleep(max(0, began+stopAt+200*time.Millisecond-boottime.Now()))
					if alive := r.countAlive(); alive != processes {
						t.Fatalf("%d processes of the job are left", alive)
					}
					r.endPlanned()
				})
			}
		}
	})
}

// TestReplace_Standby: without a job the next elector gets the lease and the key, and can lead.
func TestReplace_Standby(t *testing.T) {
	r := newRig(t, "plain", 0)
	r.killElector(unix.SIGKILL)
	require(t, r.replaced(1), "job", int(ipc.JobIdle), "lease", r.lease, "created", 7, "starts", 0)
	r.tell("lead 1h 2h")
	r.waitJobs(1)
	r.endPlanned()
}

// TestReplace_Stopping: the job that is being stopped keeps its deadlines, and kill-by comes
// without the elector's help.
func TestReplace_Stopping(t *testing.T) {
	r := newRig(t, "stubborn", 0)
	r.lead(1, 300*time.Millisecond, 1500*time.Millisecond)
	time.Sleep(400 * time.Millisecond)
	r.killElector(unix.SIGKILL)
	require(t, r.replaced(1), "job", int(ipc.JobEnding), "ordered", true)
	r.tell("extend 1h 2h") // stop-at has passed
	r.waitSaid("led <nil>")
	r.requireDead()
	r.tell("exit 76")
	r.waitExit(76)
}

// TestReplace_Releasing: after the announcement the next elector knows that the lease is lost, and
// one that asks for a job under it is an error.
func TestReplace_Releasing(t *testing.T) {
	for _, c := range []struct {
		name, tell, say string
		code            int
	}{
		{"finished", "exit 0", "", 0},
		{"start refused", "lead 1h 2h", "revoke ", exitLost},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "plain", 0)
			r.tell("release")
			r.waitSaid("releasing <nil>")
			r.killElector(unix.SIGKILL)
			require(t, r.replaced(1), "lease", r.lease, "releasing", true)
			r.tell("%s", c.tell)
			r.waitSaid(c.say)
			r.waitExit(c.code)
			if job := r.pid("job"); job != 0 {
				t.Errorf("a job was started: %d", job)
			}
		})
	}
}

// withoutElector kills the elector, and keeps it from being reaped until release is called. So the
// guard has none.
func (r *rig) withoutElector() (release func()) {
	r.t.Helper()
	release = hold(r.t, r.pid("elector"))
	r.killElector(unix.SIGKILL)
	return release
}

// TestReplace_DeadlinesMeanwhile: stop-at and kill-by come while there is no elector.
func TestReplace_DeadlinesMeanwhile(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for job, code := range map[string]int{"plain": 143, "stubborn": 137} {
			t.Run(job, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, job, uid)
				r.lead(1, 500*time.Millisecond, 900*time.Millisecond)
				ended := boottime.Now() + 900*time.Millisecond
				release := r.withoutElector()
				r.wait("the job is killed", func() bool { return len(r.alive) == 0 })
				if late := boottime.Now() - ended; late > 300*time.Millisecond {
					t.Errorf("the job was killed %v after kill-by", late)
				}
				r.waitIdle()
				release()
				require(t, r.replaced(1), "job", int(ipc.JobIdle), "exit", code, "ended", "<nil>")
				r.tell("exit 76")
				r.waitExit(76)
			})
		}
	})
}

// TestReplace_JobExitsMeanwhile: the job exits while there is no elector, and the next one learns
// of it: by RESTART=never it must not start again.
func TestReplace_JobExitsMeanwhile(t *testing.T) {
	r := newRig(t, "plain", 0)
	r.tell("lead 1h 2h")
	r.waitJobs(1)
	release := r.withoutElector()
	_ = unix.Kill(r.pid("job"), unix.SIGKILL)
	r.waitIdle()
	release()
	require(t, r.replaced(1), "job", int(ipc.JobIdle), "exit", 137, "starts", 1,
		"ended", "the job was killed by signal 9")
	r.tell("exit 137")
	r.waitExit(137)
}

// TestReplace_SignalMeanwhile: a stop that is asked for while there is no elector waits for none,
// and the next one learns of it.
func TestReplace_SignalMeanwhile(t *testing.T) {
	r := newRig(t, "plain", 0)
	r.tell("lead 1h 2h")
	r.waitJobs(1)
	release := r.withoutElector()
	_ = unix.Kill(r.guard.Process.Pid, unix.SIGTERM)
	r.waitIdle()
	release()
	require(t, r.replaced(1), "job", int(ipc.JobIdle), "signals", 1, "ended", "<nil>")
	r.waitSaid("signal 15")
	r.tell("exit 0")
	r.waitExit(0)
}

// TestStop_OneSignal: the guard asks the job to stop at once, whatever the elector does. The
// elector asks for the same. The job gets one signal. A second signal of the user kills it.
func TestStop_OneSignal(t *testing.T) {
	for _, electorHangs := range []bool{false, true} {
		t.Run(fmt.Sprintf("elector hangs %v", electorHangs), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "counts", 0)
			r.tell("lead 1h 2h")
			r.waitJobs(1)
			if electorHangs {
				r.killElector(unix.SIGSTOP)
			}
			_ = unix.Kill(r.guard.Process.Pid, unix.SIGTERM)
			r.waitSaid("stop signal")
			if electorHangs {
				r.killElector(unix.SIGCONT)
			}
			r.waitSaid("signal 15")
			r.tell("end planned")
			time.Sleep(200 * time.Millisecond) // until the guard has read the elector's request
			_ = unix.Kill(r.guard.Process.Pid, unix.SIGTERM)
			r.waitSaid("led <nil>")
			r.requireDead()
			r.mu.Lock()
			defer r.mu.Unlock()
			if n := r.count("stop signal"); n != 1 {
				t.Errorf("the job got %d stop signals", n)
			}
			defer r.waitExit(0)
			fmt.Fprintln(r.elector, "exit 0")
		})
	}
}

// TestReplace_GuardKilledMeanwhile: without guard and elector the spawner kills the job.
func TestReplace_GuardKilledMeanwhile(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		r := newRig(t, "daemonize", uid)
		r.tell("lead 1h 2h")
		r.waitJobs(2)
		release := r.withoutElector()
		defer release()
		_ = unix.Kill(r.guard.Process.Pid, unix.SIGKILL)
		r.wait("the job is killed", func() bool { return len(r.alive) == 0 })
		r.waitExit(-1)
	})
}

// TestReplace_GuardKilledAfter: the next elector stands in for the guard at once, with a pidfd of
// the job's first process.
func TestReplace_GuardKilledAfter(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
			t.Run(unix.SignalName(sig), func(t *testing.T) {
				t.Parallel()
				r := newRig(t, "daemonize", uid)
				r.lead(2, 2*time.Second, 3*time.Second)
				r.killElector(unix.SIGKILL)
				r.replaced(1)
				_ = unix.Kill(r.guard.Process.Pid, sig)
				r.waitSaid("led " + supervisor.ErrGuardLost.Error())
				r.requireDead()
				r.waitSaid("run " + supervisor.ErrGuardLost.Error())
				r.waitExit(-1)
				r.tell("exit 70")
			})
		}
	})
}

// TestReplace_SpawnerKilledAfter: the guard has kept all that it needs.
func TestReplace_SpawnerKilledAfter(t *testing.T) {
	r := newRig(t, "daemonize", 0)
	r.tell("lead 1h 2h")
	r.waitJobs(2)
	spawner := r.spawner()
	r.killElector(unix.SIGKILL)
	r.replaced(1)
	_ = unix.Kill(spawner, unix.SIGKILL)
	r.waitSaid("revoke " + strconv.FormatInt(r.lease, 16))
	r.requireDead()
	r.waitExit(exitLost)
}

// TestReplace_StartsAgain: the next elector starts the job again, and the spawner's messages about
// the first one do not disturb it.
func TestReplace_StartsAgain(t *testing.T) {
	r := newRig(t, "plain", 0)
	r.tell("lead 1h 2h")
	r.waitJobs(1)
	first := r.pid("job")
	r.tell("end planned")
	r.waitSaid("led <nil>")
	r.killElector(unix.SIGKILL)
	require(t, r.replaced(1), "job", int(ipc.JobIdle), "starts", 1, "ended", "<nil>")
	r.tell("lead 1h 2h")
	r.wait("the second job", func() bool { return len(r.alive) == 1 && r.pids["job"] != first })
	r.killElector(unix.SIGKILL)
	require(t, r.replaced(2), "job", int(ipc.JobRunning), "pid", r.pid("job"), "starts", 2,
		"exited", 2)
	r.tell("end lost")
	r.wait("the second term ends", func() bool { return r.count("led <nil>") == 2 })
	r.requireDead()
	r.tell("exit 0")
	r.waitExit(0)
}
