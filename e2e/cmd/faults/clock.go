//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"leasehold/e2e/harness"
)

// The variables that say by how many seconds the wall clock of a program built
// by buildShifted jumps, and at which moment of CLOCK_MONOTONIC, in nanoseconds.
const (
	clockOffset = "E2E_CLOCK_OFFSET"
	clockFrom   = "E2E_CLOCK_FROM"
)

// jumpingNow is put in front of Go's time.Now. All else in package time, timers
// above all, goes by the monotonic clock and is as it was.
const jumpingNow = `
var clockOffset, clockFrom = clockVariable("` + clockOffset + `"), clockVariable("` + clockFrom + `")

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

// buildShifted builds leasehold and the stock loop with a wall clock that can
// be made to jump, into a directory below bin/, and returns that. Go's build
// cache makes the second time cheap.
func buildShifted(ctx context.Context, programs string) (string, error) {
	module, err := harness.ModuleRoot()
	if err != nil {
		return "", err
	}
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("find Go's own sources: %w", err)
	}
	original := filepath.Join(strings.TrimSpace(string(root)), "src/time/time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		return "", err
	}
	text := string(source)
	for _, change := range []struct{ from, to string }{
		{"import (\n", "import (\n\t\"syscall\"\n"},
		{"func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n", jumpingNow + "\nfunc Now() Time {\n\tsec, nsec, mono := jumpingNow()\n"},
	} {
		if strings.Count(text, change.from) != 1 {
			return "", fmt.Errorf("%s is not as expected: there is no one %q", original, change.from)
		}
		text = strings.Replace(text, change.from, change.to, 1)
	}
	dir := filepath.Join(programs, "clock")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	replacement, overlay := filepath.Join(dir, "time.go.txt"), filepath.Join(dir, "overlay.json")
	mapping, err := json.Marshal(map[string]any{"Replace": map[string]string{original: replacement}})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(replacement, []byte(text), 0o644); err != nil {
		return "", err
	}
	if err := os.WriteFile(overlay, mapping, 0o644); err != nil {
		return "", err
	}
	fmt.Fprintln(os.Stderr, "building programs whose wall clock can jump; it takes about a minute the first time")
	cmd := exec.CommandContext(ctx, "go", "build", "-overlay", overlay, "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w",
		"-o", dir+"/", ".", "./e2e/cmd/stockloop")
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build programs whose wall clock can jump: %w\n%s", err, out)
	}
	return dir, nil
}
