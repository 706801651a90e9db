//go:build linux

package guard

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/proctree"
	"leasehold/supervisor/reload"
)

// ReloadConfig is what a reload needs to know. A reload replaces the elector on purpose: with the
// binary that is at the path now, and the settings that are in the env file now.
type ReloadConfig struct {
	Path    string // of the binary, absolute; "": there is no reload
	Version string // of this one
	// Check makes the argv of the process that checks whether an elector of that binary can take
	// over. The process leaves a reload.Result in descriptor 3. If there is a lease, it proves that
	// its etcd has it; 0: there is none, or nothing depends on it. created is the key's revision.
	// settings means that descriptor 4 has what replaces the settings in its environment.
	Check func(lease, created int64, settings bool) []string
	Env   []string // of that process: the guard's own, as it was at the start
}

// reloadState is what a reload does.
//
//	none --> asked --> forking --> checking --> reading --> ending --> starting --> none
//	           |          the check process runs  |           |           |
//	           v                                  v           v           v
//	          none                               none        none        none
//
// Until ending nothing has been touched: whatever goes wrong, the elector goes on. From ending on,
// the elector is replaced as one that was lost, see electorState. If the next one is lost before
// it is ready, the one that follows is of the binary and the environment of before. That is the
// same within a minute, if it has not renewed the lease yet, or if it is the second one. The trial
// ends with the lease: of another one nobody knows whether the old settings lead to its etcd.
type reloadState string

const (
	reloadNone     reloadState = "none"
	reloadAsked    reloadState = "asked"    // the request has not come yet
	reloadForking  reloadState = "forking"  // another thread forks the check process
	reloadChecking reloadState = "checking" // it runs
	reloadReading  reloadState = "reading"  // another thread reads what it has left
	reloadEnding   reloadState = "ending"   // the elector has got SIGKILL, and has not exited yet
	reloadStarting reloadState = "starting" // the next one is not ready yet
)

// reloading is what the guard knows of a reload.
type reloading struct {
	state    reloadState
	answered bool // its outcome is known; what it has begun still has to end
	asker    int  // the connection to whoever has asked; -1: none
	again    bool // too many others have connected there: try again
	lease    int64
	pid      int           // of the check process; 0: none
	by       time.Duration // when the state has to have ended
	timedOut bool
	// The child that was reaped last, of those that were not known.
	reaped int
	status unix.WaitStatus
	failed string // how the check process has exited, if not with 0

	before  image         // of the electors before the last reload
	trialBy time.Duration // until then they may come back; 0: never
	renewed bool          // the elector of the last reload has renewed the lease of a job
	lost    bool          // it has, and was lost since
}

// image is a binary and an environment, of electors and of the process that revokes.
type image struct {
	fd      int // of the binary; -1: it is that of the guard
	env     []string
	version string
}

// path is what is executed.
func (i image) path() string {
	if i.fd < 0 {
		return "/proc/self/exe"
	}
	return "/proc/self/fd/" + strconv.Itoa(i.fd)
}

const (
	requestTimeout = 5 * time.Second
	checkTimeout   = 15 * time.Second
	// readyTimeout bounds the time until the next elector is ready, see guard.readyTimeout. It is
	// killed earlier if it is silent.
	readyTimeout = 30 * time.Second
	trialTime    = time.Minute
)

// transition is the one place where the state of the reload changes, and where that is logged. The
// model has no such machine: to it a reload is a replacement like any other.
func (r *reloading) transition(g *guard, to reloadState, why string) {
	g.log.Debug("reload", "before", string(r.state), "state", string(to), "reason", why)
	r.state = to
}

// reloadAsked: somebody who may signal us has asked for a reload.
func (g *guard) reloadAsked() {
	r := &g.reload
	asker, again := g.connectAsker()
	if why := g.irreloadable(); why != "" {
		g.answer(asker, reload.Outcome{Text: why})
		g.log.Warn("reload refused: "+why, "binary", g.cfg.Reload.Path)
		return
	}
	r.asker, r.again, r.answered, r.timedOut, r.failed = asker, again, false, false, ""
	if asker < 0 {
		g.check(-1)
		return
	}
	r.by = boottime.Now() + requestTimeout
	r.transition(g, reloadAsked, "signal")
}

// receiveRequest receives what the asker sends: a request, and possibly settings. It is root or of
// our user.
func (g *guard) receiveRequest() {
	r := &g.reload
	if r.state != reloadAsked || g.watched[watchAsker].Revents == 0 {
		return
	}
	settings, whole, err := receiveRights(r.asker, g.scratch[:])
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return
	}
	r.transition(g, reloadNone, "request")
	why := g.irreloadable()
	if err != nil || !whole {
		why = "whoever has asked is gone, or asks for something else"
	}
	if why != "" {
		closeAll(settings)
		g.endReload(reload.Outcome{Text: why})
		return
	}
	g.check(settings)
}

// receiveRights receives a request. It returns the first descriptor that has come with it, or -1.
func receiveRights(conn int, buf []byte) (fd int, request bool, err error) {
	rights := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(conn, buf, rights, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	fd = -1
	if err != nil {
		return fd, false, err
	}
	messages, _ := unix.ParseSocketControlMessage(rights[:oobn])
	for i := range messages {
		fds, _ := unix.ParseUnixRights(&messages[i])
		for _, other := range fds {
			if fd < 0 {
				fd = other
			} else {
				_ = unix.Close(other)
			}
		}
	}
	return fd, reload.IsRequest(buf[:n]), nil
}

// check has a process check the reload.
func (g *guard) check(settings int) {
	r := &g.reload
	r.lease = g.known.Lease.ID
	created := g.known.Entered.Created
	if created == 0 { // the next elector only gives it back
		r.lease = 0
	}
	g.log.Info("reload: checking the binary and the settings", "binary", g.cfg.Reload.Path)
	r.by = boottime.Now() + checkTimeout
	r.transition(g, reloadForking, "asked for")
	g.starter.askCheck(g.cfg.Reload.Check(r.lease, created, settings >= 0), settings)
}

// irreloadable is why there can be no reload now, or "".
func (g *guard) irreloadable() string {
	e, j, now := &g.elector, &g.job, boottime.Now()
	switch {
	case g.cfg.Reload.Path == "":
		return "the path of the binary is not known"
	case g.reload.state != reloadNone:
		return "another reload is under way"
	case g.stopSignals > 0, e.givenUp, e.announced, g.spawner.pid == 0, g.spawnerClosed():
		return "the daemon stops"
	case e.state != electorRunning:
		return "the elector is just being replaced: try again"
	case g.known.Lease.Releasing:
		return "the lease is just being given back: try again"
	case j.alive() && g.known.Entered.Created == 0:
		return "the key of the job's lease is not known"
	case g.known.Lease.TTL != 0 && g.known.Entered.Created == 0:
		return "a lease is just being granted: try again"
	case j.state == jobStopping, j.state == jobKilling, j.state == jobPostStop:
		return "the job is being stopped: try again"
	case j.state == jobFreezing, j.state == jobFrozen, j.state == jobThawing:
		return "the job is frozen: try again when it runs"
	case j.alive() && j.stopAt-now < min(time.Second, g.cfg.TTL/4):
		return "the lease was not renewed for long, and the job is stopped in " +
			(j.stopAt - now).Round(time.Millisecond).String()
	}
	return ""
}

// connectAsker connects to whoever has asked, and returns the connection; -1: nobody listens whom
// we believe. again: too many have connected there, and it may be worth another try.
func (g *guard) connectAsker() (asker int, again bool) {
	fd, err := unix.Socket(unix.AF_UNIX,
		unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, false
	}
	if err = unix.Connect(fd, &unix.SockaddrUnix{Name: g.askerAddress}); err == nil {
		peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err == nil && (peer.Uid == 0 || int(peer.Uid) == unix.Geteuid()) {
			return fd, false
		}
	}
	_ = unix.Close(fd)
	return -1, errors.Is(err, unix.EAGAIN)
}

// answer sends an outcome, once. It never waits.
func (g *guard) answer(asker int, o reload.Outcome) {
	if asker >= 0 {
		_, _ = unix.SendmsgN(asker, o.Encode(), nil, nil, unix.MSG_NOSIGNAL)
		_ = unix.Close(asker)
	}
}

// endReload answers whoever has asked, unless that was done.
func (g *guard) endReload(o reload.Outcome) {
	r := &g.reload
	if r.answered {
		return
	}
	if r.again {
		r.asker, _ = g.connectAsker()
	}
	g.answer(r.asker, o)
	r.asker, r.answered = -1, true
	if !o.Done {
		g.log.Warn("reload failed: "+o.Text, "binary", g.cfg.Reload.Path)
	}
}

// abortReload ends a reload that has touched nothing yet, and what it has begun. One that has
// touched something goes on.
func (g *guard) abortReload(why string) {
	r := &g.reload
	switch r.state {
	case reloadNone, reloadEnding, reloadStarting:
		return
	case reloadAsked:
		r.transition(g, reloadNone, why)
	case reloadChecking:
		r.killCheck()
	}
	g.endReload(reload.Outcome{Text: why})
}

// killCheck kills the check process. It is not reaped while its pid is known.
func (r *reloading) killCheck() {
	if r.pid > 0 { // 0 would be our own process group
		_ = unix.Kill(r.pid, unix.SIGKILL)
	}
}

// giveUpReload: no elector follows.
func (g *guard) giveUpReload() {
	const why = "the daemon exits"
	g.abortReload(why)
	if g.reload.state != reloadNone {
		g.endReload(reload.Outcome{Text: why})
	}
}

// serveReloadDeadlines ends what takes too long.
func (g *guard) serveReloadDeadlines(now time.Duration) {
	r := &g.reload
	if r.trialBy != 0 && now >= r.trialBy && r.state != reloadStarting {
		g.endTrial()
	}
	if now < r.by {
		return
	}
	switch r.state {
	case reloadAsked:
		g.abortReload("whoever has asked does not say for what")
	case reloadForking:
		g.endReload(reload.Outcome{Text: "the binary can't be executed within " +
			checkTimeout.String() + ": its file system hangs, and with it the thread that starts" +
			" electors. Restart the daemon soon"})
		r.by = forever // if the fork ever ends, the rest does
	case reloadReading:
		g.endReload(reload.Outcome{Text: "the result of the check can't be read within " +
			checkTimeout.String()})
		r.by = forever
	case reloadChecking:
		r.killCheck()
		r.timedOut, r.by = true, now+time.Second // it may be frozen
	case reloadStarting:
		r.by = now + time.Second
		if g.elector.state == electorRunning {
			g.log.Warn("the elector of the new binary is not ready: killing it",
				"elapsed", (now - g.elector.lostAt).String())
			g.killElector("not ready")
		}
	}
}

// nextReloadDeadline is the earliest moment at which serveReloadDeadlines has something to do.
func (g *guard) nextReloadDeadline() time.Duration {
	r, next := &g.reload, forever
	switch r.state {
	case reloadAsked, reloadForking, reloadChecking, reloadReading, reloadStarting:
		next = r.by
	}
	if r.trialBy != 0 && r.state != reloadStarting {
		next = min(next, r.trialBy)
	}
	return next
}

// receiveCheck takes what the starter says of the check process.
func (g *guard) receiveCheck() {
	if a := g.starter.checkRead.Swap(nil); a != nil {
		g.checkRead(a)
	}
	if a := g.starter.checkForked.Swap(nil); a != nil {
		g.starter.busy--
		g.checkForked(a)
	}
}

// checkForked: the check process runs, or could not be started.
func (g *guard) checkForked(a *checkAnswer) {
	r := &g.reload
	if a.err != nil {
		g.endReload(reload.Outcome{Text: "the binary can't be executed: " + a.err.Error()})
		r.transition(g, reloadNone, "not forked")
		return
	}
	r.transition(g, reloadChecking, "forked")
	r.by = boottime.Now() + checkTimeout
	// If it has exited already, the loop may have reaped it before it knew its pid.
	switch pid, ws, errno := wait(a.pid); {
	case pid == a.pid:
		g.checkExited(ws)
		return
	case errno == unix.ECHILD && r.reaped == a.pid:
		g.checkExited(r.status)
		return
	case errno == unix.ECHILD:
		g.checkExited(0)
		return
	}
	r.pid = a.pid
	g.listChildren()
	if r.answered {
		r.killCheck()
	}
}

// checkExited: what it has left says whether the check has passed, unless it has failed.
func (g *guard) checkExited(ws unix.WaitStatus) {
	r := &g.reload
	r.pid = 0
	g.listChildren()
	if exit := proctree.ExitOf(ws); exit.Code != 0 {
		r.failed = fmt.Sprintf("exited with code %d", exit.Code)
	}
	r.transition(g, reloadReading, "exited")
	r.by = boottime.Now() + checkTimeout
	g.starter.post(askRead)
}

// checkRead: the result is read. Only here is anything touched.
func (g *guard) checkRead(a *checkAnswer) {
	r, e := &g.reload, &g.elector
	r.transition(g, reloadNone, "checked")
	why := g.irreloadable()
	switch {
	case r.timedOut:
		why = "the check of the binary and the settings has not ended within " +
			checkTimeout.String()
	case r.failed != "":
		why = "the binary is no leasehold that can take over: its check " + r.failed
	case errors.Is(a.err, reload.ErrNoResult):
		why = "the binary is no leasehold that can take over: its check says nothing"
	case a.err != nil:
		why = "the result of the check can't be read: " + a.err.Error()
	case a.result.Refused != "":
		why = a.result.Refused
	case why == "" && !g.leaseProven():
		why = leaseChanged
	}
	if r.answered || why != "" {
		g.endReload(reload.Outcome{Text: why})
		g.starter.dropChecked()
		return
	}
	g.log.Info("reload: replacing the elector", "version", a.result.Version,
		"from", g.starter.image.version)
	proctree.SignalPidfd(e.pidfd, unix.SIGKILL)
	e.silent = true
	e.transition(g, electorEnding, "reload")
	r.transition(g, reloadEnding, "passed")
}

const leaseChanged = "the lease has changed meanwhile: try again"

// leaseProven reports whether the etcd of the next elector is known to be that of the lease, or
// nothing depends on it.
func (g *guard) leaseProven() bool {
	return g.reload.lease != 0 || g.known.Entered.Created == 0 && !g.job.alive()
}

// lossCounts reports whether an elector that has exited counts as lost. Each reload ends one, and
// may bring one that is replaced by what was there before.
func (g *guard) lossCounts() bool { return g.reload.state != reloadEnding && !g.restores() }

// restores reports whether what was there before the last reload comes back if the elector is lost.
func (g *guard) restores() bool {
	r := &g.reload
	return r.trialBy != 0 && (!r.renewed || r.lost)
}

// chooseImage decides of which image the elector is that follows one that has exited.
func (g *guard) chooseImage() {
	r, s := &g.reload, &g.starter
	switch {
	case r.state == reloadEnding && g.leaseProven():
		g.endTrial()
		r.before, s.image, s.checked = s.image, s.checked, image{fd: -1}
		r.renewed, r.lost = false, false
		g.elector.token = g.elector.token[:0] // the user may be another
		now := boottime.Now()
		r.trialBy, r.by = now+trialTime, now+g.readyTimeout(now)
		r.transition(g, reloadStarting, "exited")
	case r.state == reloadEnding: // what it has sent last
		s.dropChecked()
		g.endReload(reload.Outcome{Text: leaseChanged})
		r.transition(g, reloadNone, leaseChanged)
	default:
		g.abortReload("the elector was lost meanwhile")
		if g.restores() {
			g.restore("was lost before it was ready")
		}
		r.lost = true
	}
}

// readyTimeout is how long the next elector may take to be ready. While a job lives, the one before
// it must be able to come back, and renew the lease, before stop-at.
func (g *guard) readyTimeout(now time.Duration) time.Duration {
	if g.job.alive() {
		return min(readyTimeout, max((g.job.stopAt-now)/2, 500*time.Millisecond))
	}
	return readyTimeout
}

// restore has the next elector be of the image before the last reload.
func (g *guard) restore(why string) {
	r, s := &g.reload, &g.starter
	if r.state == reloadStarting {
		g.endReload(reload.Outcome{Text: "the elector of the new binary " + why})
		r.transition(g, reloadNone, "restored")
	}
	g.log.Warn("the elector of the last reload is lost: going back to the one before it",
		"version", r.before.version, "from", s.image.version)
	s.close(s.image.fd)
	s.image, r.before, r.trialBy = r.before, image{fd: -1}, 0
	g.elector.token = g.elector.token[:0]
}

// reloadReady: the next elector serves its endpoint.
func (g *guard) reloadReady() {
	r := &g.reload
	if r.state != reloadStarting {
		return
	}
	version := g.starter.image.version
	g.endReload(reload.Outcome{Done: true, Text: version})
	g.log.Info("reloaded", "version", version, "from", r.before.version)
	r.transition(g, reloadNone, "ready")
}

// endTrial forgets the image before the last reload, unless its elector is not ready yet.
func (g *guard) endTrial() {
	r := &g.reload
	if r.state == reloadStarting {
		return
	}
	g.starter.close(r.before.fd)
	r.before, r.trialBy = image{fd: -1}, 0
}
