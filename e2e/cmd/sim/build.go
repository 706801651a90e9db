package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// A change to a file of Go's runtime. Each text must be in the file exactly once: if another
// version of Go has it in other words, the build fails.
type change struct{ file, from, to string }

// runtimeChanges make the runtime's choices in a bubble depend on a seed. A goroutine of a bubble
// draws from one stream; everything else in the process draws from Go's own. And no goroutine is
// preempted, or overtaken by one from the global queue, because that would depend on the real time.
var runtimeChanges = []change{
	{"rand.go", "func rand() uint64 {\n", `func rand() uint64 {
	if inSeededBubble() {
		return nextSeeded()
	}
`},
	{"select.go", "j := cheaprandn(uint32(norder + 1))", "j := seededn(uint32(norder + 1))"},
	{"time.go", "t.rand = cheaprand()", "t.rand = seededn(1<<32 - 1)"},
	// A select adds the timers that it waits for to the bubble's, each with a random number. The
	// order of its locks is that of addresses.
	{"select.go", `
		if c.timer != nil {
			blockTimerChan(c)
		}
	}
`, `	}
	for _, i := range pollorder {
		if c := scases[i].c; c.timer != nil {
			blockTimerChan(c)
		}
	}
`},
	{"rand.go", "// rand32 is uint32(rand())", `var seeded uint64 // 0: not seeded

//go:linkname seedBubble leasehold/e2e/sim.seedRuntime
func seedBubble(seed uint64) { seeded = seed }

//go:nosplit
func inSeededBubble() bool {
	mp := getg().m
	return seeded != 0 && mp.curg != nil && mp.curg.bubble != nil
}

// nextSeeded is SplitMix64.
//
//go:nosplit
func nextSeeded() uint64 {
	seeded += 0x9e3779b97f4a7c15
	x := seeded
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// seededn is as cheaprandn.
//
//go:nosplit
func seededn(n uint32) uint32 {
	if !inSeededBubble() {
		return cheaprandn(n)
	}
	return uint32(nextSeeded() >> 32 * uint64(n) >> 32)
}

// rand32 is uint32(rand())`},
	// The hash of every map's keys, and with it the order of big maps.
	{"rand.go", "	globalRand.state.Init(*seed)\n", `	*seed = [32]byte{1}
	globalRand.state.Init(*seed)
`},
	{
		"proc.go",
		"const forcePreemptNS = 10 * 1000 * 1000 // 10ms", "const forcePreemptNS = 1 << 60",
	},
	{"proc.go", "if pp.schedtick%61 == 0 && !sched.runq.empty() {", "if false {"},
	// For speed alone: the heap only grows within a run, and gRPC's goroutines need more than 2 kB.
	{"mem_linux.go", "if debug.disablethp != 0 {", "sysHugePageOS(v, n)\n\tif false {"},
	{
		"stack.go", "var startingStackSize uint32 = fixedStack",
		"var startingStackSize uint32 = 8 << 10",
	},
}

// build compiles the simulation with the changed runtime, and with the mutation's patch if it is
// not "".
func build(ctx context.Context, out, patch string) error {
	dir, err := os.MkdirTemp("", "leasehold-sim-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	replace := map[string]string{}
	if err := changeRuntime(ctx, dir, replace); err != nil {
		return err
	}
	if patch != "" {
		if err := mutate(ctx, dir, patch, replace); err != nil {
			return err
		}
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, overlay, 0o600); err != nil {
		return err
	}
	_, err = run(ctx, ".", "go", "test", "-c", "-trimpath", "-tags", "simruntime",
		"-overlay", file, "-o", out, "./e2e/sim")
	return err
}

func changeRuntime(ctx context.Context, dir string, replace map[string]string) error {
	root, err := run(ctx, ".", "go", "env", "GOROOT")
	if err != nil {
		return err
	}
	for _, c := range runtimeChanges {
		path := filepath.Join(strings.TrimSpace(root), "src", "runtime", c.file)
		from := path
		if done := replace[path]; done != "" {
			from = done
		}
		text, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if strings.Count(string(text), c.from) != 1 {
			return fmt.Errorf("%s of this version of Go has not %q once", path, c.from)
		}
		replace[path] = filepath.Join(dir, c.file)
		changed := strings.Replace(string(text), c.from, c.to, 1)
		if err := os.WriteFile(replace[path], []byte(changed), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// mutate applies the patch to a copy of the election package, and of the simulated guard.
func mutate(ctx context.Context, dir, patch string, replace map[string]string) error {
	text, err := os.ReadFile(patch)
	if err != nil {
		return err
	}
	here, err := os.Getwd()
	if err != nil {
		return err
	}
	var files []string
	for _, pkg := range []string{"election", "e2e/sim"} {
		found, err := filepath.Glob(pkg + "/*.go")
		if err == nil {
			err = os.CopyFS(filepath.Join(dir, pkg), os.DirFS(pkg))
		}
		if err != nil {
			return err
		}
		files = append(files, found...)
	}
	if err := os.WriteFile(filepath.Join(dir, "patch"), text, 0o600); err != nil {
		return err
	}
	if _, err := run(ctx, dir, "git", "apply", "patch"); err != nil {
		return err
	}
	for _, f := range files {
		replace[filepath.Join(here, f)] = filepath.Join(dir, f)
	}
	return nil
}

// run runs a program and returns what it writes.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, exit.Stderr)
	}
	return string(out), err
}
