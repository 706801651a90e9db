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
// we still find the whole job by descent: all of it descends from the spawner, and from the guard
// if the spawner is gone. If wait4(2) reports that the spawner has no child, nothing of the job is
// left. That proof needs no /proc. To find its children the spawner reads the kernel's list of
// them, which hidepid does not shorten.
type spawner struct {
	area    *spawnArea
	mem     []byte       // the area, and after it what the job's execve needs
	envp    [3][]uintptr // of the job and its hooks: the term's part, with a zero at the end
	terms   int          // where in mem the term's entries of the environment begin
	sock    int          // SOCK_SEQPACKET, non-blocking
	elector int          // the elector's end, of which each elector gets a copy
	pid     int          // 0: it has exited
	zombie  int          // its pid from its exit until it is reaped
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

// send asks for something. It never blocks.
func (s *spawner) send(kind, serial int32) {
	s.await(boottime.Now()) // before the send: the spawner may answer with a heartbeat at once
	s.post(kind, serial)
}

// post sends a message, and does not mind if the spawner does not act on it.
func (s *spawner) post(kind, serial int32) {
	s.sent = ipc.SpawnerMessage{Kind: kind, Serial: serial}
	s.write()
}

func (s *spawner) write() {
	_, _, _ = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s.sock), uintptr(unsafe.Pointer(&s.sent)),
		uintptr(ipc.SpawnerMessageLen), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
}

// signal asks to send a signal to the first process of that start, whose hook runs.
func (s *spawner) signal(serial int32, sig unix.Signal) {
	s.await(boottime.Now())
	s.sent = ipc.SpawnerMessage{Kind: ipc.SpawnerSignal, Serial: serial, Value: int32(sig)}
	s.write()
}

// receive reads the next message into got. It returns the descriptor that came with it, or -1, and
// false if there is no message.
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
	if errno == unix.ECONNRESET { // the spawner has not read a message; its own messages come next
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

// receiveFromSpawner acts on the spawner's messages.
func (g *guard) receiveFromSpawner() {
	s, j := g.spawner, &g.job
	for s.pid != 0 {
		fd, ok := s.receive()
		if !ok {
			hungUp := g.watched[watchSpawner].Revents&unix.POLLHUP != 0
			if (hungUp || j.state == jobKilling) && proctree.PidfdExited(s.pidfd) {
				g.spawnerExited() // even if a tracer keeps it from being reaped
			}
			return
		}
		m := s.got
		if j.state == jobIdle || m.Serial != j.serial { // the answer to a kill of an earlier job
			if fd >= 0 {
				proctree.CloseRaw(fd)
			}
			continue
		}
		switch m.Kind {
		case ipc.SpawnerStarted:
			j.spawnerStarted(int(m.Value), fd)
		case ipc.SpawnerRefused:
			j.childless = m.Extra == 1
			j.refused(m.Value)
		case ipc.SpawnerExited:
			j.childless, j.unanswered = m.Extra == 1, false
			j.firstExited(unix.WaitStatus(m.Value))
		case ipc.SpawnerGone:
			j.childless, j.unanswered = true, false
			// It has done what it was asked for. We may have counted its last heartbeat already.
			s.awaited = false
			if j.pid != 0 {
				j.firstExited(unix.WaitStatus(unix.SIGKILL))
			}
		}
	}
}

// spawnerExited acts on the exit of the spawner. The kernel has killed the job's first process, and
// the rest of the job becomes our children.
func (g *guard) spawnerExited() {
	s, j := g.spawner, &g.job
	s.pid, s.zombie, s.awaited, s.lost = 0, s.pid, false, true
	g.listChildren()
	j.unanswered = false
	j.kill(ipc.KilledSpawner) // before firstExited: the job does not exit by itself
	if j.pid != 0 {
		switch pid, ws, errno := wait(j.pid); {
		case pid == j.pid:
			j.firstExited(ws)
		case errno == unix.ECHILD: // the spawner has reaped it, and could not report that
			j.firstExited(unix.WaitStatus(unix.SIGKILL))
		}
	}
	if g.elector.announced && !j.alive() {
		return
	}
	g.elector.announced = false
	g.log.Error("spawner exited: killing the job and revoking the lease")
	g.giveUp("spawner exited")
}

// await notes that the spawner owes a heartbeat from now on.
func (s *spawner) await(now time.Duration) {
	s.awaited, s.lastHeartbeat, s.checkedAt, s.missedChecks = true, now, now, 0
	s.heartbeats = atomic.LoadUint32(&s.area.heartbeats)
}

// heartbeat reports whether the spawner has shown a new heartbeat.
func (s *spawner) heartbeat(now time.Duration) bool {
	beats := atomic.LoadUint32(&s.area.heartbeats)
	if beats == s.heartbeats {
		return false
	}
	s.heartbeats, s.lastHeartbeat, s.checkedAt, s.missedChecks = beats, now, now, 0
	return true
}

// spawnerTimeout is for how long the spawner may do nothing of what it was asked for. If kill-by
// has passed, that is half the margin: the guard needs the rest to kill all by itself. If the lease
// was lost before, it is half a second, and no longer than until then: the next leader may be
// starting, but a machine that stalls may keep any process from running for a while.
func (g *guard) spawnerTimeout(now time.Duration) time.Duration {
	j := &g.job
	if j.state != jobKilling || !j.lost && now < j.killBy {
		return max(g.cfg.TTL/3, time.Second)
	}
	timeout := max(g.cfg.Margin/2, 50*time.Millisecond)
	return max(timeout, min(500*time.Millisecond, j.killBy-now))
}

// serveSpawnerSilence kills a spawner that was asked for something and shows no heartbeat. All of
// the job then becomes the guard's children. As with the elector, the silence must last for three
// checks.
func (g *guard) serveSpawnerSilence(now time.Duration) {
	s := g.spawner
	switch timeout := g.spawnerTimeout(now); {
	case !s.awaited:
	case s.heartbeat(now):
		// While it kills, it shows heartbeats again and again.
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

// kill kills the spawner. Its descendants become the guard's children.
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
