//go:build linux

// Package app is the daemon. It connects the other packages to make the processes guard and
// elector, and `leasehold elect`. Signals, the log, systemd and the exit codes are here.
package app

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/cli"
	"leasehold/config"
	"leasehold/internal/quote"
	"leasehold/supervisor/check"
)

// Build identifies the binary.
type Build struct{ Version, Commit, Date string }

// Roles of the processes that leasehold starts itself. They are not for users.
const (
	roleElector = "elector"
	roleRevoke  = "revoke"
	roleProbe   = "probe"
	roleCheck   = "run-check"
	roleHook    = "run-hook"
	// roleCheckReload is what the guard of an older binary runs, so its name stays.
	roleCheckReload = "check-reload"
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
		case name == roleCheckReload && len(rest) > 0:
			return checkReload(build, rest)
		case name == roleCheck:
			nameProcess("check")
			return check.Run(rest)
		case name == roleHook:
			nameProcess("hook")
			return check.RunHook(rest)
		case name == roleProbe:
			fmt.Print("\n")
			time.Sleep(10 * time.Second) // until the guard kills it
			return exitOK
		}
	}
	call, err := newProgram(build).Parse(args)
	if name := call.Command.Name; err == nil && name != "run" && name != "elect" {
		err = config.LoadFile(call.EnvFile) // run and elect do it after they have caught signals
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
		Reload:    askReload,
		ExitCodes: exitEntries(), LastWords: lastWords,
	}
}

// report writes why the command ended to standard error and to the file that Kubernetes shows, and
// returns the exit code. The other commands, which somebody runs beside the daemon, do not write to
// that file: it is for the process that the container was started for.
func report(command string, err error) int {
	var logged *loggedError
	if errors.As(err, &logged) {
		return logged.code
	}
	end := endingOf(err)
	speaks := command == "status" || command == "check" // they have printed the answer
	if end.code == exitOK || end.code == exitNo && speaks {
		return end.code
	}
	text := err.Error()
	if wrong := (*config.Error)(nil); !errors.As(err, &wrong) {
		text = "leasehold: " + text
	}
	text = printable(text)
	fmt.Fprint(os.Stderr, text)
	if slices.Contains([]string{"", "run", "elect", "install"}, command) {
		leaveMessage(terminationLog, text, false)
	}
	return end.code
}

// printable makes lines of text that can be shown in a terminal, with a newline at the end. An
// error may have the name of a file in it, or what somebody has answered.
func printable(text string) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	for i, line := range lines {
		lines[i] = quote.Printable(line)
	}
	return strings.Join(lines, "\n") + "\n"
}

// closeOnExec keeps every descriptor except the standard streams from our children, also those that
// we inherited by accident.
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

// nameProcess gives a process that the guard has started a name in ps and pgrep. By itself it has
// that of the descriptor by which its binary was executed. To set it, /proc has to show the process
// as its user's: call it before hideMemory.
func nameProcess(role string) {
	_ = os.WriteFile("/proc/self/comm", []byte("leasehold-"+role), 0) // for people alone
}

// hideMemory keeps this process's memory, which holds secrets, from other processes of its user.
// Guard and elector do it themselves.
func hideMemory() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }
