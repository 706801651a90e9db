//go:build linux

package check

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/internal/quote"
	"leasehold/supervisor/proctree"
)

// Hook is a command that has to run at a certain moment: not to answer a question, but for what it
// does. A runner starts it, as it starts a check, and kills all that is left of it when it has
// exited, when the time is up, and when whoever asks has exited. What it prints goes where the
// daemon prints.
type Hook struct {
	Runner   []string // begins the argv of the runner, which has to call RunHook with the rest
	Argv     []string
	Env      []string
	Timeout  time.Duration
	NewPrivs bool // as in Command
}

// RunnerArgv is the argv of its runner, which kills the hook at a time since boot. 0: it does so
// after Timeout, and does not end with whoever asks.
func (h *Hook) RunnerArgv(until time.Duration) []string {
	argv := append(append([]string{}, h.Runner...), until.String())
	return append(append(argv, runOptions{h.Timeout, h.NewPrivs}.encode()...), h.Argv...)
}

// Start starts the runner, which kills the hook at a time since boot. If it comes to run only then,
// it does not run the hook. The other end of asking has to be closed when whoever asks exits.
func (h *Hook) Start(until time.Duration, asking int, more ...string) (pid int, err error) {
	return syscall.ForkExec("/proc/self/exe", h.RunnerArgv(until), &syscall.ProcAttr{
		Env:   append(append([]string{}, h.Env...), more...),
		Files: []uintptr{0, 1, 2, uintptr(asking)},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

// RunHook is the runner of a hook. Its arguments are those that Hook.RunnerArgv has appended. It
// returns the exit code of the hook, as a shell has it, when nothing of the hook is left. It must
// be called once, from the main goroutine.
func RunHook(args []string) int {
	if len(args) < 4 {
		return 64
	}
	until, err := time.ParseDuration(args[0])
	timeout, err2 := time.ParseDuration(args[1])
	if err != nil || err2 != nil {
		return 64
	}
	alone := until == 0
	if !alone {
		timeout = until - boottime.Now()
	}
	// The hook is killed when the thread that has forked it ends.
	runtime.LockOSThread()
	unix.CloseOnExec(wantedFd)
	got := report{alone: alone}
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		err = errors.Join(unix.Dup3(null, 0, 0), becomeRunner(args[2] == "new-privs"))
	}
	switch {
	case err != nil:
		got.Fault = "it can't be run: " + err.Error()
	case timeout <= 0:
		got.Fault = "its time was up before it could be run"
	default:
		got.run(args[3:], timeout, false)
	}
	switch {
	case got.Fault != "":
		fmt.Fprintln(os.Stderr, "leasehold: hook: "+quote.Line(got.Fault))
		return ExitNotRun
	case got.TimedOut:
		return exitTimedOut
	}
	return got.Code
}

// Exited is nil if a runner that has exited in this way has run its hook, and that has succeeded.
func (h *Hook) Exited(ws unix.WaitStatus) error {
	switch exit := proctree.ExitOf(ws); {
	case exit.Signal != 0:
		return fmt.Errorf("%w: the process that runs it was killed", ErrNotRun)
	case exit.Code == ExitNotRun:
		return ErrNotRun
	case exit.Code == exitTimedOut:
		return fmt.Errorf("it was killed: it has not exited within %v", h.Timeout)
	case exit.Code > 128:
		return fmt.Errorf("it was killed by signal %d", exit.Code-128)
	case exit.Code != 0:
		return fmt.Errorf("exit code %d", exit.Code)
	}
	return nil
}

// ErrNotRun means that it is not known whether the hook was run to its end: it has to be run again.
var ErrNotRun = errors.New("it could not be run")

// ExitNotRun is the exit code of a runner that could not run its hook, as env(1) has it.
const ExitNotRun = 125

// HookFailed is what the log says if the hook has failed.
const HookFailed = "LEASEHOLD_POST_STOP has failed: what it should have undone may be there still"
