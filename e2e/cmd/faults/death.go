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

// death finds the moment from which on no thread of a process runs in user space
// any more. The process' connection closes only when each of them has had a
// processor to end on, and its memory has been freed.
type death struct {
	found chan time.Duration // 0: it was not seen
	stop  context.CancelFunc
}

func watchDeath(ctx context.Context, pid int) *death {
	ctx, cancel := context.WithCancel(ctx)
	d := &death{make(chan time.Duration, 1), cancel}
	go func() { d.found <- deathOf(ctx, pid) }()
	return d
}

// end ends the watch, and returns what it has found by then.
func (d *death) end() time.Duration {
	d.stop()
	return <-d.found
}

// deathOf polls the threads of a process until SIGKILL has reached each of them.
// It returns 0 when ctx ends first.
func deathOf(ctx context.Context, pid int) time.Duration {
	// It must not wait for a processor among all that has just woken.
	defer harness.RealTime(1)()
	pause := unix.NsecToTimespec(200_000)
	tasks := fmt.Sprintf("/proc/%d/task", pid)
	for ctx.Err() == nil {
		_ = unix.Nanosleep(&pause, nil)
		if !killed(filepath.Join(tasks, strconv.Itoa(pid))) { // the first thread is cheap to ask
			continue
		}
		threads, err := os.ReadDir(tasks)
		if err != nil && !isGone(err) {
			continue
		}
		if !slices.ContainsFunc(threads, func(e os.DirEntry) bool {
			return !killed(filepath.Join(tasks, e.Name()))
		}) {
			return harness.Now()
		}
	}
	return 0
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
