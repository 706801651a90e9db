//go:build linux

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// pings counts the pings to the guard and its answers.
type pings struct {
	sent, answered int64
	killBy         time.Duration // when the last ping was sent
	at             time.Duration // when that was
	due            time.Duration // when the next one is
}

// Run receives the guard's messages until ctx ends. Then it returns nil. If the guard is lost, Run
// kills the job itself, proves that nothing of it is left, and returns ErrGuardLost. No Supervise
// may be under way when ctx ends.
func (s *Supervisor) Run(ctx context.Context) error {
	var owned sync.WaitGroup
	defer owned.Wait()
	defer s.monitors.Wait() // no run is under way any more, so they end
	defer func() { _ = errors.Join(s.pipe.Close(), s.spawner.Close()) }()
	if s.notify != nil {
		owned.Go(s.readNotifications)
		defer func() { _ = s.notify.Close() }()
	}
	stop := make(chan struct{})
	defer close(stop)

	messages := make(chan ipc.Message)
	owned.Go(func() { s.read(messages, stop) })
	owned.Go(s.readSpawner)
	exited := make(chan struct{})
	exit, err := newPidfdWait(s.guardFd)
	if err != nil {
		return fmt.Errorf("watch the guard: %w", err)
	}
	defer func() { _ = exit.Close() }()
	owned.Go(func() { exit.wait(exited) })

	var p pings
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-exited:
			return s.guardLost("guard exited", messages)
		case m := <-messages:
			s.receive(m, &p)
		case <-tick.C:
			s.receiveWaiting(messages, &p) // the job may be frozen, and not overdue
			if s.unreachable.Load() || s.guardHangs(&p) && !s.unread(messages, &p) {
				return s.guardLost("guard hangs", messages)
			}
			// If the job should be gone by now, we ping the guard even if our own loops hang:
			// nobody else would notice.
			if overdue := s.killOverdue(); overdue || s.cfg.Running() {
				s.ping(&p)
			}
			now := boottime.Now()
			p.due = now + s.pingInterval(now)
			tick.Reset(p.due - now)
		case <-s.pingDue:
			now := boottime.Now()
			soon := max(now, p.at+min(s.cfg.TTL/10, s.seldom()))
			p.due = min(p.due, now+s.pingInterval(now), soon)
			tick.Reset(p.due - now)
		}
	}
}

// receive acts on a message of the guard.
func (s *Supervisor) receive(m ipc.Message, p *pings) {
	switch m.Kind {
	case ipc.KindPong:
		s.answered(m.Pong(), p)
	case ipc.KindSignal:
		s.mu.Lock()
		s.stopped = true
		s.mu.Unlock()
		s.cfg.Signal(m.Signal().Signal)
		s.pingSoon()
	case ipc.KindTimerLatency:
		s.metrics.timerLatency.Observe(m.TimerLatency().By.Seconds())
	case ipc.KindStarted:
		s.started(m.Started())
	case ipc.KindRefused:
		s.refused(m.Refused())
	case ipc.KindFrozen:
		s.frozen(m.Frozen())
		s.pingSoon()
	case ipc.KindThawed:
		s.thawed()
	case ipc.KindEnding:
		s.ending()
	case ipc.KindExited:
		s.firstExited(m.Exited())
	case ipc.KindGone:
		s.gone(m.Gone())
		s.pingSoon() // the guard may wait for our release
	}
}

// receiveWaiting acts on the messages that have come by now.
func (s *Supervisor) receiveWaiting(messages <-chan ipc.Message, p *pings) {
	for {
		select {
		case m := <-messages:
			s.receive(m, p)
		default:
			return
		}
	}
}

// ping sends a ping. It wants no answer while there is no job: nothing depends on it.
func (s *Supervisor) ping(p *pings) {
	p.at = boottime.Now()
	s.mu.Lock()
	if !s.job.alive() {
		s.mu.Unlock()
		s.send(ipc.Ping{})
		return
	}
	p.killBy = s.job.term.KillBy
	s.mu.Unlock()
	p.sent++
	s.send(ipc.Ping{Number: p.sent})
}

// answered: the guard has read the ping, and all that was sent before.
func (s *Supervisor) answered(m ipc.Pong, p *pings) {
	if p.answered = m.Number; p.answered == p.sent {
		s.mu.Lock()
		s.job.known = max(s.job.known, p.killBy)
		s.mu.Unlock()
	}
}

// pingSoon makes Run send a ping, unless it has just done so.
func (s *Supervisor) pingSoon() {
	select {
	case s.pingDue <- struct{}{}:
	default:
	}
}

// unread takes the messages that have come, and reports whether these show the guard to be alive,
// or there are more in the pipe. An answer that we have not read yet was sent all the same: our
// other goroutines may have kept the reading one waiting.
func (s *Supervisor) unread(messages <-chan ipc.Message, p *pings) bool {
	for {
		select {
		case m := <-messages:
			s.receive(m, p)
			continue
		default:
		}
		pipe := []unix.PollFd{{Fd: int32(s.cfg.In), Events: unix.POLLIN}}
		_, err := unix.Poll(pipe, 0)
		return err == nil && pipe[0].Revents&unix.POLLIN != 0 || !s.guardHangs(p)
	}
}

// guardHangs reports whether the guard is taken for hung: more than three pings are unanswered
// while the guard has something to do. It has to start the job, to follow the exit of the first
// process, and to kill: from a margin before kill-by on, and from half a second after the end of a
// stop or a loss. Otherwise its silence does no harm, since killOverdue kills sooner than that, and
// a pause of the machine must not cost the daemon. Pings count only as we send them, so that a
// pause of our own, or of the host, does not count against the guard.
func (s *Supervisor) guardHangs(p *pings) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	j, now := &s.job, boottime.Now()
	if !j.alive() || p.sent-p.answered <= 3 {
		return false
	}
	switch {
	case j.pidfd < 0 && now < j.askedAt+s.cfg.TTL/3: // the start
	case j.pidfd >= 0 && proctree.PidfdExited(j.pidfd):
	case now >= j.known-s.cfg.Margin(), now-500*time.Millisecond >= j.due:
	default:
		return false
	}
	return true
}

// killOverdue kills, as far as killNow can, a job that the guard should have killed by now. The
// guard may hang. To be sure of that takes several pings, and on a starved machine they are slow.
// It reports whether there is such a job.
func (s *Supervisor) killOverdue() bool {
	s.mu.Lock()
	overdue := s.job.alive() && boottime.Now() >= s.job.overdue(s.cfg.Margin())
	s.mu.Unlock()
	if overdue {
		s.killNow()
	}
	return overdue
}

// seldom is the time between two pings that no deadline needs sooner.
func (s *Supervisor) seldom() time.Duration {
	return min(max(s.cfg.TTL/5, time.Second), s.cfg.MaxPing, ipc.MaxSilence/3)
}

// pingInterval is the time from now to the next ping. Pings are as frequent as deadlines need them.
//
// Most of the time a ping with each renewal is enough, and while the job is frozen: nothing thaws
// it before we ask for that. If none counts, the guard replaces a silent
// elector from a third of the TTL before stop-at on. From a margin before kill-by on, during a
// start, and once the job is to end, guardHangs counts pings. For both it is a thirtieth of the
// TTL, at most a second. From the moment on when the job is overdue, it is far less. Nothing of the
// job should be left then, and within the rest of the margin we have to notice that the guard hangs
// and to kill in its place.
func (s *Supervisor) pingInterval(now time.Duration) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	seldom, often := s.seldom(), min(s.cfg.TTL/30, time.Second, s.cfg.MaxPing)
	j, margin := &s.job, s.cfg.Margin()
	overdue := j.overdue(margin)
	switch {
	case !j.alive() && s.stopped: // the guard waits for our release
		return often
	case !j.alive(), j.frozen && j.due == forever:
		return seldom
	case now >= overdue:
		return max(min(max(margin/16, 25*time.Millisecond), margin/8), time.Millisecond)
	case j.shown.State != JobRunning || j.due != forever || proctree.PidfdExited(j.pidfd):
		return min(often, overdue-now)
	}
	silence := ipc.Silence(s.cfg.TTL, true, j.term.StopAt-now)
	needed := min(now+silence-2*often, min(j.term.KillBy, j.known)-margin-5*often)
	return min(max(often, min(seldom, needed-now)), overdue-now)
}

// read passes on the guard's messages.
func (s *Supervisor) read(messages chan<- ipc.Message, stop <-chan struct{}) {
	conn, err := s.pipe.SyscallConn()
	if err != nil {
		return
	}
	for {
		for m, ok := s.inbox.Next(); ok; m, ok = s.inbox.Next() {
			select {
			case messages <- m.Clone():
			case <-stop:
				return
			}
		}
		var fillErr error
		if err := conn.Read(func(fd uintptr) bool {
			var more bool
			more, fillErr = s.inbox.Fill(int(fd))
			return more || fillErr != nil
		}); err != nil || fillErr != nil {
			return // end-of-file proves nothing: the guard's pidfd shows whether it has exited
		}
	}
}

// readSpawner receives the spawner's messages, until its end or ours. With each start comes a pidfd
// of the job's first process, which shows us its exit without the guard's help.
func (s *Supervisor) readSpawner() {
	conn, err := s.spawner.SyscallConn()
	if err != nil {
		return
	}
	for {
		var m ipc.SpawnerMessage
		var control [unix.SizeofCmsghdr + 8]byte
		n, controlLen := 0, 0
		var received error
		if err := conn.Read(func(fd uintptr) bool {
			n, controlLen, _, _, received = unix.Recvmsg(int(fd), m.Bytes(), control[:],
				unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			return !errors.Is(received, unix.EAGAIN)
		}); err != nil || received != nil || n != ipc.SpawnerMessageLen {
			return // end-of-file proves nothing: the spawner's pidfd shows whether it has exited
		}
		switch m.Kind {
		case ipc.SpawnerStarted:
			s.firstProcess(m, receivedFd(control[:controlLen]))
		case ipc.SpawnerGone:
			select {
			case <-s.spawnerDone:
			default:
				close(s.spawnerDone)
			}
		case ipc.SpawnerHookDone:
			select {
			case s.hookDone <- unix.WaitStatus(m.Value):
			default:
			}
		}
	}
}

// receivedFd is the descriptor that came with a message, or -1.
func receivedFd(control []byte) int {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 {
		return -1
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1
	}
	return fds[0]
}

// tellSpawner sends the spawner a message that has only a kind.
func (s *Supervisor) tellSpawner(kind int32) {
	m := ipc.SpawnerMessage{Kind: kind}
	_ = unix.Sendto(s.cfg.SpawnerSock, m.Bytes(), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, nil)
}

// pidfdWait waits for the exit of a process without holding a thread.
type pidfdWait struct{ *os.File }

func newPidfdWait(pidfd int) (pidfdWait, error) {
	// A copy: closing it ends the wait, and must not close the original under its users.
	fd, err := unix.FcntlInt(uintptr(pidfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return pidfdWait{}, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return pidfdWait{}, errors.Join(err, unix.Close(fd))
	}
	return pidfdWait{os.NewFile(uintptr(fd), "pidfd")}, nil
}

// wait closes exited when the process has exited. It returns without that once the file is closed.
func (p pidfdWait) wait(exited chan<- struct{}) {
	conn, err := p.SyscallConn()
	if err != nil {
		return
	}
	if conn.Read(func(fd uintptr) bool { return proctree.PidfdExited(int(fd)) }) == nil {
		close(exited)
	}
}
