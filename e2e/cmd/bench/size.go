//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// idler is a candidate that has nothing to do.
type idler struct {
	*harness.Machine
	role   string
	before map[int]time.Duration // CPU of each process
}

// measureSize measures the programs' binaries, the memory of idlers at the beginning and at the
// end, and their CPU in between.
func (t *testbed) measureSize(ctx context.Context) error {
	const first, during = 10 * time.Second, time.Minute
	fmt.Fprintf(os.Stderr, "measuring memory and idle CPU: %v\n", first+during)
	var idlers []*idler
	defer func() {
		for _, i := range idlers {
			end(i.Machine)
		}
	}()
	for _, of := range harness.Implementations {
		election := t.newElection()
		for n, role := range []string{"leader", "standby"} {
			m, err := t.startCopy(of, election)
			if err != nil {
				return err
			}
			idlers = append(idlers, &idler{Machine: m, role: role})
			if _, err := t.WaitQueue(ctx, election, int64(n+1)); err != nil {
				return err
			}
		}
	}
	if err := harness.Wait(ctx, first); err != nil {
		return err
	}
	if err := t.measureMemory(idlers, first); err != nil {
		return err
	}
	began := harness.Now()
	for _, i := range idlers {
		i.before = cpu(i.Guard())
	}
	if err := harness.Wait(ctx, during); err != nil {
		return err
	}
	for _, i := range idlers {
		used := CPU{
			Implementation: i.Implementation.Name, Role: i.role, TTL: longTTL.Seconds(),
			Seconds: (harness.Now() - began).Seconds(),
		}
		after := cpu(i.Guard())
		for _, pid := range slices.Sorted(maps.Keys(after)) {
			used.Used = append(used.Used, harness.Milliseconds(after[pid]-i.before[pid]))
		}
		t.results.CPU = append(t.results.CPU, used)
	}
	return t.measureMemory(idlers, first+during)
}

// startCopy starts a candidate from a copy of its program: alone on its machine a standby shares no
// page with a leader.
func (t *testbed) startCopy(of harness.Implementation, election string) (*harness.Machine, error) {
	return t.start(of, election, longTTL, func(cfg *harness.CandidateConfig) error {
		info, err := os.Stat(cfg.Binary)
		if err != nil {
			return err
		}
		t.results.Binaries[of.Name] = info.Size()
		original := cfg.Binary
		cfg.Binary = filepath.Join(t.dir, fmt.Sprintf("copy-%d", t.count))
		return harness.CopyProgram(original, cfg.Binary)
	})
}

// measureMemory measures that of standbys.
func (t *testbed) measureMemory(idlers []*idler, after time.Duration) error {
	for _, i := range idlers {
		if i.role != "standby" {
			continue
		}
		m := Memory{Implementation: i.Implementation.Name, When: "after " + after.String()}
		for _, pid := range processes(i.Guard()) {
			kib, own, err := memory(pid)
			if errors.Is(err, os.ErrPermission) {
				fmt.Fprintln(os.Stderr, "the memory of leasehold can be read by root only")
				return nil
			}
			if err != nil {
				return err
			}
			m.KiB, m.Own = append(m.KiB, kib), append(m.Own, own)
		}
		t.results.Memory = append(t.results.Memory, m)
	}
	return nil
}

// processes are a daemon's, with its job.
func processes(guard int) []int { return append([]int{guard}, harness.Descendants(guard)...) }

// memory is the proportional set size of a process in KiB, and how much of that no other candidate
// shares: all but the pages of files.
func memory(pid int) (pss, own int64, err error) {
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, err
	}
	var kib [3]int64
	for i, name := range []string{"Pss:", "Pss_Anon:", "Pss_Shmem:"} {
		_, size, _ := strings.Cut(string(rollup), "\n"+name)
		if _, err := fmt.Sscan(size, &kib[i]); err != nil {
			return 0, 0, fmt.Errorf("read %s of pid %d: %w", name, pid, err)
		}
	}
	return kib[0], kib[1] + kib[2], nil
}

// cpu is the time that each of a daemon's processes has run. Its job, among them, only waits.
func cpu(guard int) map[int]time.Duration {
	used := map[int]time.Duration{}
	for _, pid := range processes(guard) {
		const schedClock = 2 // CPUCLOCK_SCHED: of the whole process, in nanoseconds
		var ts unix.Timespec
		if unix.ClockGettime(int32(^pid<<3|schedClock), &ts) == nil {
			used[pid] = time.Duration(ts.Nano())
		}
	}
	return used
}
