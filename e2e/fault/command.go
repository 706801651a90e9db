//go:build linux

package fault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"path"
	"strings"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

// steer starts a command of leasehold's for the election of the target.
func steer(on *Target, args ...string) (*harness.Child, error) {
	cmd := exec.Command(on.Programs.Leasehold, args...)
	cmd.Env = []string{
		"LEASEHOLD_ELECTION=" + path.Dir(on.Leading.Key),
		"LEASEHOLD_ENDPOINTS=" + strings.Join(on.Etcd.Endpoints(), ","),
	}
	return harness.StartChild(args[0], nil, cmd)
}

// steered runs such a command, which has to succeed.
func steered(ctx context.Context, on *Target, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, harness.WaitTimeout)
	defer cancel()
	child, err := steer(on, args...)
	if err != nil {
		return err
	}
	defer child.Kill()
	if code, err := child.Wait(ctx); err != nil || code != 0 {
		return fmt.Errorf("leasehold %q ended with %d, %w: %s", args, code, err, child.Log())
	}
	return nil
}

// SwitchedOver asks the leader for a switchover to the next in line, and has another fault while
// the job stops. The fault begins with the request.
func SwitchedOver(while Fault) Fault {
	var asking *harness.Child
	end := while.Recover
	while.Name = "switchover-" + while.Name
	inject := while.Inject
	while.Inject = func(ctx context.Context, on *Target) (err error) {
		began := harness.Now()
		if asking, err = steer(on, "switchover", "--timeout", "30s",
			"--to", on.Others[0].Name); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, harness.WaitTimeout)
		defer cancel()
		if err := on.Machine.WaitStatus(ctx, "/leader", http.StatusServiceUnavailable); err != nil {
			return fmt.Errorf("the leader does not hand over: %w: %s", err, asking.Log())
		}
		err = inject(ctx, on)
		on.Began = began
		return err
	}
	while.Recover = func(ctx context.Context, on *Target) error {
		if asking != nil {
			_ = asking.Signal(syscall.SIGTERM) // if it still waits, it withdraws the request
			short, cancel := context.WithTimeout(ctx, harness.WaitTimeout)
			_, _ = asking.Wait(short)
			cancel()
			asking.Kill()
		}
		return end.Do(ctx, on)
	}
	return while
}

// Held holds the election, and then has another fault. Its end is the release. The fault's figure
// is when that was.
func Held(while Fault) Fault {
	inject, end := while.Inject, while.Recover
	while.Name = "held-" + while.Name
	while.Inject = func(ctx context.Context, on *Target) error {
		if err := steered(ctx, on, "hold"); err != nil {
			return err
		}
		return inject(ctx, on)
	}
	while.Recover = func(ctx context.Context, on *Target) error {
		err := steered(ctx, on, "release")
		on.Figure(Released, harness.Now()-on.Began)
		return errors.Join(err, end.Do(ctx, on))
	}
	return while
}

// Released is the figure of Held.
const Released = "hold released"

// Delayed is a fault that waits first.
func Delayed(wait time.Duration, f Fault) Fault {
	inject := f.Inject
	f.Inject = func(ctx context.Context, on *Target) error {
		if err := harness.Wait(ctx, wait); err != nil {
			return err
		}
		return inject(ctx, on)
	}
	return f
}
