//go:build linux

package check

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

func hookOf(script string) *Hook {
	return &Hook{
		Runner: []string{"test", "run-hook"}, Argv: []string{"sh", "-c", script},
		Env: os.Environ(), Timeout: time.Minute,
	}
}

// runHook runs the hook, which has its whole time, and returns how its runner says that it has
// ended.
func runHook(t *testing.T, h *Hook, more ...string) error {
	t.Helper()
	asking, alive, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = asking.Close(), alive.Close() }()
	return waitHook(t, h, boottime.Now()+h.Timeout, asking, more...)
}

func waitHook(
	t *testing.T, h *Hook, until time.Duration, asking *os.File, more ...string,
) error {
	t.Helper()
	pid, err := h.Start(until, int(asking.Fd()), more...)
	if err != nil {
		t.Fatal(err)
	}
	var ws unix.WaitStatus
	for {
		if _, err = unix.Wait4(pid, &ws, 0, nil); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return h.Exited(ws)
}

// However a hook ends, and whatever it forks, nothing of it is left when its runner has exited.
func TestHook(t *testing.T) {
	const stubborn = `trap '' TERM HUP INT; while :; do sleep 1; done`
	for _, row := range []struct {
		name, script string
		timeout      time.Duration
		want         string
	}{
		{"succeeds", `test "$LEASEHOLD_REASON" = stop`, time.Minute, ""},
		{"fails", "exit 3", time.Minute, "exit code 3"},
		{"is killed", "kill -9 $$", time.Minute, "killed by signal 9"},
		{"hangs", "sleep 1000", 200 * time.Millisecond, "not exited within 200ms"},
		{"ignores TERM", stubborn, 200 * time.Millisecond, "not exited within"},
		{
			"daemonizes", fmt.Sprintf(`(setsid sh -c "%s" &) ; sleep 0.2`, stubborn), time.Minute,
			"",
		},
		{
			"forks without end", `while :; do (setsid sh -c 'sleep 0.01; sleep 0.01' &); done`,
			time.Second, "not exited within",
		},
		{"reads", "cat", time.Minute, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			h := hookOf(row.script)
			h.Timeout = row.timeout
			err := runHook(t, h, "CHECK_MARK="+newMark(t), "LEASEHOLD_REASON=stop")
			if row.want == "" && err != nil ||
				row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)) {
				t.Errorf("got %v, want %q", err, row.want)
			}
			if left := marked(newMark(t)); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
	h := hookOf("")
	h.Argv = []string{"no-such-command"}
	if err := runHook(t, h); err == nil || !strings.Contains(err.Error(), "could not be run") {
		t.Errorf("no such command: %v", err)
	}
}

// A runner that comes too late does not run the hook: another job may run by now.
func TestHook_TooLate(t *testing.T) {
	ran := filepath.Join(t.TempDir(), "ran")
	err := waitHook(t, hookOf(": >"+ran), boottime.Now(), os.Stdin)
	if !errors.Is(err, ErrNotRun) {
		t.Errorf("got %v, want %v", err, ErrNotRun)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("the hook has run")
	}
}

// A hook ends with whoever asks for it, and one that is alone does not.
func TestHook_AskerKilled(t *testing.T) {
	killAsker(t, "ask-hook")
	h := hookOf("exit 5")
	alone := exec.Command("/proc/self/exe")
	alone.Args = h.RunnerArgv(0)
	if err := alone.Run(); alone.ProcessState.ExitCode() != 5 {
		t.Errorf("alone: %v", err)
	}
}
