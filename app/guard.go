//go:build linux

package app

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	ossignal "os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/election"
	guardproc "leasehold/supervisor/guard"
)

const flushTime = 200 * time.Millisecond

// guard is the process that the user starts. It makes the elector, and runs and kills the job.
func guard(command []string) (code int) {
	caught := catchSignals(unix.SIGALRM) // what is neither handled nor passed on is dropped
	children := make(chan os.Signal, 1)
	ossignal.Notify(children, unix.SIGCHLD)
	// A crash ends us by a signal: the runtime's exit code for it, 2, would be taken for the job's.
	debug.SetTraceback("crash")

	cfg, log, lines, err := configure("run")
	if err != nil {
		leaveMessage(terminationLog, err.Error(), false)
		return exitConfig
	}
	defer func() { lines.end(code) }()
	// What would stop us. Not before the configuration is read, whose faults are written from here: see newLogWriter.
	ossignal.Notify(caught.signals, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)
	go caught.relayHangUps(log)
	notify, told := newNotifier()
	defer told()
	if err := leaveStdin(); err != nil {
		log.Error("leave the terminal to the shell", "err", err)
		return exitOS
	}
	path, code := lookCommand(command[0], log)
	if code != 0 {
		return code
	}
	return guardproc.Run(guardproc.Config{
		Path: path, Argv: command, Env: withoutOurs(os.Environ()),
		Election: cfg.Election, Identity: cfg.Identity,
		TTL: cfg.TTL.Duration, Margin: election.NewTiming(cfg.TTL.Duration, -1, cfg.Margin.Or(-1)).Margin,
		StopSignal: cfg.StopSignal.Signal, NewPrivs: cfg.NoNewPrivs == "off",
		Elector: []string{"leasehold", roleElector},
		Probe:   []string{"leasehold", roleProbe},
		Revoke: func(lease int64, within time.Duration) []string {
			return []string{"leasehold", roleRevoke, strconv.FormatInt(lease, 16), within.String()}
		},
		Signals: caught.signals, Children: children, Ignored: caught.ignoredByJob(cfg.StopSignal.Signal),
		Notify: notify, Stopping: stopping(cfg), Turned: newWatchdog(),
		Logger: log,
	})
}

// withoutOurs drops from an environment what is the daemon's alone: its settings, secrets among them, and its line to systemd.
func withoutOurs(environ []string) []string {
	return slices.DeleteFunc(environ, func(entry string) bool {
		return strings.HasPrefix(entry, "LEASEHOLD_") || strings.HasPrefix(entry, "NOTIFY_SOCKET=") || strings.HasPrefix(entry, "WATCHDOG_")
	})
}

// lookCommand finds the job's executable as a shell would.
func lookCommand(name string, log *slog.Logger) (string, int) {
	path, err := exec.LookPath(name)
	switch {
	case err == nil || errors.Is(err, exec.ErrDot):
		return path, 0
	case errors.Is(err, os.ErrPermission), errors.Is(err, unix.EISDIR):
		log.Error(fmt.Sprintf("the command %q is not executable", name), "err", err, "exit_code", exitNotExec)
		return "", exitNotExec
	}
	log.Error(fmt.Sprintf("the command %q is not found", name), "err", err, "exit_code", exitNotFound)
	return "", exitNotFound
}
