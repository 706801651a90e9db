//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

// search is one run of pan, the program that spin makes of a model.
type search struct {
	model   string // path of the .pml file
	options []string
	limit   time.Duration
}

// result is what pan reports.
type result struct {
	States, Errors int
	MB, Seconds    float64 // of processor time
	Violation      string  // in pan's words; "": none
	Property       string  // that breaks; "": the violation is none of a property
	Cut            string  // why the search is not complete; "": it is
	Transitions    []string
	Trail          []byte
	Trace          []string
}

// needPrograms reports which of the programs is missing, and where it comes from.
func needPrograms() error {
	for _, program := range []string{"spin", "gcc"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%w: apt-get install spin gcc libc6-dev", err)
		}
	}
	return nil
}

// run searches. If pan finds a violation, the result has its trace.
func (s search) run(ctx context.Context) (r result, err error) {
	dir, err := s.build(ctx)
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err != nil {
		return r, err
	}
	_, _, options := s.arguments()
	limited, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	out, used, err := command(limited, dir, "./pan", options...)
	r = parse(out)
	r.Seconds = used.Seconds()
	switch {
	case ctx.Err() != nil:
		return r, errors.New("interrupted")
	case limited.Err() != nil:
		r.Cut = fmt.Sprintf("it took longer than %v", s.limit)
	case err != nil && r.Violation == "" && r.Cut == "":
		r.Cut = fmt.Sprintf("pan: %v", err)
	}
	if r.Violation == "" {
		return r, nil
	}
	if r.Trail, err = os.ReadFile(s.trail(dir)); err == nil {
		err = s.replay(ctx, dir, &r)
	}
	return r, err
}

// replayed walks a kept trail.
func (s search) replayed(ctx context.Context, trail []byte) (r result, err error) {
	dir, err := s.newDir()
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err == nil {
		err = os.WriteFile(s.trail(dir), trail, 0o644)
	}
	if err != nil {
		return r, err
	}
	r.Violation = "the end of the kept trail"
	return r, s.replay(ctx, dir, &r)
}

// replay lets spin walk pan's trail, and keeps what the model prints on the way. With REPLAY the
// model counts ticks, and without RECORD it has no C code, which spin can't run.
func (s search) replay(ctx context.Context, dir string, r *result) error {
	options, _, _ := s.arguments()
	options = slices.DeleteFunc(options, func(o string) bool { return o == "-DRECORD" })
	options = append(options, "-DREPLAY", "-t", "-T", filepath.Base(s.model))
	out, _, err := command(ctx, dir, "spin", options...)
	if err != nil {
		return fmt.Errorf("spin -t: %w\n%s", err, out)
	}
	for line := range strings.Lines(out) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "@ ") {
			r.Trace = append(r.Trace, line)
		}
	}
	if len(r.Trace) == 0 {
		return fmt.Errorf("the trail prints no line that begins with @:\n%s", out)
	}
	r.Property, err = s.property(out)
	return err
}

func (s search) trail(dir string) string {
	return filepath.Join(dir, filepath.Base(s.model)+".trail")
}

// newDir makes a new directory, which it returns also if it fails. Spin and pan write beside the
// model, so that a copy of it, and of what it includes, is there.
func (s search) newDir() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "leasehold-model-"); err != nil {
		return "", err
	}
	headers, err := filepath.Glob(filepath.Join(filepath.Dir(s.model), "*.h"))
	for _, path := range append(headers, s.model) {
		if err == nil {
			err = harness.CopyProgram(path, filepath.Join(dir, filepath.Base(path)))
		}
	}
	return dir, err
}

// build makes pan in such a directory.
func (s search) build(ctx context.Context) (dir string, err error) {
	if dir, err = s.newDir(); err != nil {
		return dir, err
	}
	spin, gcc, _ := s.arguments()
	spin = append([]string{"-a"}, append(spin, filepath.Base(s.model))...)
	out, _, err := command(ctx, dir, "spin", spin...)
	if err != nil {
		return dir, fmt.Errorf("spin -a: %w\n%s", err, out)
	}
	gcc = append([]string{"-w", "-DMEMLIM=" + memoryLimit}, gcc...)
	out, _, err = command(ctx, dir, "gcc", append(gcc, "-o", "pan", "pan.c")...)
	if err != nil {
		return dir, fmt.Errorf("gcc: %w\n%s", err, out)
	}
	return dir, nil
}

const memoryLimit = "6000" // MB

// arguments says whose each option is: a macro that the model mentions is spin's, another macro is
// gcc's, the others are pan's.
func (s search) arguments() (spin, gcc, pan []string) {
	text, _ := os.ReadFile(s.model) // if it can't be read, build says so
	for _, option := range s.options {
		macro, isMacro := strings.CutPrefix(option, "-D")
		macro, _, _ = strings.Cut(macro, "=")
		switch {
		case isMacro && regexp.MustCompile(`\b`+regexp.QuoteMeta(macro)+`\b`).Match(text):
			spin = append(spin, option)
		case isMacro || strings.HasPrefix(option, "-O"):
			gcc = append(gcc, option)
		default:
			pan = append(pan, option)
		}
	}
	return spin, gcc, pan
}

// command runs a program in a directory, and returns what it prints and the processor time that it
// takes. When ctx ends, it kills the program and what it started.
func command(ctx context.Context, dir, name string, args ...string) (string, time.Duration, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	out, err := cmd.CombinedOutput()
	var used time.Duration
	if cmd.ProcessState != nil {
		used = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	return string(out), used, err
}

var (
	foundLine   = regexp.MustCompile(`(?m)^pan:\d+: (.*) \(at depth -?\d+\)$`)
	errorsLine  = regexp.MustCompile(`(?m)^State-vector \d+ byte, depth reached \d+, errors: (\d+)`)
	statesLine  = regexp.MustCompile(`(?m)^ *([0-9.e+]+) states, stored`)
	memoryLine  = regexp.MustCompile(`(?m)^ *([0-9.]+)\s+total actual memory usage`)
	machineLine = regexp.MustCompile(`(?m)^transition \S+ \S+ \S+$`)
	cutLine     = regexp.MustCompile(`max search depth too small|reached -DMEMLIM bound|` +
		`out of memory|hash table full|(?i:aborted)`)
)

// parse reads pan's report. Whatever makes the search less than complete is in Cut.
func parse(out string) (r result) {
	if m := foundLine.FindStringSubmatch(out); m != nil {
		r.Violation = m[1]
	}
	r.States, r.MB = int(figure(statesLine, out)), figure(memoryLine, out)
	r.Errors = int(figure(errorsLine, out))
	r.Transitions = machineLine.FindAllString(out, -1)
	slices.Sort(r.Transitions)
	r.Transitions = slices.Compact(r.Transitions)
	switch {
	case cutLine.MatchString(out):
		r.Cut = cutLine.FindString(out)
	case !errorsLine.MatchString(out) || !statesLine.MatchString(out):
		r.Cut = "pan gave no report:\n" + out
	case r.Errors > 0 && r.Violation == "":
		r.Cut = "pan counts an error and does not name it:\n" + out
	case r.Errors == 0 && strings.Contains(out, "Search not completed"):
		r.Cut = "search not completed"
	case !strings.Contains(out, "Full statespace search for:"):
		r.Cut = "the states are not stored in full, so that some may be missed"
	}
	return r
}

// figure is the number that a line has; 0, if there is no such line.
func figure(line *regexp.Regexp, out string) float64 {
	m := line.FindStringSubmatch(out)
	if m == nil {
		return 0
	}
	n, _ := strconv.ParseFloat(m[1], 64) // the pattern lets digits through only
	return n
}
