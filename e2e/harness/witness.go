//go:build linux

package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// WitnessVariable names the environment variable in which the test job finds its witness.
const WitnessVariable = "WITNESS"

// Hello is what a process of a job tells the witness first, as a line of JSON.
type Hello struct {
	Candidate string `json:"candidate"`
	Token     int64  `json:"token"`
	Pid       int    `json:"pid"`
	Role      string `json:"role"` // "job" for the job's first process
	// Started is the process' own reading of Now at its start.
	Started time.Duration `json:"started"`
	// Forked is the kernel's account of when the process came to be, rounded down to hundredths of
	// a second. Until Started it has executed nothing of its own.
	Forked time.Duration `json:"forked"`
	// Heartbeat is how often the process tells the witness that it runs; 0: never.
	Heartbeat time.Duration `json:"heartbeat,omitempty"`

	Args        []string          `json:"args,omitempty"`
	Env         []string          `json:"env,omitempty"`
	Status      map[string]string `json:"status,omitempty"`      // of /proc/self/status
	Descriptors map[string]string `json:"descriptors,omitempty"` // of /proc/self/fd
}

// Life is one process of a job as the witness saw it. Its connection closes when the last process
// that holds it has ended, and in no other way: a process forked without exec holds its parent's.
type Life struct {
	Hello
	End time.Duration // zero while it lives
	// Heartbeats are the process' own readings of Now, from just before it sent them.
	Heartbeats []time.Duration
	conn       int
}

// Alive reports whether the connection is still held.
func (l Life) Alive() bool { return l.End == 0 }

// Witness is told of the life of every process of every job: each holds a connection to it. One
// thread waits in one epoll for all of them, with real-time priority where that is permitted, so
// that the recorded ends are late by microseconds, rarely by more (see punctual).
type Witness struct {
	// Addr goes into the job's environment as WITNESS. It is an abstract unix socket: any user
	// reaches it, and it leaves no file. Each node of a network has one of its own of this name.
	Addr string

	epoll, wake int
	stopped     atomic.Bool
	done        chan struct{} // closed when the thread has ended

	mu      sync.Mutex
	sockets map[int]*socket // by descriptor, while open
	lives   []*Life
	changed chan struct{} // closed and replaced at each change
}

// socket is one on which the witness listens, or a process' connection to it.
type socket struct {
	listens bool
	node    *Node  // where it listens
	life    *Life  // of the process, once that has said hello
	said    []byte // the line that is not yet complete
}

var witnesses atomic.Int64 // keeps addresses apart

// NewWitness starts a witness.
func NewWitness() (w *Witness, err error) {
	punctual()
	w = &Witness{
		Addr:  fmt.Sprintf("@leasehold-witness-%d-%d", os.Getpid(), witnesses.Add(1)),
		epoll: -1, wake: -1,
		done: make(chan struct{}), changed: make(chan struct{}),
		sockets: map[int]*socket{},
	}
	w.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err == nil {
		err = w.watch(w.wake)
	}
	if err == nil {
		err = w.ListenOn(nil)
	}
	if err != nil {
		w.closeDescriptors()
		return nil, fmt.Errorf("start a witness: %w", err)
	}
	go w.run()
	return w, nil
}

// punctual has the Go runtime keep nobody waiting who reads the clock when a system call returns,
// as the witness does. That takes one of its processors, and a fork holds one until its child has
// executed, milliseconds where many are under way; so there are more of them than forks. A
// collection stops all threads and waits for those forks as well; so it is rare.
var punctual = sync.OnceFunc(func() {
	runtime.GOMAXPROCS(max(16, runtime.GOMAXPROCS(0)))
	debug.SetGCPercent(1000)
	debug.SetMemoryLimit(256 << 20) // more than this only where it is needed
})

// ListenOn has the witness hear the jobs on a node as well, until Close. It is not an error if it
// does already.
func (w *Witness) ListenOn(node *Node) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.sockets {
		if s.listens && s.node == node {
			return nil
		}
	}
	return node.Do(func() error {
		const kind = unix.SOCK_STREAM | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
		fd, err := unix.Socket(unix.AF_UNIX, kind, 0)
		if err != nil {
			return fmt.Errorf("make a socket for a witness: %w", err)
		}
		err = errors.Join(
			unix.Bind(fd, &unix.SockaddrUnix{Name: w.Addr}), unix.Listen(fd, 4096), w.watch(fd))
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		w.sockets[fd] = &socket{listens: true, node: node}
		return nil
	})
}

// watch is edge-triggered: the kernel then hands events out in the order in which they happened.
func (w *Witness) watch(fd int) error {
	return unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{
		Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET, Fd: int32(fd),
	})
}

// Close ends the witness, and with it every test job that is still alive.
func (w *Witness) Close() {
	if !w.stopped.Swap(true) {
		// It can't fail: the counter is never near its limit.
		_, _ = unix.Write(w.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		<-w.done
	}
}

func (w *Witness) closeDescriptors() {
	for _, fd := range slices.AppendSeq([]int{w.epoll, w.wake}, maps.Keys(w.sockets)) {
		_ = unix.Close(fd) // -1: it was not opened
	}
	clear(w.sockets)
}

func (w *Witness) run() {
	defer close(w.done)
	defer RealTime(2)()
	events := make([]unix.EpollEvent, 256)
	for !w.stopped.Load() {
		n, err := unix.EpollWait(w.epoll, events, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			break
		}
		w.handle(events[:n], Now())
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closeDescriptors()
}

func (w *Witness) handle(events []unix.EpollEvent, now time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range events {
		fd := int(e.Fd)
		switch s := w.sockets[fd]; {
		case s == nil: // to wake, or it was closed and a child that was being forked had it still
		case s.listens:
			w.accept(fd)
		default:
			w.read(fd, s, now)
		}
	}
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *Witness) accept(listener int) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if err != nil {
			return // EAGAIN: that was all of them
		}
		if err := w.watch(fd); err != nil {
			_ = unix.Close(fd)
			continue
		}
		w.sockets[fd] = &socket{}
	}
}

func (w *Witness) read(fd int, s *socket, now time.Duration) {
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case n > 0:
			s.said = append(s.said, buf[:n]...)
			for {
				line, rest, whole := bytes.Cut(s.said, []byte("\n"))
				if !whole {
					break
				}
				w.hear(fd, s, line)
				s.said = rest
			}
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			return
		default: // end of file or reset: its holders have ended
			if s.life != nil {
				s.life.End = now
			}
			_ = unix.Close(fd)
			delete(w.sockets, fd)
			return
		}
	}
}

// hear takes a line that a process has said.
func (w *Witness) hear(fd int, s *socket, line []byte) {
	if s.life == nil {
		if hello := (Hello{}); json.Unmarshal(line, &hello) == nil {
			s.life = &Life{Hello: hello, conn: fd}
			w.lives = append(w.lives, s.life)
		}
		return
	}
	if at, err := strconv.ParseInt(string(line), 10, 64); err == nil {
		s.life.Heartbeats = append(s.life.Heartbeats, time.Duration(at))
	}
}

// Lives lists every process that said hello, in that order.
func (w *Witness) Lives() []Life {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.copies()
}

func (w *Witness) copies() []Life {
	lives := make([]Life, 0, len(w.lives))
	for _, l := range w.lives {
		lives = append(lives, *l)
	}
	return lives
}

// Follow calls f with the processes of all jobs, as they are at a moment or later, at each change
// and as often as given until ctx ends. It forgets those that have ended as soon as f has seen them
// so.
func (w *Witness) Follow(
	ctx context.Context, every time.Duration, f func(at time.Duration, lives []Life),
) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		w.mu.Lock()
		changed, at, lives := w.changed, Now(), w.copies()
		w.lives = slices.DeleteFunc(w.lives, func(l *Life) bool { return l.End != 0 })
		w.mu.Unlock()
		f(at, lives)
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Wait waits until ok is satisfied with the lives so far.
func (w *Witness) Wait(ctx context.Context, ok func([]Life) bool) error {
	for {
		w.mu.Lock()
		changed := w.changed
		w.mu.Unlock()
		lives := w.Lives()
		if ok(lives) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%w; the witness has seen %d lives", context.Cause(ctx), len(lives))
		}
	}
}

// WaitForJob waits for the first process of a job that satisfies ok, of all that have come so far
// or will come, and lives.
func (w *Witness) WaitForJob(ctx context.Context, ok func(Life) bool) (found Life, err error) {
	err = w.Wait(ctx, func(lives []Life) bool {
		i := slices.IndexFunc(lives, func(l Life) bool {
			return l.Role == "job" && l.Alive() && ok(l)
		})
		if i >= 0 {
			found = lives[i]
		}
		return i >= 0
	})
	if err != nil {
		err = fmt.Errorf("wait for a job: %w", err)
	}
	return found, err
}

// WaitForNext waits for the job of a later term than the given one.
func (w *Witness) WaitForNext(ctx context.Context, before Life) (Life, error) {
	return w.WaitForJob(ctx, func(l Life) bool { return l.Token > before.Token })
}

// WaitForDead waits until nothing of the given life's term is alive, and returns when it ended.
func (w *Witness) WaitForDead(ctx context.Context, of Life) (end time.Duration, err error) {
	err = w.Wait(ctx, func(lives []Life) bool {
		end = 0
		for _, l := range lives {
			if l.Token == of.Token && l.Candidate == of.Candidate {
				if l.Alive() {
					return false
				}
				end = max(end, l.End)
			}
		}
		return end != 0
	})
	if err != nil {
		return 0, fmt.Errorf("wait for the end of the job of %s (token %d): %w",
			of.Candidate, of.Token, err)
	}
	return end, nil
}

// Tell sends a command to a process of the test job, such as "exit 3".
func (w *Witness) Tell(l Life, command string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.sockets[l.conn]; s == nil || s.life == nil || s.life.Pid != l.Pid {
		return fmt.Errorf("tell pid %d to %s: it has ended", l.Pid, command)
	}
	_, err := unix.Write(l.conn, append([]byte(command), '\n'))
	return err
}
