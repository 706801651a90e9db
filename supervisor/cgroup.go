//go:build linux

package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cgroupPrefix is how the job's cgroup is named: a random part follows.
const cgroupPrefix = "leasehold-"

// cgroup is the job's own cgroup (v2). Its maker holds a lock on it while it lives, so that what a dead one left is known.
type cgroup struct {
	dir    string
	fd     int // the directory, for CLONE_INTO_CGROUP
	kill   int // cgroup.kill
	events int // cgroup.events
	buf    [256]byte
}

// newCgroup makes a cgroup below our own and proves by a probe process that a process can be started in it and killed with it.
// Whatever dead predecessors left beside it is killed and removed first.
func newCgroup(probe []string) (*cgroup, error) {
	parent, err := ownCgroup()
	if err != nil {
		return nil, err
	}
	unlock, err := lockDir(parent, time.Second)
	if err != nil {
		return nil, err
	}
	defer unlock()
	removeLeftovers(parent)

	dir, err := os.MkdirTemp(parent, cgroupPrefix)
	if err != nil {
		return nil, err
	}
	c, err := openCgroup(dir)
	if err != nil {
		_ = os.Remove(dir)
		return nil, err
	}
	if err := unix.Flock(c.fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		c.remove()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := c.probe(probe); err != nil {
		c.remove()
		return nil, err
	}
	return c, nil
}

// openCgroup opens an existing cgroup; the elector uses it for the guard's.
func openCgroup(dir string) (*cgroup, error) {
	c := &cgroup{dir: dir, fd: -1, kill: -1, events: -1}
	for _, f := range []struct {
		fd    *int
		name  string
		flags int
	}{
		{&c.fd, "", unix.O_RDONLY | unix.O_DIRECTORY},
		{&c.kill, "cgroup.kill", unix.O_WRONLY}, // Linux 5.14
		{&c.events, "cgroup.events", unix.O_RDONLY},
	} {
		fd, err := unix.Open(filepath.Join(dir, f.name), f.flags|unix.O_CLOEXEC, 0)
		if err != nil {
			c.close()
			return nil, &os.PathError{Op: "open", Path: filepath.Join(dir, f.name), Err: err}
		}
		*f.fd = fd
	}
	return c, nil
}

func (c *cgroup) close() {
	for _, fd := range []int{c.fd, c.kill, c.events} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// remove closes and removes the cgroup and those that the job made inside it. It must be empty.
func (c *cgroup) remove() {
	c.close()
	removeTree(c.dir)
}

// killAll sends SIGKILL to everything in the cgroup.
func (c *cgroup) killAll() {
	c.buf[0] = '1'
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(c.kill), uintptr(unsafe.Pointer(&c.buf[0])), 1)
}

// populated says if there is a process in the cgroup. What can't be read counts as populated, unless the cgroup is gone,
// which it can be only when it was empty.
func (c *cgroup) populated() bool {
	n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(c.events), uintptr(unsafe.Pointer(&c.buf[0])), uintptr(len(c.buf)), 0, 0, 0)
	if errno != 0 {
		return errno != unix.ENODEV
	}
	return !bytes.Contains(c.buf[:n], populatedZero)
}

var populatedZero = []byte("populated 0")

// waitEmpty waits until nothing is left in the cgroup, killing it again and again.
func (c *cgroup) waitEmpty(d time.Duration) bool {
	for end := Now() + d; ; {
		c.killAll()
		if !c.populated() {
			return true
		}
		if Now() > end {
			return false
		}
		fds := []unix.PollFd{{Fd: int32(c.events), Events: unix.POLLPRI}}
		_, _ = unix.Poll(fds, 10)
	}
}

// probe starts a process in the cgroup, kills it by the cgroup and sees it gone.
func (c *cgroup) probe(argv []string) error {
	pid, err := syscall.ForkExec("/proc/self/exe", argv, &syscall.ProcAttr{
		Env: []string{}, Files: []uintptr{},
		Sys: &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: c.fd},
	})
	if err != nil {
		return fmt.Errorf("start a process in %s: %w", c.dir, err)
	}
	empty := c.populated() && c.waitEmpty(2*time.Second)
	if !empty {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	var ws unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &ws, 0, nil); err != unix.EINTR {
			break
		}
	}
	if !empty || !ws.Signaled() || ws.Signal() != unix.SIGKILL {
		return fmt.Errorf("%s does not kill the processes in it", c.dir)
	}
	return nil
}

// ownCgroup finds the directory of this process's cgroup v2.
func ownCgroup() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	path := ""
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			path = p
		}
	}
	if path == "" || strings.HasPrefix(path, "/..") {
		return "", errors.New("this process is in no cgroup v2 that it can see")
	}
	b, err = os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		// 42 32 0:37 ROOT MOUNTPOINT options… - cgroup2 …, proc_pid_mountinfo(5)
		before, after, _ := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if !strings.HasPrefix(after, "cgroup2 ") || len(fields) < 5 {
			continue
		}
		if rel, ok := strings.CutPrefix(path, strings.TrimSuffix(fields[3], "/")); ok {
			return filepath.Join(unescapeMount(fields[4]), rel), nil
		}
	}
	return "", errors.New("no cgroup v2 is mounted")
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// lockDir locks a directory, so that nobody mistakes a cgroup that is just being made for a leftover.
func lockDir(dir string, wait time.Duration) (unlock func(), err error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	for end := Now() + wait; ; {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = unix.Close(fd) }, nil
		}
		if Now() > end {
			_ = unix.Close(fd)
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
		_, _ = unix.Poll(nil, 5)
	}
}

// removeLeftovers kills and removes the cgroups whose maker is gone: their lock can be taken.
func removeLeftovers(parent string) {
	dirs, _ := filepath.Glob(filepath.Join(parent, cgroupPrefix+"*"))
	for _, dir := range dirs {
		c, err := openCgroup(dir)
		if err != nil {
			continue
		}
		if unix.Flock(c.fd, unix.LOCK_EX|unix.LOCK_NB) == nil && c.waitEmpty(2*time.Second) {
			c.remove()
			continue
		}
		c.close()
	}
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
