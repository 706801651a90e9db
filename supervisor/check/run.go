//go:build linux

package check

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/proctree"
)

// runOptions are what a runner is told before the command.
type runOptions struct {
	timeout  time.Duration
	newPrivs bool
}

func (o runOptions) encode() []string {
	newPrivs := "no-new-privs"
	if o.newPrivs {
		newPrivs = "new-privs"
	}
	return []string{o.timeout.String(), newPrivs}
}

// exitTimedOut is the exit code of a hook that was killed because its time was up, as timeout(1)
// has it.
const exitTimedOut = 124

// The runner's descriptors.
const (
	reportFd = 1
	wantedFd = 3 // shows the end of the process that asks, or that it does not want an answer
)

// Run is the runner. Its arguments are those that Command.Probe has appended. It returns an exit
// code when nothing of the check is left, and must be called once, from the main goroutine.
func Run(args []string) int {
	if len(args) < 3 {
		return 64
	}
	timeout, err := time.ParseDuration(args[0])
	if err != nil {
		return 64
	}
	// The command is killed when the thread that has forked it ends.
	runtime.LockOSThread()
	unix.CloseOnExec(wantedFd)
	var got report
	if err := becomeRunner(args[1] == "new-privs"); err != nil {
		got.Fault = err.Error()
	} else if wanted := got.run(args[2:], timeout, true); !wanted {
		return 0
	}
	text, err := json.Marshal(got)
	if err == nil {
		_, err = unix.Write(reportFd, text) // the pipe has room for it
	}
	if err != nil {
		return 70
	}
	return 0
}

// becomeRunner keeps all that descends from this process below it, and killable.
func becomeRunner(newPrivs bool) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	if newPrivs || proctree.HasCapability(unix.CAP_KILL) {
		return nil
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// run runs the command, and kills all that is left of it. It reports whether somebody still wants
// the result. It keeps the end of what the command prints; or that goes where it always goes.
func (r *report) run(argv []string, timeout time.Duration, keep bool) (wanted bool) {
	path, err := exec.LookPath(argv[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		r.Fault = "it can't be run: " + err.Error()
		return true
	}
	files, pipe := []uintptr{0, 1, 2}, [2]int{-1, -1}
	if keep {
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			r.Fault = "it can't be run: " + err.Error()
			return true
		}
		_ = unix.SetNonblock(pipe[0], true)
		files[1], files[2] = uintptr(pipe[1]), uintptr(pipe[1])
	}
	deadline := boottime.Now() + timeout
	pidfd := -1
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{
		Env: os.Environ(), Files: files,
		Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, PidFD: &pidfd},
	})
	_ = unix.Close(pipe[1])
	if err != nil {
		r.Fault = "it can't be run: " + err.Error()
		return true
	}
	o := output{fd: pipe[0], open: keep}
	wanted = true
	for {
		left := deadline - boottime.Now()
		if left <= 0 {
			r.TimedOut = true
			break
		}
		fds := []unix.PollFd{
			{Fd: int32(pidfd), Events: unix.POLLIN},
			{Fd: wantedFd, Events: unix.POLLIN},
			{Fd: int32(o.fd), Events: unix.POLLIN},
		}
		if r.alone {
			fds[1].Fd = -1
		}
		if !o.open {
			fds[2].Fd = -1
		}
		// Nobody writes to wantedFd, so it shows its end only.
		_, _ = unix.Poll(fds, int(min(left, time.Minute).Milliseconds())+1)
		if fds[1].Revents != 0 {
			wanted = false
			break
		}
		o.read()
		if fds[0].Revents != 0 {
			break
		}
	}
	status := killAll(pid)
	o.read()
	if !r.TimedOut {
		exit := proctree.ExitOf(status)
		r.Code, r.Signal = exit.Code, exit.Signal
	}
	r.Output = o.text()
	return wanted
}

// killAll kills all that descends from this process, until nothing is left. It returns how pid has
// exited, which is a child.
func killAll(pid int) (status unix.WaitStatus) {
	var procs *proctree.Scanner
	pause := 100 * time.Microsecond
	for round := 0; ; round++ {
		for {
			var ws unix.WaitStatus
			got, err := unix.Wait4(-1, &ws, unix.WNOHANG|unix.WALL, nil)
			switch {
			case err == unix.EINTR:
				continue
			case err == unix.ECHILD:
				return status
			case got == pid:
				status = ws
			}
			if got <= 0 {
				break
			}
		}
		if procs == nil {
			var err error
			if procs, err = proctree.NewScanner(); err != nil {
				_ = unix.Kill(-pid, unix.SIGKILL) // without /proc only its group can be found
				time.Sleep(10 * time.Millisecond)
				continue
			}
		}
		procs.KillListed(procs.Self)
		if round > 3 { // what forks faster than the lists can be read
			procs.KillDescendants(procs.Self)
		}
		time.Sleep(pause)
		pause = min(pause*5/4, time.Second) // it may be in uninterruptible sleep for hours
	}
}

// output keeps the end of what a check prints.
type output struct {
	fd   int
	open bool
	buf  [64 << 10]byte
	kept []byte
}

// read takes what has come by now, and at most a megabyte of it: a check may print without end.
func (o *output) read() {
	for range 16 {
		if !o.open {
			return
		}
		n, err := unix.Read(o.fd, o.buf[:])
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return
		case err != nil || n == 0:
			o.open = false
		default:
			o.kept = append(o.kept, o.buf[:n]...)
			if cut := len(o.kept) - maxOutput; cut > 0 {
				o.kept = slices.Delete(o.kept, 0, cut)
			}
		}
	}
}

// text is one line of valid UTF-8.
func (o *output) text() string {
	text := strings.ToValidUTF8(string(bytes.TrimSpace(o.kept)), "\uFFFD")
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool {
		return r == '\n' || r == '\r'
	}), " | ")
}
