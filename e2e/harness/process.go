//go:build linux

package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

// Now reads CLOCK_BOOTTIME, the clock of all times in this package.
func Now() time.Duration { return boottime.Now() }

// RealTime has the calling thread run before others, where that is permitted; its
// goroutine is locked to it until restore. The thread must not end with the
// goroutine: what was forked on it would get the signal that a process gets at its
// parent thread's end.
func RealTime(priority uint32) (restore func()) {
	runtime.LockOSThread()
	fifo := unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO,
		Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: priority,
	}
	permitted := unix.SchedSetAttr(0, &fifo, 0) == nil
	return func() {
		if permitted {
			normal := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}
			_ = unix.SchedSetAttr(0, &normal, 0) // it was so before
		}
		runtime.UnlockOSThread()
	}
}

// Stat reads /proc/PID/stat, or that of a thread: the fields after the name, of
// which the first is the state. See proc_pid_stat(5).
func Stat(dir string) ([]string, error) {
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return nil, err
	}
	// The name, in parentheses, may hold anything.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 7 {
		return nil, fmt.Errorf("%s/stat is %q", dir, stat)
	}
	return fields, nil
}

// process is a child with one goroutine that waits for it.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when the child has been reaped
}

// startProcessOn is startProcess on a node of a network, unless that is nil.
func startProcessOn(node *Node, cmd *exec.Cmd) (p *process, err error) {
	if node == nil {
		return startProcess(cmd)
	}
	err = node.Do(func() error {
		p, err = startProcess(cmd)
		return err
	})
	return p, err
}

// startProcess starts cmd so that it can't outlive this program, in a process
// group of its own, or a session, so that Ctrl-C on a terminal reaches this
// program alone.
func startProcess(cmd *exec.Cmd) (*process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr.Setpgid = !cmd.SysProcAttr.Setsid
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		_ = cmd.Wait() // what it ended with is in cmd.ProcessState
	}()
	return p, nil
}

func (p *process) alive() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// signal reports an error when the process has ended already.
func (p *process) signal(sig syscall.Signal) error {
	return p.cmd.Process.Signal(sig)
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended by itself
	<-p.ended
}

// code is the exit code, or 128+n after signal n, as a shell has it.
func (p *process) code() int {
	ws, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return p.cmd.ProcessState.ExitCode()
}

// buffer collects what a child writes.
type buffer struct {
	mu   sync.Mutex
	text strings.Builder
	also io.Writer // may be nil
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.also != nil {
		if _, err := b.also.Write(p); err != nil {
			return 0, err
		}
	}
	return b.text.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

var given sync.Map // the ports that FreePort has returned

// FreePort returns a TCP port of 127.0.0.1 that nobody listens on. It is below
// the range from which the kernel takes the ports of outgoing connections, so
// that a server that is down for a while finds its port free again. No port is
// returned twice: who got it first may not listen yet.
func FreePort() (int, error) {
	for range 1000 {
		port := 10000 + rand.IntN(20000)
		if _, taken := given.LoadOrStore(port, true); taken {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		return port, l.Close()
	}
	return 0, errors.New("no free port on 127.0.0.1")
}

// FreeAddr is FreePort as host:port.
func FreeAddr() (string, error) {
	port, err := FreePort()
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), err
}

// Until calls f every few milliseconds until it returns nil, and returns its
// last error when ctx ends first.
func Until(ctx context.Context, f func() error) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// Within calls f with a deadline of its own. Where that passes, the error says that
// so long there was what otherwise is.
func Within(
	ctx context.Context, d time.Duration, otherwise string, f func(context.Context) error,
) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d, fmt.Errorf("%s within %v", otherwise, d))
	defer cancel()
	return f(ctx)
}

// UntilWithin is Until with a deadline of its own.
func UntilWithin(ctx context.Context, d time.Duration, otherwise string, f func() error) error {
	return Within(ctx, d, otherwise, func(ctx context.Context) error { return Until(ctx, f) })
}

// Wait lets time pass: that of a fault, or that in which something is measured.
func Wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// TempDir makes a directory that users other than this one can enter: daemons
// and jobs run under other uids.
func TempDir(pattern string) (string, error) {
	dir, err := os.MkdirTemp("", pattern)
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}
