//go:build linux

package fault

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"

	"leasehold/e2e/harness"
)

// CPUStarved keeps the processors busy with so many loops, in a cgroup that Recover removes.
func CPUStarved(cgroup *harness.Cgroup, loops int) Fault {
	return stress("cpu-starved", cgroup, loops, "", "/bin/sh", "-c", "while :; do :; done")
}

// MemoryTaken takes all memory but so many MiB, in a cgroup that Recover removes.
func MemoryTaken(cgroup *harness.Cgroup, testjob string, leave int) Fault {
	return stress("memory-taken", cgroup, 1, "full\n", testjob, fmt.Sprintf("leave=%d", leave))
}

// stress is n processes that take from the machine what others need. They have it when each has
// written that it is ready.
func stress(name string, cgroup *harness.Cgroup, n int, ready string, command ...string) Fault {
	var commands []*exec.Cmd
	start := func(ctx context.Context) error {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
		cgroup.Enter(cmd)
		output, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			return err
		}
		commands = append(commands, cmd)
		if ready == "" {
			return nil
		}
		defer context.AfterFunc(ctx, func() { _ = cgroup.Kill() })()
		if line, err := bufio.NewReader(output).ReadString('\n'); line != ready {
			wrote := fmt.Errorf("it wrote %q, want %q", line, ready)
			return errors.Join(wrote, err, context.Cause(ctx))
		}
		return nil
	}
	return Fault{
		Name: name,
		Inject: func(ctx context.Context, _ *Target) error {
			// A virtual machine may have to get its memory from its host first.
			const long = 10 * harness.WaitTimeout
			return harness.Within(ctx, long, "no stress", func(ctx context.Context) error {
				for range n {
					if err := start(ctx); err != nil {
						return fmt.Errorf("start %s: %w", strings.Join(command, " "), err)
					}
				}
				return nil
			})
		},
		Recover: func(ctx context.Context, _ *Target) error {
			_ = cgroup.Kill() // so does Remove
			for _, cmd := range commands {
				_ = cmd.Wait() // it was killed
			}
			return cgroup.Remove(ctx)
		},
		Verify: func(context.Context, *Target) error {
			if len(cgroup.Processes()) < n {
				return errors.New("the stress ended early: did the kernel run out of memory?")
			}
			return nil
		},
	}
}
