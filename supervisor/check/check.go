//go:build linux

// Package check runs commands that answer a question by their exit code: is the job healthy, is
// this machine fit to lead?
//
// The process that asks starts a runner for each check, another process of the same binary. The
// runner starts the command, and is a child subreaper. So all that descends from the command also
// descends from the runner, until the runner has killed it. It kills it when the command has
// exited, when the time is up, and when the process that asks has exited or does not want the
// answer any more. It exits when wait4(2) shows that nothing is left.
//
// Not promised: if the runner itself is killed, the command is killed too, but not what it has
// forked. A process in uninterruptible sleep exits when that ends. The runner waits for it, and no
// other check of the same kind begins meanwhile.
package check

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/quote"
)

// A Probe makes one check. It returns nil if the check passes, or why not. When ctx ends, it
// returns soon, and what it returns means nothing.
type Probe func(ctx context.Context) error

// Command is a check that a command makes.
type Command struct {
	// Runner begins the argv of the runner, which is this binary. It has to call Run with the rest.
	Runner  []string
	Argv    []string // of the command; the first is looked for in the PATH of Env
	Env     []string
	Timeout time.Duration
	// NewPrivs lets the command gain privileges also if the runner then can't kill it.
	NewPrivs bool

	running, stuck atomic.Bool
}

// killTimeout is how long a runner may take to kill what it has started, and to report.
const killTimeout = 2 * time.Second

// cancelTimeout is how long a Probe that is cancelled waits for that.
const cancelTimeout = 100 * time.Millisecond

// ErrNoResult means that the check could not be made: that says nothing about what it checks.
var ErrNoResult = errors.New("the check could not be made")

// ErrStuck means that the check before this one has not exited, although it was killed.
var ErrStuck = errors.New("the check before it was killed, and has not exited")

// Probe implements Probe. One check of a command runs at a time.
func (c *Command) Probe(ctx context.Context) error {
	if !c.running.CompareAndSwap(false, true) {
		if c.stuck.Load() {
			return ErrStuck
		}
		return fmt.Errorf("%w: one that was cancelled is not over", ErrNoResult)
	}
	r, err := newRunner()
	if err != nil {
		c.running.Store(false)
		return fmt.Errorf("%w: %w", ErrNoResult, err)
	}
	defer r.cancel()
	reported := make(chan report, 1)
	go func() { // until the runner has exited, however long that takes, or an exec that hangs
		got := r.run(c)
		c.stuck.Store(false)
		c.running.Store(false) // before the result is seen: the next one may follow at once
		reported <- got
	}()
	timer := time.NewTimer(c.Timeout + killTimeout)
	defer timer.Stop()
	select {
	case got := <-reported:
		return got.err(c.Timeout)
	case <-timer.C:
		c.stuck.Store(true)
		return ErrStuck
	case <-ctx.Done():
	}
	r.cancel()
	timer.Reset(cancelTimeout)
	select {
	case <-reported:
	case <-timer.C:
	}
	return ctx.Err()
}

// runner is a runner and its pipes.
type runner struct {
	report, reportW *os.File // what it writes when it is done; nobody else has the other end
	wanted, wantedR *os.File // it ends when this is closed
}

func newRunner() (*runner, error) {
	r := &runner{}
	var err error
	if r.report, r.reportW, err = os.Pipe(); err != nil {
		return nil, err
	}
	if r.wantedR, r.wanted, err = os.Pipe(); err != nil {
		return nil, errors.Join(err, r.report.Close(), r.reportW.Close())
	}
	return r, nil
}

// run starts the runner, and returns its report when it has exited.
func (r *runner) run(c *Command) report {
	defer func() { _ = r.report.Close() }()
	pid, err := r.start(c)
	_ = errors.Join(r.reportW.Close(), r.wantedR.Close())
	if err != nil {
		return report{Lost: "it can't be started: " + err.Error()}
	}
	return r.wait(pid)
}

func (r *runner) start(c *Command) (pid int, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = null.Close() }()
	argv := append(append([]string{}, c.Runner...), runOptions{c.Timeout, c.NewPrivs}.encode()...)
	// Not os/exec: its Wait holds a thread, and the runtime would end this process if it needed
	// another one while the job has used up the limit of processes.
	return fork("/proc/self/exe", append(argv, c.Argv...), &syscall.ProcAttr{
		Env:   c.Env,
		Files: []uintptr{null.Fd(), r.reportW.Fd(), 2, r.wantedR.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

// forking is held while a process is being started: the garbage collector is the whole process'.
var forking sync.Mutex

// maxGarbage is how much memory this process may use before it collects garbage nevertheless. A
// container may have little.
const maxGarbage = 32 << 20

// fork starts a process. If the file is on a mount that hangs, so does the exec, and the thread
// that waits for it does nothing for the runtime meanwhile: a garbage collection would wait for it,
// and all other goroutines would wait for the collection. So there is none before the exec has
// returned, or before memory is short: then this process hangs, and the guard replaces it.
func fork(path string, argv []string, attr *syscall.ProcAttr) (pid int, err error) {
	forking.Lock()
	defer forking.Unlock()
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(min(debug.SetMemoryLimit(-1), maxGarbage)))
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	return syscall.ForkExec(path, argv, attr)
}

// cancel has the runner kill what it has started. It may be called more than once.
func (r *runner) cancel() { _ = r.wanted.Close() }

// wait returns the report when the runner has exited.
func (r *runner) wait(pid int) (got report) {
	text, err := io.ReadAll(io.LimitReader(r.report, maxReport))
	if err == nil {
		err = json.Unmarshal(text, &got)
	}
	if err != nil {
		got = report{Lost: "the process that runs it was killed"}
	}
	for { // it exits at this moment, or has exited
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			return got
		}
	}
}

// report is what a runner writes when nothing of the check is left.
type report struct {
	Lost     string // why the runner has left no report; "": it has
	Fault    string // why it was not run; "": it was
	Code     int
	Signal   int
	TimedOut bool
	Output   string // the end of it

	alone bool // nobody asks: it is wanted, whoever exits
}

const (
	maxOutput = 200 // of the check's output, in bytes
	maxReport = 16 << 10
)

// err is nil if the check has passed, or says why not. It can be shown in a terminal.
func (r report) err(timeout time.Duration) error {
	var why string
	switch {
	case r.Lost != "":
		return fmt.Errorf("%w: %s", ErrNoResult, r.Lost)
	case r.Fault != "":
		why = r.Fault
	case r.TimedOut:
		why = fmt.Sprintf("no result within %v", timeout)
	case r.Signal != 0:
		why = fmt.Sprintf("killed by signal %d", r.Signal)
	case r.Code != 0:
		why = fmt.Sprintf("exit code %d", r.Code)
	default:
		return nil
	}
	if r.Output != "" {
		why += ": " + r.Output
	}
	return errors.New(quote.Line(why))
}
