//go:build linux

package guard

import (
	"errors"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// electorState is what the elector does.
//
//	              forked               exited as announced
//	starting ---------------> running ---------------------> gone
//	 ^  |                      |   |                          ^
//	 |  |                      |   | silent, does not read,   |
//	 |  |                      |   | given up: SIGKILL        |
//	 |  |                      |   v                          |
//	 |  |                      |  ending -------------------->+ exited, given up
//	 |  |                      v   |                          |
//	 +-------------------------+---+ exited                   |
//	    |                                                     |
//	    +-- not forked in time, given up -------------------->+
//
// An elector that exits, hangs or does not read is replaced, and the job goes on. Another one is
// forked only when the last one has exited and its pipe is read to the end. From then on nobody
// speaks with etcd before the new one has the Record.
//
// The guard gives up if the third within a minute would follow. Then it kills the job, and revokes
// the lease when nothing of the job is left.
//
// transition is the one place where the state changes.
type electorState string

const (
	electorStarting electorState = "starting" // another thread forks it
	electorRunning  electorState = "running"
	electorEnding   electorState = "ending" // it has got SIGKILL; or it has exited: see drain
	electorGone     electorState = "gone"   // none runs, and none follows
)

// elector is what the guard knows of the elector, and of the process that revokes the lease if none
// follows. What outlives an elector is in guard.known.
type elector struct {
	state   electorState
	givenUp bool // none follows
	silent  bool // why it ends: it did not exit by itself

	pid       int // 0: reaped, or not yet forked
	pidfd     int
	in        int // the pipe pair: in and outbox
	inbox     ipc.Inbox
	outbox    ipc.Outbox
	pipeEnded bool
	status    unix.WaitStatus // how it has exited
	drainBy   time.Duration   // it has exited, and its pipe must end by then; 0: it has not

	heardAt      time.Duration
	checkAt      time.Duration // when its silence is checked next
	missedChecks int

	announced bool // it is about to exit in good order
	exit      Exit // as it announced it

	askAt      time.Duration    // when one is to be forked; 0: it was asked for
	startBy    time.Duration    // when the one that is being forked must run
	lostAt     time.Duration    // when the one before it was lost; 0: the first one
	replacedAt [2]time.Duration // of the last two that were replaced

	token    []byte // in tokenBuf: etcd's authentication token
	tokenBuf [ipc.MaxText]byte
	revoker  int // pid of the revoking process
	revokeBy time.Duration
}

const (
	// mostReplaced bounds how many electors are replaced within replacedWithin.
	mostReplaced   = len(elector{}.replacedAt)
	replacedWithin = time.Minute
	// askAgain is the pause after a fork that failed, as it does at the limit of processes.
	askAgain = 500 * time.Millisecond
)

// transition is the one place where the state of the elector changes, and where that is logged.
func (e *elector) transition(g *guard, to electorState, why string) {
	g.log.Debug("elector state",
		"machine", "elector", "from", string(e.state), "to", string(to), "reason", why)
	e.state = to
}

// electorForked: an elector runs. It gets all that the guard knows before anything else.
func (g *guard) electorForked(p electorProcess) {
	e := &g.elector
	e.pid, e.pidfd, e.in, e.outbox.FD = p.pid, p.pidfd, p.in, p.out
	e.inbox, e.pipeEnded = ipc.Inbox{}, false
	e.announced, e.exit, e.silent = false, Exit{}, false
	e.transition(g, electorRunning, "forked")
	now := boottime.Now()
	g.heardFromElector(now)
	start := g.startTimeout() // it has to start, on a busy machine
	if g.reload.state == reloadStarting {
		start = min(start, g.readyTimeout(now)*2/3)
	}
	e.checkAt = max(e.checkAt, now+start)
	g.listChildren()
	r := &g.known
	r.Version, r.StopSignals = ipc.RecordVersion, g.stopSignals
	g.job.record(r)
	if len(e.token) > 0 {
		g.send(ipc.Token{Value: e.token})
	}
	g.send(*r)
	if g.job.alive() && e.lostAt != 0 {
		g.spawner.post(ipc.SpawnerShow, 0)
	}
}

// send sends a message to the elector. If the elector does not read, it is replaced. If it has
// closed its end, it is about to exit, and its pidfd will show that.
func (g *guard) send(message any) {
	e := &g.elector
	if e.state != electorRunning || !errors.Is(e.outbox.Send(message), ipc.ErrFull) {
		return
	}
	g.log.Warn("elector does not read: killing it and starting another")
	g.killElector("it does not read")
}

// receiveFromElector receives the elector's messages. End-of-file proves nothing: the pidfd shows
// whether the elector has exited, and its silence shows whether it hangs.
func (g *guard) receiveFromElector() {
	e := &g.elector
	if e.pipeEnded {
		return
	}
	if e.drainBy != 0 {
		g.drain(boottime.Now())
		return
	}
	if _, err := e.inbox.Fill(e.in); err != nil {
		e.pipeEnded = true
		return
	}
	g.takeMessages()
}

func (g *guard) takeMessages() {
	for m, ok := g.elector.inbox.Next(); ok; m, ok = g.elector.inbox.Next() {
		g.message(m)
	}
}

// message acts on a message of the elector.
func (g *guard) message(m ipc.Message) {
	now := boottime.Now()
	switch m.Kind {
	case ipc.KindPing:
		g.heardFromElector(now)
		if ping := m.Ping(); ping.Number != 0 { // else the elector wants no answer
			g.send(ipc.Pong(ping))
		}
		g.cfg.Heartbeat()
	case ipc.KindReady:
		g.electorReady(now)
	case ipc.KindStatus:
		g.cfg.Notify("STATUS=" + m.Status().Text)
	case ipc.KindLease:
		g.leased(m.Lease())
	case ipc.KindEntered:
		entered := m.Entered()
		if entered.Created != g.known.Entered.Created {
			g.endTrial()
		}
		g.known.Entered = entered
	case ipc.KindRestarts:
		g.known.Restarts = m.Restarts()
	case ipc.KindJobReady:
		g.known.JobReady = m.JobReady()
	case ipc.KindToken:
		g.elector.token = append(g.elector.tokenBuf[:0], m.Token().Value...)
	case ipc.KindStart:
		if !g.elector.givenUp {
			g.job.startAsked(m.Start())
			g.elector.checkAt = min(g.elector.checkAt, g.silentUntil(now))
		}
	case ipc.KindExtend:
		g.reload.renewed = true
		g.job.extended(m.Extend(), now)
		g.elector.checkAt = min(g.elector.checkAt, g.silentUntil(now))
	case ipc.KindStop:
		g.job.stopAsked(m.Stop(), now)
	case ipc.KindExiting:
		exiting := m.Exiting()
		g.elector.announced = true
		g.elector.exit = Exit{Code: exiting.Code, Why: exiting.Why}
	}
}

// electorReady: its endpoint is served.
func (g *guard) electorReady(now time.Duration) {
	g.cfg.Notify("READY=1")
	if lost := g.elector.lostAt; lost != 0 {
		g.log.Info("another elector runs", "elapsed", (now - lost).String())
	}
	g.reloadReady()
}

// leased: the elector has another lease, or knows more about it. A release is never taken back: the
// request for it may be on its way to etcd for ever.
func (g *guard) leased(l ipc.Lease) {
	r := &g.known
	if l.ID != r.Lease.ID {
		g.endTrial()
		r.Lease, r.Entered, r.Starts = l, ipc.Entered{}, 0
		return
	}
	if l.TTL != 0 {
		r.Lease.TTL = l.TTL
	}
	r.Lease.Releasing = r.Lease.Releasing || l.Releasing
}

// heardFromElector notes that a ping has come. The elector sends none if a loop of it hangs, though
// another may still send messages.
func (g *guard) heardFromElector(now time.Duration) {
	e := &g.elector
	e.heardAt, e.missedChecks = now, 0
	e.checkAt = g.silentUntil(now)
}

// silentUntil is until when an elector may be silent that has just sent a ping. While a job lives,
// an elector that hangs must be replaced before stop-at, with time for the next one to renew the
// lease. Until a third of the TTL before stop-at the elector pings every fifth of the TTL, then
// every thirtieth, or every second. Without a job it pings every fifth, or every second if that is
// longer, and is replaced before its lease ends, unless that is very short. While a job is frozen,
// the same: only a renewal is missed, and the job must not be killed because a busy machine has
// cost it three electors.
func (g *guard) silentUntil(now time.Duration) time.Duration {
	runs := g.job.alive() && g.job.state != jobFrozen
	return now + ipc.Silence(g.cfg.TTL, runs, g.job.stopAt-now)
}

// serveElectorDeadlines replaces an elector that is silent. It gives up one that has not exited in
// time after a second signal, or that is not forked in time. It kills a revoking process whose time
// is up.
func (g *guard) serveElectorDeadlines(now time.Duration) {
	e := &g.elector
	switch {
	case e.givenUp || e.state == electorGone:
	case g.forceBy != 0 && now >= g.forceBy && !g.job.alive():
		g.log.Error("elector has not exited after the second signal: killing it",
			"elapsed", forceTimeout.String())
		g.forced = true
		g.giveUp("second signal")
	case e.state == electorStarting && e.askAt != 0 && now >= e.askAt:
		e.askAt = 0
		g.starter.ask(e.startBy)
	case e.state == electorStarting && now >= e.startBy:
		g.log.Error("another elector does not start: killing the job and revoking the lease")
		g.giveUp("it does not start")
	case e.state == electorRunning && now >= e.checkAt:
		g.checkSilence(now)
	case e.drainBy != 0 && now >= e.drainBy:
		g.drain(now)
	}
	if e.revoker != 0 && now >= e.revokeBy {
		_ = unix.Kill(e.revoker, unix.SIGKILL)
		e.revokeBy = now + time.Second // it may be frozen
	}
}

// checkSilence counts that the elector is silent. That must last for three checks, so that a pause
// of the guard, or of the host, does not count against it.
func (g *guard) checkSilence(now time.Duration) {
	e := &g.elector
	e.checkAt = now + min(g.cfg.TTL/30, time.Second)
	if e.missedChecks++; e.missedChecks < 3 {
		return
	}
	g.log.Warn("elector silent: killing it and starting another",
		"elapsed", (now - e.heardAt).String())
	g.killElector("silent")
}

// nextElectorDeadline is the earliest moment at which serveElectorDeadlines has something to do.
func (g *guard) nextElectorDeadline() time.Duration {
	e, next := &g.elector, forever
	switch e.state {
	case electorStarting:
		if next = e.startBy; e.askAt != 0 {
			next = min(next, e.askAt)
		}
	case electorRunning:
		next = e.checkAt
	case electorEnding:
		if e.drainBy != 0 {
			next = e.drainBy
		}
	case electorGone:
		if g.starter.busy > 0 && !g.job.alive() { // see finished
			next = g.starter.busyBy
		}
	}
	if g.forceBy != 0 && !g.job.alive() && !e.givenUp && e.state != electorGone {
		next = min(next, g.forceBy)
	}
	if e.revoker != 0 {
		next = min(next, e.revokeBy)
	}
	return next
}

// killElector kills an elector that hangs. The job is left alone: another elector follows.
func (g *guard) killElector(why string) {
	e := &g.elector
	proctree.SignalPidfd(e.pidfd, unix.SIGKILL)
	e.silent = true
	e.transition(g, electorEnding, why)
}

// giveUp kills the elector, if it lives, and the job with it. No elector follows, so nobody may
// wait for an answer, and the daemon that is started next may need the address.
func (g *guard) giveUp(why string) {
	e := &g.elector
	e.givenUp = true
	switch {
	case e.pid != 0:
		proctree.SignalPidfd(e.pidfd, unix.SIGKILL)
		e.transition(g, electorEnding, why)
	default:
		e.closeProcess()
		e.transition(g, electorGone, why)
	}
	g.job.kill(ipc.KilledElector)
	g.closeListener()
	g.giveUpReload()
}

// closeListener closes the elector's socket, but not on the loop's thread: if thousands of clients
// wait there, that takes the kernel 100 ms and more.
func (g *guard) closeListener() {
	if g.listener >= 0 {
		g.unlisten <- g.listener
		g.listener = -1
	}
}

// electorExited: the elector is reaped, so nothing new leaves it any more.
func (g *guard) electorExited(ws unix.WaitStatus) {
	e, now := &g.elector, boottime.Now()
	e.pid, e.status, e.drainBy = 0, ws, now+g.startTimeout()
	g.listChildren()
	g.drain(now)
}

// drain acts on what an elector has sent that has exited. That counts to the last message: it may
// have announced that it gives the lease back. It may have been forking a process. Until that has
// executed its binary, it holds the other end of the pipe. So the pipe may end only a little later,
// and drain is called again.
func (g *guard) drain(now time.Duration) {
	e := &g.elector
	whole := g.readToEnd()
	if !e.pipeEnded && now < e.drainBy {
		if e.state != electorEnding {
			e.transition(g, electorEnding, "exited, and its pipe is still held")
		}
		return
	}
	e.closeProcess()
	if g.reload.state == reloadStarting { // it was never ready: the one before it comes back
		e.announced = false
	}
	if e.announced && !g.job.alive() {
		e.transition(g, electorGone, "exited as announced")
		g.giveUpReload()
		return
	}
	exit := proctree.ExitOf(e.status)
	attrs := []any{"exit_code", exit.Code, "signal", exit.Signal}
	if e.silent {
		attrs = nil // we have killed it
	}
	why := g.irreplaceable(whole, now)
	e.announced = false
	if why != "" {
		if !e.givenUp {
			g.log.Error("elector exited, and is not replaced: "+
				"killing the job and revoking the lease", append(attrs, "reason", why)...)
		}
		g.giveUp(why)
		return
	}
	g.countReplacement(now)
	g.chooseImage()
	if text := "elector exited: starting another"; !e.silent {
		if g.job.alive() {
			text += ", the job goes on"
		}
		g.log.Warn(text, attrs...)
	}
	e.startBy, e.askAt = now+g.startTimeout(), 0
	e.transition(g, electorStarting, "exited")
	g.starter.ask(e.startBy)
}

// startTimeout is how long it may take to fork an elector, and then until it says something.
func (g *guard) startTimeout() time.Duration {
	return min(max(g.cfg.TTL/3, 2*time.Second), ipc.MaxSilence)
}

// readToEnd acts on all that an elector that has exited has sent. It reports whether the pipe was
// read to its end, and had nothing but messages in it.
func (g *guard) readToEnd() bool {
	e := &g.elector
	for !e.pipeEnded {
		more, err := e.inbox.Fill(e.in)
		switch {
		case err != nil:
			e.pipeEnded = true
		case !more:
			return false // somebody else holds its end
		}
		g.takeMessages()
	}
	return e.inbox.Empty()
}

// closeProcess closes what belongs to an elector that has exited.
func (e *elector) closeProcess() {
	e.pipeEnded, e.drainBy = true, 0
	for _, fd := range []*int{&e.in, &e.outbox.FD, &e.pidfd} {
		if *fd >= 0 {
			_ = unix.Close(*fd)
			*fd = -1
		}
	}
}

// irreplaceable is why no other elector follows one that has exited, or "".
func (g *guard) irreplaceable(whole bool, now time.Duration) string {
	e := &g.elector
	switch {
	case e.givenUp:
		return "given up"
	case e.announced:
		return "it has announced its exit, and the job lives"
	case !whole:
		return "its messages can't be read"
	case g.known.Lease.Releasing && g.job.alive():
		return "it gives the lease back, and the job lives"
	case g.stopSignals > 1:
		return "second signal"
	case g.spawnerClosed():
		return "the spawner starts nothing any more"
	case g.lossCounts() && e.replacedAt[0] != 0 && now-e.replacedAt[0] < replacedWithin:
		return "too many within " + replacedWithin.String()
	}
	return ""
}

// spawnerClosed reports whether the spawner starts nothing any more, because an elector took us for
// hung.
func (g *guard) spawnerClosed() bool { return atomic.LoadInt32(&g.spawner.area.closed) != 0 }

// countReplacement counts the loss of an elector that is replaced.
func (g *guard) countReplacement(now time.Duration) {
	e := &g.elector
	switch {
	case g.reload.state == reloadEnding:
		g.known.Reloaded++
	case e.silent:
		g.known.Silent++
	default:
		g.known.Exited++
	}
	e.lostAt = now
	if !g.lossCounts() {
		return
	}
	copy(e.replacedAt[:], e.replacedAt[1:])
	e.replacedAt[mostReplaced-1] = now
}

// startRevoke starts the process that revokes the lease of a lost elector. Nothing of the job is
// left.
func (g *guard) startRevoke() {
	e := &g.elector
	lease := g.known.Lease
	g.known.Lease = ipc.Lease{}
	within := max(lease.TTL, g.cfg.TTL)
	if g.forceBy != 0 {
		within = 2 * forceTimeout
	}
	var err error = unix.EBUSY // Go lets one fork wait for the other, and that one hangs
	if g.starter.busy == 0 {
		err = g.forkRevoke(g.cfg.Revoke(lease.ID, within))
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

// forkRevoke forks the revoking process. The token goes through a pipe, where no other user can
// read it. All of it fits into the pipe.
func (g *guard) forkRevoke(argv []string) error {
	var token [2]int
	if err := unix.Pipe2(token[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	e := &g.elector
	_, _ = unix.Write(token[1], e.token) // without it the revoking process uses the password
	_ = unix.Close(token[1])
	var err error
	image := g.starter.image
	e.revoker, err = syscall.ForkExec(image.path(), argv, &syscall.ProcAttr{
		Env: image.env, Files: []uintptr{uintptr(token[0]), 1, 2, uintptr(g.stateFd)},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	_ = unix.Close(token[0])
	return err
}

func (g *guard) revokerExited(ws unix.WaitStatus) {
	g.elector.revoker = 0
	g.listChildren()
	if exit := proctree.ExitOf(ws); exit.Code != 0 {
		g.log.Warn("lease could not be revoked: it will expire",
			"exit_code", exit.Code, "signal", exit.Signal)
	}
}
