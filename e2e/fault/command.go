//go:build linux

package fault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
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

// Switchover hands the lead over to the next in line.
func Switchover() Fault {
	return Fault{Name: "switchover", Inject: func(ctx context.Context, on *Target) error {
		return steered(ctx, on, switchover(on)...)
	}}
}

func switchover(on *Target) []string {
	return []string{"switchover", "--timeout", "30s", "--to", on.Others[0].Name}
}

// SwitchedOver asks the leader for a switchover to the next in line, and has another fault while
// the job stops. The fault begins with the request.
func SwitchedOver(while Fault) Fault {
	var asking *harness.Child
	while.Name = "switchover-" + while.Name
	while.Inject = whileStopping(func(_ context.Context, on *Target) (err error) {
		asking, err = steer(on, switchover(on)...)
		return err
	}, while.Inject)
	while.Recover = Step(func(ctx context.Context, _ *Target) error {
		if asking == nil {
			return nil
		}
		_ = asking.Signal(syscall.SIGTERM) // if it still waits, it withdraws the request
		ctx, cancel := context.WithTimeout(ctx, harness.WaitTimeout)
		defer cancel()
		_, _ = asking.Wait(ctx)
		asking.Kill()
		return nil
	}).Then(while.Recover)
	return while
}

// whileStopping makes the leader stop its job, and injects another fault meanwhile. The fault
// begins with the request.
func whileStopping(ask, inject Step) Step {
	return func(ctx context.Context, on *Target) error {
		if err := ask(ctx, on); err != nil {
			return err
		}
		if err := waitStopping(ctx, on); err != nil {
			return err
		}
		return meanwhile(inject)(ctx, on)
	}
}

// meanwhile injects another fault, and the first one's beginning stays as it was.
func meanwhile(inject Step) Step {
	return func(ctx context.Context, on *Target) error {
		began := on.Began
		err := inject.Do(ctx, on)
		on.Began = began
		return err
	}
}

// waitStopping waits until the leader stops its job. (/leader answers 503 also while an elector is
// replaced.)
func waitStopping(ctx context.Context, on *Target) error {
	return harness.UntilWithin(ctx, harness.WaitTimeout, "the leader does not stop its job",
		func() error {
			var now struct{ State string }
			_, body, err := on.Machine.Get(ctx, "/status")
			if err == nil {
				err = json.Unmarshal([]byte(body), &now)
			}
			if err == nil && now.State != "stopping" {
				err = fmt.Errorf("its state is %s", now.State)
			}
			return err
		})
}

// FailedBack gives the leader a lower priority than the others have. So it hands over, and another
// fault comes while the job stops. The fault begins when the leader stops its job.
func FailedBack(while Fault) Fault {
	while.Name = "failback-" + while.Name
	while.Configure = func(_ *Target, cfg *harness.CandidateConfig) error {
		cfg.Env = append(cfg.Env, "LEASEHOLD_PRIORITY=10", "LEASEHOLD_FAILBACK=1s")
		return nil
	}
	while.Inject = whileLeaving(while.Inject)
	return while
}

// Unfit makes the leader unfit. So it hands over, and another fault comes while the job stops. The
// fault begins when the leader stops its job.
func Unfit(while Fault) Fault {
	var fit string // the leader is fit while this file is there
	while.Name = "unfit-" + while.Name
	while.Configure = func(on *Target, cfg *harness.CandidateConfig) error {
		dir, err := on.Machine.StateDir(cfg.UID)
		if err != nil {
			return err
		}
		fit = filepath.Join(dir, "fit")
		cfg.Env = append(cfg.Env, "LEASEHOLD_FITNESS_CMD=test -e "+fit,
			"LEASEHOLD_FITNESS_INTERVAL=200ms", "LEASEHOLD_HEALTH_RETRIES=2",
			"LEASEHOLD_HEALTH_TIMEOUT=1s")
		return os.WriteFile(fit, nil, 0o644)
	}
	inject := whileLeaving(while.Inject)
	while.Inject = func(ctx context.Context, on *Target) error {
		if err := os.Remove(fit); err != nil {
			return err
		}
		return inject(ctx, on)
	}
	return while
}

// whileLeaving waits until the leader stops its job by itself, and injects another fault.
func whileLeaving(inject Step) Step {
	return func(ctx context.Context, on *Target) error {
		if err := waitStopping(ctx, on); err != nil {
			return err
		}
		on.Begin()
		return meanwhile(inject)(ctx, on)
	}
}

// Held holds the election, and then has another fault. Its end is the release, and a third fault
// meanwhile, which may be none. The figure is when the election was released.
func Held(while, releasing Fault) Fault {
	inject := while.Inject
	while.Name = "held-" + while.Name
	while.Inject = func(ctx context.Context, on *Target) error {
		if err := steered(ctx, on, "hold"); err != nil {
			return err
		}
		return inject(ctx, on)
	}
	return untilReleased(while, releasing)
}

// HeldFor holds the election for so long, and then has another fault. The figure is when that time
// is over.
func HeldFor(lasts time.Duration, while Fault) Fault {
	inject := while.Inject
	while.Name = "held-for-" + while.Name
	while.Inject = func(ctx context.Context, on *Target) error {
		over := on.Began + lasts
		if err := steered(ctx, on, "hold", "--for", lasts.String()); err != nil {
			return err
		}
		err := inject(ctx, on)
		on.Figure(HoldOver, over-on.Began)
		return err
	}
	return while
}

// HeldStop holds the election and has the leader stop its job, and has another fault meanwhile. The
// fault begins with the request. Its end is the release.
func HeldStop(while Fault) Fault {
	while.Name = "held-stop-" + while.Name
	while.Inject = whileStopping(func(ctx context.Context, on *Target) error {
		return steered(ctx, on, "hold", "--stop")
	}, while.Inject)
	return untilReleased(while, Fault{})
}

// The figures of Held and HeldStop, and of HeldFor.
const (
	Released = "hold released"
	HoldOver = "hold over"
)

// untilReleased releases the election at the end of the fault, and has another one meanwhile.
func untilReleased(held, releasing Fault) Fault {
	held.Recover = Step(func(ctx context.Context, on *Target) error {
		ctx, cancel := context.WithTimeout(ctx, harness.WaitTimeout)
		defer cancel()
		asking, err := steer(on, "release")
		if err != nil {
			return err
		}
		defer asking.Kill()
		if err := meanwhile(releasing.Inject)(ctx, on); err != nil {
			return err
		}
		code, err := asking.Wait(ctx)
		on.Figure(Released, harness.Now()-on.Began)
		if err == nil && code != 0 {
			err = fmt.Errorf("leasehold release ended with %d: %s", code, asking.Log())
		}
		return errors.Join(err, releasing.Recover.Do(ctx, on))
	}).Then(held.Recover)
	return held
}

// Delayed is a fault that waits first.
func Delayed(wait time.Duration, f Fault) Fault {
	return delayed(f, func(*Target) time.Duration { return wait })
}

// AtAnyTime is a fault that first waits for a part of that time, another one in each trial.
func AtAnyTime(most time.Duration, f Fault) Fault {
	return delayed(f, func(on *Target) time.Duration {
		return time.Duration(float64(most) * Spread(on.Trial))
	})
}

func delayed(f Fault, wait func(*Target) time.Duration) Fault {
	inject := f.Inject
	f.Inject = func(ctx context.Context, on *Target) error {
		if err := harness.Wait(ctx, wait(on)); err != nil {
			return err
		}
		return inject(ctx, on)
	}
	return f
}
