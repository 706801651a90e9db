//go:build linux

// Package app is the daemon: it wires what the other packages are into the processes guard and
// elector, and into `leasehold elect`. Signals, the log, systemd and the exit codes are here.
package app

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/cli"
	"leasehold/config"
)

// Build says what was built.
type Build struct{ Version, Commit, Date string }

// Roles that leasehold gives to its own processes. Users have no use for them.
const (
	roleElector = "elector"
	roleRevoke  = "revoke"
	roleProbe   = "probe"
)

// Main runs leasehold and returns its exit code.
func Main(args []string, build Build) int {
	closeOnExec()
	if len(args) > 0 {
		switch name, rest := args[0], args[1:]; {
		case name == roleElector && len(rest) >= 2:
			return runElector(build, rest)
		case name == roleRevoke && len(rest) == 2:
			return revoke(rest)
		case name == roleProbe:
			fmt.Print("\n")
			time.Sleep(10 * time.Second) // until the guard kills it
			return exitOK
		}
	}
	call, err := newProgram(build).Parse(args)
	if name := call.Command.Name; err == nil && name != "run" && name != "elect" {
		err = config.LoadFile(call.EnvFile) // the daemons first catch signals
	}
	if err == nil {
		err = call.Command.Run(call)
	}
	return report(call.Command.Name, err)
}

// newProgram makes the command line.
func newProgram(build Build) *cli.Program {
	return &cli.Program{
		Version: build.Version, Built: fmt.Sprintf("commit %s, %s", build.Commit, build.Date),
		Stdout: os.Stdout, Stderr: os.Stderr,
		Run:       func(c cli.Call) error { return runGuard(build, c) },
		Elect:     func(c cli.Call) error { return runElect(build, c) },
		ExitCodes: exitEntries(), LastWords: lastWords,
	}
}

// report says on standard error why the command ended, and where Kubernetes shows it, and returns
// the exit code. The commands that a probe runs have no say in the latter: the container's last
// words are those of the process that it was started for.
func report(command string, err error) int {
	var logged *loggedError
	if errors.As(err, &logged) {
		return logged.code
	}
	end := endingOf(err)
	if end.code == exitOK || end.code == exitNo {
		return end.code
	}
	text := err.Error()
	if wrong := (*config.Error)(nil); !errors.As(err, &wrong) {
		text = "leasehold: " + text
	}
	text = strings.TrimRight(text, "\n") + "\n"
	fmt.Fprint(os.Stderr, text)
	if command != "status" && command != "check" {
		leaveMessage(terminationLog, text, false)
	}
	return end.code
}

// closeOnExec sees to it that no descriptor but the standard streams is ever inherited, also those
// that came to us by accident.
func closeOnExec() {
	if unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	// Linux before 5.11
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
}

// hideMemory keeps this process's memory, which holds secrets, from other processes of its user.
// Guard and elector do it themselves.
func hideMemory() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }
