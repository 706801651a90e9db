//go:build linux

package fault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// BuildJumping builds leasehold and the naive client with a wall clock that can be
// made to jump, into a directory. Go reads the clock without a system call and is
// linked statically, so nothing can come in between: the programs are built with a
// time package that jumps. Go's build cache makes the second time cheap.
func BuildJumping(ctx context.Context, dir string) (*harness.Programs, error) {
	module, err := harness.ModuleRoot()
	if err != nil {
		return nil, err
	}
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("find Go's own sources: %w", err)
	}
	source := filepath.Join(strings.TrimSpace(string(root)), "src/time")
	original, changed := filepath.Join(source, "time.go"), filepath.Join(dir, "time.go.txt")
	text, err := os.ReadFile(original)
	if err != nil {
		return nil, err
	}
	const now = "func Now() Time {\n\tsec, nsec, mono := "
	before, after, found := strings.Cut(string(text), now+"runtimeNow()\n")
	if !found {
		return nil, fmt.Errorf("%s is not as expected: there is no %q",
			original, now+"runtimeNow()")
	}
	overlay := map[string]map[string]string{"Replace": {
		original:                            changed,
		filepath.Join(source, "jumping.go"): filepath.Join(module, "e2e/fault/jumping.go.txt"),
	}}
	mapping := filepath.Join(dir, "overlay.json")
	err = errors.Join(
		os.MkdirAll(dir, 0o755),
		os.WriteFile(changed, []byte(before+now+"jumpingNow()\n"+after), 0o644),
		harness.WriteJSON(mapping, overlay),
	)
	if err != nil {
		return nil, err
	}
	fmt.Fprintln(os.Stderr,
		"building programs whose wall clock can jump; it takes about a minute the first time")
	return harness.BuildIn(ctx, dir, "-overlay", mapping, ".", "./e2e/cmd/naiveclient")
}

// lead is the time from the start of the daemon to the jump of its clock.
const lead = 8 * time.Second

// WallClockJumps has the machine's daemon, and nothing else, see the wall clock jump.
func WallClockJumps(by time.Duration) Fault {
	var jump time.Duration
	return Fault{
		Name: "wall-clock-jumps",
		Configure: func(on *Target, cfg *harness.CandidateConfig) error {
			jump = harness.Now() + lead
			cfg.Binary = on.Jumping.Beside(cfg.Binary)
			// jumping.go.txt reads them.
			cfg.Env = append(cfg.Env, fmt.Sprintf("E2E_CLOCK_OFFSET=%.0f", by.Seconds()),
				fmt.Sprintf("E2E_CLOCK_FROM=%d", (monotonic()+lead).Nanoseconds()))
			return nil
		},
		Inject: func(ctx context.Context, on *Target) error {
			left := jump - harness.Now()
			if left <= 0 {
				return errors.New("the clock has jumped before the pair was up")
			}
			on.Began = jump
			return harness.Wait(ctx, left)
		},
		Verify: func(_ context.Context, on *Target) error {
			if !on.Machine.Implementation.Ours() {
				return nil // it logs no times
			}
			return jumped(on.Machine.Log(), by)
		},
	}
}

func monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // Linux has always had this clock
	}
	return time.Duration(ts.Nano())
}

var logTime = regexp.MustCompile(`(?m)^time=(\S+)`)

// jumped returns an error unless the last line of a log was written by a clock that has jumped.
func jumped(log string, by time.Duration) error {
	found := logTime.FindAllStringSubmatch(log, -1)
	if len(found) == 0 {
		return errors.New("the daemon logs no times")
	}
	last, err := time.Parse(time.RFC3339Nano, found[len(found)-1][1])
	if err != nil {
		return err
	}
	if off := time.Until(last); (off - by).Abs() > time.Minute {
		return fmt.Errorf("the daemon's clock is off by %v, want %v", off, by)
	}
	return nil
}
