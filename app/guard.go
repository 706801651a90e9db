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
	"leasehold/internal/quote"
	"leasehold/supervisor/guard"
	"leasehold/supervisor/reload"
)

// runGuard is the process that the user starts. It starts the elector and the spawner, which starts
// the job, and it kills the job.
//
//	user, systemd ── signals ──→ guard ──→ elector (runElector)
//	      ↑                       │  └───→ spawner ──→ job
//	      └──── notifier, log ────┘
func runGuard(build Build, call cli.Call) error {
	// What is neither handled nor passed on is dropped.
	caught := catchSignals(unix.SIGALRM, reload.Signal)
	children := make(chan os.Signal, 1)
	ossignal.Notify(children, unix.SIGCHLD)
	// A crash ends us by a signal: the runtime's exit code for a crash, 2, would look like the
	// job's.
	debug.SetTraceback("crash")

	environ := os.Environ()
	if err := config.LoadFile(call.EnvFile); err != nil {
		return err
	}
	cfg, err := config.Load(config.ForRun)
	if err != nil {
		return err
	}
	log := newLog(cfg)
	// The terminal stops a process by these signals. They are caught only now, because this thread
	// writes the problems of the configuration: see newLogWriter.
	ossignal.Notify(caught.signals, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)
	go caught.relayHangUps(log.Logger)
	systemd := newNotifier()
	defer systemd.flush()
	path, err := lookCommand(call.Job[0])
	if err == nil {
		err = lookChecks(cfg)
	}
	if err == nil {
		err = leaveStdin()
	}
	if err != nil {
		return log.exit(err)
	}
	preStart := ""
	if cfg.PreStart.Argv != nil {
		preStart, _ = lookCommand(cfg.PreStart.Argv[0]) // lookChecks has found it
	}
	log.start(build, cfg)
	exit, err := guard.Run(guard.Config{
		Path: path, Argv: call.Job, Env: jobEnvironment(os.Environ()),
		Election: cfg.Election, Identity: cfg.Identity,
		TTL: cfg.TTL.Duration, Margin: cfg.Timing().Margin,
		StopSignal: cfg.StopSignal.Signal, StopGrace: cfg.StopGrace.Duration,
		NewPrivs: cfg.NoNewPrivs == "off", Freeze: cfg.Freezes(),
		PreStart: cfg.PreStart.Argv, PreStartPath: preStart,
		PostStop: postStop(cfg),
		Elector:  []string{"leasehold", roleElector},
		Probe:    []string{"leasehold", roleProbe},
		Revoke: func(lease int64, within time.Duration) []string {
			return []string{"leasehold", roleRevoke, strconv.FormatInt(lease, 16), within.String()}
		},
		JobNotifies: cfg.Notify == "ready" || cfg.Watchdog.Duration > 0,
		JobWatchdog: cfg.Watchdog.Duration,
		StateDir:    cfg.StateDir,
		Listen:      bindInGuard(cfg.Listen, caught.signals),
		Reload:      reloadConfig(build, cfg, environ, call.EnvFile),
		Signals:     caught.signals, Ignored: caught.ignoredByJob(cfg.StopSignal.Signal),
		Children: children,
		Notify:   systemd.notify, Stopping: stopping(cfg), Heartbeat: newWatchdog(),
		Logger: log.Logger,
	})
	switch {
	case err == nil:
		err = &electorExit{exit}
	case errors.Is(err, errListen):
		systemd.notify("STATUS=" + quote.Printable("exiting: "+err.Error()))
	case errors.Is(err, errPlannedStop):
		err = nil
	}
	return log.exit(err)
}

// jobEnvironment drops what is only for the daemon from an environment: its settings, secrets
// included, and its socket to systemd. The job keeps what `leasehold status` and `leasehold check`
// need.
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
