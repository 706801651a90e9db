//go:build linux

package app

import (
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"leasehold/cli"
	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/supervisor"
	"leasehold/supervisor/guard"
	"leasehold/supervisor/proctree"
)

func TestEnding(t *testing.T) {
	for _, c := range []struct {
		err   error
		code  int
		level slog.Level
	}{
		{nil, 0, slog.LevelInfo},
		{cli.ErrNoLeader, 1, slog.LevelError},
		{health.ErrNo, 1, slog.LevelError},
		{&cli.UsageError{Hint: "hint"}, 64, slog.LevelError},
		{fmt.Errorf("%w: x", health.ErrNoAnswer), 69, slog.LevelError},
		{&cli.EtcdError{Command: "status", Err: errors.New("x")}, 69, slog.LevelError},
		{fmt.Errorf("%w: x", election.ErrUnreachable), 69, slog.LevelError},
		{supervisor.ErrGuardLost, 70, slog.LevelError},
		{errors.New("anything"), 70, slog.LevelError},
		{fmt.Errorf("%w: x", errSystem), 71, slog.LevelError},
		{fmt.Errorf("%w: x", errListen), 71, slog.LevelError},
		{fmt.Errorf("%w: x", cli.ErrInstall), 71, slog.LevelError},
		{fmt.Errorf("%w: x", election.ErrNotElected), 75, slog.LevelInfo},
		{errLost, 76, slog.LevelError},
		{&config.Error{Problems: []error{errors.New("x")}}, 78, slog.LevelError},
		{&election.NestedError{}, 78, slog.LevelError},
		{fmt.Errorf("%w: x", errSetUp), 78, slog.LevelError},
		{fmt.Errorf("the command %w", errNotExecutable), 126, slog.LevelError},
		{fmt.Errorf("the command %w", errNotFound), 127, slog.LevelError},
		{
			errors.Join(nil, &supervisor.ExitError{Exit: proctree.Exit{Code: 75}}), 75,
			slog.LevelError,
		},
		{&supervisor.ExitError{}, 0, slog.LevelInfo},
		{&electorExit{guard.Exit{Why: "planned stop", Forced: true}}, 0, slog.LevelWarn},
		{&electorExit{
			guard.Exit{Code: 75, Why: "LEASEHOLD_WAIT is over: not elected"},
		}, 75, slog.LevelInfo},
		{&electorExit{
			guard.Exit{Code: 75, Why: jobsOwnCode + "the job exited"},
		}, 75, slog.LevelError},
		{&electorExit{guard.Exit{Code: 70, Why: "anything"}}, 70, slog.LevelError},
		{&guard.SetupError{Op: "x", Err: errors.New("y")}, 71, slog.LevelError},
	} {
		if end := endingOf(c.err); end.code != c.code || end.level != c.level {
			t.Errorf("%v: exit code %d, logged as %v; want %d, %v",
				c.err, end.code, end.level, c.code, c.level)
		}
	}
}

func TestJobEnvironment(t *testing.T) {
	got := jobEnvironment([]string{
		"PATH=/bin", "LEASEHOLD_ENDPOINTS=a:1", "LEASEHOLD_LISTEN=:1", "LEASEHOLD_TLS_CA_FILE=/ca",
		"LEASEHOLD_TLS_KEY_FILE=/key", "LEASEHOLD_USERNAME=u", "LEASEHOLD_PASSWORD=p",
		"LEASEHOLD_PASSWORD_FILE=/p", "LEASEHOLD_TTL=5s", "LEASEHOLD_ELECTION=e",
		"NOTIFY_SOCKET=@x", "WATCHDOG_USEC=1", "WATCHDOG_PID=1", "NOTIFY=kept",
	})
	want := "[PATH=/bin LEASEHOLD_ENDPOINTS=a:1 LEASEHOLD_LISTEN=:1 LEASEHOLD_TLS_CA_FILE=/ca " +
		"LEASEHOLD_TLS_KEY_FILE=/key NOTIFY=kept]"
	if fmt.Sprint(got) != want {
		t.Errorf("%v, want %v", got, want)
	}
}
