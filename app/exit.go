//go:build linux

package app

import (
	"errors"
	"log/slog"
	"strconv"
	"strings"

	"leasehold/cli"
	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/supervisor"
	"leasehold/supervisor/guard"
	"leasehold/supervisor/reload"
)

// Exit codes: those of sysexits.h where it has one, and a shell's 126 and 127.
const (
	exitOK          = 0
	exitNo          = 1
	exitUsage       = 64
	exitUnavailable = 69
	exitInternal    = 70
	exitOS          = 71
	exitNotElected  = 75
	exitLost        = 76
	exitConfig      = 78
	exitNotExec     = 126
	exitNotFound    = 127
)

// Errors with which a daemon ends that no other package has.
var (
	errPlannedStop   = errors.New("planned stop")
	errLost          = errors.New("leadership lost, and the job is not restarted")
	errSetUp         = errors.New("set up the candidate")
	errListen        = errors.New("LEASEHOLD_LISTEN")
	errSystem        = errors.New("the system refuses what the daemon needs")
	errNotExecutable = errors.New("is not executable")
	errNotFound      = errors.New("is not found")
)

// exits is the table of the exit codes: when each is used, and for which errors. An error that no
// entry names is an internal error. Where the job's own code is passed on, it can be any of these
// as well; the last log line says whose it is.
var exits = []struct {
	code int
	name string // "": the code's number
	when string
	errs func(error) bool // nil: none
}{
	{
		exitOK, "",
		"planned stop, whatever the job's code; the job ended with 0 and is not restarted;" +
			" status: there is a leader; check: yes;" +
			" list, history, hold, release: done; watch, status --watch: interrupted;" +
			" switchover: another candidate leads",
		is(),
	},
	{
		exitNo, "",
		"status: there is no leader; check: no; reload: refused or failed, the job goes on;" +
			" switchover: refused, the job goes on, or another candidate leads than was asked for",
		either(is(cli.ErrNoLeader, health.ErrNo), as[*reload.RefusedError],
			as[*cli.RefusedError]),
	},
	{
		-1, "the job's, or 128+n",
		"the job ended, by itself or by signal n, and is not restarted;" +
			" the last log line says whose code it is",
		as[*supervisor.ExitError],
	},
	{exitUsage, "", "wrong usage", as[*cli.UsageError]},
	{
		exitUnavailable, "",
		"status, list, history, watch, hold, release, switchover, check, wait, reload:" +
			" nobody answers, or etcd refuses;" +
			" not elected within LEASEHOLD_WAIT, because etcd did not answer or refused",
		either(is(health.ErrNoAnswer, election.ErrUnreachable,
			reload.ErrNoAnswer), as[*cli.EtcdError]),
	},
	{
		exitInternal, "",
		"internal error: spawner lost, the third elector within a minute, or elect's" +
			" state file can't be written when it gives its lease back;" +
			" start the daemon again." +
			" A lost guard ends by a signal and has no code",
		nil,
	},
	{
		exitOS, "",
		"before any campaign: LEASEHOLD_LISTEN can't be bound," +
			" elector or spawner can't be started," +
			" or the job of a lost predecessor can't be killed; install: the copy can't be made;" +
			" reload: the system refuses",
		either(is(errListen, errSystem, cli.ErrInstall), as[*guard.SetupError]),
	},
	{
		exitNotElected, "",
		"not elected within LEASEHOLD_WAIT, because another candidate leads or is ahead;" +
			" switchover: not done in time, and the request is withdrawn; wait: not in time",
		is(election.ErrNotElected, cli.ErrTimeout),
	},
	{
		exitLost, "",
		"leadership lost under LEASEHOLD_RESTART=never after the job had started",
		is(errLost),
	},
	{
		exitConfig, "",
		"wrong configuration; the election lies within another live one, or around it;" +
			" LEASEHOLD_CONTACT_LOSS=freeze, and the job can't be frozen",
		either(as[*config.Error], as[*election.NestedError], is(errSetUp, guard.ErrNoFreezer)),
	},
	{exitNotExec, "", "COMMAND can't be executed", is(errNotExecutable)},
	{exitNotFound, "", "COMMAND is not found", is(errNotFound)},
}

// is reports whether an error is, or wraps, one of these; without any, whether there is none.
func is(targets ...error) func(error) bool {
	return func(err error) bool {
		for _, target := range targets {
			if errors.Is(err, target) {
				return true
			}
		}
		return len(targets) == 0 && err == nil
	}
}

// as reports whether an error is, or wraps, one of that type.
func as[E error](err error) bool {
	var target E
	return errors.As(err, &target)
}

func either(of ...func(error) bool) func(error) bool {
	return func(err error) bool {
		for _, f := range of {
			if f(err) {
				return true
			}
		}
		return false
	}
}

// exitEntries is the table for help, the man page and docs/reference.md.
func exitEntries() []cli.Entry {
	var list []cli.Entry
	for _, e := range exits {
		name := e.name
		if name == "" {
			name = strconv.Itoa(e.code)
		}
		list = append(list, cli.Entry{Name: name, Meaning: e.when})
	}
	return list
}

// lastWords is what help and docs/reference.md say of the termination message.
const lastWords = "Unless the code is 0, the daemon also writes the last line of its log," +
	" or what is wrong with the configuration, to " + terminationLog + "." +
	" Kubernetes shows that in the pod's status." +
	" The daemon never creates the file, and leaves alone what the job wrote there."

// jobsOwnCode begins the text of an exit code that is the job's. systemd/leasehold@.service looks
// for it: it restarts some codes, but not where they are the job's.
const jobsOwnCode = "with the job's own code: "

// An ending is why the daemon ends, and the code that says so to whoever started it.
type ending struct {
	code  int
	text  string
	level slog.Level // of the last line
}

func endingOf(err error) ending {
	end := ending{code: exitInternal, level: slog.LevelError}
	for _, e := range exits {
		if e.errs != nil && e.errs(err) {
			end.code = e.code
			break
		}
	}
	var job *supervisor.ExitError
	var elector *electorExit
	switch {
	case err == nil:
		end.text = errPlannedStop.Error()
	case errors.As(err, &job):
		end.code, end.text = job.Code, jobsOwnCode+job.Error()
	case errors.As(err, &elector):
		end.code, end.text = elector.Code, elector.Why
	case errors.Is(err, election.ErrNotElected), errors.Is(err, election.ErrUnreachable):
		end.text = "LEASEHOLD_WAIT is over: " + err.Error()
	default:
		end.text = err.Error()
	}
	// That another candidate leads is what WAIT was set for.
	elsewhere := end.code == exitNotElected && !strings.HasPrefix(end.text, jobsOwnCode)
	if end.code == exitOK || elsewhere {
		end.level = slog.LevelInfo
	}
	if elector != nil && elector.Forced {
		end.level = slog.LevelWarn
	}
	return end
}

// An electorExit is the end of the guard as its elector has announced it.
type electorExit struct{ guard.Exit }

func (e *electorExit) Error() string { return e.Why }

// A loggedError is the end of a daemon whose log has said why.
type loggedError struct{ code int }

func (e *loggedError) Error() string { return "exit code " + strconv.Itoa(e.code) }
