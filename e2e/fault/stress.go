//go:build linux

package fault

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"

	"leasehold/e2e/harness"
)

// Stress is processes that take from the machine what others need.
type Stress struct {
	cgroup   *harness.Cgroup
	commands []*exec.Cmd
	outputs  []io.Reader
}

// BusyLoop is a command that takes a processor.
var BusyLoop = []string{"/bin/sh", "-c", "while :; do :; done"}

// StartStress starts so many processes with a command, in a cgroup that End
// removes.
func StartStress(cgroup *harness.Cgroup, n int, command ...string) (*Stress, error) {
	s := &Stress{cgroup: cgroup}
	for range n {
		if err := s.start(command); err != nil {
			s.End()
			return nil, fmt.Errorf("start stress: %w", err)
		}
	}
	return s, nil
}

func (s *Stress) start(command []string) error {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	s.cgroup.Enter(cmd)
	output, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	s.commands, s.outputs = append(s.commands, cmd), append(s.outputs, output)
	return cmd.Start()
}

// WaitFor waits until each process has written the word.
func (s *Stress) WaitFor(ctx context.Context, word string) error {
	stop := context.AfterFunc(ctx, s.kill)
	defer stop()
	for _, o := range s.outputs {
		line, err := bufio.NewReader(o).ReadString('\n')
		if err != nil || strings.TrimSpace(line) != word {
			wrote := fmt.Errorf("the stress wrote %q, want %q", line, word)
			return errors.Join(wrote, err, context.Cause(ctx))
		}
	}
	return nil
}

func (s *Stress) kill() {
	for _, cmd := range s.commands {
		if cmd.Process != nil {
			_ = cmd.Process.Kill() // it may have ended
		}
	}
}

// Running reports whether all of its processes still run. The kernel may have
// killed one that took memory.
func (s *Stress) Running() bool {
	for _, cmd := range s.commands {
		fields, err := harness.Stat(fmt.Sprintf("/proc/%d", cmd.Process.Pid))
		if err != nil || fields[0] == "Z" {
			return false
		}
	}
	return true
}

// End ends the stress.
func (s *Stress) End() {
	s.kill()
	for _, cmd := range s.commands {
		_ = cmd.Wait() // it was killed
	}
	s.commands = nil
	_ = s.cgroup.Remove(context.Background()) // the next run tries again
}

// CPUStarved keeps the processors busy with so many loops, in a cgroup.
func CPUStarved(cgroup *harness.Cgroup, loops int) Fault {
	var stress *Stress
	return Fault{
		Name: "cpu-starved",
		Inject: func(context.Context, *Target) (err error) {
			stress, err = StartStress(cgroup, loops, BusyLoop...)
			return err
		},
		Recover: func(context.Context, *Target) error { stress.End(); return nil },
	}
}
