//go:build linux

package guard

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/internal/nofile"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// termVariables is how many entries a term adds to the environment, and termBytes bounds their
// length.
const (
	termVariables = 5
	termBytes     = 8 << 10
)

// watchdogPid is an entry of the environment with room for a pid.
const watchdogPid = "WATCHDOG_PID=          "

// termEnvironment is the part of the job's environment that depends on the term.
func termEnvironment(cfg Config, t ipc.Start) []string {
	return []string{
		"LEASEHOLD_ELECTION=" + cfg.Election,
		"LEASEHOLD_IDENTITY=" + cfg.Identity,
		"LEASEHOLD_KEY=" + t.Key,
		"LEASEHOLD_FENCING_TOKEN=" + strconv.FormatInt(t.Token, 10),
		"LEASEHOLD_LEASE_ID=" + strconv.FormatInt(t.LeaseID, 16),
	}
}

// newSpawner makes what guard and spawner share, and forks the spawner. It must be called on the
// thread that lives as long as the guard. proc is a descriptor of /proc, and lock that of the state
// file; -1: there is none.
func newSpawner(
	cfg Config, c *proctree.Cgroup, proc, lock int, noNewPrivs bool,
) (*spawner, error) {
	s := &spawner{sock: -1, elector: -1, pidfd: -1}
	if err := s.layOut(cfg); err != nil {
		return nil, err
	}
	const socket = unix.SOCK_SEQPACKET | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	toGuard, err := unix.Socketpair(unix.AF_UNIX, socket, 0)
	if err != nil {
		s.close()
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	defer func() { _ = unix.Close(toGuard[1]) }()
	s.sock = toGuard[0]
	toElector, err := unix.Socketpair(unix.AF_UNIX, socket, 0)
	if err != nil {
		s.close()
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	defer func() { _ = unix.Close(toElector[1]) }()
	s.elector = toElector[0]

	a := s.area
	a.guardSock, a.electorSock, a.procFd = int32(toGuard[1]), int32(toElector[1]), int32(proc)
	a.cgroupFd, a.lockFd = -1, int32(lock)
	if c != nil {
		a.cgroupFd, a.leaf = int32(c.FD), int32(c.Leaves)
	}
	if noNewPrivs {
		a.noNewPrivs = 1
	}
	for _, sig := range cfg.Ignored {
		a.keepIgnored |= 1 << (sig - 1)
	}
	a.prepareMessages()

	s.iov = receiveInto(&s.got)
	pid, pidfd, errno := forkSpawner(a)
	if errno != 0 {
		s.close()
		return nil, fmt.Errorf("fork: %w", errno)
	}
	s.pid, s.pidfd = pid, pidfd
	s.await(boottime.Now())
	return s, nil
}

// receiveInto is the struct iovec of a message.
func receiveInto(m *ipc.SpawnerMessage) [2]uintptr {
	return [2]uintptr{uintptr(unsafe.Pointer(m)), uintptr(ipc.SpawnerMessageLen)}
}

// prepareMessages fills in what the spawner passes to the kernel, because the spawner may not store
// a pointer.
func (a *spawnArea) prepareMessages() {
	a.guardPid = int32(unix.Getpid())
	a.nofile = [2]uint64{nofile.Original.Soft, nofile.Original.Hard}
	a.message = ipc.SpawnerMessage{}
	a.iov = receiveInto(&a.message)
	a.header = spawnHeader{iov: uintptr(unsafe.Pointer(&a.iov)), iovLen: 1}
	a.control = spawnControl{
		len: unsafe.Offsetof(a.control.fd) + 4, level: unix.SOL_SOCKET, kind: unix.SCM_RIGHTS,
	}
	a.clone = spawnClone{
		flags:      unix.CLONE_PIDFD | unix.CLONE_INTO_CGROUP,
		pidfd:      uint64(uintptr(unsafe.Pointer(&a.pidfd))),
		exitSignal: uint64(unix.SIGCHLD),
	}
	a.urgent = unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO,
		Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: 1,
	}
	copy(a.listPath[:len(a.listPath)-1], "thread-self/children")
	copy(a.name[:len(a.name)-1], "leasehold-spawn")
	copy(a.title[:len(a.title)-1], "leasehold\x00spawner")
	// The arguments of a process lie one after the other in memory.
	last := os.Args[len(os.Args)-1]
	a.titleAt = unsafe.Pointer(unsafe.StringData(os.Args[0]))
	end := uintptr(unsafe.Pointer(unsafe.StringData(last))) + uintptr(len(last))
	a.titleLen = int32(end - uintptr(a.titleAt))
}

// forkSpawner forks the spawner.
//
//go:norace
//go:noinline
func forkSpawner(a *spawnArea) (pid, pidfd int, errno unix.Errno) {
	var fd int32 = -1
	runtimeBeforeFork()
	child, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_PIDFD|uintptr(unix.SIGCHLD), 0,
		uintptr(unsafe.Pointer(&fd)), 0, 0, 0)
	if errno == 0 && child == 0 {
		spawnerMain(a)
	}
	runtimeAfterFork()
	return int(child), int(fd), errno
}

// layOut maps the shared memory and writes into it what the job's execve needs. Pointers into it
// are valid in both processes.
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
	mem, err := unix.Mmap(-1, 0, s.terms+termBytes, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_SHARED|unix.MAP_ANONYMOUS)
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
	words := unsafe.Slice((*uintptr)(unsafe.Pointer(&mem[pointers])),
		len(cfg.Argv)+1+len(cfg.Env)+termVariables+1)
	argv, envp := words[:len(cfg.Argv)+1], words[len(cfg.Argv)+1:]
	s.area.path = put(cfg.Path)
	for i, arg := range cfg.Argv {
		argv[i] = put(arg)
	}
	for i, entry := range cfg.Env {
		if entry == watchdogPid { // the child writes its pid over what follows the =
			s.area.pidAt = unsafe.Pointer(&mem[texts+strings.IndexByte(entry, '=')+1])
		}
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
