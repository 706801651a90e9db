//go:build linux

// Package app is the daemon: it wires what the other packages are into the processes guard and elector,
// and into the commands that only ask.
package app

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
)

// Build says what was built.
type Build struct{ Version, Commit, Date string }

var build Build

// Roles that leasehold gives to its own processes. Users have no use for them.
const (
	roleElector = "elector"
	roleRevoke  = "revoke"
	roleProbe   = "probe"
)

// Main runs leasehold and returns its exit code.
func Main(args []string, b Build) int {
	build = b
	closeOnExec()
	if len(args) == 0 {
		return wrongUsage(args)
	}
	switch name, rest := args[0], args[1:]; {
	case name == "--" && len(rest) > 0:
		return guard(rest)
	case name == "run" && len(rest) > 1 && rest[0] == "--":
		return guard(rest[1:])
	case name == "elect" && len(rest) == 0:
		return elect()
	case name == "status" && (len(rest) == 0 || len(rest) == 1 && rest[0] == "--json"):
		return status(len(rest) == 1)
	case name == "check" && (len(rest) == 0 || len(rest) == 1 && slices.Contains(health.Checks(), rest[0])):
		return check(rest)
	case name == "install" && len(rest) == 1 && rest[0] != "" && rest[0][0] != '-':
		return install(rest[0])
	case name == "version" && len(rest) == 0:
		fmt.Printf("leasehold %s (commit %s, %s)\n", build.Version, build.Commit, build.Date)
		return 0
	case (name == "help" || name == "-h" || name == "--help") && len(rest) == 0:
		fmt.Print(help())
		return 0
	case name == roleElector && len(rest) >= 2:
		return elector(rest)
	case name == roleRevoke && len(rest) == 2:
		return revoke(rest)
	case name == roleProbe:
		fmt.Print("\n")
		time.Sleep(10 * time.Second) // until the guard kills it
		return 0
	}
	return wrongUsage(args)
}

// wrongUsage tells the user what is wrong, on standard error, and where Kubernetes shows it. The subcommands that a probe runs
// have no say there: the container's last words are those of the process that it was started for.
func wrongUsage(args []string) int {
	hint := usageHint(args)
	fmt.Fprint(os.Stderr, hint)
	if len(args) == 0 || args[0] != "status" && args[0] != "check" {
		leaveMessage(terminationLog, hint, false)
	}
	return exitUsage
}

// closeOnExec sees to it that no descriptor but the standard streams is ever inherited, also those that came to us by accident.
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

// configure reads the configuration of a subcommand and makes the logger. It tells what is wrong.
func configure(subcommand string) (config.Config, *slog.Logger, *logWriter, error) {
	cfg, err := config.Load(subcommand, os.Environ())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return config.Config{}, nil, nil, err
	}
	log, lines := newLogger(cfg.Log)
	return cfg, log, lines, nil
}

// status prints the election as etcd has it.
func status(asJSON bool) int {
	cfg, log, lines, err := configure("status")
	if err != nil {
		return exitConfig
	}
	defer lines.Flush(flushTime)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	report, err := election.Query(ctx, electionConfig(cfg, log))
	if err != nil {
		fmt.Fprintf(os.Stderr, "etcd does not answer: %v\n", err)
		return exitUnavailable
	}
	if asJSON {
		err = json.NewEncoder(os.Stdout).Encode(reportJSON(cfg.Election, report))
	} else {
		_, err = io.WriteString(os.Stdout, reportText(cfg.Election, report))
	}
	if err != nil {
		return exitInternal
	}
	if report.Leader == nil {
		return 1
	}
	return 0
}

// check asks the local daemon, for exec probes and images without curl.
func check(args []string) int {
	cfg, _, lines, err := configure("check")
	if err != nil {
		return exitConfig
	}
	defer lines.Flush(flushTime)
	what := health.Checks()[0]
	if len(args) == 1 {
		what = args[0]
	}
	return health.Check(context.Background(), cfg.Listen, what, os.Stdout)
}

// hideMemory keeps this process's memory, which holds secrets, from other processes of its user. Guard and elector do it themselves.
func hideMemory() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }
