//go:build linux

package proctree

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// counting starts a process in the cgroup that counts in a file, and returns what it has counted
// by now, and a pidfd of it.
func counting(t *testing.T, c *Cgroup, more string) (count func() int, pidfd int) {
	t.Helper()
	leaf, err := c.leaf()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leaf)
	file := filepath.Join(t.TempDir(), "n")
	pidfd = startIn(t, leaf, more+"n=0; while :; do n=$((n+1)); echo $n >"+file+".new; mv "+file+
		".new "+file+"; done")
	count = func() int {
		text, _ := os.ReadFile(file)
		n, _ := strconv.Atoi(string(text[:max(len(text)-1, 0)]))
		return n
	}
	until(t, "it counts", func() bool { return count() > 0 })
	return count, pidfd
}

func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(testWait); !f(); {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, testWait)
		}
		_, _ = unix.Poll(nil, 1)
	}
}

func (f *Freezer) set(t *testing.T, frozen bool) {
	t.Helper()
	if err := f.Set(frozen); err != nil {
		t.Fatal(err)
	}
}

// TestFreezer: a frozen process runs no instruction, goes on when it is thawed, and can be killed
// while it is frozen.
func TestFreezer(t *testing.T) {
	c := newTestCgroupWith(t, true)
	f, self := c.Freezer, unix.Getpid()
	count, pidfd := counting(t, c, "")
	if f.Frozen() {
		t.Error("it is frozen before anybody asked for that")
	}
	f.set(t, true)
	until(t, "it is frozen", f.Frozen)
	if f.Outside(self) != 0 {
		t.Error("something of it is outside its cgroup")
	}
	before := count()
	_, _ = unix.Poll(nil, 50)
	if now := count(); now != before {
		t.Errorf("frozen, it has counted from %d to %d", before, now)
	}
	f.set(t, false)
	until(t, "it goes on", func() bool { return count() > before })
	f.set(t, true)
	until(t, "it is frozen again", f.Frozen)
	before = count()
	if !c.waitEmpty(testWait) || !PidfdExited(pidfd) {
		t.Error("it was not killed while it was frozen")
	}
	if now := count(); now != before {
		t.Errorf("killed, it has counted from %d to %d", before, now)
	}
	f.set(t, false) // as for the next start
	counting(t, c, "")
}

// TestFreezer_Outside: a process that has left the cgroup is found, for it runs on.
func TestFreezer_Outside(t *testing.T) {
	c := newTestCgroupWith(t, true)
	parent, err := OwnCgroup()
	if err != nil {
		t.Fatal(err)
	}
	f, self := c.Freezer, unix.Getpid()
	left := filepath.Join(t.TempDir(), "pid")
	leaves := "(echo 0 >" + parent + "/cgroup.procs; sh -c 'echo $PPID' >" + left +
		"; exec sleep 1000) & "
	counting(t, c, leaves)
	var pid int
	until(t, "a process has left", func() bool {
		text, _ := os.ReadFile(left)
		pid, _ = strconv.Atoi(string(text[:max(len(text)-1, 0)]))
		return pid != 0
	})
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) })
	f.set(t, true)
	until(t, "what is in it is frozen", f.Frozen)
	if found := f.Outside(self); found != pid {
		t.Errorf("outside the cgroup, found pid %d, want %d", found, pid)
	}
	f.set(t, false)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "nothing is outside any more", func() bool { return f.Outside(self) == 0 })
}

// TestFreezer_OutsideWithoutMainThread: as a search that looks at the main thread only would not
// find it.
func TestFreezer_OutsideWithoutMainThread(t *testing.T) {
	c := newTestCgroupWith(t, true)
	parent, err := OwnCgroup()
	if err != nil {
		t.Fatal(err)
	}
	test, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := c.leaf()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leaf)
	startIn(t, leaf, "exec "+test+" leaver "+parent)
	f, self := c.Freezer, unix.Getpid()
	f.set(t, true)
	until(t, "it is found", func() bool {
		f.set(t, false) // it may not have left yet
		_, _ = unix.Poll(nil, 5)
		f.set(t, true)
		return f.Outside(self) > 0
	})
	if !f.Frozen() || c.Populated() {
		t.Error("something is in the cgroup still")
	}
}

// TestCgroup_RemovesFrozenLeftovers: what a daemon that was killed whole left frozen is killed.
func TestCgroup_RemovesFrozenLeftovers(t *testing.T) {
	parent := needCgroup(t)
	left, pidfd := newLeftover(t, parent)
	if err := os.WriteFile(filepath.Join(left, "cgroup.freeze"), []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	newTestCgroup(t)
	if !PidfdExited(pidfd) {
		t.Error("the leftover's process lives")
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("the leftover is still there: %v", err)
	}
}

// TestIsLasting: what an administrator has to change is told from what another start may find
// otherwise.
func TestIsLasting(t *testing.T) {
	_, noCgroup := findCgroup("1:name=systemd:/\n", "")
	for _, c := range []struct {
		err  error
		want bool
	}{
		{noCgroup, true},
		{fmt.Errorf("probe: %w", ErrUnavailable), true},
		{&os.PathError{Op: "open", Path: "cgroup.freeze", Err: unix.ENOENT}, true},
		{&os.PathError{Op: "mkdir", Path: "leasehold-1", Err: unix.EACCES}, true},
		{&os.PathError{Op: "mkdir", Path: "leasehold-1", Err: unix.EROFS}, true},
		{&os.PathError{Op: "mkdir", Path: "leasehold-1", Err: unix.ENOENT}, false},
		{fmt.Errorf("start a process: %w", unix.EAGAIN), false},
		{errors.New("cgroup.events does not show it frozen"), false},
	} {
		if got := IsLasting(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}
