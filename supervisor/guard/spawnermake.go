//go:build linux

package guard

import (
	"fmt"
	"os"
	"reflect"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/internal/nofile"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// termBytes bounds the length of the entries that a term adds to the environment.
const termBytes = 8 << 10

// watchdogPid is an entry of the environment with room for a pid.
const watchdogPid = "WATCHDOG_PID=          "

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
	a.guardPid, a.run = int32(unix.Getpid()), reflect.ValueOf(execJob).Pointer()
	a.nofile = [2]uint64{nofile.Original.Soft, nofile.Original.Hard}
	a.message = ipc.SpawnerMessage{}
	a.iov = receiveInto(&a.message)
	a.header = spawnHeader{iov: uintptr(unsafe.Pointer(&a.iov)), iovLen: 1}
	a.control = spawnControl{
		len: unsafe.Offsetof(a.control.fd) + 4, level: unix.SOL_SOCKET, kind: unix.SCM_RIGHTS,
	}
	a.clone = spawnClone{
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

// layOut maps the shared memory and writes into it what the execve of the job and of the hooks
// need. Pointers into it are valid in both processes.
func (s *spawner) layOut(cfg Config) error {
	align := func(n int) int { return (n + 15) &^ 15 }
	// The environment of a hook has one entry more, which comes first, and the same others.
	preStart, postStop := []string{ipc.ReasonStart}, []string{ipc.ReasonStop}
	var runner []string // of the hook after the job
	if cfg.PostStop != nil {
		runner = cfg.PostStop.RunnerArgv(0)
	}
	texts := [][]string{
		{cfg.Path, cfg.PreStartPath, "/proc/self/exe"},
		cfg.Argv, cfg.PreStart, runner, preStart, postStop, cfg.Env,
	}
	text := 0
	for _, list := range texts {
		for _, entry := range list {
			text += len(entry) + 1
		}
	}
	environment := len(cfg.Env) + ipc.TermVariables + 1
	words := len(cfg.Argv) + 1 + len(cfg.PreStart) + 1 + len(runner) + 1 + 3*environment + 2
	pointers := align(int(unsafe.Sizeof(*s.area)))
	next := pointers + align(8*words)
	s.terms = next + align(text)
	mem, err := unix.Mmap(-1, 0, s.terms+termBytes, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("map memory: %w", err)
	}
	s.mem, s.area = mem, (*spawnArea)(unsafe.Pointer(&mem[0]))
	put := func(entry string) uintptr {
		here := uintptr(unsafe.Pointer(&mem[next]))
		next += copy(mem[next:], entry) + 1
		return here
	}
	free := unsafe.Slice((*uintptr)(unsafe.Pointer(&mem[pointers])), words)
	take := func(n int) []uintptr { // with a zero at the end
		taken := free[:n+1]
		free = free[n+1:]
		return taken
	}
	list := func(entries []string) uintptr {
		taken := take(len(entries))
		for i, entry := range entries {
			taken[i] = put(entry)
		}
		return uintptr(unsafe.Pointer(&taken[0]))
	}
	a := s.area
	a.path, a.argv = put(cfg.Path), list(cfg.Argv)
	if cfg.PreStart != nil {
		a.preStartPath, a.preStartArgv = put(cfg.PreStartPath), list(cfg.PreStart)
	}
	if cfg.PostStop != nil {
		a.postStopPath, a.postStopArgv = put("/proc/self/exe"), list(runner)
		a.hookTimeout, a.hookSlack = int64(cfg.PostStop.Timeout), int64(cfg.hookSlack())
	}
	env := take(len(cfg.Env) + ipc.TermVariables)
	pre, post := take(1+len(cfg.Env)+ipc.TermVariables), take(1+len(cfg.Env)+ipc.TermVariables)
	pre[0], post[0] = put(preStart[0]), put(postStop[0])
	shared := 1
	for i, entry := range cfg.Env {
		if entry == watchdogPid { // the child writes its pid over what follows the =
			a.pidAt = unsafe.Pointer(&mem[next+strings.IndexByte(entry, '=')+1])
		}
		env[i] = put(entry)
		if isHooks(entry) {
			pre[shared], post[shared] = env[i], env[i]
			shared++
		}
	}
	a.envp = uintptr(unsafe.Pointer(&env[0]))
	a.preStartEnvp = uintptr(unsafe.Pointer(&pre[0]))
	a.postStopEnvp = uintptr(unsafe.Pointer(&post[0]))
	s.envp = [3][]uintptr{env[len(cfg.Env):], pre[shared:], post[shared:]}
	return nil
}

// isHooks reports whether an entry of the job's environment is for the hooks too. What is for a
// service that notifies systemd is for the job alone.
func isHooks(entry string) bool {
	return !strings.HasPrefix(entry, "NOTIFY_SOCKET=") && !strings.HasPrefix(entry, "WATCHDOG_")
}

// setTerm writes the entries of the environment that the next start adds.
func (s *spawner) setTerm(entries []string) error {
	free := s.terms
	for _, envp := range s.envp {
		clear(envp)
	}
	for i, entry := range entries {
		if free+len(entry)+1 > len(s.mem) || i >= ipc.TermVariables {
			return unix.E2BIG
		}
		for _, envp := range s.envp {
			envp[i] = uintptr(unsafe.Pointer(&s.mem[free]))
		}
		free += copy(s.mem[free:], entry)
		s.mem[free] = 0
		free++
	}
	return nil
}
