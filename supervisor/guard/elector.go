//go:build linux

package guard

import (
	"errors"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// elector is what the guard knows of the elector, and of the process that revokes the lease in its
// place.
type elector struct {
	pid   int // 0: reaped
	pidfd int
	gone  bool // it has exited or was given up: nothing is expected of it any more

	in        int // the pipe pair: in and outbox
	inbox     ipc.Inbox
	outbox    ipc.Outbox
	pipeEnded bool

	heardAt      time.Duration
	checkAt      time.Duration // when its silence is checked next
	missedChecks int

	announced bool // it is about to exit in good order
	exit      Exit // as it announced it

	lease    ipc.Lease // ID 0: none
	token    []byte    // in tokenBuf: etcd's authentication token
	tokenBuf [ipc.MaxText]byte
	revoker  int // pid of the revoking process
	revokeBy time.Duration
}

// startElector starts the elector with the pipe pair, its socket to the spawner, a pidfd of the
// spawner, and the socket to serve on.
func (g *guard) startElector() error {
	e := &g.elector
	var toElector, fromElector [2]int
	for _, p := range []*[2]int{&toElector, &fromElector} {
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			return err
		}
	}
	e.in, e.outbox.FD = fromElector[0], toElector[1]
	argv := append(append([]string{}, g.cfg.Elector...), strconv.Itoa(unix.Getpid()),
		strconv.Itoa(g.spawner.pid))
	if g.cgroup != nil {
		argv = append(argv, g.cgroup.Dir)
	}
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: os.DevNull, Err: err}
	}
	files := []uintptr{
		uintptr(null), 1, 2, uintptr(toElector[0]), uintptr(fromElector[1]),
		uintptr(g.spawner.elector), uintptr(g.spawner.pidfd),
	}
	if g.listener >= 0 {
		files = append(files, uintptr(g.listener))
	}
	e.pid, err = syscall.ForkExec("/proc/self/exe", argv, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &e.pidfd},
	})
	for _, fd := range []int{null, toElector[0], fromElector[1], g.spawner.elector} {
		_ = unix.Close(fd)
	}
	g.spawner.elector = -1
	if err != nil {
		e.pid = 0
		return err
	}
	e.pipeEnded = false
	g.heardFromElector(boottime.Now())
	g.listChildren()
	return nil
}

// send sends a message to the elector. If the elector does not read, it counts as lost. If it has
// closed its end, it is about to exit, and its pidfd will show that.
func (g *guard) send(message any) {
	if g.elector.gone || !errors.Is(g.elector.outbox.Send(message), ipc.ErrFull) {
		return
	}
	g.log.Error("elector does not read: killing it and the job")
	g.loseElector()
}

// receiveFromElector receives the elector's messages. End-of-file proves nothing: the pidfd shows
// whether the elector has exited, and its silence shows whether it hangs.
func (g *guard) receiveFromElector() {
	e := &g.elector
	if e.pipeEnded {
		return
	}
	if _, err := e.inbox.Fill(e.in); err != nil {
		e.pipeEnded = true
		return
	}
	for m, ok := e.inbox.Next(); ok; m, ok = e.inbox.Next() {
		g.message(m)
		g.heardFromElector(boottime.Now())
	}
}

// message acts on a message of the elector.
func (g *guard) message(m ipc.Message) {
	now := boottime.Now()
	switch m.Kind {
	case ipc.KindPing:
		g.send(ipc.Pong(m.Ping()))
		g.cfg.Heartbeat()
	case ipc.KindReady:
		g.cfg.Notify("READY=1")
	case ipc.KindStatus:
		g.cfg.Notify("STATUS=" + m.Status().Text)
	case ipc.KindLease:
		g.elector.lease = m.Lease()
	case ipc.KindToken:
		g.elector.token = append(g.elector.tokenBuf[:0], m.Token().Value...)
	case ipc.KindStart:
		if !g.elector.gone {
			g.job.startAsked(m.Start())
		}
	case ipc.KindExtend:
		g.job.extended(m.Extend(), now)
	case ipc.KindStop:
		g.job.stopAsked(m.Stop(), now)
	case ipc.KindExiting:
		exiting := m.Exiting()
		g.elector.announced = true
		g.elector.exit = Exit{Code: exiting.Code, Why: exiting.Why}
	}
}

// heardFromElector notes that a message has come. While a job lives, the elector may be silent
// until kill-by, otherwise for a TTL.
func (g *guard) heardFromElector(now time.Duration) {
	e := &g.elector
	e.heardAt, e.missedChecks = now, 0
	if g.job.alive() {
		e.checkAt = max(g.job.killBy, now+g.cfg.TTL/10)
	} else {
		e.checkAt = now + max(g.cfg.TTL, 5*time.Second)
	}
}

// serveElectorDeadlines kills an elector that is silent, or that has not exited in time after a
// second signal, and a revoking process whose time is up.
func (g *guard) serveElectorDeadlines(now time.Duration) {
	e := &g.elector
	if g.forceBy != 0 && now >= g.forceBy && !g.job.alive() && e.pid != 0 && !e.gone {
		g.log.Error("elector has not exited after the second signal: killing it",
			"elapsed", forceTimeout.String())
		g.forced = true
		g.loseElector()
	}
	if e.revoker != 0 && now >= e.revokeBy {
		_ = unix.Kill(e.revoker, unix.SIGKILL)
		e.revokeBy = now + time.Second // it may be frozen
	}
	if e.pid == 0 || e.gone || now < e.checkAt {
		return
	}
	// Its silence must last for three checks, so that a pause of the guard, or of the host, does
	// not count against it.
	e.checkAt = now + g.cfg.TTL/10
	if e.missedChecks++; e.missedChecks < 3 {
		return
	}
	g.log.Error("elector silent: killing it and the job", "elapsed", (now - e.heardAt).String())
	g.loseElector()
}

// nextElectorDeadline is the earliest moment at which serveElectorDeadlines has something to do.
func (g *guard) nextElectorDeadline() time.Duration {
	e, next := &g.elector, forever
	if e.pid != 0 && !e.gone {
		next = min(next, e.checkAt)
		if g.forceBy != 0 && !g.job.alive() {
			next = min(next, g.forceBy)
		}
	}
	if e.revoker != 0 {
		next = min(next, e.revokeBy)
	}
	return next
}

// loseElector kills the elector, if it still lives, and the job with it. No elector follows, so
// nobody may wait for an answer, and the daemon that is started next may need the address.
func (g *guard) loseElector() {
	if g.elector.pid != 0 {
		proctree.SignalPidfd(g.elector.pidfd, unix.SIGKILL)
	}
	g.elector.gone = true
	g.job.kill(ipc.KilledElector)
	g.closeListener()
}

// closeListener closes the elector's socket, but not on the loop's thread: if thousands of clients
// wait there, that takes the kernel 100 ms and more.
func (g *guard) closeListener() {
	if g.listener >= 0 {
		g.unlisten <- g.listener
		g.listener = -1
	}
}

// electorExited distinguishes an elector that has announced its exit from one that was lost.
func (g *guard) electorExited(ws unix.WaitStatus) {
	e := &g.elector
	e.pid = 0
	g.listChildren()
	for !e.pipeEnded { // its last messages may still be in the pipe
		if more, err := e.inbox.Fill(e.in); !more || err != nil {
			break
		}
		for m, ok := e.inbox.Next(); ok; m, ok = e.inbox.Next() {
			switch m.Kind {
			case ipc.KindExiting, ipc.KindLease, ipc.KindToken:
				g.message(m)
			}
		}
	}
	e.pipeEnded = true
	if e.announced && !g.job.alive() {
		e.gone = true
		return
	}
	e.announced = false
	g.loseElector()
	exit := proctree.ExitOf(ws)
	g.log.Error("elector exited: killing the job and revoking the lease",
		"exit_code", exit.Code, "signal", exit.Signal)
}

// startRevoke starts the process that revokes the lease of a lost elector. Nothing of the job is
// left.
func (g *guard) startRevoke() {
	e := &g.elector
	lease := e.lease
	e.lease = ipc.Lease{}
	within := max(lease.TTL, g.cfg.TTL)
	if g.forceBy != 0 {
		within = 2 * forceTimeout
	}
	// The token goes through a pipe, where no other user can read it. All of it fits into the pipe.
	var token [2]int
	err := unix.Pipe2(token[:], unix.O_CLOEXEC)
	if err == nil {
		_, _ = unix.Write(token[1], e.token) // without it the revoking process uses the password
		_ = unix.Close(token[1])
		e.revoker, err = syscall.ForkExec("/proc/self/exe", g.cfg.Revoke(lease.ID, within),
			&syscall.ProcAttr{
				Env: os.Environ(), Files: []uintptr{uintptr(token[0]), 1, 2},
				Sys: &syscall.SysProcAttr{Setsid: true},
			})
		_ = unix.Close(token[0])
	}
	if err != nil {
		e.revoker = 0
		g.log.Error("lease could not be revoked: it will expire",
			"lease", strconv.FormatInt(lease.ID, 16), "err", err)
		return
	}
	e.revokeBy = boottime.Now() + within
	g.listChildren()
}

func (g *guard) revokerExited(ws unix.WaitStatus) {
	g.elector.revoker = 0
	g.listChildren()
	if exit := proctree.ExitOf(ws); exit.Code != 0 {
		g.log.Warn("lease could not be revoked: it will expire",
			"exit_code", exit.Code, "signal", exit.Signal)
	}
}
