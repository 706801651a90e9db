//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// watchDeath finds the moment from which on no thread of a process runs in user space any more:
// SIGKILL has reached each of them. The process' connection closes only when each has had a
// processor to end on, and its memory has been freed. It is 0 when ctx ends first.
func watchDeath(ctx context.Context, pid int) <-chan time.Duration {
	found := make(chan time.Duration, 1) // closed when the watch has ended
	go func() {
		defer close(found)
		// It must not wait for a processor among all that has just woken.
		defer harness.RealTime(1)()
		pause := unix.NsecToTimespec(200_000)
		for ctx.Err() == nil {
			_ = unix.Nanosleep(&pause, nil)
			if allKilled(pid) {
				found <- harness.Now()
				return
			}
		}
	}()
	return found
}

// allKilled asks first the first thread, which is cheap.
func allKilled(pid int) bool {
	tasks := fmt.Sprintf("/proc/%d/task", pid)
	if !killed(filepath.Join(tasks, strconv.Itoa(pid))) {
		return false
	}
	threads, err := os.ReadDir(tasks)
	if err != nil && !isGone(err) {
		return false
	}
	return !slices.ContainsFunc(threads, func(e os.DirEntry) bool {
		return !killed(filepath.Join(tasks, e.Name()))
	})
}

var pendingPattern = regexp.MustCompile(`(?m)^SigPnd:\s*([0-9a-f]+)$`)

// killed reports whether SIGKILL waits for a thread, which then never comes back to
// user space, or whether the thread has begun to exit, or is gone. See
// proc_pid_status(5) and proc_pid_stat(5); PF_EXITING is the kernel's.
func killed(dir string) bool {
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
	fields, err := harness.Stat(dir) // from the third on
	if err != nil {
		return isGone(err)
	}
	flags, err := strconv.ParseUint(fields[flagsField-3], 10, 64)
	return err == nil && flags&pfExiting != 0
}

// isGone reports whether an error of /proc says that there is no such process or
// thread any more. Any other says nothing of it.
func isGone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }
