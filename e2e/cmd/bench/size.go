//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// binaries are the programs of the implementations.
func (b *bench) binaries() map[string]string {
	return map[string]string{
		harness.Leasehold.Name:   b.programs.Leasehold,
		harness.StockLoop.Name:   b.programs.Stockloop,
		harness.EtcdctlLock.Name: b.etcd.Ctl,
	}
}

// measureBinaries takes the sizes of the programs.
func (b *bench) measureBinaries() error {
	for name, path := range b.binaries() {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		b.results.Binaries[name] = info.Size()
	}
	return nil
}

// idler is a candidate that has nothing to do.
type idler struct {
	*harness.Machine
	role   string
	before map[int]time.Duration // CPU of each process
	began  time.Duration
}

// measureIdle measures idlers: their memory at the beginning and at the end, and the CPU in
// between.
func (t *testbed) measureIdle(ctx context.Context, during time.Duration) error {
	const first = 10 * time.Second
	fmt.Fprintf(os.Stderr, "measuring memory and idle CPU: %v\n", during+first)
	var idlers []*idler
	defer func() {
		for _, i := range idlers {
			t.end(i.Machine)
		}
	}()
	for _, of := range harness.Implementations {
		t.count++
		election := fmt.Sprintf("bench/%d", t.count)
		for n, role := range []string{"leader", "standby"} {
			// From a copy of the program: alone on its machine a standby shares no page with a leader.
			binary := filepath.Join(t.dir, fmt.Sprintf("copy-%d", t.count))
			if err := harness.CopyProgram(t.binaries()[of.Name], binary); err != nil {
				return err
			}
			m, err := t.start(of, election, longTTL, binary)
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
	if err := t.measureMemory(idlers, first); err != nil || during == 0 {
		return err
	}
	for _, i := range idlers {
		i.before, i.began = cpu(i.Guard()), harness.Now()
	}
	if err := harness.Wait(ctx, during); err != nil {
		return err
	}
	for _, i := range idlers {
		used := CPU{
			Contender: i.Implementation.Name, Role: i.role, TTL: longTTL.Seconds(),
			Seconds: (harness.Now() - i.began).Seconds(),
		}
		after := cpu(i.Guard())
		for _, pid := range slices.Sorted(maps.Keys(after)) {
			used.Used = append(used.Used, harness.Milliseconds(after[pid]-i.before[pid]))
		}
		t.results.CPU = append(t.results.CPU, used)
	}
	return t.measureMemory(idlers, first+during)
}

func (t *testbed) measureMemory(idlers []*idler, after time.Duration) error {
	for _, i := range idlers {
		if i.role != "standby" {
			continue
		}
		m := Memory{Contender: i.Implementation.Name, When: "after " + after.String()}
		for _, pid := range processes(i.Guard()) {
			kib, err := pss(pid)
			if errors.Is(err, os.ErrPermission) {
				fmt.Fprintln(os.Stderr, "the memory of leasehold can be read by root only")
				return nil
			}
			if err != nil {
				return err
			}
			m.KiB = append(m.KiB, kib)
		}
		t.results.Memory = append(t.results.Memory, m)
	}
	return nil
}

// processes are a daemon's, with its job.
func processes(guard int) []int { return append([]int{guard}, harness.Descendants(guard)...) }

// pss is the proportional set size of a process in KiB.
func pss(pid int) (int64, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if rest, found := strings.CutPrefix(lines.Text(), "Pss:"); found {
			return strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
		}
	}
	return 0, errors.Join(fmt.Errorf("no Pss for pid %d", pid), lines.Err())
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
