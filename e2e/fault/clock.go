//go:build linux

package fault

import (
	"context"
	"encoding/json"
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

// The variables that say by how many seconds the wall clock of a program built
// by BuildJumping jumps, and at which moment of CLOCK_MONOTONIC, in nanoseconds.
const (
	clockOffset = "E2E_CLOCK_OFFSET"
	clockFrom   = "E2E_CLOCK_FROM"
)

// jumpingNow is put in front of Go's time.Now. All else in package time, timers
// above all, goes by the monotonic clock and is as it was.
const jumpingNow = `
var (
	clockOffset = clockVariable("` + clockOffset + `")
	clockFrom   = clockVariable("` + clockFrom + `")
)

func clockVariable(name string) int64 {
	text, _ := syscall.Getenv(name)
	negative := len(text) > 0 && text[0] == '-'
	if negative {
		text = text[1:]
	}
	value := int64(0)
	for _, digit := range []byte(text) {
		value = 10*value + int64(digit-'0')
	}
	if negative {
		return -value
	}
	return value
}

func jumpingNow() (sec int64, nsec int32, mono int64) {
	sec, nsec, mono = runtimeNow()
	if clockOffset != 0 && mono >= clockFrom {
		sec += clockOffset
	}
	return sec, nsec, mono
}
`

// BuildJumping builds leasehold and the stock loop with a wall clock that can be
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
	original := filepath.Join(strings.TrimSpace(string(root)), "src/time/time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		return nil, err
	}
	text := string(source)
	for _, change := range []struct{ from, to string }{
		{"import (\n", "import (\n\t\"syscall\"\n"},
		{
			"func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n",
			jumpingNow + "\nfunc Now() Time {\n\tsec, nsec, mono := jumpingNow()\n",
		},
	} {
		if strings.Count(text, change.from) != 1 {
			return nil, fmt.Errorf("%s is not as expected: there is no one %q", original, change.from)
		}
		text = strings.Replace(text, change.from, change.to, 1)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	replacement, overlay := filepath.Join(dir, "time.go.txt"), filepath.Join(dir, "overlay.json")
	mapping, err := json.Marshal(map[string]any{"Replace": map[string]string{original: replacement}})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(replacement, []byte(text), 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(overlay, mapping, 0o644); err != nil {
		return nil, err
	}
	fmt.Fprintln(os.Stderr,
		"building programs whose wall clock can jump; it takes about a minute the first time")
	cmd := exec.CommandContext(ctx, "go", "build", "-overlay", overlay, "-trimpath",
		"-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", dir+"/", ".", "./e2e/cmd/stockloop")
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build programs whose wall clock can jump: %w\n%s", err, out)
	}
	return harness.ProgramsIn(dir), nil
}

// lead is the time from the start of the daemon to the jump of its clock.
const lead = 8 * time.Second

// WallClockJumps has the machine's daemon, and nothing else, see the wall clock
// jump.
func WallClockJumps(name string, by time.Duration) Fault {
	var jump time.Duration
	return Fault{
		Name: name,
		Configure: func(on *Target, cfg *harness.CandidateConfig) error {
			jump = harness.Now() + lead
			cfg.Binary = on.Jumping.Beside(cfg.Binary)
			cfg.Env = append(cfg.Env,
				fmt.Sprintf("%s=%d", clockOffset, int64(by/time.Second)),
				fmt.Sprintf("%s=%d", clockFrom, (monotonic()+lead).Nanoseconds()))
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

// jumped returns an error unless the last line of a log was written by a clock
// that has jumped.
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
