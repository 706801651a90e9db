//go:build linux

package guard

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/internal/nofile"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// spawner is the guard's end of the spawner, a small process between guard and job: it starts the job, reaps it, and kills it when
// the guard asks for it, when the elector does, or when the guard is gone.
//
// It is a child subreaper, as the guard is. So after the death of any one of the daemon's processes the whole job is still found by
// descent: all of it descends from the spawner while that lives, and falls to the guard when it doesn't. That the spawner has no
// child left, which wait4(2) tells, proves that nothing of the job is left. The proof needs no /proc; to name its children the spawner
// reads the kernel's list of them, which hidepid does not shorten.
type spawner struct {
	area    *spawnArea
	mem     []byte // the area, and after it what the job's execve needs
	envp    []uintptr
	terms   int // where in mem the entries of the term go
	sock    int // SOCK_SEQPACKET, non-blocking
	elector int // the elector's end, until that has it, then -1
	pid     int // 0: it has ended
	zombie  int // its pid then, until it is reaped
	pidfd   int

	sent    ipc.SpawnerMessage
	got     ipc.SpawnerMessage
	control spawnControl
	iov     [2]uintptr
	header  spawnHeader

	waiting bool          // it was asked for something, and owes a turn
	turns   uint32        // as last seen
	turned  time.Duration // when it was last seen to turn, or was asked
	looked  time.Duration // when it was last looked at
	missed  int           // looks in a row at which it had not
}

// termVariables is how many entries of the environment a term adds, and termBytes bounds their length.
const (
	termVariables = 5
	termBytes     = 8 << 10
)

// newSpawner makes what guard and spawner share, and forks the spawner. It must be called on the thread that lives as long as the
// guard. The descriptors are those that the spawner keeps.
func newSpawner(cfg Config, c *proctree.Cgroup, proc int, noNewPrivs bool) (*spawner, error) {
	s := &spawner{sock: -1, elector: -1, pidfd: -1}
	if err := s.layOut(cfg); err != nil {
		return nil, err
	}
	toGuard, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		s.close()
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	defer func() { _ = unix.Close(toGuard[1]) }()
	s.sock = toGuard[0]
	toElector, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		s.close()
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	defer func() { _ = unix.Close(toElector[1]) }()
	s.elector = toElector[0]

	a := s.area
	a.guardPid, a.guardSock, a.electorSock, a.procFd = int32(unix.Getpid()), int32(toGuard[1]), int32(toElector[1]), int32(proc)
	a.cgroupFd = -1
	if c != nil {
		a.cgroupFd, a.leaf = int32(c.FD), int32(c.Leaves)
	}
	if noNewPrivs {
		a.noNewPrivs = 1
	}
	for _, sig := range cfg.Ignored {
		a.keepIgnored |= 1 << (sig - 1)
	}
	a.nofile = [2]uint64{nofile.Original.Soft, nofile.Original.Hard}
	a.message = ipc.SpawnerMessage{}
	a.iov = [2]uintptr{uintptr(unsafe.Pointer(&a.message)), uintptr(ipc.SpawnerMessageLen)}
	a.header = spawnHeader{iov: uintptr(unsafe.Pointer(&a.iov)), iovLen: 1}
	a.control = spawnControl{len: unsafe.Offsetof(a.control.fd) + 4, level: unix.SOL_SOCKET, kind: unix.SCM_RIGHTS}
	a.clone = spawnClone{
		flags: unix.CLONE_PIDFD | unix.CLONE_INTO_CGROUP, pidfd: uint64(uintptr(unsafe.Pointer(&a.pidfd))), exitSignal: uint64(unix.SIGCHLD),
	}
	a.urgent = unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: 1}
	copy(a.listPath[:len(a.listPath)-1], "thread-self/children")
	copy(a.name[:len(a.name)-1], "leasehold-spawn")
	copy(a.title[:len(a.title)-1], "leasehold\x00spawner")
	// The kernel lays out a process's arguments one after the other.
	last := os.Args[len(os.Args)-1]
	a.titleAt = unsafe.Pointer(unsafe.StringData(os.Args[0]))
	a.titleLen = int32(uintptr(unsafe.Pointer(unsafe.StringData(last))) + uintptr(len(last)) - uintptr(a.titleAt))

	// The header of our own reads.
	s.iov = [2]uintptr{uintptr(unsafe.Pointer(&s.got)), uintptr(ipc.SpawnerMessageLen)}

	pid, pidfd, errno := forkSpawner(a)
	if errno != 0 {
		s.close()
		return nil, fmt.Errorf("fork: %w", errno)
	}
	s.pid, s.pidfd = pid, pidfd
	s.asked(boottime.Now())
	return s, nil
}

// forkSpawner forks the spawner.
//
//go:norace
//go:noinline
func forkSpawner(a *spawnArea) (pid, pidfd int, errno unix.Errno) {
	var fd int32 = -1
	runtimeBeforeFork()
	child, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_PIDFD|uintptr(unix.SIGCHLD), 0, uintptr(unsafe.Pointer(&fd)), 0, 0, 0)
	if errno == 0 && child == 0 {
		spawnerMain(a)
	}
	runtimeAfterFork()
	return int(child), int(fd), errno
}

// layOut maps the shared memory and writes into it what the job's execve needs. Pointers in it hold in both processes.
func (s *spawner) layOut(cfg Config) error {
	align := func(n int) int { return (n + 15) &^ 15 }
	text := len(cfg.Path) + 1
	for _, list := range [][]string{cfg.Argv, cfg.Env} {
		for _, entry := range list {
			text += len(entry) + 1
		}
	}
	pointers := align(int(unsafe.Sizeof(*s.area)))
	texts := pointers + align(8*(len(cfg.Argv)+1+len(cfg.Env)+termVariables+1))
	s.terms = texts + align(text)
	mem, err := unix.Mmap(-1, 0, s.terms+termBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("map memory: %w", err)
	}
	s.mem, s.area = mem, (*spawnArea)(unsafe.Pointer(&mem[0]))
	at := func(offset int) uintptr { return uintptr(unsafe.Pointer(&mem[offset])) }
	put := func(entry string) uintptr {
		here := at(texts)
		texts += copy(mem[texts:], entry) + 1
		return here
	}
	words := unsafe.Slice((*uintptr)(unsafe.Pointer(&mem[pointers])), len(cfg.Argv)+1+len(cfg.Env)+termVariables+1)
	argv, envp := words[:len(cfg.Argv)+1], words[len(cfg.Argv)+1:]
	s.area.path = put(cfg.Path)
	for i, arg := range cfg.Argv {
		argv[i] = put(arg)
	}
	for i, entry := range cfg.Env {
		envp[i] = put(entry)
	}
	s.area.argv, s.area.envp = uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envp[0]))
	s.envp = envp[len(cfg.Env):]
	return nil
}

// setTerm writes the entries of the environment that the next start adds.
func (s *spawner) setTerm(entries []string) error {
	free := s.terms
	for i := range s.envp {
		s.envp[i] = 0
	}
	for i, entry := range entries {
		if free+len(entry)+1 > len(s.mem) || i >= termVariables {
			return unix.E2BIG
		}
		s.envp[i] = uintptr(unsafe.Pointer(&s.mem[free]))
		free += copy(s.mem[free:], entry)
		s.mem[free] = 0
		free++
	}
	return nil
}

// tell sends a message. It never blocks.
func (s *spawner) tell(kind, serial int32) {
	s.asked(boottime.Now()) // before it can have turned for it
	s.sent = ipc.SpawnerMessage{Kind: kind, Serial: serial}
	_, _, _ = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s.sock), uintptr(unsafe.Pointer(&s.sent)), uintptr(ipc.SpawnerMessageLen), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
}

// asked notes that the spawner owes a turn from now on.
func (s *spawner) asked(now time.Duration) {
	s.waiting, s.turned, s.looked, s.missed, s.turns = true, now, now, 0, atomic.LoadUint32(&s.area.turns)
}

// hasTurned reports whether the spawner has turned since it was last seen to.
func (s *spawner) hasTurned(now time.Duration) bool {
	turns := atomic.LoadUint32(&s.area.turns)
	if turns == s.turns {
		return false
	}
	s.turns, s.turned, s.looked, s.missed = turns, now, now, 0
	return true
}

// hear reads the next message into got, with the descriptor that came along, or -1. It returns false if there is none.
func (s *spawner) hear() (fd int, ok bool) {
	s.control.len, s.control.fd = 0, -1
	s.header = spawnHeader{
		iov: uintptr(unsafe.Pointer(&s.iov)), iovLen: 1,
		control: uintptr(unsafe.Pointer(&s.control)), controlLen: unsafe.Sizeof(s.control),
	}
	n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(s.sock), uintptr(unsafe.Pointer(&s.header)), unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if errno == unix.ECONNRESET { // it has left a message unread; its own come after that
		n, _, errno = unix.RawSyscall(unix.SYS_RECVMSG, uintptr(s.sock), uintptr(unsafe.Pointer(&s.header)), unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	}
	if errno != 0 || int(n) != ipc.SpawnerMessageLen {
		return -1, false
	}
	if s.header.controlLen == 0 {
		return -1, true
	}
	return int(s.control.fd), true
}

// kill ends the spawner. What descends from it falls to the guard.
func (s *spawner) kill() {
	if s.pid != 0 {
		proctree.SignalPidfd(s.pidfd, unix.SIGKILL)
	}
}

// close ends the spawner and gives back what newSpawner made. Nothing of the job is left.
func (s *spawner) close() {
	s.kill()
	if s.pid != 0 {
		for end := boottime.Now() + time.Second; boottime.Now() < end; { // it is killed, and has exited at once
			if pid, err := unix.Wait4(s.pid, nil, unix.WNOHANG, nil); pid != 0 && !errors.Is(err, unix.EINTR) {
				break
			}
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.pidfd), Events: unix.POLLIN}}, 10)
		}
	}
	for _, fd := range []int{s.sock, s.elector, s.pidfd} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	if s.mem != nil {
		_ = unix.Munmap(s.mem)
	}
}
