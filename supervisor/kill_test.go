//go:build linux

package supervisor_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/supervisor/proctree"
)

// TestGuard_SleepsBesideZombies: a process that has ended can't be reaped for as long as a tracer
// holds it.
func TestGuard_SleepsBesideZombies(t *testing.T) {
	t.Run("job", func(t *testing.T) {
		t.Parallel()
		r := newRig(t, "plain", 0)
		r.tell("lead 1h 2h")
		release := hold(t, number(r.waitSaid("job")))
		_ = unix.Kill(number(r.waitSaid("job")), unix.SIGKILL)
		r.requireSleep()
		release()
		r.waitSaid("led the job was killed by signal 9")
		r.tell("exit 0")
		r.waitExit(0)
	})
	t.Run("revoke", func(t *testing.T) {
		t.Parallel()
		r := newRig(t, "plain", 0, "TEST_REVOKE=hang")
		r.tell("lead 1h 2h")
		r.waitJobs(1)
		r.loseElectors()
		release := hold(t, number(r.waitSaid("revoke"))) // until its time is up, and longer
		time.Sleep(testTTL)
		r.requireSleep()
		release()
		r.waitExit(exitLost)
	})
}

// TestGuard_SpawnerLost: all of the job falls to the guard, also while a tracer keeps the spawner
// from being reaped.
func TestGuard_SpawnerLost(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, traced := range []bool{false, true} {
			t.Run(fmt.Sprintf("traced=%v", traced), func(t *testing.T) {
				t.Parallel()
				if traced && os.Getuid() != 0 {
					t.Skip("skipped: needs root")
				}
				r := newRig(t, "daemonize", uid)
				r.tell("lead 1h 2h")
				r.waitJobs(2)
				spawner := r.spawner()
				release := func() {}
				if traced {
					release = hold(t, spawner)
				}
				_ = unix.Kill(spawner, unix.SIGKILL)
				r.waitSaid("revoke " + strconv.FormatInt(r.lease, 16))
				r.requireDead()
				r.waitExit(exitLost)
				release()
			})
		}
	})
}

// TestGuard_StartCalledOff: a start that comes to nothing leaves no cgroup behind in which the next
// job would be killed at once.
func TestGuard_StartCalledOff(t *testing.T) {
	needCgroup(t)
	r := newRig(t, "plain", 0, "TEST_MARGIN=20s") // half of it is what the spawner may hang for
	spawner := r.spawner()
	_ = unix.Kill(spawner, unix.SIGSTOP)
	r.tell("lead 200ms 300ms")
	time.Sleep(350 * time.Millisecond) // kill-by has passed, and the spawner is not yet given up
	_ = unix.Kill(spawner, unix.SIGCONT)
	r.waitSaid("led <nil>")
	r.tell("again")
	r.tell("lead 1h 2h")
	r.waitJobs(1)
	r.tell("end planned")
	r.wait("the second term ends", func() bool { return r.count("led <nil>") == 2 })
	r.requireDead()
	r.tell("exit 0")
	r.waitExit(0)
}

// hold traces a process, so that nobody reaps it before it is released. The rest of the test is
// bound to its thread.
func hold(t *testing.T, pid int) (release func()) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.PtraceSeize(pid); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		for {
			var ws unix.WaitStatus
			if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); err != nil && err != unix.EINTR {
				t.Fatal(err)
			}
			if ws.Signaled() {
				return
			}
			_ = unix.PtraceCont(pid, int(ws.StopSignal()))
		}
	}
}

// requireSleep fails if the guard, and what it has started, takes more than a little of a
// processor.
func (r *rig) requireSleep() {
	r.t.Helper()
	const interval = time.Second
	pids := append([]int{r.guard.Process.Pid}, r.children()...)
	used := func() (sum time.Duration) {
		for _, pid := range pids {
			var ts unix.Timespec
			if unix.ClockGettime(int32(^pid<<3|2),
				&ts) == nil { // its CPU-time clock, clock_getcpuclockid(3)
				sum += time.Duration(ts.Nano())
			}
		}
		return sum
	}
	before := used()
	time.Sleep(interval)
	if busy := used() - before; busy > interval/4 {
		r.t.Errorf("in %v the guard was busy for %v", interval, busy)
	} else {
		r.t.Logf("in %v the guard was busy for %v", interval, busy)
	}
}

func TestGuard_LostContactKillsForkStorm(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		r := newRig(t, "storm", uid)
		r.lead(1, 1500*time.Millisecond, 1700*time.Millisecond)
		r.waitSaid("led <nil>")
		r.requireDead()
		r.tell("exit 0")
		r.waitExit(0)
	})
}

// TestGuard_SetUserID: what gains privileges can leave the job's cgroup, and a guard without
// CAP_KILL can't kill it there. So it gains none, unless the user wants it to.
func TestGuard_SetUserID(t *testing.T) {
	const user = 65534
	parent := needCgroup(t)
	outside := filepath.Join(parent, "cgroup.procs")
	for _, c := range []struct {
		name string
		env  []string
		euid int
	}{
		{"no_new_privs", nil, user},
		{"off", []string{"TEST_NEW_PRIVS=1"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := delegateCgroup(t, parent, user)
			r := newRigIn(t, dir, "sudo", user, append(c.env, "TEST_SETUID="+setuidBinary,
				"TEST_OUTSIDE="+outside)...)
			if dirs, _ := filepath.Glob(filepath.Join(dir.Name(), "leasehold-*")); len(dirs) != 1 {
				t.Fatalf("the job has no cgroup of its own: %q", dirs)
			}
			r.tell("lead 1h 2h")
			said := r.waitSaid("job escape")
			if !strings.HasPrefix(said, fmt.Sprintf("job escape as-%d ", c.euid)) {
				t.Fatalf("%q, want the user %d", said, c.euid)
			}
			r.tell("end lost")
			if c.euid == 0 { // the guard can't kill it, and the lease is held on to
				r.wait("the rest of the job is dead", func() bool { return len(r.alive) == 1 })
				pid, err := strconv.Atoi(said[strings.LastIndexByte(said, ' ')+1:])
				if err := errors.Join(err, unix.Kill(pid, unix.SIGKILL)); err != nil {
					t.Error(err)
				}
			}
			r.waitSaid("led <nil>")
			r.requireDead()
			r.tell("exit 0")
			r.waitExit(0)
		})
	}
}

// delegateCgroup makes a cgroup that belongs to a user.
func delegateCgroup(t *testing.T, parent string, uid int) *os.File {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "delegated-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
		for end := time.Now().Add(testWait); ; _, _ = unix.Poll(nil, 5) {
			if removeTree(dir); unix.Access(dir, unix.F_OK) != nil {
				return
			}
			if time.Now().After(end) {
				t.Errorf("%s can't be removed", dir)
				return
			}
		}
	})
	for _, name := range []string{"", "cgroup.procs", "cgroup.subtree_control"} {
		if err := os.Chown(filepath.Join(dir, name), uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// TestGuard_LocksMemory: with CAP_IPC_LOCK whatever the limit, without it only where there is none.
func TestGuard_LocksMemory(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old); err != nil {
		t.Fatal(err)
	}
	finite := old.Cur != unix.RLIM_INFINITY
	eachUser(t, func(t *testing.T, uid int) {
		want := !finite || uid == 0 && proctree.HasCapability(unix.CAP_IPC_LOCK)
		r := newRig(t, "plain", uid)
		r.tell("lead 1h 2h")
		r.waitJobs(1)
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.guard.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if locked := !strings.Contains(string(text), "VmLck:\t       0 kB\n"); locked != want {
			t.Errorf("memory is locked: %v, want %v; limit %d", locked, want, old.Cur)
		}
		if mine, jobs := lockLimit(t, os.Getpid()), lockLimit(t, r.pids["job"]); jobs != mine {
			t.Errorf("the job's limit is %q, want %q", jobs, mine)
		}
		r.tell("end planned")
		r.waitSaid("led <nil>")
		r.tell("exit 0")
		r.waitExit(0)
	})
}

// lockLimit is the line of /proc that tells how much memory a process may lock.
func lockLimit(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "Max locked memory") {
			return line
		}
	}
	t.Fatalf("no limit of locked memory in %s", text)
	return ""
}

// needCgroup skips where this user can't make cgroups, which CI forbids.
func needCgroup(t *testing.T) string {
	t.Helper()
	parent, err := proctree.OwnCgroup()
	if err == nil {
		err = unix.Access(parent, unix.W_OK)
	}
	if err != nil {
		if os.Getenv("E2E_NO_SKIP") != "" {
			t.Fatalf("needs root (cgroup v2): %v", err)
		}
		t.Skip("skipped: needs root (cgroup v2)")
	}
	return parent
}

// removeTree removes a cgroup and those inside it, the innermost first.
func removeTree(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeTree(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}
