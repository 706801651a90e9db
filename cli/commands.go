//go:build linux

// Package cli is the command line: one table of commands, from which the parser, help, hints, the
// man page and the shell's completion come. The commands that only ask or copy are here too.
//
// Commands return errors. Package app decides on the exit code and the last line that follow from
// an error.
package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"leasehold/config"
	"leasehold/health"
)

// A Command is one row of the command line's table.
type Command struct {
	Name        string   // what is typed after leasehold
	Args        string   // what follows, as usage shows it; "" for nothing
	Summary     string   // a line, without a full stop
	Description string   // more, in sentences
	Words       []string // the only words that may follow; nil: any
	Flags       []string // of its own, such as --json
	Options     []string // flags that take a value, such as --timeout
	Files       bool     // its argument is a path
	Min, Max    int      // how many arguments it takes; the job's words don't count
	Job         bool     // it takes a job, after --
	MayJob      bool     // it may be given one
	Run         func(Call) error
}

// Usage is the command as its user types it.
func (c Command) Usage() string {
	name := c.Name
	if c.Job {
		name = "[" + name + "]"
	}
	return strings.TrimSpace("leasehold " + name + " " + c.Args)
}

// About is what the command does, in sentences.
func (c Command) About() string {
	summary := strings.ToUpper(c.Summary[:1]) + c.Summary[1:] + "."
	return strings.TrimSpace(summary + " " + c.Description)
}

// A Call is a command line in which no error was found.
type Call struct {
	Command Command
	EnvFile string   // of -f; "" for none
	Args    []string // without flags
	Flags   []string // those of the command that were given
	Options map[string]string
	Job     []string // what stands after --
	HasJob  bool     // there is a --
}

// Has reports whether the flag was given.
func (c Call) Has(flag string) bool { return slices.Contains(c.Flags, flag) }

// Duration is the value of an option; none: it was not given.
func (c Call) Duration(option string, none time.Duration) (time.Duration, error) {
	text, given := c.Options[option]
	if !given {
		return none, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return 0, &UsageError{Hint: fmt.Sprintf(
			"%s takes a time with its unit, such as 90s or 1h: %s", option, c.Command.Usage())}
	}
	return d, nil
}

// A Program is what the command line is made of.
type Program struct {
	Version        string
	Built          string // the commit and its date
	Stdout, Stderr io.Writer
	Run            func(Call) error // the daemon with a job; it reads the call's EnvFile
	Elect          func(Call) error // the daemon without one; it does too
	Reload         func(Call) error
	ExitCodes      []Entry
	LastWords      string // of the termination message
}

// Commands is the table.
func (p *Program) Commands() []Command {
	return []Command{
		{
			Name: "run", Args: "-- COMMAND [ARG...]", Job: true,
			Summary: "run COMMAND while leading",
			Description: "Before another candidate can lead, leasehold kills COMMAND and all its" +
				" descendants. LEASEHOLD_RESTART says what follows when COMMAND ends by itself.",
			Run: func(c Call) error { return p.Run(c) },
		},
		{
			Name:    "elect",
			Summary: "campaign and report who leads, without a job (for a sidecar)",
			Description: "An app that asks /leader must stop within LEASEHOLD_LOSS_GRACE of its" +
				" last request that got 200" +
				" (poll interval + time to stop <= LEASEHOLD_LOSS_GRACE <= LEASEHOLD_STOP_GRACE).",
			Run: func(c Call) error { return p.Elect(c) },
		},
		{
			Name: "status", Args: "[ELECTION] [--json] [--watch]", Max: 1,
			Flags: []string{"--json", "--watch"},
			Summary: "show the election as etcd has it: leader, token, lease time left, hold," +
				" and the queue with each candidate's priority and version",
			Description: "ELECTION overrules LEASEHOLD_ELECTION." +
				" Exit code 0: there is a leader; 1: there is none;" +
				" 69: etcd does not answer, or refuses." +
				" With --watch it goes on until SIGINT or SIGTERM (exit code 0)," +
				" also if etcd does not answer for a while, but not if it refuses:" +
				" on a terminal it shows the election" +
				" every second in the same place, elsewhere it prints it again when more has" +
				" changed than the time that is left of the lease.",
			Run: p.status,
		},
		{
			Name: "list", Args: "[--json]", Flags: []string{"--json"},
			Summary: "show the elections that have a candidate of leasehold, or are held: leader," +
				" token, since when, number of candidates, and whether they are held",
			Description: "Exit code 0; 69: etcd does not answer, or refuses.",
			Run:         p.list,
		},
		{
			Name: "history", Args: "[ELECTION] [-n N] [--json]", Max: 1,
			Flags: []string{"--json"}, Options: []string{"-n"},
			Summary: "show who has led: token, from when, how long, why no longer," +
				" starts and last exit of the job",
			Description: "The last 20 terms, or N of the 100 that etcd keeps, the latest first." +
				" Why: stopped, switchover, held, resigned, contact lost, lease lost," +
				" key deleted, key overwritten, job exited, job not started, guard lost," +
				" internal error;" +
				" or lost, if the leader could not say." +
				" Exit code 0; 69: etcd does not answer, or refuses.",
			Run: p.history,
		},
		{
			Name: "watch", Args: "[ELECTION] [--from REVISION] [--json]", Max: 1,
			Flags: []string{"--json"}, Options: []string{"--from"},
			Summary: "print a line when something changes:" +
				" who leads, the candidates, a hold, a switchover",
			Description: "It begins with who leads. With --from it first shows the changes from" +
				" that revision of etcd on. If etcd no longer has them, it says compacted," +
				" and goes on from the oldest revision that etcd has." +
				" It runs until SIGINT or SIGTERM, also if etcd does not answer for a while." +
				" Exit code 0: interrupted; 69: etcd never answers, or refuses.",
			Run: p.watch,
		},
		{
			Name: "hold", Args: "[ELECTION] [--for TIME] [--reason TEXT] [--stop]", Max: 1,
			Flags: []string{"--stop"}, Options: []string{"--for", "--reason"},
			Summary: "let nobody become leader until release; whoever leads goes on",
			Description: "With --stop the leader stops its job in order, and nobody follows:" +
				" status ends with 1 when that is done, this command does not wait for it." +
				" With --for, in whole seconds, the hold ends by itself." +
				" It outlasts every daemon, and a restart of etcd." +
				" A hold that is there is replaced." +
				" Exit code 0: held; 69: etcd does not answer, or refuses.",
			Run: p.hold,
		},
		{
			Name: "release", Args: "[ELECTION]", Max: 1,
			Summary: "end a hold",
			Description: "Exit code 0: there is no hold any more;" +
				" 69: etcd does not answer, or refuses.",
			Run: p.release,
		},
		{
			Name: "switchover", Args: "[ELECTION] [--to IDENTITY] [--timeout 60s]", Max: 1,
			Options: []string{"--to", "--timeout"},
			Summary: "let the leader stop its job in order, and another candidate lead",
			Description: "Without --to that is the next in line." +
				" It prints who leads, and for how long nobody did." +
				" Exit code 0: done; 1: refused, and the job goes on" +
				" (nobody waits, there is no such candidate, it is not ready," +
				" the next in line has no record, such as etcdctl elect," +
				" the election is held)," +
				" or another candidate leads than was asked for;" +
				" 69: etcd does not answer, or refuses;" +
				" 75: not done in time (60s by default), and the request is withdrawn.",
			Run: p.switchover,
		},
		{
			Name: "check", Args: "[" + strings.Join(health.Checks(), "|") + "]", Max: 1,
			Words: health.Checks(),
			Summary: "ask the local daemon, at LEASEHOLD_LISTEN," +
				" whether it is live (the default), ready, leader or standby",
			Description: "Exit code 0: yes; 1: no, with the reason;" +
				" 69: nobody answers within two seconds.",
			Run: p.check,
		},
		{
			Name: "wait", Args: "leader|standby|ready [--timeout TIME]", Min: 1, Max: 1,
			Words: []string{"leader", "standby", "ready"}, Options: []string{"--timeout"},
			Summary: "return when the local daemon, at LEASEHOLD_LISTEN, is that",
			Description: "It asks five times a second." +
				" Exit code 0: it is; 69: nobody answers; 75: it is not within TIME.",
			Run: p.wait,
		},
		{
			Name: "reload", Args: "[--env] PID [-- COMMAND [ARG...]]", Min: 1, Max: 1, MayJob: true,
			Flags: []string{"--env"},
			Summary: "have the daemon PID go on with the binary and the settings as they are now," +
				" without touching the job",
			Description: "PID is the process that was started. Only its elector is replaced." +
				" The settings are those that the daemon was started with, and those in the file" +
				" of its -f, which is read again. With --env the LEASEHOLD_* variables of this" +
				" command take the place of those that the daemon was started with." +
				" First the new binary and the settings are checked, and that the daemon's lease" +
				" is in their etcd. If the new elector does not work, the one before it comes" +
				" back. COMMAND must be the daemon's own, if it is given." +
				" The command and LEASEHOLD_" + strings.Join(config.FixedNames(), ", ") +
				" take a restart. Exit code 0: done; 1: refused or failed, the job goes on;" +
				" 69: the daemon does not answer.",
			Run: func(c Call) error { return p.Reload(c) },
		},
		{
			Name: "install", Args: "DEST", Min: 1, Max: 1, Files: true,
			Summary: "copy this binary to DEST, a directory or a file: for an init container," +
				" which has no cp",
			Description: "It replaces DEST in one step.",
			Run:         func(c Call) error { return install(c.Args[0]) },
		},
		{
			Name: "completion", Args: "bash|zsh|fish", Min: 1, Max: 1, Words: Shells(),
			Summary: "print the completion for a shell",
			Description: "bash: put it into /etc/bash_completion.d, or source it." +
				" zsh: into a folder of fpath, as _leasehold, or source it after compinit." +
				" fish: into ~/.config/fish/completions, as leasehold.fish, or source it.",
			Run: p.completion,
		},
		{
			Name:    "version",
			Summary: "print the version",
			Run: func(Call) error {
				_, _ = fmt.Fprintf(p.Stdout, "leasehold %s (%s)\n", p.Version, p.Built)
				return nil
			},
		},
		{
			Name: "help", Args: "[COMMAND]", Max: 1, Words: commandNames[:],
			Summary: "print this, or the help of COMMAND",
			Run:     p.help,
		},
	}
}

// commandNames repeats the names in the table, because the table can't refer to itself.
var commandNames = [...]string{
	"run", "elect", "status", "list", "history", "watch", "hold", "release", "switchover", "check",
	"wait", "reload", "install", "completion", "version", "help",
}

// GlobalFlags are the flags that every command takes.
func GlobalFlags() []Entry {
	return []Entry{
		{"-f FILE", "read variables from FILE, in the format of systemd's EnvironmentFile=." +
			" A variable of the environment overrules the file, also when it is set to nothing"},
		{"-h, --help", "print the help, or that of the command"},
		{"--version", "print the version"},
	}
}

// A UsageError says in one line what is wrong with a command line, with a hint.
type UsageError struct{ Hint string }

func (e *UsageError) Error() string { return e.Hint }
