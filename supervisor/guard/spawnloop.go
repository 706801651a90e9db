//go:build linux

package guard

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/supervisor/check"
	"leasehold/supervisor/ipc"
)

// The code in this file runs in the spawner. The guard forks it without exec, so that it costs a
// few pages of memory and not a whole Go process. No Go runtime runs in it: it has one thread, no
// scheduler, no garbage collection, and its stack can't grow. So every function here is nosplit
// (the linker checks the sum of their frames), allocates nothing, makes only raw system calls, and
// stores no pointer. All its data are in the spawnArea. All signals stay blocked in it, because it
// has no handlers. The file is long because these rules hold for all of it and for nothing else.
//
// If a function breaks the rule that the stack can't grow, runtime_BeforeFork makes the child
// crash. gVisor starts its stub processes in the same way.

//go:linkname runtimeBeforeFork syscall.runtime_BeforeFork
func runtimeBeforeFork()

//go:linkname runtimeAfterFork syscall.runtime_AfterFork
func runtimeAfterFork()

// spawnArea is memory that the guard and the spawner share. The guard fills it before the fork.
type spawnArea struct {
	// stack is that of the job's first process until its exec. There is one such process at a time.
	stack [4096]byte

	// The guard writes these at any time.
	stopAt    int64 // atomic; no start after this time since boot
	cancelled int32 // atomic; serial of the start that is cancelled

	// The guard writes these before it asks for a start. They point into this area.
	path, argv, envp uintptr
	// The hooks before and after the job. argv is 0: there is none.
	preStartPath, preStartArgv, preStartEnvp uintptr
	postStopPath, postStopArgv, postStopEnvp uintptr
	hookTimeout, hookSlack                   int64 // ns

	// The spawner writes these.
	heartbeats uint32 // atomic; a spawner that is asked for something and shows none hangs
	leaf       int32  // number of the newest cgroup for a start

	// What the spawner was made with.
	guardPid, guardSock, electorSock, cgroupFd, procFd int32
	lockFd                                             int32 // of the state file; -1: there is none
	noNewPrivs                                         int32
	nofile                                             [2]uint64
	keepIgnored                                        uint64 // signals that stay ignored, 1<<(n-1)
	titleAt                                            unsafe.Pointer
	pidAt                                              unsafe.Pointer // see writePid; nil: nowhere
	titleLen                                           int32
	run                                                uintptr // the code of execJob

	// The rest is the spawner's own.
	fds       [5]unix.PollFd // in the order of poll
	listFd    int32
	leafFd    int32
	leafUsed  int32
	self      int32 // pid
	serial    int32 // of the last start
	first     int32 // pid of the job's first process until it is reaped
	execErrno int32 // why it could not be executed
	hasExited int32
	status    int32
	closed    int32
	guardGone int32
	hookDue   int32 // something was started, after which the hook has not run
	hook      int32 // pid of the hook's runner
	hookWord  int32 // its wait status
	hookUntil int64 // time since boot; no other runner follows then; 0: none was started
	hookBy    int64 // time since boot; the runner hangs
	orphaned  int32 // the guard is lost, and nothing of the job is left
	killing   int32
	killAsked int32 // serial of the guard's kill that waits for an answer
	rounds    int32
	nextRound int64 // since boot
	raised    int32
	pidfd     int32
	word      int32
	now       unix.Timespec
	pause     unix.Timespec
	pipe      [2]int32
	sigset    uint64
	action    [4]uint64 // zeros
	urgent    unix.SchedAttr
	clone     spawnClone
	message   ipc.SpawnerMessage
	iov       [2]uintptr
	header    spawnHeader
	control   spawnControl
	listPath  [24]byte
	name      [16]byte
	title     [24]byte
	number    [16]byte
	buf       [4096]byte
}

// The places in spawnArea.fds.
const (
	pollGuardSock = iota
	pollElectorSock
	pollGuardPidfd
	pollExec
	pollSignal
)

// spawnClone is struct clone_args of clone3(2), version 2.
type spawnClone struct {
	flags, pidfd, childTid, parentTid, exitSignal, stack, stackSize, tls uint64
	setTid, setTidSize, cgroup                                           uint64
}

// spawnHeader is struct msghdr, without pointers.
type spawnHeader struct {
	name       uintptr
	nameLen    uint32
	_          uint32
	iov        uintptr
	iovLen     uintptr
	control    uintptr
	controlLen uintptr
	flags      int32
	_          int32
}

// spawnControl is a struct cmsghdr with one descriptor.
type spawnControl struct {
	len         uintptr
	level, kind int32
	fd          int32
	_           int32
}

// spawnerMain is the spawner from its first instruction on. It does not return.
//
//go:nosplit
//go:norace
//go:noinline
func spawnerMain(a *spawnArea) {
	a.begin()
	a.keepOwnDescriptors()
	a.heartbeats++
	for {
		a.round()
	}
}

// begin gives the fork the attributes of a spawner. It is not part of spawnerMain, whose frame is
// below all others: their sum must fit with the counters of a fuzz test too.
//
//go:nosplit
//go:norace
//go:noinline
func (a *spawnArea) begin() {
	_, _, _ = unix.RawSyscall(unix.SYS_SETSID, 0, 0, 0)
	_, _, _ = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0, 0)
	_, _, _ = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(&a.name)),
		0, 0, 0, 0)
	if a.noNewPrivs != 0 {
		_, _, _ = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	}
	a.showTitle()
	a.resetSignals()
}

// showTitle overwrites the spawner's copy of the guard's arguments, which ps shows.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (a *spawnArea) showTitle() {
	for i := range a.titleLen {
		b := byte(0)
		if int(i) < len(a.title) {
			b = a.title[i]
		}
		*(*byte)(unsafe.Add(a.titleAt, i)) = b
	}
}

// resetSignals sets all signals to their default, except those that the job has to ignore. They
// stay blocked until the job's exec, because none of Go's handlers may run before that.
//
//go:nosplit
//go:norace
func (a *spawnArea) resetSignals() {
	for sig := uintptr(1); sig <= 64; sig++ {
		// The action is all zeros. It is refused for SIGKILL and SIGSTOP.
		if a.keepIgnored&(1<<(sig-1)) == 0 {
			_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig,
				uintptr(unsafe.Pointer(&a.action)), 0, 8, 0, 0)
		}
	}
}

// keepOwnDescriptors closes all that the guard had open, except the standard streams, which are for
// the job, and the spawner's own descriptors.
//
//go:nosplit
//go:norace
func (a *spawnArea) keepOwnDescriptors() {
	next := max(a.guardSock, a.electorSock, a.procFd, a.cgroupFd, a.lockFd) + 1
	lowest := next
	a.keep(&a.guardSock, &next)
	a.keep(&a.electorSock, &next)
	a.keep(&a.procFd, &next)
	hasCgroup := a.cgroupFd >= 0
	if hasCgroup {
		a.keep(&a.cgroupFd, &next)
	}
	hasLock := a.lockFd >= 0
	if hasLock { // the forked child holds it too, until its exec
		a.keep(&a.lockFd, &next)
	}
	// We exit if a descriptor could not be kept. The guard sees that.
	for a.guardSock < 0 || a.electorSock < 0 || a.procFd < 0 || hasCgroup && a.cgroupFd < 0 ||
		hasLock && a.lockFd < 0 {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 1, 0, 0)
	}
	closeRange(next, 1<<31-1)
	closeRange(3, lowest-1)
	guard, _, errno := unix.RawSyscall(unix.SYS_PIDFD_OPEN, uintptr(a.guardPid), 0, 0)
	parent, _, _ := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0)
	orphaned := errno != 0 || parent != uintptr(a.guardPid)
	a.sigset = 1 << (unix.SIGCHLD - 1)
	sigfd, _, errno := unix.RawSyscall6(unix.SYS_SIGNALFD4, ^uintptr(0),
		uintptr(unsafe.Pointer(&a.sigset)), 8, unix.SFD_CLOEXEC|unix.SFD_NONBLOCK, 0, 0)
	if errno != 0 {
		sigfd = ^uintptr(0)
	}
	list, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(a.procFd),
		uintptr(unsafe.Pointer(&a.listPath)), unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
	a.listFd = -1
	if errno == 0 {
		a.listFd = int32(list)
	}
	a.fds[pollGuardSock].Fd, a.fds[pollElectorSock].Fd = a.guardSock, a.electorSock
	a.fds[pollGuardPidfd].Fd = int32(guard)
	a.fds[pollExec].Fd, a.fds[pollSignal].Fd = -1, int32(sigfd)
	for i := range a.fds {
		a.fds[i].Events = unix.POLLIN
	}
	a.leafFd = -1
	if orphaned {
		a.guardIsGone()
	}
	if a.nofile[1] != 0 { // the limit may lie below our own descriptors
		_, _, _ = unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE,
			uintptr(unsafe.Pointer(&a.nofile)), 0, 0, 0)
	}
}

// keep moves a descriptor to the lowest number from next on, and closes what lies between.
//
//go:nosplit
//go:norace
func (a *spawnArea) keep(fd, next *int32) {
	moved, _, errno := unix.RawSyscall(unix.SYS_FCNTL, uintptr(*fd), unix.F_DUPFD_CLOEXEC,
		uintptr(*next))
	if errno != 0 {
		moved = ^uintptr(0)
	} else if int32(moved) > *next {
		closeRange(*next, int32(moved)-1)
	}
	*fd, *next = int32(moved), max(*next, int32(moved)+1)
}

//go:nosplit
//go:norace
func closeRange(from, to int32) {
	if _, _, errno := unix.RawSyscall(unix.SYS_CLOSE_RANGE, uintptr(from), uintptr(to),
		0); errno == 0 {
		return
	}
	for fd := from; fd <= to && fd < 1024; fd++ { // Linux before 5.9
		rawCloseSpawn(uintptr(fd))
	}
}

//go:nosplit
//go:norace
func rawCloseSpawn(fd uintptr) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0) }

// round waits for something to do, and does it.
//
//go:nosplit
//go:norace
func (a *spawnArea) round() {
	timeout := uintptr(0)
	if a.orphaned != 0 {
		a.pause = unix.Timespec{Nsec: 5_000_000}
		timeout = uintptr(unsafe.Pointer(&a.pause))
	}
	if a.killing != 0 {
		a.killWhenDue()
		timeout = uintptr(unsafe.Pointer(&a.pause))
	}
	for i := range a.fds {
		a.fds[i].Revents = 0
	}
	_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&a.fds)),
		uintptr(len(a.fds)), timeout, 0, 0, 0)
	if a.fds[pollGuardPidfd].Revents != 0 {
		a.guardIsGone()
	}
	if a.fds[pollElectorSock].Revents != 0 {
		a.receiveFromElector()
	}
	if a.fds[pollGuardSock].Revents != 0 && a.receive(pollGuardSock) {
		switch a.message.Kind {
		case ipc.SpawnerPrepare:
			a.prepare()
		case ipc.SpawnerStart:
			a.serial = a.message.Serial
			errno := a.prepare()
			if errno == 0 {
				errno = a.start()
			}
			if errno != 0 {
				a.send(a.guardSock, ipc.SpawnerRefused, a.serial, errno, 1, -1)
			}
		case ipc.SpawnerKill:
			a.killAsked = a.message.Serial
			// From now on the guard kills this cgroup, and since Linux 6.14 nothing can be started
			// in it after that.
			a.leafUsed = 1
			a.kill()
		case ipc.SpawnerShow:
			a.show()
		case ipc.SpawnerSignal:
			if a.first != 0 && a.message.Serial == a.serial { // only we reap it
				_, _, _ = unix.RawSyscall(unix.SYS_KILL, uintptr(a.first),
					uintptr(a.message.Value), 0)
			}
		case ipc.SpawnerHookDone:
			a.hookDue = 0
		}
	}
	if a.fds[pollExec].Revents != 0 {
		a.execDone()
	}
	if a.fds[pollSignal].Revents != 0 {
		_, _, _ = unix.RawSyscall(unix.SYS_READ, uintptr(a.fds[pollSignal].Fd),
			uintptr(unsafe.Pointer(&a.buf)), uintptr(len(a.buf)))
	}
	a.reap()
	if a.orphaned != 0 && a.killing == 0 {
		a.endAsOrphan()
	}
	a.heartbeats++
}

// endAsOrphan runs the hook after the job, if it is due, and then ends the spawner.
//
//go:nosplit
//go:norace
func (a *spawnArea) endAsOrphan() {
	switch now := a.readClock(); {
	case a.hook != 0:
		if now >= a.hookBy {
			a.kill()
		}
	case a.hookDue != 0:
		if a.hookUntil == 0 {
			a.hookUntil = now + a.hookTimeout
		}
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno == 0 && pid == 0 {
			a.execHook()
		}
		if errno != 0 { // again in the next round
			if now >= a.hookUntil {
				a.hookDue, a.hookWord = 0, check.ExitNotRun<<8
			}
		} else {
			a.hook, a.hookBy = int32(pid), now+a.hookTimeout+a.hookSlack
		}
	case a.guardGone != 0:
		if a.postStopArgv != 0 {
			a.send(a.electorSock, ipc.SpawnerHookDone, 0, a.hookWord, 0, -1)
		}
		for {
			_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
}

// hookEnded: the runner of the hook has exited. Unless it has run the hook, another one follows, as
// long as there is time. First, what a runner that was killed may have left is killed.
//
//go:nosplit
//go:norace
func (a *spawnArea) hookEnded() {
	a.hook, a.hookWord = 0, a.word
	signaled, notRun := a.word&0x7f != 0, a.word>>8&0xff == check.ExitNotRun
	if !signaled && !notRun || a.readClock() >= a.hookUntil {
		a.hookDue = 0
	}
	a.kill()
}

// execHook becomes the runner of the hook after the job, in the child. It does not return.
//
//go:nosplit
//go:norace
func (a *spawnArea) execHook() {
	_, _, _ = unix.RawSyscall(unix.SYS_SETSID, 0, 0, 0)
	own := uint64(0) // on the stack: the area is shared with the spawner
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK,
		uintptr(unsafe.Pointer(&own)), 0, 8, 0, 0)
	if a.lockFd >= 0 { // it holds the lock of the state file until it exits
		_, _, _ = unix.RawSyscall(unix.SYS_FCNTL, uintptr(a.lockFd), unix.F_SETFD, 0)
	}
	_, _, _ = unix.RawSyscall(unix.SYS_EXECVE, a.postStopPath, a.postStopArgv, a.postStopEnvp)
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, check.ExitNotRun, 0, 0)
	}
}

// killWhenDue makes a round of the kill when it is due, and sets the pause until the next.
//
//go:nosplit
//go:norace
func (a *spawnArea) killWhenDue() {
	now := a.readClock()
	if now >= a.nextRound {
		began := now
		a.killRound()
		now = a.readClock()
		// Killed processes need the processor to exit. So we leave most of the time to them.
		a.nextRound = now + max(100_000, 4*(now-began))
		if a.rounds > 100 {
			a.nextRound = max(a.nextRound, now+10_000_000)
		} else if a.rounds > 10 {
			a.nextRound = max(a.nextRound, now+1_000_000)
		}
	}
	a.pause = unix.Timespec{Nsec: min(a.nextRound-now, 10_000_000)}
}

// guardIsGone kills what there is, and then ends the spawner.
//
//go:nosplit
//go:norace
func (a *spawnArea) guardIsGone() {
	a.guardGone = 1
	a.fds[pollGuardPidfd].Fd = -1
	if a.orphaned == 0 { // else only the hook is left
		a.close()
	}
}

// close kills what there is. Nothing is started any more.
//
//go:nosplit
//go:norace
func (a *spawnArea) close() {
	a.closed = 1
	a.kill()
}

//go:nosplit
//go:norace
func (a *spawnArea) kill() {
	if a.killing == 0 {
		a.killing, a.rounds, a.nextRound = 1, 0, 0
	}
}

// receive reads a message. If the other side has closed the socket, it reads there no more: a pidfd
// shows whether that process has exited.
//
//go:nosplit
//go:norace
func (a *spawnArea) receive(which int) bool {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(a.fds[which].Fd),
		uintptr(unsafe.Pointer(&a.message)), uintptr(ipc.SpawnerMessageLen),
		unix.MSG_DONTWAIT, 0, 0)
	if errno == 0 && n == uintptr(ipc.SpawnerMessageLen) {
		return true
	}
	if errno != unix.EAGAIN {
		a.fds[which].Fd = -1
	}
	return false
}

//go:nosplit
//go:norace
func (a *spawnArea) receiveFromElector() {
	if !a.receive(pollElectorSock) {
		return
	}
	switch a.message.Kind {
	case ipc.SpawnerKill:
		if a.orphaned == 0 {
			a.close()
			return
		}
		a.send(a.electorSock, ipc.SpawnerGone, 0, 0, 0, -1) // only the hook is left
	case ipc.SpawnerHook: // the guard may hang, and it may be impossible to kill it
		if a.closed != 0 && a.killing == 0 {
			a.orphaned = 1
		}
		if a.orphaned != 0 && a.hookDue == 0 && a.hook == 0 && a.killing == 0 {
			a.send(a.electorSock, ipc.SpawnerHookDone, 0, a.hookWord, 0, -1)
		}
	}
}

// send sends a message, with a descriptor unless that is negative, and reports whether it was sent.
// The guard asks for little at a time and receives all answers, so there is always room for them.
// But the kernel may refuse another descriptor (unix(7), ETOOMANYREFS).
//
//go:nosplit
//go:norace
func (a *spawnArea) send(sock, kind, serial, value, extra, fd int32) bool {
	a.message.Kind, a.message.Serial, a.message.Value, a.message.Extra = kind, serial, value, extra
	a.header.control, a.header.controlLen = 0, 0
	if fd >= 0 {
		a.control.fd = fd
		a.header.control = uintptr(unsafe.Pointer(&a.control))
		a.header.controlLen = unsafe.Sizeof(a.control)
	}
	_, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(sock),
		uintptr(unsafe.Pointer(&a.header)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	return errno == 0
}

// prepare makes the cgroup for the next start, unless it is there.
//
//go:nosplit
//go:norace
func (a *spawnArea) prepare() int32 {
	if a.cgroupFd < 0 || a.leafFd >= 0 && a.leafUsed == 0 {
		return 0
	}
	if a.leafFd >= 0 {
		rawCloseSpawn(uintptr(a.leafFd))
		a.leafFd = -1
		// This fails if the job has made cgroups in it. Then the guard removes it.
		_, _, _ = unix.RawSyscall(unix.SYS_UNLINKAT, uintptr(a.cgroupFd),
			uintptr(unsafe.Pointer(&a.number)), unix.AT_REMOVEDIR)
	}
	n := a.leaf + 1
	i := len(a.number) - 1
	for a.number[i] = 0; n > 0 && i > 0; n /= 10 {
		i--
		a.number[i] = byte('0' + n%10)
	}
	for j := 0; i < len(a.number); i, j = i+1, j+1 {
		a.number[j] = a.number[i]
	}
	_, _, errno := unix.RawSyscall(unix.SYS_MKDIRAT, uintptr(a.cgroupFd),
		uintptr(unsafe.Pointer(&a.number)), 0o755)
	if errno != 0 {
		return int32(errno)
	}
	a.leaf++
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(a.cgroupFd),
		uintptr(unsafe.Pointer(&a.number)), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0, 0, 0)
	if errno != 0 {
		return int32(errno)
	}
	a.leafFd, a.leafUsed = int32(fd), 0
	return 0
}

// start forks the job and returns 0, or an errno. execDone sees the result of the exec.
//
// Until its exec the child shares our memory and has a stack of its own. To copy the memory would
// take longer than all else that a start needs. As in a vfork the child stores nothing that we use.
// But we do not wait for it: a slow file system may delay the exec, and we may have to kill.
//
// With a hook before the job the memory is copied. The child may live for long then, and the OOM
// killer takes all processes that share a memory.
//
//go:nosplit
//go:norace
func (a *spawnArea) start() int32 {
	// A start that fails counts too: its cgroup may have been killed meanwhile, see
	// proctree.Cgroup.
	a.leafUsed = 1
	if a.closed != 0 || a.first != 0 {
		return ipc.SpawnerTooLate
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_PIPE2, uintptr(unsafe.Pointer(&a.pipe)),
		unix.O_CLOEXEC|unix.O_NONBLOCK, 0); errno != 0 {
		return int32(errno)
	}
	self, _, _ := unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
	a.self = int32(self)
	// The last check: everything that may take time is done.
	if a.cancelled == a.serial || a.readClock() >= a.stopAt {
		rawCloseSpawn(uintptr(a.pipe[0]))
		rawCloseSpawn(uintptr(a.pipe[1]))
		return ipc.SpawnerTooLate
	}
	pid, errno := uintptr(0), uintptr(unix.EINVAL)
	if a.preStartArgv == 0 {
		pid, errno = a.fork(unix.CLONE_VM)
	}
	if errno != 0 { // a hook; or an emulator or a filter that knows only threads and forks
		if pid, errno = a.fork(0); errno == 0 && pid == 0 {
			execJob(a)
		}
	}
	rawCloseSpawn(uintptr(a.pipe[1]))
	if errno != 0 {
		rawCloseSpawn(uintptr(a.pipe[0]))
		return int32(errno)
	}
	if a.postStopArgv != 0 {
		a.hookDue = 1
	}
	a.first, a.execErrno, a.hasExited = int32(pid), 0, 0
	a.fds[pollExec].Fd = a.pipe[0]
	return 0
}

// fork makes the child. With CLONE_VM it runs execJob. Without, it has a copy of our stack, and
// fork returns 0 in it.
//
//go:nosplit
//go:norace
func (a *spawnArea) fork(share uintptr) (pid, errno uintptr) {
	// If there is no cgroup, there may be no clone3 either: some seccomp filters refuse it, because
	// they can't check its arguments.
	trap, arg1, arg2 := uintptr(unix.SYS_CLONE), share|unix.CLONE_PIDFD|uintptr(unix.SIGCHLD),
		uintptr(0)
	if a.leafFd >= 0 {
		a.clone.flags = uint64(share | unix.CLONE_PIDFD | unix.CLONE_INTO_CGROUP)
		a.clone.cgroup, a.clone.stack, a.clone.stackSize = uint64(a.leafFd), 0, 0
		trap, arg1, arg2 = unix.SYS_CLONE3, uintptr(unsafe.Pointer(&a.clone)),
			unsafe.Sizeof(a.clone)
	}
	pidfd := uintptr(unsafe.Pointer(&a.pidfd))
	if share == 0 {
		pid, _, failed := unix.RawSyscall6(trap, arg1, arg2, pidfd, 0, 0, 0)
		return pid, uintptr(failed)
	}
	a.clone.stack = uint64(uintptr(unsafe.Pointer(&a.stack)))
	a.clone.stackSize = uint64(unsafe.Sizeof(a.stack))
	if trap == unix.SYS_CLONE {
		arg2 = uintptr(a.clone.stack + a.clone.stackSize)
	}
	return cloneJob(trap, arg1, arg2, pidfd, a, a.run)
}

// cloneJob makes a system call, clone or clone3, whose child calls the function at run.
//
//go:noescape
func cloneJob(trap, arg1, arg2, arg3 uintptr, a *spawnArea, run uintptr) (pid, errno uintptr)

// readClock returns nanoseconds since boot.
//
//go:nosplit
//go:norace
func (a *spawnArea) readClock() int64 {
	_, _, _ = unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_BOOTTIME,
		uintptr(unsafe.Pointer(&a.now)), 0)
	return a.now.Sec*1e9 + a.now.Nsec
}

// execJob is the child from its first instruction on. It does not return. The three parts run one
// after the other, not one from within the other: all frames must fit on the stack.
//
//go:nosplit
//go:norace
func execJob(a *spawnArea) {
	a.becomeChild()
	failed := int32(0)
	if a.preStartArgv != 0 {
		failed = a.preStart()
	}
	a.exec(failed)
}

// becomeChild gives the fork the attributes of a job.
//
//go:nosplit
//go:norace
//go:noinline
func (a *spawnArea) becomeChild() {
	_, _, _ = unix.RawSyscall(unix.SYS_SETSID, 0, 0, 0)
	_, _, _ = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0,
		0, 0)
	if parent, _, _ := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0); parent != uintptr(a.self) {
		// The spawner exited before PR_SET_PDEATHSIG, so no signal will come.
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 128+uintptr(unix.SIGKILL), 0, 0)
	}
	own := uint64(0) // on the stack: the area is shared with the spawner
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK,
		uintptr(unsafe.Pointer(&own)), 0, 8, 0, 0)
	if a.pidAt != nil {
		a.writePid()
	}
}

// exec becomes the job, in the child. It does not return. failed is why it may not; 0: it may.
//
//go:nosplit
//go:norace
//go:noinline
func (a *spawnArea) exec(failed int32) {
	if failed == 0 {
		_, _, errno := unix.RawSyscall(unix.SYS_EXECVE, a.path, a.argv, a.envp)
		failed = int32(errno)
	}
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(a.pipe[1]),
		uintptr(unsafe.Pointer(&failed)), 4)
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 127, 0, 0)
	}
}

// preStart runs the hook before the job, in the process that becomes the job. It returns 0 if the
// job may start. The hook is a process of the job: whatever ends the job ends it too. Signals have
// their default action here, so the stop signal ends the start.
//
//go:nosplit
//go:norace
//go:noinline
func (a *spawnArea) preStart() int32 {
	self, _, _ := unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno == 0 && pid == 0 {
		_, _, _ = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0,
			0, 0, 0)
		// If the parent was killed before that, no signal comes.
		if parent, _, _ := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0); parent == self {
			_, _, errno = unix.RawSyscall(unix.SYS_EXECVE, a.preStartPath, a.preStartArgv,
				a.preStartEnvp)
		}
		code := uintptr(126)
		if errno == unix.ENOENT {
			code = 127
		}
		for {
			_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, code, 0, 0)
		}
	}
	if errno != 0 {
		return int32(errno)
	}
	status := int32(0) // on the stack, like now: the area is shared with the spawner
	for {
		got, _, errno := unix.RawSyscall6(unix.SYS_WAIT4, pid, uintptr(unsafe.Pointer(&status)), 0,
			0, 0, 0)
		if got == pid || errno != unix.EINTR {
			break
		}
	}
	if code := status >> 8 & 0xff; code != 0 {
		return ipc.SpawnerHookFailed - code
	}
	if signal := status & 0x7f; signal != 0 {
		return ipc.SpawnerHookFailed - 128 - signal
	}
	var now unix.Timespec
	_, _, _ = unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_BOOTTIME,
		uintptr(unsafe.Pointer(&now)), 0)
	if a.cancelled == a.serial || now.Sec*1e9+now.Nsec >= a.stopAt {
		return ipc.SpawnerTooLate
	}
	return 0
}

// writePid writes the pid of this process, the job's first, into its environment. No other process
// of the job is started meanwhile.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (a *spawnArea) writePid() {
	pid, _, _ := unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
	digits := 1
	for rest := pid; rest >= 10; rest /= 10 {
		digits++
	}
	*(*byte)(unsafe.Add(a.pidAt, digits)) = 0
	for ; digits > 0; pid /= 10 {
		digits--
		*(*byte)(unsafe.Add(a.pidAt, digits)) = byte('0' + pid%10)
	}
}

// execDone learns the result of the exec: the exec closes the pipe, or its error comes through it.
//
//go:nosplit
//go:norace
func (a *spawnArea) execDone() {
	n, _, _ := unix.RawSyscall(unix.SYS_READ, uintptr(a.fds[pollExec].Fd),
		uintptr(unsafe.Pointer(&a.word)), 4)
	rawCloseSpawn(uintptr(a.fds[pollExec].Fd))
	a.fds[pollExec].Fd = -1
	if n == 4 {
		a.execErrno = a.word
	} else {
		a.send(a.electorSock, ipc.SpawnerStarted, a.serial, a.first, 0, a.pidfd)
		if !a.send(a.guardSock, ipc.SpawnerStarted, a.serial, a.first, 0, a.pidfd) {
			a.kill() // the guard could not signal it
		}
	}
	rawCloseSpawn(uintptr(a.pidfd))
}

// show sends the elector a pidfd of the job's first process, if that runs. Until the exec is done,
// execDone does it.
//
//go:nosplit
//go:norace
func (a *spawnArea) show() {
	if a.first == 0 || a.fds[pollExec].Fd >= 0 || a.execErrno != 0 {
		return
	}
	// Only we reap it. So the pid can't be a stranger's.
	pidfd, _, errno := unix.RawSyscall(unix.SYS_PIDFD_OPEN, uintptr(a.first), 0, 0)
	if errno != 0 {
		return
	}
	a.send(a.electorSock, ipc.SpawnerStarted, a.serial, a.first, 0, int32(pidfd))
	rawCloseSpawn(pidfd)
}

// reap reaps children that have exited, and reports that to the guard and the elector.
//
//go:nosplit
//go:norace
func (a *spawnArea) reap() {
	var pid uintptr
	var errno unix.Errno
	for range maxReaps {
		pid, _, errno = unix.RawSyscall6(unix.SYS_WAIT4, ^uintptr(0),
			uintptr(unsafe.Pointer(&a.word)), unix.WNOHANG|unix.WALL, 0, 0, 0)
		if errno != 0 || pid == 0 {
			break
		}
		if int32(pid) == a.first {
			a.status, a.hasExited = a.word, 1
			if a.fds[pollExec].Fd >= 0 {
				a.execDone()
			}
			a.first = 0
		}
		if int32(pid) == a.hook {
			a.hookEnded()
		}
	}
	none := errno == unix.ECHILD
	if errno == 0 && pid != 0 { // there may be more
		a.rearm()
	}
	if a.hasExited != 0 {
		a.hasExited = 0
		switch {
		case a.execErrno != 0:
			extra := int32(0)
			if none {
				extra = 1
			}
			a.send(a.guardSock, ipc.SpawnerRefused, a.serial, a.execErrno, extra, -1)
		case none:
			a.send(a.guardSock, ipc.SpawnerExited, a.serial, a.status, 1, -1)
		default:
			a.send(a.guardSock, ipc.SpawnerExited, a.serial, a.status, 0, -1)
		}
	}
	if a.killing == 0 || !none {
		return
	}
	a.killing = 0
	if a.closed != 0 {
		a.send(a.electorSock, ipc.SpawnerGone, 0, 0, 0, -1)
	}
	if a.guardGone != 0 {
		a.orphaned = 1
	}
	if a.killAsked != 0 {
		a.send(a.guardSock, ipc.SpawnerGone, a.killAsked, 0, 0, -1)
		a.killAsked = 0
	}
}

// rearm makes the next round come at once.
//
//go:nosplit
//go:norace
func (a *spawnArea) rearm() {
	self, _, _ := unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
	_, _, _ = unix.RawSyscall(unix.SYS_KILL, self, uintptr(unix.SIGCHLD), 0)
}

// killRound kills the children. Their pids can't be those of strangers, because nobody else reaps
// them. When they exit, their children become ours. So in the end there are only children.
//
//go:nosplit
//go:norace
func (a *spawnArea) killRound() {
	a.rounds++
	// Raise the priority only if the guard is lost. Otherwise the guard kills too, at its own
	// priority, and killed processes need the other processors to exit.
	if a.closed != 0 && a.raised == 0 {
		a.raised = 1
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_SETATTR, 0, uintptr(unsafe.Pointer(&a.urgent)), 0)
	}
	if a.first != 0 {
		_, _, _ = unix.RawSyscall(unix.SYS_KILL, uintptr(a.first), uintptr(unix.SIGKILL), 0)
	}
	if a.listFd < 0 {
		return // the kernel has no such lists: guard and elector read the process table
	}
	_, _, _ = unix.RawSyscall(unix.SYS_LSEEK, uintptr(a.listFd), 0, unix.SEEK_SET)
	child := uintptr(0)
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(a.listFd),
			uintptr(unsafe.Pointer(&a.buf)), uintptr(len(a.buf)))
		if errno != 0 || n == 0 || n > uintptr(len(a.buf)) {
			return
		}
		for i := uintptr(0); i < n; i++ {
			c := a.buf[i]
			if c >= '0' && c <= '9' {
				child = child*10 + uintptr(c-'0')
				continue
			}
			if child > 0 {
				_, _, _ = unix.RawSyscall(unix.SYS_KILL, child, uintptr(unix.SIGKILL), 0)
			}
			child = 0
		}
		a.heartbeats++
	}
}
