//go:build linux

package reload

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

// ErrNoAnswer means that the signal was sent, and nobody has said how the reload ended.
var ErrNoAnswer = errors.New("the daemon does not answer: its log says what it has done")

// A RefusedError says why nothing was done, or that the reload has failed. The job was left alone.
type RefusedError struct{ Why string }

func (e *RefusedError) Error() string { return e.Why }

func refuse(format string, args ...any) error {
	return &RefusedError{fmt.Sprintf(format, args...)}
}

// ThreadName is how a thread of each guard is named, by which the asker knows a guard.
const ThreadName = "guard-starter"

// Time limits. The guard connects at once, and bounds by itself how long a reload may take: its
// check 15 s, then the start of an elector.
const (
	connectTimeout = 10 * time.Second
	outcomeTimeout = time.Minute
)

// A Request asks for a reload.
type Request struct {
	PID int
	// Command must be the guard's own; nil: it does not matter.
	Command []string
	// Settings replace those of the guard's environment; nil: they do not.
	Settings []string
}

// Ask has a guard reload, and returns the version that runs then. The error is a *RefusedError,
// wraps ErrNoAnswer, or comes from the system.
func Ask(r Request) (version string, err error) {
	a, err := newAsker(r.PID)
	if err != nil {
		return "", err
	}
	defer a.close()
	if r.Settings != nil {
		if a.settings, err = newSettings(r.Settings); err != nil {
			return "", err
		}
	}
	if err := a.check(r.Command); err != nil {
		return "", err
	}
	if err := a.listen(); err != nil {
		return "", err
	}
	switch err := unix.PidfdSendSignal(a.pidfd, Signal, nil, 0); {
	case errors.Is(err, unix.EPERM):
		return "", refuse("not permitted to signal process %d: be its user, or root", r.PID)
	case errors.Is(err, unix.ESRCH):
		return "", refuse("process %d has exited", r.PID)
	case err != nil:
		return "", fmt.Errorf("signal process %d: %w", r.PID, err)
	}
	o, err := a.outcome()
	switch {
	case err != nil:
		return "", err
	case !o.Done:
		return "", &RefusedError{o.Text}
	}
	return o.Text, nil
}

// asker is `leasehold reload`.
type asker struct {
	process
	pidfd, settings, listener, conn int // -1: none
}

func newAsker(pid int) (*asker, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		return nil, refuse("there is no process %d", pid)
	case err != nil:
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &asker{
		process: process{pid: pid}, pidfd: pidfd, settings: -1, listener: -1, conn: -1,
	}, nil
}

func (a *asker) close() {
	for _, fd := range []int{a.pidfd, a.settings, a.listener, a.conn} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// check refuses what is no guard: the signal would end it, or mean something else to it. What it
// reads is of the process of the pidfd, because that process lives afterwards.
func (a *asker) check(command []string) error {
	err := a.read()
	if err == nil && a.exited() {
		err = unix.ESRCH
	}
	if err != nil {
		return refuse("process %d can't be read: %v", a.pid, err)
	}
	own := slices.Index(a.args, "--")
	switch {
	case !a.guards || !a.catches || own < 1:
		return refuse("process %d is not a leasehold that runs a job"+
			" (the main process, which was started)", a.pid)
	case command != nil && !slices.Equal(command, a.args[own+1:]):
		return refuse("the command can't be changed by a reload: restart the daemon")
	}
	return nil
}

// listen makes the socket on which the guard is going to answer.
func (a *asker) listen() (err error) {
	address := &unix.SockaddrUnix{Name: Address(a.inner, a.started)}
	a.listener, err = unix.Socket(unix.AF_UNIX,
		unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err == nil {
		err = unix.Bind(a.listener, address)
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return a.held(address)
	}
	if err == nil {
		err = unix.Listen(a.listener, 128) // anybody may connect
	}
	if err != nil {
		return fmt.Errorf("listen for the answer: %w", err)
	}
	return nil
}

// held says who listens already. That may be anybody.
func (a *asker) held(address unix.Sockaddr) error {
	by := "a process that can't be asked"
	if unix.Connect(a.listener, address) == nil {
		if peer, err := unix.GetsockoptUcred(a.listener, unix.SOL_SOCKET,
			unix.SO_PEERCRED); err == nil {
			by = fmt.Sprintf("process %d of user %d", peer.Pid, peer.Uid)
		}
	}
	return refuse("another reload of process %d is under way, by %s."+
		" If that is none, end it, or use kill -s RTMIN+1 %d", a.pid, by, a.pid)
}

// outcome sends the request, and waits for the guard's answer.
func (a *asker) outcome() (Outcome, error) {
	for end := boottime.Now() + connectTimeout; a.conn < 0; {
		switch ready, err := a.wait(a.listener, end); {
		case err != nil:
			return Outcome{}, err
		case ready == nothingReady:
			return Outcome{}, fmt.Errorf("%w. It may be an older leasehold, or in another network"+
				" or time namespace. In a container, run leasehold reload there", ErrNoAnswer)
		case ready == guardExited:
			return Outcome{}, a.gone()
		}
		conn, _, err := unix.Accept4(a.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if err != nil {
			continue // whoever it was has gone
		}
		// Anybody may connect. Only the guard counts.
		if peer, err := unix.GetsockoptUcred(conn, unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil ||
			int(peer.Pid) != a.pid {
			_ = unix.Close(conn)
			continue
		}
		a.conn = conn
	}
	var rights []byte
	if a.settings >= 0 {
		rights = unix.UnixRights(a.settings)
	}
	// If it fails, the guard has closed the connection, and may have said why.
	_ = unix.Sendmsg(a.conn, []byte(requestText), rights, nil, unix.MSG_NOSIGNAL)
	switch ready, err := a.wait(a.conn, boottime.Now()+outcomeTimeout); {
	case err != nil:
		return Outcome{}, err
	case ready == nothingReady:
		return Outcome{}, fmt.Errorf("%w. The reload has not ended within %s",
			ErrNoAnswer, outcomeTimeout)
	case ready == guardExited:
		return Outcome{}, a.gone()
	}
	var message [maxOutcome]byte
	n, err := unix.Read(a.conn, message[:])
	if errors.Is(err, unix.ECONNRESET) {
		// The guard has answered and closed the connection before it read the request. The kernel
		// says so first, once.
		n, err = unix.Read(a.conn, message[:])
	}
	o, ok := decodeOutcome(message[:max(n, 0)])
	switch {
	case err == nil && ok:
		return o, nil
	case a.exited():
		return Outcome{}, a.gone()
	}
	return Outcome{}, fmt.Errorf("%w. It has closed the connection", ErrNoAnswer)
}

func (a *asker) gone() error {
	return refuse("process %d has exited before the reload was done", a.pid)
}

// What wait has seen.
const (
	nothingReady = iota // in time
	fdReady
	guardExited
)

// wait waits until fd can be read, or the guard has exited. It prefers fd: the guard may have
// answered before it exited.
func (a *asker) wait(fd int, end time.Duration) (ready int, err error) {
	fds := []unix.PollFd{
		{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(a.pidfd), Events: unix.POLLIN},
	}
	for {
		left := end - boottime.Now()
		if left <= 0 {
			return nothingReady, nil
		}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return nothingReady, fmt.Errorf("wait for the answer: %w", err)
		case n > 0 && fds[0].Revents != 0:
			return fdReady, nil
		case n > 0:
			return guardExited, nil
		}
	}
}

func (a *asker) exited() bool {
	fds := []unix.PollFd{{Fd: int32(a.pidfd), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, 0)
	return n > 0
}

// process is what /proc shows of a process.
type process struct {
	pid     int
	inner   int      // its pid in its own namespace
	args    []string // its command line
	started string
	catches bool // the Signal
	guards  bool // it has the thread that only a guard has
}

func (p *process) read() error {
	dir := "/proc/" + strconv.Itoa(p.pid) + "/"
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return err
	}
	p.inner = p.pid
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		fields := strings.Fields(value)
		if len(fields) == 0 {
			continue
		}
		switch last := fields[len(fields)-1]; name {
		case "NSpid":
			if p.inner, err = strconv.Atoi(last); err != nil {
				return err
			}
		case "SigCgt":
			caught, err := strconv.ParseUint(last, 16, 64)
			if err != nil {
				return err
			}
			p.catches = caught&(1<<(Signal-1)) != 0
		}
	}
	threads, _ := filepath.Glob(dir + "task/*/comm")
	for _, thread := range threads {
		name, _ := os.ReadFile(thread) // it may have ended
		p.guards = p.guards || string(name) == ThreadName+"\n"
	}
	cmdline, err := os.ReadFile(dir + "cmdline")
	if err != nil {
		return err
	}
	p.args = strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return err
	}
	p.started, err = startTime(stat)
	return err
}
