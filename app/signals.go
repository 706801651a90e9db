//go:build linux

package app

import (
	"fmt"
	"log/slog"
	"os"
	ossignal "os/signal"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

// caught has the signals of a process that the user starts, except those that were ignored when it
// was started.
type caught struct {
	signals  chan os.Signal // SIGHUP only from relayHangUps
	hangUps  chan os.Signal
	ignored  []unix.Signal
	terminal bool // it was started with a controlling terminal
}

// catchSignals is called before anything that takes time, so that no signal ends the process before
// it can stop in order. It catches more besides the usual signals.
//
// A shell makes a command ignore signals that must not end it: nohup SIGHUP, a background shell
// SIGINT and SIGQUIT. They stay ignored. SIGTERM is caught even if it was ignored: a user must be
// able to stop a daemon.
func catchSignals(more ...os.Signal) *caught {
	c := &caught{
		signals: make(chan os.Signal, 64), hangUps: make(chan os.Signal, 64),
		terminal: hasTerminal(),
	}
	if ossignal.Ignored(unix.SIGHUP) {
		c.ignored = append(c.ignored, unix.SIGHUP)
	} else {
		ossignal.Notify(c.hangUps, unix.SIGHUP)
	}
	if ossignal.Ignored(unix.SIGINT) {
		// Go's runtime hides whether SIGQUIT was ignored. Shells ignore both or none.
		c.ignored = append(c.ignored, unix.SIGINT, unix.SIGQUIT)
		ossignal.Ignore(unix.SIGQUIT)
	} else {
		ossignal.Notify(c.signals, unix.SIGINT, unix.SIGQUIT)
	}
	more = append(more, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH)
	ossignal.Notify(c.signals, more...)
	return c
}

// ignoredByJob returns the signals that the job ignores from its start: those that we ignore,
// except its stop signal.
func (c *caught) ignoredByJob(stop unix.Signal) []unix.Signal {
	if slices.Contains(c.ignored, stop) {
		// Catch it and drop it: exec resets caught signals, but not ignored ones.
		ossignal.Notify(make(chan os.Signal, 1), stop)
	}
	return slices.DeleteFunc(slices.Clone(c.ignored), func(s unix.Signal) bool { return s == stop })
}

// relayHangUps passes each SIGHUP on. If a SIGHUP comes from a terminal that hangs up, it passes on
// SIGTERM instead. It never returns.
func (c *caught) relayHangUps(log *slog.Logger) {
	gone := false
	for s := range c.hangUps {
		if gone {
			// Kernel and shell may both send one: the second must not count as a second SIGTERM.
			continue
		}
		if gone = c.terminal && losesTerminal(); gone {
			log.Info("the terminal has hung up: stopping")
			s = unix.SIGTERM
		}
		c.signals <- s
	}
}

// losesTerminal reports whether the controlling terminal is gone, or disappears within a second:
// shells and terminal emulators send SIGHUP, and exit a moment later.
func losesTerminal() bool {
	for end := boottime.Now() + time.Second; hasTerminal(); time.Sleep(20 * time.Millisecond) {
		if boottime.Now() > end {
			return false
		}
	}
	return true
}

// hasTerminal reports whether this process has a controlling terminal. It loses the terminal when
// that hangs up, or when the leader of its Unix session exits.
func hasTerminal() bool {
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err == nil
}

func isTerminal(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}

// leaveStdin replaces standard input by /dev/null if it is a terminal and we run in its background.
// The shell's job control keeps background processes from reading the terminal. But the job calls
// setsid, and would take the shell's keystrokes.
func leaveStdin() error {
	if !isTerminal(0) {
		return nil
	}
	// An error means that it is the terminal of another Unix session.
	foreground, err := unix.IoctlGetInt(0, unix.TIOCGPGRP)
	if err == nil && foreground == unix.Getpgrp() {
		return nil
	}
	null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Dup3(null, 0, 0)
		_ = unix.Close(null)
	}
	if err != nil {
		return fmt.Errorf("%w: leave the terminal to the shell: %w", errSystem, err)
	}
	return nil
}
