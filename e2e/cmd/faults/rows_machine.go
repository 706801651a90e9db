//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// machineRows are faults of the whole machine.
var machineRows = []Row{
	{Name: "starved-cpu", Group: "machine", About: "64 busy loops on the machine, while the road to etcd is dark and the deadline passes",
		Alone: RowAlone, User: true, Burden: func(context.Context, *runner) (*burden, error) {
			return startBurden(64, "/bin/sh", "-c", "while :; do :; done")
		}, Strike: dark, After: borne},
	{Name: "starved-memory", Group: "machine", About: "nearly all memory is taken while the road to etcd is dark and the deadline passes",
		Alone: AllAlone, Burden: takeMemory,
		Strike: dark, After: borne},
	wallClock("wall-clock-forward", "is set an hour forward", time.Hour),
	wallClock("wall-clock-back", "is set an hour back", -time.Hour),
	{Name: "suspend", Group: "machine", About: "the leader's machine is suspended past its TTL and resumed (all its processes frozen and thawed)",
		Promise: Outside, Alone: OursAlone, CI: true,
		Strike: func(ctx context.Context, t *Trial) error {
			err := t.Leader.Freeze(ctx)
			t.Frozen(t.Leader, t.At, 0)
			return err
		},
		Heal: func(ctx context.Context, t *Trial) error {
			// It sleeps on for a while when another leads.
			err := within(ctx, t.patience(), "no next job", func(ctx context.Context) error {
				return t.Witness.Wait(ctx, func([]harness.Life) bool { return t.next() != nil })
			})
			if err := errors.Join(err, harness.Wait(ctx, time.Second)); err != nil {
				return err
			}
			watchDeath(ctx, t)
			thawed := harness.Now()
			t.frozen[0].to = thawed
			t.Notes["thawed"] = thawed
			return t.Leader.Thaw(ctx)
		},
		After: func(ctx context.Context, t *Trial) error {
			if err := deathOfThreads(ctx, t); err != nil {
				return err
			}
			if thawed, _ := t.Notes["thawed"].(time.Duration); t.Killed != 0 {
				t.Figure("thaw to death", t.Killed-thawed)
			}
			return nil
		}},
}

// memoryLeft is what the burden leaves for all others: enough that the kernel
// need kill nobody, too little to keep every page of every program.
const memoryLeft = 400 // MiB

func takeMemory(ctx context.Context, h *runner) (*burden, error) {
	b, err := startBurden(1, filepath.Join(h.programs, "testjob"), fmt.Sprintf("leave=%d", memoryLeft))
	if err != nil {
		return nil, err
	}
	// A virtual machine may have to get its memory from its host first.
	err = within(ctx, 10*patience, "memory is not full", func(ctx context.Context) error { return b.says(ctx, "full") })
	if err != nil {
		b.lift()
		return nil, err
	}
	return b, nil
}

// lead is the time from the leader's start to the jump of its clock.
const lead = 5 * time.Second

// wallClock is a row in which the leader's daemon, and nothing else, sees the
// wall clock jump. Go reads it without a system call and is linked statically,
// so nothing can come in between: the programs are built with a time package
// that jumps. See shifted.
func wallClock(name, does string, by time.Duration) Row {
	return Row{
		Name: name, Group: "machine", About: "the leader's wall clock " + does,
		Without: []string{harness.EtcdctlLock.Name}, Untouched: true, Shifted: true,
		Change: func(t *Trial, cfg *harness.CandidateConfig) error {
			if cfg.Identity != "a" {
				return nil
			}
			t.Notes["jump"] = harness.Now() + lead
			cfg.Binary = filepath.Join(t.shifted, filepath.Base(cfg.Binary))
			cfg.Env = append(cfg.Env, fmt.Sprintf("%s=%d", clockOffset, int64(by/time.Second)), fmt.Sprintf("%s=%d", clockFrom, (monotonic()+lead).Nanoseconds()))
			return nil
		},
		Strike: func(ctx context.Context, t *Trial) error {
			jump, _ := t.Notes["jump"].(time.Duration)
			left := jump - harness.Now()
			if left <= 0 {
				return errors.New("the clock has jumped before the pair was up")
			}
			if err := harness.Wait(ctx, left); err != nil {
				return err
			}
			t.At = jump
			return nil
		},
		Lasts: 6 * time.Second,
		After: func(ctx context.Context, t *Trial) error { return afterJump(ctx, t, by) },
	}
}

func monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // Linux has always had this clock
	}
	return time.Duration(ts.Nano())
}

// afterJump has the leader stop, which must hand over as ever, and looks for
// the jump in what it logs meanwhile.
func afterJump(ctx context.Context, t *Trial, by time.Duration) error {
	t.Read()
	if !t.Of.ours() || t.moved() {
		return nil
	}
	t.handOver(ctx)
	return jumped(t.Leader.Log(), by)
}

var logTime = regexp.MustCompile(`(?m)^time=(\S+)`)

// jumped tells if the last line of a log was written by a clock that has jumped.
func jumped(log string, by time.Duration) error {
	found := logTime.FindAllStringSubmatch(log, -1)
	if len(found) == 0 {
		return errors.New("the leader logs no times")
	}
	last, err := time.Parse(time.RFC3339Nano, found[len(found)-1][1])
	if err != nil {
		return err
	}
	if off := time.Until(last); (off - by).Abs() > time.Minute {
		return fmt.Errorf("the leader's clock is off by %v, want %v", off, by)
	}
	return nil
}
