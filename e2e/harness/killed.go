//go:build linux

package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// Killed reports whether no thread of a process runs in user space any more: SIGKILL has reached
// each of them, or they have exited. It asks first the first thread, which is cheap.
func Killed(pid int) bool {
	tasks := fmt.Sprintf("/proc/%d/task", pid)
	if !threadKilled(filepath.Join(tasks, strconv.Itoa(pid))) {
		return false
	}
	threads, err := os.ReadDir(tasks)
	if err != nil && !isGone(err) {
		return false
	}
	return !slices.ContainsFunc(threads, func(e os.DirEntry) bool {
		return !threadKilled(filepath.Join(tasks, e.Name()))
	})
}

var pendingPattern = regexp.MustCompile(`(?m)^SigPnd:\s*([0-9a-f]+)$`)

// threadKilled reports whether SIGKILL waits for a thread, which then never comes back to
// user space, or whether the thread has begun to exit, or is gone. See
// proc_pid_status(5) and proc_pid_stat(5); PF_EXITING is the kernel's.
func threadKilled(dir string) bool {
	const sigkill, flagsField, pfExiting = 1 << (unix.SIGKILL - 1), 9, 0x4
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return isGone(err)
	}
	if found := pendingPattern.FindSubmatch(status); found != nil {
		pending, err := strconv.ParseUint(string(found[1]), 16, 64)
		if err == nil && pending&sigkill != 0 {
			return true
		}
	}
	fields, err := Stat(dir) // from the third on
	if err != nil {
		return isGone(err)
	}
	flags, err := strconv.ParseUint(fields[flagsField-3], 10, 64)
	return err == nil && flags&pfExiting != 0
}

// isGone reports whether an error of /proc says that there is no such process or
// thread any more. Any other says nothing of it.
func isGone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }
