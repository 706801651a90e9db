//go:build linux

package guard

import (
	"errors"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// spawner is the guard's end of the spawner, a small process between guard and job: it starts the
// job, reaps it, and kills it when the guard asks for it, when the elector does, or when the guard
// is gone.
//
// It is a child subreaper, as the guard is. So after the loss of any one of the daemon's processes
// the whole job is still found by descent: all of it descends from the spawner while that lives,
// and falls to the guard when it doesn't. That the spawner has no child left, which wait4(2) tells,
// proves that nothing of the job is left. The proof needs no /proc. To name its children the
// spawner reads the kernel's list of them, which hidepid does not shorten.
type spawner struct {
	area    *spawnArea
	mem     []byte // the area, and after it what the job's execve needs
	envp    []uintptr
	terms   int // where in mem the entries of the term go
	sock    int // SOCK_SEQPACKET, non-blocking
	elector int // the elector's end, until that has it, then -1
	pid     int // 0: it has exited
	zombie  int // its pid then, until it is reaped
	pidfd   int
	lost    bool

	sent    ipc.SpawnerMessage
	got     ipc.SpawnerMessage
	control spawnControl
	iov     [2]uintptr
	header  spawnHeader

	awaited       bool   // it was asked for something, and owes a heartbeat
	heartbeats    uint32 // as last seen
	lastHeartbeat time.Duration
	checkedAt     time.Duration
	missedChecks  int // checks in a row without a heartbeat
}

// send sends a message. It never blocks.
func (s *spawner) send(kind, serial int32) {
	s.await(boottime.Now()) // before it can have answered with a heartbeat
	s.sent = ipc.SpawnerMessage{Kind: kind, Serial: serial}
	_, _, _ = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s.sock), uintptr(unsafe.Pointer(&s.sent)),
		uintptr(ipc.SpawnerMessageLen), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
}

// receive reads the next message into got, with the descriptor that came along, or -1. It returns
// false if there is none.
func (s *spawner) receive() (fd int, ok bool) {
	s.control.len, s.control.fd = 0, -1
	s.header = spawnHeader{
		iov: uintptr(unsafe.Pointer(&s.iov)), iovLen: 1,
		control: uintptr(unsafe.Pointer(&s.control)), controlLen: unsafe.Sizeof(s.control),
	}
	recvmsg := func() (uintptr, unix.Errno) {
		n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(s.sock),
			uintptr(unsafe.Pointer(&s.header)), unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		return n, errno
	}
	n, errno := recvmsg()
	if errno == unix.ECONNRESET { // it has left a message unread; its own come after that
		n, errno = recvmsg()
	}
	if errno != 0 || int(n) != ipc.SpawnerMessageLen {
		return -1, false
	}
	if s.header.controlLen == 0 {
		return -1, true
	}
	return int(s.control.fd), true
}

// receiveFromSpawner acts on what the spawner says.
func (g *guard) receiveFromSpawner() {
	s, j := g.spawner, &g.job
	for s.pid != 0 {
		fd, ok := s.receive()
		if !ok {
			hungUp := g.watched[watchSpawner].Revents&unix.POLLHUP != 0
			if (hungUp || j.state == jobKilling) && proctree.PidfdExited(s.pidfd) {
				g.spawnerExited() // though a tracer may keep it from being reaped
			}
			return
		}
		m := s.got
		if j.state == jobIdle || m.Serial != j.serial { // it answers a kill that came too late
			if fd >= 0 {
				proctree.CloseRaw(fd)
			}
			continue
		}
		switch m.Kind {
		case ipc.SpawnerStarted:
			j.spawnerStarted(int(m.Value), fd)
		case ipc.SpawnerRefused:
			j.childless = true // it has no child yet, or no more
			j.refused(m.Value)
		case ipc.SpawnerExited:
			j.childless, j.unanswered = m.Extra == 1, false
			j.firstExited(unix.WaitStatus(m.Value))
		case ipc.SpawnerGone:
			j.childless, j.unanswered = true, false
			if j.pid != 0 {
				j.firstExited(unix.WaitStatus(unix.SIGKILL))
			}
		}
	}
}

// spawnerExited follows the exit of the spawner. The kernel has killed the job's first process, and
// what descends from that falls to us.
func (g *guard) spawnerExited() {
	s, j := g.spawner, &g.job
	s.pid, s.zombie, s.awaited, s.lost = 0, s.pid, false, true
	g.listChildren()
	j.unanswered = false
	j.kill(ipc.KilledSpawner) // before its end is looked at, which is no end of its own
	if j.pid != 0 {
		switch pid, ws, errno := wait(j.pid); {
		case pid == j.pid:
			j.firstExited(ws)
		case errno == unix.ECHILD: // the spawner has reaped it, and could not tell
			j.firstExited(unix.WaitStatus(unix.SIGKILL))
		}
	}
	if g.elector.announced && !j.alive() {
		return
	}
	g.elector.announced = false
	g.log.Error("spawner exited: killing the job and revoking the lease")
	g.loseElector()
}

// await notes that the spawner owes a heartbeat from now on.
func (s *spawner) await(now time.Duration) {
	s.awaited, s.lastHeartbeat, s.checkedAt, s.missedChecks = true, now, now, 0
	s.heartbeats = atomic.LoadUint32(&s.area.heartbeats)
}

// heartbeat reports whether the spawner has shown a heartbeat since the last one that was seen.
func (s *spawner) heartbeat(now time.Duration) bool {
	beats := atomic.LoadUint32(&s.area.heartbeats)
	if beats == s.heartbeats {
		return false
	}
	s.heartbeats, s.lastHeartbeat, s.checkedAt, s.missedChecks = beats, now, now, 0
	return true
}

// spawnerTimeout is for how long the spawner may do nothing of what it was asked for. Where kill-by
// has passed, or the next leader may be starting, that is half the margin, for the guard needs the
// rest to kill all by itself.
func (g *guard) spawnerTimeout(now time.Duration) time.Duration {
	if j := &g.job; j.state == jobKilling && (j.lost || now >= j.killBy) {
		return max(g.cfg.Margin/2,
			50*time.Millisecond) // what a busy processor may keep it from running
	}
	return max(g.cfg.TTL/3, time.Second)
}

// serveSpawnerSilence kills a spawner that was asked for something and shows no heartbeat. All of
// the job falls to the guard then. As with the elector, its silence must outlast three checks.
func (g *guard) serveSpawnerSilence(now time.Duration) {
	s := g.spawner
	switch timeout := g.spawnerTimeout(now); {
	case !s.awaited:
	case s.heartbeat(now):
		// One that kills shows a heartbeat again and again.
		s.awaited = g.job.state == jobKilling && !g.job.childless
	case now >= s.checkedAt+timeout/3:
		s.checkedAt = now
		if s.missedChecks++; s.missedChecks >= 3 {
			g.log.Error("spawner hangs: killing it", "elapsed", (now - s.lastHeartbeat).String())
			s.awaited = false
			s.kill()
		}
	}
}

// kill kills the spawner. What descends from it falls to the guard.
func (s *spawner) kill() {
	if s.pid != 0 {
		proctree.SignalPidfd(s.pidfd, unix.SIGKILL)
	}
}

// close kills the spawner and gives back what newSpawner made. Nothing of the job is left.
func (s *spawner) close() {
	s.kill()
	if s.pid != 0 {
		for end := boottime.Now() + time.Second; boottime.Now() < end; { // it exits at once
			if pid, err := unix.Wait4(s.pid, nil, unix.WNOHANG, nil); pid != 0 && !errors.Is(err,
				unix.EINTR) {
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
