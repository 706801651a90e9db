//go:build linux

package app

import (
	"errors"
	"strconv"

	"leasehold/election"
	"leasehold/supervisor"
)

// Exit codes. Where the job's own code is passed on, it can be any of these as well; the last log line says whose it is.
const (
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

func exitCodes() []entry {
	code := strconv.Itoa
	return []entry{
		{"0", "planned stop, whatever the job's code; the job ended with 0 and is not restarted; status: there is a leader; check: yes"},
		{"1", "status: there is no leader; check: no"},
		{"the job's, or 128+n", "the job ended, by itself or by signal n, and is not restarted; the last log line says whose code it is"},
		{code(exitUsage), "wrong usage"},
		{code(exitUnavailable), "status, check: nobody answers"},
		{code(exitInternal), "internal fault: elector or spawner lost (worth a restart); a lost guard shows as the signal that took it"},
		{code(exitOS), "LEASEHOLD_LISTEN can't be bound, elector or spawner can't be started, or a dead predecessor's job can't be killed: before any campaign; install: the copy can't be made"},
		{code(exitNotElected), "not elected within LEASEHOLD_WAIT"},
		{code(exitLost), "leadership lost under LEASEHOLD_RESTART=never after the job had started"},
		{code(exitConfig), "wrong configuration"},
		{code(exitNotExec), "COMMAND can't be executed"},
		{code(exitNotFound), "COMMAND is not found"},
	}
}

var (
	errPlannedStop = errors.New("planned stop")
	errLost        = errors.New("leadership lost, and the job is not restarted")
)

// An ending is why the daemon ends, and the code that says so to whoever started it.
type ending struct {
	code int
	text string
}

func endingOf(err error) ending {
	var ended *supervisor.ExitError
	switch {
	case err == nil:
		return ending{0, "planned stop"}
	case errors.As(err, &ended):
		return ending{ended.Code, "with the job's own code: " + ended.Error()}
	case errors.Is(err, election.ErrNotElected):
		return ending{exitNotElected, "not elected within LEASEHOLD_WAIT"}
	case errors.Is(err, errLost):
		return ending{exitLost, err.Error()}
	}
	return ending{exitInternal, err.Error()}
}
