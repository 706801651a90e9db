//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// A burden is some processes that take from the machine what others need.
type burden struct {
	cgroup   string
	commands []*exec.Cmd
	outputs  []io.Reader
}

// startBurden starts so many processes with a command.
func startBurden(n int, command ...string) (*burden, error) {
	b := &burden{}
	if err := b.start(n, command...); err != nil {
		b.lift()
		return nil, err
	}
	return b, nil
}

func (b *burden) start(n int, command ...string) (err error) {
	if b.cgroup, err = makeCgroup(); err != nil {
		return err
	}
	dir, err := os.Open(b.cgroup)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	for range n {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true, UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		output, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("start a burden: %w", err)
		}
		b.commands, b.outputs = append(b.commands, cmd), append(b.outputs, output)
	}
	return nil
}

// says waits until each process has said the word.
func (b *burden) says(ctx context.Context, word string) error {
	stop := context.AfterFunc(ctx, b.kill)
	defer stop()
	for _, o := range b.outputs {
		line, err := bufio.NewReader(o).ReadString('\n')
		if err != nil || strings.TrimSpace(line) != word {
			return errors.Join(fmt.Errorf("a burden says %q, want %q", line, word), err, context.Cause(ctx))
		}
	}
	return nil
}

func (b *burden) kill() {
	for _, cmd := range b.commands {
		_ = cmd.Process.Kill() // it may have ended
	}
}

// alive tells if all of its processes still live.
func (b *burden) alive() bool {
	for _, cmd := range b.commands {
		if cmd.Process.Signal(syscall.Signal(0)) != nil {
			return false
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
		if err != nil || strings.HasPrefix(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " Z") {
			return false
		}
	}
	return true
}

// lift ends the burden.
func (b *burden) lift() {
	b.kill()
	for _, cmd := range b.commands {
		_ = cmd.Wait() // it was killed
	}
	b.commands = nil
	if b.cgroup != "" {
		_ = removeCgroup(context.Background(), b.cgroup) // the next run tries again
	}
	b.cgroup = ""
}

// bear starts the row's burden, unless it is there, and lifts any other.
func (h *runner) bear(ctx context.Context, row *Row) (err error) {
	h.bearing.Lock()
	defer h.bearing.Unlock()
	if h.burdenFor == row && h.burden != nil && h.burden.alive() {
		return nil
	}
	h.unburden()
	if row.Burden != nil {
		h.burden, err = row.Burden(ctx, h)
		h.burdenFor = row
	}
	return err
}

func (h *runner) unburden() {
	if h.burden != nil {
		h.burden.lift()
	}
	h.burden, h.burdenFor = nil, nil
}

// borne checks that the burden was there to the end.
func borne(_ context.Context, t *Trial) error {
	t.bearing.Lock()
	defer t.bearing.Unlock()
	if t.burden == nil || !t.burden.alive() {
		return errors.New("the burden ended early: did the kernel run out of memory?")
	}
	return nil
}
