//go:build linux

package proctree

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const testWait = 20 * time.Second

// endsMainThread reports whether this process is one that ends its main thread, and no other.
func endsMainThread() bool {
	return len(os.Args) == 3 && (os.Args[1] == "leaver" || os.Args[1] == "main-gone")
}

func init() {
	if endsMainThread() {
		runtime.LockOSThread() // the main goroutine, to the main thread
	}
}

// The test binary is also the probe process of NewCgroup.
func TestMain(m *testing.M) {
	if endsMainThread() {
		go withoutMainThread(os.Args[1], os.Args[2])
		_, _, _ = syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
	}
	if len(os.Args) > 1 && os.Args[1] == "probe" {
		fmt.Print("\n")
		time.Sleep(10 * time.Second)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// needCgroup skips where this user can't make cgroups, which CI forbids.
func needCgroup(t *testing.T) string {
	t.Helper()
	parent, err := OwnCgroup()
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

func newTestCgroup(t *testing.T) *Cgroup { return newTestCgroupWith(t, false) }

func newTestCgroupWith(t *testing.T, freezer bool) *Cgroup {
	t.Helper()
	needCgroup(t)
	c, err := NewCgroup([]string{"leasehold", "probe"}, freezer)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !c.waitEmpty(testWait) {
			t.Error("the cgroup is not empty")
		}
		if c.Freezer != nil {
			c.Freezer.close()
		}
		c.Remove()
	})
	return c
}

// startIn starts a shell command in the cgroup and returns a pidfd of its first process.
func startIn(t *testing.T, fd int, script string) int {
	t.Helper()
	pidfd := -1
	pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{
		Env: []string{"PATH=/usr/bin:/bin"}, Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: fd, PidFD: &pidfd},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Kill(pid, unix.SIGKILL)
		_, _ = unix.Wait4(pid, nil, 0, nil)
		_ = unix.Close(pidfd)
	})
	return pidfd
}

// TestCgroup_KillsAlone: the cgroup kills a tree of daemonized processes without the help of
// parentage.
func TestCgroup_KillsAlone(t *testing.T) {
	c := newTestCgroup(t)
	for range 3 { // each start in a leaf of its own, although the one before was killed
		leaf, err := c.leaf()
		if err != nil {
			t.Fatal(err)
		}
		marker := filepath.Join(t.TempDir(), "up")
		pidfd := startIn(t, leaf,
			"trap '' TERM; (setsid sh -c 'sleep 1000 & wait' &); touch "+marker+"; sleep 1000")
		for end := time.Now().Add(testWait); ; {
			if _, err := os.Stat(marker); err == nil {
				break
			}
			if PidfdExited(pidfd) || time.Now().After(end) {
				t.Fatal("the process did not run")
			}
			_, _ = unix.Poll(nil, 5)
		}
		if !c.Populated() {
			t.Fatal("the cgroup does not show what runs in it")
		}
		if !c.waitEmpty(testWait) {
			t.Fatal("the cgroup did not kill what runs in it")
		}
		if !PidfdExited(pidfd) {
			t.Fatal("the cgroup is empty, but its first process lives")
		}
		_ = unix.Close(leaf)
	}
}

// TestCgroup_RemovesLeftovers: what a dead guard left is killed and removed, what a living one has
// is not touched.
func TestCgroup_RemovesLeftovers(t *testing.T) {
	parent := needCgroup(t)
	living := newTestCgroup(t)
	livingLeaf, err := living.leaf()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(livingLeaf)
	alive := startIn(t, livingLeaf, "sleep 1000")

	left, dead := newLeftover(t, parent)
	newTestCgroup(t)
	if !PidfdExited(dead) {
		t.Error("the leftover's process lives")
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("the leftover is still there: %v", err)
	}
	if PidfdExited(alive) {
		t.Error("a living guard's cgroup was killed")
	}
}

// withoutMainThread goes on when the main thread has exited. As a leaver it leaves for the cgroup
// path: then the kernel moves only the other threads, and shows the old cgroup for the process.
// Otherwise it makes the file path.
func withoutMainThread(as, path string) {
	signal.Ignore(syscall.SIGTERM)
	pid := strconv.Itoa(os.Getpid())
	for {
		stat, _ := os.ReadFile("/proc/" + pid + "/task/" + pid + "/stat")
		if strings.Contains(string(stat), ") Z ") {
			break
		}
		time.Sleep(time.Millisecond)
	}
	text := ""
	if as == "leaver" {
		path, text = path+"/cgroup.procs", pid
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		panic(err)
	}
	time.Sleep(time.Minute)
	os.Exit(0)
}

// TestCgroup_MainThreadGone: a leftover whose main thread has exited, which cgroup.kill alone does
// not reach, is killed and removed.
func TestCgroup_MainThreadGone(t *testing.T) {
	parent := needCgroup(t)
	test, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	up := filepath.Join(t.TempDir(), "up")
	left, pidfd := newLeftoverOf(t, parent, "exec "+test+" main-gone "+up)
	until(t, "its main thread has exited", func() bool {
		_, err := os.Stat(up)
		return err == nil
	})
	began := time.Now()
	if err := removeLeftovers(parent); err != nil {
		t.Error(err)
	}
	t.Logf("it took %v", time.Since(began))
	if !PidfdExited(pidfd) {
		t.Error("the leftover's process lives")
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("the leftover is still there: %v", err)
	}
}

// newLeftover makes what a dead guard leaves: a cgroup that nobody has locked, and a process in it.
func newLeftover(t *testing.T, parent string) (dir string, pidfd int) {
	t.Helper()
	return newLeftoverOf(t, parent, "sleep 1000")
}

func newLeftoverOf(t *testing.T, parent, script string) (dir string, pidfd int) {
	t.Helper()
	dir = filepath.Join(parent, cgroupPrefix+"0leftover")
	inner := filepath.Join(dir, "1", "inner")
	if err := os.MkdirAll(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeTree(dir) })
	fd, err := unix.Open(inner, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return dir, startIn(t, fd, script)
}

// TestCgroup_LocksOfOthers: a lock on a directory that anybody can open keeps nobody from starting,
// and nobody else can open ours.
func TestCgroup_LocksOfOthers(t *testing.T) {
	parent := needCgroup(t)
	lock, err := os.Open(parent)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	c := newTestCgroup(t)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v to make a cgroup", took)
	}
	cmd := exec.Command("/bin/sh", "-c", `exec 9<"$1"`, "sh", c.Dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out),
		"Permission denied") {
		t.Errorf("an ordinary user opens %s: %v, %s", c.Dir, err, out)
	}
}

// TestCgroup_ManyAtOnce: guards that start at the same time each see the leftover dead, and none
// removes another's cgroup.
func TestCgroup_ManyAtOnce(t *testing.T) {
	parent := needCgroup(t)
	_, dead := newLeftover(t, parent)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				if err := removeLeftovers(parent); err != nil {
					t.Error(err)
				}
				if !PidfdExited(dead) {
					t.Error("the leftover's process lives")
				}
				c, err := makeCgroup(parent)
				if err != nil {
					t.Error(err)
					return
				}
				if err := removeLeftovers(parent); err != nil {
					t.Error(err)
				}
				if err := unix.Access(c.Dir, unix.F_OK); err != nil {
					t.Errorf("the cgroup of a living guard was removed: %v", err)
				}
				c.Remove()
			}
		})
	}
	wg.Wait()
}

// A cgroup of Linux before 5.14 has no cgroup.kill. The job then runs without one of its own: the
// error is what the log says of that, and nothing is left of the trial.
func TestCgroup_WithoutKill(t *testing.T) {
	parent := t.TempDir() // no file comes to be in what is made here
	c, err := makeCgroup(parent)
	if c != nil || !errors.Is(err, os.ErrNotExist) ||
		!strings.Contains(err.Error(), "cgroup.kill") {
		t.Errorf("%v, %v", c, err)
	}
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("left is %v, %v", left, err)
	}
}

// TestFindCgroup: a mount shows what lies below its root, and not what only begins with the same
// letters.
func TestFindCgroup(t *testing.T) {
	mount := func(root, point string) string {
		return "42 32 0:37 " + root + " " + point + " rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
	}
	const v1 = "33 32 0:30 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
	for _, row := range []struct{ path, mounts, want string }{
		{"/", v1 + mount("/", "/sys/fs/cgroup"), "/sys/fs/cgroup"},
		{"/a/b", mount("/", "/sys/fs/cgroup"), "/sys/fs/cgroup/a/b"},
		{"/foo", mount("/foo", "/sys/fs/cgroup"), "/sys/fs/cgroup"},
		{"/foo/bar", mount("/foo", "/sys/fs/cgroup"), "/sys/fs/cgroup/bar"},
		{"/foobar", mount("/foo", "/sys/fs/cgroup"), ""},
		{
			"/foobar", mount("/foo", "/mnt/foo") + mount("/", "/sys/fs/cgroup"),
			"/sys/fs/cgroup/foobar",
		},
		{"/with space/x", mount(`/with\040space`, `/mnt/a\040b`), "/mnt/a b/x"},
		{"/..", mount("/", "/sys/fs/cgroup"), ""},
		{"/../other", mount("/", "/sys/fs/cgroup"), ""},
		{"/..x", mount("/", "/sys/fs/cgroup"), "/sys/fs/cgroup/..x"},
		{"/a", v1, ""},
	} {
		got, err := findCgroup("1:pids:/x\n0::"+row.path+"\n", row.mounts)
		if got != row.want || (err == nil) != (row.want != "") {
			t.Errorf("%s in %q: %q, %v; want %q", row.path, row.mounts, got, err, row.want)
		}
	}
}

// TestProcHidden: the last mount at /proc counts, also without a source, or beside a mount point
// with white space that the kernel does not escape.
func TestProcHidden(t *testing.T) {
	proc := func(options string) string {
		return "22 28 0:21 / /proc rw,nosuid shared:12 - proc proc " + options + "\n"
	}
	for mounts, want := range map[string]string{
		"":                                 "",
		proc("rw"):                         "",
		proc("rw,gid=4,hidepid=invisible"): "hidepid=invisible",
		proc("rw,hidepid=2") + proc("rw"):  "",
		proc("rw") + proc("rw,hidepid=ptraceable"):                "hidepid=ptraceable",
		proc("rw,hidepid=0") + proc("hidepid=off"):                "",
		"22 28 0:21 / /proc rw - proc  rw,hidepid=1\n":            "hidepid=1",
		"22 28 0:21 / /\r/proc rw - proc proc hidepid=1\n":        "",
		"22 28 0:21 / /home/x\u00a0/proc rw - proc x hidepid=1\n": "",
		"22 28 0:21 / /proc":                                      "",
	} {
		if got := procHidden(mounts); got != want {
			t.Errorf("%q: %q, want %q", mounts, got, want)
		}
	}
}
