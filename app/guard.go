//go:build linux

package app

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	ossignal "os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/cli"
	"leasehold/config"
	"leasehold/supervisor/guard"
)

// runGuard is the process that the user starts. It makes the elector, and runs and kills the job.
//
//	user, systemd ── signals ──→ guard ──→ elector (runElector)
//	      ↑                       │  └───→ job
//	      └──── notifier, log ────┘
func runGuard(build Build, call cli.Call) error {
	caught := catchSignals(unix.SIGALRM) // what is neither handled nor passed on is dropped
	children := make(chan os.Signal, 1)
	ossignal.Notify(children, unix.SIGCHLD)
	// A crash ends us by a signal: the runtime's exit code for it, 2, would be taken for the job's.
	debug.SetTraceback("crash")

	if err := config.LoadFile(call.EnvFile); err != nil {
		return err
	}
	cfg, err := config.Load(config.ForRun)
	if err != nil {
		return err
	}
	log := newLog(cfg)
	// What would stop us. Not before the configuration is read, whose faults are written from here:
	// see newLogWriter.
	ossignal.Notify(caught.signals, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)
	go caught.relayHangUps(log.Logger)
	systemd := newNotifier()
	defer systemd.flush()
	path, err := lookCommand(call.Job[0])
	if err == nil {
		err = leaveStdin()
	}
	if err != nil {
		return log.exit(err)
	}
	log.start(build, cfg)
	exit, err := guard.Run(guard.Config{
		Path: path, Argv: call.Job, Env: jobEnvironment(os.Environ()),
		Election: cfg.Election, Identity: cfg.Identity,
		TTL: cfg.TTL.Duration, Margin: cfg.Timing().Margin,
		StopSignal: cfg.StopSignal.Signal, NewPrivs: cfg.NoNewPrivs == "off",
		Elector: []string{"leasehold", roleElector},
		Probe:   []string{"leasehold", roleProbe},
		Revoke: func(lease int64, within time.Duration) []string {
			return []string{"leasehold", roleRevoke, strconv.FormatInt(lease, 16), within.String()}
		},
		Signals: caught.signals, Ignored: caught.ignoredByJob(cfg.StopSignal.Signal),
		Children: children,
		Notify:   systemd.notify, Stopping: stopping(cfg), Heartbeat: newWatchdog(),
		Logger: log.Logger,
	})
	if err == nil {
		err = &electorExit{exit}
	}
	return log.exit(err)
}

// jobEnvironment drops from an environment what is the daemon's alone: its settings, secrets among
// them, and its line to systemd. The job keeps what `leasehold status` and `leasehold check` need
// beside the variables of its term.
func jobEnvironment(environ []string) []string {
	return slices.DeleteFunc(environ, func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		if setting, ours := strings.CutPrefix(name, config.Prefix+"_"); ours {
			return setting != "ENDPOINTS" && setting != "LISTEN" &&
				!strings.HasPrefix(setting, "TLS_")
		}
		return name == "NOTIFY_SOCKET" || strings.HasPrefix(name, "WATCHDOG_")
	})
}

// lookCommand finds the job's executable as a shell would.
func lookCommand(name string) (string, error) {
	path, err := exec.LookPath(name)
	switch {
	case err == nil || errors.Is(err, exec.ErrDot):
		return path, nil
	case errors.Is(err, os.ErrPermission), errors.Is(err, unix.EISDIR):
		return "", fmt.Errorf("the command %q %w: %w", name, errNotExecutable, err)
	}
	return "", fmt.Errorf("the command %q %w: %w", name, errNotFound, err)
}
