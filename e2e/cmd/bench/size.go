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

func (b *bench) binaries() map[string]string {
	return map[string]string{
		harness.Leasehold.Name:   b.program("leasehold"),
		harness.StockLoop.Name:   b.program("stockloop"),
		harness.EtcdctlLock.Name: b.etcd.Ctl,
	}
}

// measureIdle measures candidates that have nothing to do: their memory at the
// beginning and at the end, and the CPU in between. Each standby runs from a
// copy of its program, for alone on its machine it would share no page with a
// leader.
func (s *stage) measureIdle(ctx context.Context, during time.Duration) error {
	fmt.Fprintf(os.Stderr, "measuring memory and idle CPU: %v\n", during+10*time.Second)
	type idler struct {
		*candidate
		role   string
		before map[int]time.Duration // CPU of each process
		begin  time.Duration
	}
	var idlers []*idler
	defer func() {
		for _, c := range idlers {
			s.end(c.candidate)
		}
	}()
	for _, of := range harness.Implementations {
		s.count++
		election := fmt.Sprintf("bench/%d", s.count)
		for i, role := range []string{"leader", "standby"} {
			binary := filepath.Join(s.dir, fmt.Sprintf("copy-%d", s.count))
			if err := copyFile(s.binaries()[of.Name], binary); err != nil {
				return err
			}
			c, err := s.start(of, election, longTTL, binary)
			if err != nil {
				return err
			}
			idlers = append(idlers, &idler{candidate: c, role: role})
			if _, err := s.queue(ctx, election, int64(i+1)); err != nil {
				return err
			}
		}
	}
	if err := harness.Wait(ctx, 10*time.Second); err != nil {
		return err
	}
	memory := func(when string) error {
		for _, c := range idlers {
			if c.role != "standby" {
				continue
			}
			m := Memory{Contender: c.of.Name, When: when}
			for _, pid := range append([]int{c.Guard()}, harness.Descendants(c.Guard())...) {
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
			s.results.Memory = append(s.results.Memory, m)
		}
		return nil
	}
	if err := memory("after 10s"); err != nil || during == 0 {
		return err
	}
	for _, c := range idlers {
		c.before, c.begin = cpu(c.Guard()), harness.Now()
	}
	if err := harness.Wait(ctx, during); err != nil {
		return err
	}
	for _, c := range idlers {
		used := CPU{Contender: c.of.Name, Role: c.role, TTL: longTTL.Seconds(), Seconds: (harness.Now() - c.begin).Seconds()}
		after := cpu(c.Guard())
		for _, pid := range slices.Sorted(maps.Keys(after)) {
			used.Used = append(used.Used, harness.Milliseconds(after[pid]-c.before[pid]))
		}
		s.results.CPU = append(s.results.CPU, used)
	}
	return memory("after " + (10*time.Second + during).String())
}

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

// cpu is the time that each of a daemon's processes has run, its job among
// them, which waits.
func cpu(guard int) map[int]time.Duration {
	used := map[int]time.Duration{}
	for _, pid := range append([]int{guard}, harness.Descendants(guard)...) {
		const schedClock = 2 // CPUCLOCK_SCHED: of the whole process, in nanoseconds
		var ts unix.Timespec
		if unix.ClockGettime(int32(^pid<<3|schedClock), &ts) == nil {
			used[pid] = time.Duration(ts.Nano())
		}
	}
	return used
}

func copyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}
