//go:build linux

package harness

import (
	"bytes"
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
	"runtime/debug"
	"slices"
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

// RealTime has the calling thread run before others, where that is permitted; its goroutine is
// locked to it until restore. The thread must not end with the goroutine: what was forked on it
// would get the signal that a process gets at its parent thread's end.
//
// With the race detector the thread only gets the highest normal priority: the detector's locks
// spin, and a real-time thread that waits for one keeps its holder from running, for seconds.
func RealTime(priority uint32) (restore func()) {
	runtime.LockOSThread()
	urgent := unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO,
		Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: priority,
	}
	if RaceDetector() {
		urgent.Policy, urgent.Priority, urgent.Nice = unix.SCHED_NORMAL, 0, -20
	}
	permitted := unix.SchedSetAttr(0, &urgent, 0) == nil
	return func() {
		if permitted {
			normal := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}
			_ = unix.SchedSetAttr(0, &normal, 0) // it was so before
		}
		runtime.UnlockOSThread()
	}
}

// RaceDetector says whether this program was built with the race detector.
func RaceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// Stat reads /proc/PID/stat, or that of a thread: the fields after the name, of which the first is
// the state. See proc_pid_stat(5).
func Stat(dir string) ([]string, error) {
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return nil, err
	}
	// The name, in parentheses, may hold anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 7 {
		return nil, fmt.Errorf("%s/stat is %q", dir, stat)
	}
	return fields, nil
}

// WaitStopped waits until SIGSTOP has stopped all threads of a process, or it has ended. Each
// thread runs on until it has seen the signal. One that is traced stops in another state.
func WaitStopped(pid int) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return Until(ctx, func() error {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		if err != nil {
			return err
		}
		for _, thread := range threads {
			if stat, err := Stat(thread); err == nil && !strings.Contains("TtZX", stat[0]) {
				return fmt.Errorf("%s is not stopped: its state is %s", thread, stat[0])
			}
		}
		return nil
	})
}

// Children lists the pids of a process' children.
func Children(pid int) []int { return children()[pid] }

// Descendants lists the pids of all that descend from a process.
func Descendants(pid int) []int {
	children := children()
	all := children[pid]
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}

// children maps each process to its children.
func children() map[int][]int {
	children := map[int][]int{}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // a good pattern
	for _, dir := range dirs {
		fields, err := Stat(dir)
		if err != nil {
			continue // it has just ended
		}
		pid, errPid := strconv.Atoi(filepath.Base(dir))
		parent, errParent := strconv.Atoi(fields[1])
		if errPid == nil && errParent == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	return children
}

// Child is a process that this program has started. It can't outlive it.
type Child struct {
	name           string
	cmd            *exec.Cmd
	stdout, stderr buffer
	copies         sync.WaitGroup // until the child and its descendants have closed both
	ended          chan struct{}  // closed when the child has been reaped
}

// StartChild starts cmd on a node, in a process group of its own, or a session, so that Ctrl-C on a
// terminal reaches this program alone. What it writes is kept, unless cmd says where it goes.
func StartChild(name string, on *Node, cmd *exec.Cmd) (*Child, error) {
	c := &Child{name: name, cmd: cmd, ended: make(chan struct{})}
	var ends []*os.File // the child's ends of the pipes
	defer func() {
		for _, f := range ends {
			_ = f.Close() // the child has its own
		}
	}()
	for to, kept := range map[*io.Writer]*buffer{&cmd.Stdout: &c.stdout, &cmd.Stderr: &c.stderr} {
		if *to != nil {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", name, err)
		}
		*to, ends = w, append(ends, w)
		c.copies.Go(func() {
			_, _ = io.Copy(kept, r) // it ends with the last of those who write
			_ = r.Close()
		})
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr.Setpgid = !cmd.SysProcAttr.Setsid
	// Where cmd says who gets its output, a descendant that lives on must not keep Wait.
	cmd.WaitDelay = 100 * time.Millisecond
	if err := on.Do(cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() { // one goroutine waits for it
		defer close(c.ended)
		_ = cmd.Wait() // what it ended with is in cmd.ProcessState
		copied := make(chan struct{})
		go func() { defer close(copied); c.copies.Wait() }()
		select {
		case <-copied:
		case <-time.After(100 * time.Millisecond): // A descendant lives on, and may still write.
		}
	}()
	return c, nil
}

// Output is what it wrote to standard output so far.
func (c *Child) Output() string { return c.stdout.String() }

// Log is what it wrote to standard error so far.
func (c *Child) Log() string { return c.stderr.String() }

// Pid is its process.
func (c *Child) Pid() int { return c.cmd.Process.Pid }

// Ended is closed when the process has ended.
func (c *Child) Ended() <-chan struct{} { return c.ended }

// Running reports whether the process was started and has not ended.
func (c *Child) Running() bool {
	if c == nil {
		return false
	}
	select {
	case <-c.ended:
		return false
	default:
		return true
	}
}

// Signal returns an error when the process has ended already.
func (c *Child) Signal(sig syscall.Signal) error { return c.cmd.Process.Signal(sig) }

// Kill ends the process with SIGKILL, also while it is stopped, and waits until it has ended.
func (c *Child) Kill() {
	if c != nil {
		_ = c.cmd.Process.Kill() // it may have ended by itself
		<-c.ended
	}
}

// Wait waits for the end of the process and returns its exit code, 128+n after signal n.
func (c *Child) Wait(ctx context.Context) (int, error) {
	select {
	case <-c.ended:
		return exitCode(c.cmd.ProcessState), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for the end of %s: %w", c.name, context.Cause(ctx))
	}
}

// exitCode is that of a process, or 128+n after signal n, as a shell has it.
func exitCode(of *os.ProcessState) int {
	if ws, ok := of.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return of.ExitCode()
}

// RunOnce runs the binary to its end with an environment of its own and returns exit code, standard
// output and standard error.
func RunOnce(
	ctx context.Context, env []string, binary string, args ...string,
) (code int, stdout, stderr string, err error) {
	cmd := exec.Command(binary, args...)
	cmd.Env = env
	c, err := StartChild(strings.Join(cmd.Args, " "), nil, cmd)
	if err != nil {
		return 0, "", "", err
	}
	if code, err = c.Wait(ctx); err != nil {
		c.Kill()
	}
	return code, c.Output(), c.Log(), err
}

// buffer collects what a child writes.
type buffer struct {
	mu   sync.Mutex
	text []byte
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text = append(b.text, p...)
	return len(p), nil
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.text)
}

var given sync.Map // the ports that FreeAddr has returned

// FreeAddr returns a host:port of 127.0.0.1 that nobody listens on. The port is below the range
// from which the kernel takes those of outgoing connections, so that a server that is down for a
// while finds it free again. None is returned twice: who got it first may not listen yet.
func FreeAddr() (string, error) {
	for range 1000 {
		port := 10000 + rand.IntN(20000)
		if _, taken := given.LoadOrStore(port, true); taken {
			continue
		}
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		if l, err := net.Listen("tcp", addr); err == nil {
			return addr, l.Close()
		}
	}
	return "", errors.New("no free port on 127.0.0.1")
}

// Until calls f every few milliseconds until it returns nil, and returns its last error when ctx
// ends first.
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

// Within calls f with a deadline of its own. Where that passes, the error says that so long there
// was what otherwise is.
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

// TempDir makes a directory that users other than this one can enter: daemons and jobs run under
// other uids.
func TempDir(pattern string) (string, error) {
	dir, err := os.MkdirTemp("", pattern)
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}
