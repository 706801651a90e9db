//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// jobRows are jobs that don't end as they should, at a planned stop and when
// the guard itself is killed.
var jobRows = slices.Concat(
	unruly("ignore-term", "ignores SIGTERM", true, "ignore-term"),
	unruly("daemonize", "has forked twice and called setsid (daemonized)", false, "daemonize"),
	unruly("storm", "is a storm of forks, ten at a time", false, "fork-bomb=10"),
	unruly("setsid-child", "leaves a child in a session of its own, which ignores SIGTERM", false, "setsid"),
	[]Row{{
		Name: "gigabytes", Group: "job", About: "the job has 4 GB of memory to free; the road to etcd goes dark",
		Job: []string{fmt.Sprintf("memory=%d", gigabytes)}, Alone: AllAlone,
		Prepare: waitForMemory, Strike: watchingDeath(dark), After: deathOfThreads,
	}, {
		Name: "orphans", Group: "job", About: "the job has thousands of orphans and three fork loops; etcd is unreachable and the deadline passes",
		Job: []string{fmt.Sprintf("orphans=%d", orphans), "fork-bomb=3"}, Ours: true, Alone: AllAlone, CI: true,
		Prepare: waitForOrphans, Strike: watchingDeath(dark), After: func(ctx context.Context, t *Trial) error {
			return errors.Join(deathOfThreads(ctx, t), timerLatency(ctx, t))
		},
	}},
)

// unruly are the two rows of a job. Where a stop is not obeyed, its grace of
// half a second is part of the figure.
func unruly(name, does string, grace bool, word string) []Row {
	stopped := "planned stop"
	if grace {
		stopped += ", grace 0.5 s"
	}
	return []Row{
		{Name: name + "-stop", Group: "job", About: fmt.Sprintf("the job %s; %s", does, stopped),
			Job: []string{word}, Alone: OursAlone, Prepare: waitForRoles, Strike: stop},
		{Name: name + "-killed", Group: "job", About: fmt.Sprintf("the job %s; the guard is killed", does),
			Job: []string{word}, Alone: OursAlone, CI: word == "fork-bomb=10", User: true,
			Prepare: waitForRoles, Strike: guardGets(syscall.SIGKILL)},
	}
}

// waitForRoles waits until the job has the descendants that it is to have.
func waitForRoles(ctx context.Context, t *Trial) error {
	role := map[string]string{"daemonize": "daemon", "setsid": "setsid"}[t.Row.Job[0]]
	if role == "" {
		return nil
	}
	return within(ctx, patience, "no process in the role "+role, func(ctx context.Context) error {
		return t.Witness.Wait(ctx, func(lives []harness.Life) bool {
			return slices.ContainsFunc(lives, func(l harness.Life) bool { return l.Role == role })
		})
	})
}

const orphans = 4000

// waitForOrphans waits until the orphans are there.
func waitForOrphans(ctx context.Context, t *Trial) error {
	return within(ctx, 3*patience, "the job has too few orphans", func(ctx context.Context) error {
		return harness.Until(ctx, func() error {
			spawner, err := t.Leader.Spawner()
			if err != nil {
				return err
			}
			if n := len(harness.Children(spawner)); n < orphans {
				return fmt.Errorf("%d orphans", n)
			}
			return nil
		})
	})
}

var latencyPattern = regexp.MustCompile(`guard_lateness=(\S+)`)

// timerLatency reads from the leader's log how late the guard served a deadline.
// It says so when all orphans have been reaped.
func timerLatency(ctx context.Context, t *Trial) error {
	return within(ctx, 3*patience, "the leader's log tells of no timer latency", func(ctx context.Context) error {
		return harness.Until(ctx, func() error {
			found := latencyPattern.FindStringSubmatch(t.Leader.Log())
			if found == nil {
				return errors.New("not yet")
			}
			latency, err := time.ParseDuration(found[1])
			t.Figure("timer latency", latency)
			return err
		})
	})
}

const gigabytes = 4

// waitForMemory waits until the job has touched all its memory.
func waitForMemory(ctx context.Context, t *Trial) error {
	return within(ctx, 3*patience, "the job's memory is not touched", func(ctx context.Context) error {
		return harness.Until(ctx, func() error {
			statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", t.Job.Pid))
			if err != nil {
				return err
			}
			resident, err := strconv.Atoi(strings.Fields(string(statm))[1])
			if err == nil && resident*os.Getpagesize() < gigabytes<<30 {
				err = fmt.Errorf("%d MiB are touched", resident*os.Getpagesize()>>20)
			}
			return err
		})
	})
}

// watchingDeath strikes and watches for the moment from which on no thread of
// the job runs in user space any more. Its connection closes only when each of
// them has had a processor to end on, and its memory has been freed.
func watchingDeath(strike func(context.Context, *Trial) error) func(context.Context, *Trial) error {
	return func(ctx context.Context, t *Trial) error {
		watchDeath(ctx, t)
		return strike(ctx, t)
	}
}

func watchDeath(ctx context.Context, t *Trial) {
	found := make(chan time.Duration, 1)
	ctx, cancel := context.WithCancel(ctx)
	pid := t.Job.Pid
	go func() { found <- deathOf(ctx, pid) }()
	t.Notes["death"] = found
	t.cleanup(func() {
		cancel()
		if _, waits := t.Notes["death"]; waits {
			<-found
		}
	})
}

// deathOf polls the threads of a process until SIGKILL has reached each of
// them. It returns 0 when ctx ends first.
func deathOf(ctx context.Context, pid int) time.Duration {
	// It must not wait for a processor among all that has just woken. The thread
	// must not end with the goroutine: with it would die what it has started, by
	// the signal that a process gets at its parent thread's death.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fifo := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: 1}
	_ = unix.SchedSetAttr(0, &fifo, 0) // where it is not permitted the figure is the worse for it
	defer func() {
		_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}, 0)
	}()
	pause := unix.NsecToTimespec(200_000)
	for ctx.Err() == nil {
		_ = unix.Nanosleep(&pause, nil)
		if !killed(fmt.Sprintf("/proc/%d/task/%d", pid, pid)) { // the first thread is the cheapest to ask
			continue
		}
		tasks := fmt.Sprintf("/proc/%d/task", pid)
		threads, err := os.ReadDir(tasks)
		if err != nil && !isGone(err) {
			continue
		}
		if !slices.ContainsFunc(threads, func(e os.DirEntry) bool { return !killed(filepath.Join(tasks, e.Name())) }) {
			return harness.Now()
		}
	}
	return 0
}

var pendingPattern = regexp.MustCompile(`(?m)^SigPnd:\s*([0-9a-f]+)$`)

// killed tells if SIGKILL waits for a thread, which then never comes back to
// user space, or if the thread has begun to exit, or is gone. See
// proc_pid_status(5) and proc_pid_stat(5); PF_EXITING is the kernel's.
func killed(dir string) bool {
	const sigkill, flagsField, pfExiting = 1 << (unix.SIGKILL - 1), 9, 0x4
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return isGone(err)
	}
	if found := pendingPattern.FindSubmatch(status); found != nil {
		if pending, err := strconv.ParseUint(string(found[1]), 16, 64); err == nil && pending&sigkill != 0 {
			return true
		}
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return isGone(err)
	}
	// The name, in parentheses, may hold anything; the third field follows.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	flags, err := strconv.ParseUint(fields[flagsField-3], 10, 64)
	return err == nil && flags&pfExiting != 0
}

// isGone tells if an error of /proc says that there is no such process or
// thread any more. Any other says nothing of it.
func isGone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }

// deathOfThreads takes for the old job's death the moment that deathOf found.
func deathOfThreads(_ context.Context, t *Trial) error {
	found, _ := t.Notes["death"].(chan time.Duration)
	closed := t.dead()
	if closed == 0 { // it lives on, and that is the outcome
		return nil
	}
	delete(t.Notes, "death")
	// What is seen every 200 µs may have been there before the connection closed.
	if t.Killed = min(<-found, closed); t.Killed == 0 {
		return errors.New("SIGKILL was not seen at the job's threads")
	}
	t.Figure(t.Row.closing(), closed-t.Killed)
	return nil
}

// closing is what the figure is called of the time from SIGKILL at the job's
// threads to the end of its connection.
func (r *Row) closing() string {
	if len(r.Job) > 0 && strings.HasPrefix(r.Job[0], "memory=") {
		return "memory freed after"
	}
	return "its connection closed after"
}
