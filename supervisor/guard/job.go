//go:build linux

package guard

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// jobState is what the job does.
//
//	       start asked            spawner started
//	idle ---------------> forking ----------------> running
//	 ^  ^                 |     |                   |     |
//	 |  |                 |     | stop asked,       |     |
//	 |  |                 |     | stop-at passed    |     |
//	 |  |                 |     +---> stopping <----+     |
//	 |  |                 |               |               |
//	 |  |                 |               | grace over    |
//	 |  |                 v               v               v
//	 |  +------------- killing <--------------------------+
//	 |   nothing is left  |
//	 |                    | nothing is left, and there is a hook
//	 |                    v
//	 +--------------- post-stop
//	    the hook is over
//
//	                      killing: from each of the three above: lease lost, kill-by passed,
//	                      second signal, elector given up, spawner lost, start refused,
//	                      first process exited
//
// With Config.Freeze, a job that runs at stop-at is frozen. It is not stopped:
//
//	              stop-at passed             seen frozen
//	running ----------------------> freezing ------------> frozen
//	   ^                             |    ^                |    |
//	   |             new deadlines   |    |                |    |
//	   | thawed                      v    | stop-at passed |    | stop asked, and what leads
//	   +--------------------------- thawing <--------------+    | from stopping to killing,
//	                                 new deadlines              | except kill-by
//	                                                            v
//	freezing, thawing ---- the same, or kill-by passed ----> killing
//
// A frozen job runs no instruction. So it may outlast its lease, and kill-by does not concern it.
// From the state thawing on, it counts as one that runs.
//
// Every method below with the name of an event takes it in any state. transition is the one place
// where the state changes.
type jobState string

const (
	jobIdle     jobState = "idle"     // nothing of a job is left
	jobForking  jobState = "forking"  // the spawner was asked to start it
	jobRunning  jobState = "running"  // its first process runs
	jobStopping jobState = "stopping" // it has its stop signal, or gets it once it has started
	jobFreezing jobState = "freezing" // its cgroup is being frozen; something of it may run
	jobFrozen   jobState = "frozen"   // it was seen frozen, and nothing of it outside its cgroup
	jobThawing  jobState = "thawing"  // it has new deadlines, and may run
	jobKilling  jobState = "killing"  // SIGKILL goes out until nothing of it is left
	// Nothing of it is left, and the hook that follows it runs.
	jobPostStop jobState = "post-stop"
)

// job is the command and every descendant of it, from the elector's request until nothing is left.
type job struct {
	g     *guard
	state jobState

	serial     int32 // of the start
	start      ipc.Start
	signalled  bool // it has its stop signal before it was executed: its hook runs
	unanswered bool // the spawner has not yet reported the result of the start
	started    bool
	askedAt    time.Duration // when the start was asked for
	pid        int           // the first process; 0: not yet started, or exited
	pidfd      int
	status     unix.WaitStatus // of the first process
	exitSeen   time.Duration   // when its pidfd first showed its exit; 0: it has not
	childless  bool            // the spawner has reported that nothing of the job is left

	stopAt, killBy time.Duration // the elector moves them until stop-at
	readStopAt     time.Duration // of the last message that could move them
	graceEnd       time.Duration // of a stop that was asked for
	endAt          time.Duration // when the stop signal went out or the kill began; 0: neither
	frozenAt       time.Duration // when the last freeze began
	thawAsked      time.Duration // when the last thaw did
	ordered        bool          // the guard ends it: it does not exit by itself
	lost           bool          // the next leader may be starting

	reason     ipc.KillReason // of the state killing
	killAt     time.Duration  // when that began
	rounds     int            // of the kill
	nextRound  time.Duration
	complainAt time.Duration
	goneAt     time.Duration // of the state post-stop: when that began
}

// alive reports whether something of the job may run, or the hook that follows it has to.
func (j *job) alive() bool { return j.state != jobIdle }

// startAsked: the elector asks for a start.
func (j *job) startAsked(m ipc.Start) {
	g := j.g
	if j.state != jobIdle {
		g.log.Error("elector asked for a start while the job lives: killing both")
		g.giveUp("it asked for a second job")
		return
	}
	if g.known.Lease.Releasing {
		g.log.Error("elector asked for a start under a lease that it gives back: killing it")
		g.giveUp("it asked for a job without a lease")
		return
	}
	g.starts++
	g.known.Starts++
	g.known.JobReady, g.known.Unhealthy = ipc.JobReady{}, false
	*j = job{
		g: g, state: jobIdle, serial: g.starts, start: m, unanswered: true, pidfd: -1,
		askedAt: boottime.Now(), stopAt: m.StopAt, killBy: m.KillBy, graceEnd: forever,
		readStopAt: m.StopAt,
	}
	g.freezer.thawAgain()
	j.transition(jobForking, "start asked")
	if err := g.spawner.setTerm(m.Environment(g.cfg.Election, g.cfg.Identity)); err != nil {
		j.refused(int32(unix.E2BIG))
		return
	}
	atomic.StoreInt64(&g.spawner.area.stopAt, int64(j.stopAt))
	if g.stopSignals > 0 { // the request was under way when the user ended the daemon
		atomic.StoreInt32(&g.spawner.area.cancelled, j.serial)
	}
	g.spawner.send(ipc.SpawnerStart, j.serial)
	j.stopSignalled()
}

// spawnerStarted: the spawner has executed the command.
func (j *job) spawnerStarted(pid, pidfd int) {
	if !j.unanswered {
		if pidfd >= 0 {
			proctree.CloseRaw(pidfd)
		}
		j.invalid("spawner started")
		return
	}
	j.unanswered, j.started, j.pid, j.pidfd = false, true, pid, pidfd
	switch j.state {
	case jobForking:
		j.transition(jobRunning, "spawner started")
	case jobStopping:
		if !j.signalled {
			proctree.SignalPidfd(j.pidfd, j.g.cfg.StopSignal)
		}
	case jobKilling:
		j.killNow()
	default:
		j.invalid("spawner started")
	}
	j.g.known.StartedAt = boottime.Now()
	j.g.send(ipc.Started{PID: pid, At: j.g.known.StartedAt})
}

// refused: the start has failed. Then the guard proves that nothing is left, as after any other
// end.
func (j *job) refused(errno int32) {
	if !j.unanswered {
		j.invalid("start refused")
		return
	}
	j.unanswered = false
	if errno == ipc.SpawnerTooLate {
		j.ordered = true // we cancelled it
		if j.g.spawnerClosed() {
			j.g.log.Error("spawner starts nothing any more: killing the elector")
			j.g.giveUp("spawner starts nothing")
		}
	} else {
		code, why := ipc.Refusal(errno)
		j.exited(ipc.Exited{Code: code}, int(errno))
		j.g.send(ipc.Refused{Code: code, Why: why})
		j.g.log.Error("job could not be started", "path", j.g.cfg.Path, "err", why)
	}
	j.kill(ipc.KilledLeftover)
}

// firstExited: the first process has exited. The job ends with it. What it left behind is killed.
func (j *job) firstExited(ws unix.WaitStatus) {
	if j.state == jobIdle {
		j.invalid("first process exited")
		return
	}
	j.pid, j.exitSeen, j.status = 0, 0, ws
	exit := ipc.Exited(proctree.ExitOf(ws))
	j.exited(exit, 0)
	j.g.send(exit)
	j.kill(ipc.KilledLeftover)
}

// exited keeps how the job ended for the next elector.
func (j *job) exited(exit ipc.Exited, errno int) {
	now := boottime.Now()
	j.g.known.LastExit = ipc.RecordedExit{
		Exited: exit, Errno: errno, At: now, Ran: now - j.askedAt, Ordered: j.ordered,
	}
}

// record fills in what the next elector has to know of the job.
func (j *job) record(r *ipc.Record) {
	r.Job, r.PID, r.Due, r.Ordered = ipc.JobIdle, 0, 0, false
	r.StopAt, r.KillBy, r.Serial = 0, 0, j.g.starts+1
	if !j.alive() {
		return
	}
	r.PID, r.Due, r.Ordered = j.pid, forever, j.ordered
	r.StopAt, r.KillBy, r.Serial = j.stopAt, j.killBy, j.serial
	j.readStopAt = j.stopAt
	switch j.state {
	case jobForking:
		r.Job = ipc.JobForking
	case jobRunning, jobFreezing, jobThawing:
		r.Job = ipc.JobRunning
	case jobFrozen:
		r.Job = ipc.JobFrozen
	case jobStopping:
		r.Job, r.Due = ipc.JobEnding, j.graceEnd
	default:
		r.Job, r.Due = ipc.JobEnding, j.killAt
	}
}

// extended: the elector has renewed the lease. Once stop-at has passed, nothing moves the deadlines
// of this job any more, unless it is frozen then. New deadlines that are still ahead are the only
// reason to thaw it.
func (j *job) extended(m ipc.Extend, now time.Duration) {
	if j.g.cfg.Freeze {
		j.serveDeadlines(now) // stop-at may have passed just now
	}
	j.readStopAt = m.StopAt
	switch j.state {
	case jobFreezing, jobFrozen:
		if now >= m.StopAt {
			if j.state == jobFrozen { // the elector takes it for thawed
				j.g.send(ipc.Frozen{StopAt: m.StopAt})
			}
			return
		}
	case jobForking, jobRunning, jobThawing, jobStopping:
		if now >= j.stopAt {
			return
		}
	default:
		return
	}
	j.stopAt, j.killBy = m.StopAt, m.KillBy
	atomic.StoreInt64(&j.g.spawner.area.stopAt, int64(j.stopAt)) // for a start that is under way
	switch j.state {
	case jobFreezing, jobFrozen:
		j.g.freezer.thaw(j.stopAt)
		j.transition(jobThawing, "new deadlines")
	case jobThawing:
		j.g.freezer.thaw(j.stopAt)
	}
}

// stopAsked: the elector asks for the end of the job.
func (j *job) stopAsked(m ipc.Stop, now time.Duration) {
	switch m.Grace {
	case 0:
		j.lost = j.alive()
		j.kill(ipc.KilledLost)
	case ipc.UntilKillBy:
		j.stop(forever, electorAsked)
	default:
		if m.Unhealthy && (j.state == jobForking || j.state == jobRunning) {
			j.g.known.Unhealthy = true
			j.stop(now+m.Grace, isUnhealthy)
			return
		}
		j.stop(now+m.Grace, electorAsked)
	}
}

// stopSignalled: the user may have asked for the end of the daemon. The guard ends the job at once.
// The elector learns of it meanwhile, and asks for the same. A second signal kills.
func (j *job) stopSignalled() {
	switch g := j.g; {
	case g.stopSignals > 1:
		j.kill(ipc.KilledSignal)
	case g.stopSignals == 1:
		j.stop(boottime.Now()+g.cfg.StopGrace, userAsked)
	}
}

// serveDeadlines stops and kills the job on loss of contact: the elector has not moved the
// deadlines. It asks nobody.
func (j *job) serveDeadlines(now time.Duration) {
	switch j.state {
	case jobForking, jobRunning, jobStopping, jobFreezing, jobFrozen, jobThawing:
	default:
		return
	}
	switch {
	case j.state == jobFrozen:
	case now >= j.killBy:
		j.killByPassed(now)
	case j.state == jobStopping && now >= j.graceEnd:
		j.graceOver(now)
	case j.state != jobStopping && j.state != jobFreezing && now >= j.stopAt:
		j.stopAtPassed(now)
	}
	if j.state == jobThawing && now >= j.complainAt {
		j.complainAt = now + 10*time.Second
		j.g.log.Error("job is not thawed: the kernel does not carry it out",
			"elapsed", (now - j.thawAsked).Round(time.Millisecond).String())
	}
	if j.exitSeen == 0 && j.pid != 0 && proctree.PidfdExited(j.pidfd) {
		j.exitSeen = now
	}
	if j.state != jobKilling && j.exitSeen != 0 && now >= j.exitSeen+exitTimeout {
		j.exitUnreported()
	}
}

// stopAtPassed: no renewal has moved stop-at. The job has until kill-by to stop, or to be frozen. A
// start that is not yet answered is stopped.
func (j *job) stopAtPassed(now time.Duration) {
	switch {
	case j.g.cfg.Freeze && (j.state == jobRunning || j.state == jobThawing):
		j.g.freezer.freeze()
		j.transition(jobFreezing, noRenewal)
	default:
		j.stop(forever, noRenewal)
	}
	j.g.missed(now - j.stopAt)
}

// freezerDone: the freezer may have done what it was asked for. A job that is seen frozen only
// after kill-by is killed, as one that is not. Or the freezer has seen that somebody else has
// thawed the job.
func (j *job) freezerDone(now time.Duration) {
	done := j.g.freezer.isDone()
	switch {
	case j.state == jobFrozen && !done:
		j.kill(ipc.KilledThawed)
	case !done:
	case j.state == jobFreezing && now < j.killBy:
		j.transition(jobFrozen, "seen frozen")
		j.g.send(ipc.Frozen{StopAt: j.readStopAt})
	case j.state == jobThawing:
		j.transition(jobRunning, "thawed")
		j.g.send(ipc.Thawed{})
	}
}

// killByPassed: no renewal has moved kill-by. When the margin is over too, another candidate may
// lead.
func (j *job) killByPassed(now time.Duration) {
	freezing := j.state == jobFreezing
	j.kill(ipc.KilledKillBy)
	if freezing {
		j.g.log.Warn("job could not be frozen in time", "reason", j.g.freezer.why())
	}
	j.g.missed(now - j.killBy)
}

// graceOver: the job has not stopped in time.
func (j *job) graceOver(now time.Duration) {
	j.kill(ipc.KilledGrace)
	j.g.missed(now - j.graceEnd)
}

// exitUnreported: the first process has exited, and the spawner does not report it.
func (j *job) exitUnreported() {
	j.g.log.Warn("job exited and is not reaped: something traces it, or the spawner hangs",
		"pid", j.pid)
	j.kill(ipc.KilledLeftover)
}

// Why the job gets its stop signal.
const (
	noRenewal    = "no renewal by stop-at"
	electorAsked = "the term ends"
	userAsked    = "the daemon stops"
	isUnhealthy  = "it is unhealthy" // as if it exited by itself: another start may follow
)

// exitTimeout is how long the spawner may take to report an exit that the guard sees.
const exitTimeout = time.Second

// nextDeadline is the earliest moment at which serveDeadlines has something to do.
func (j *job) nextDeadline() time.Duration {
	next := forever
	switch j.state {
	case jobForking, jobRunning:
		next = min(j.killBy, j.stopAt)
	case jobThawing:
		next = min(j.killBy, j.stopAt, j.complainAt)
	case jobFreezing:
		next = j.killBy
	case jobFrozen:
	case jobStopping:
		next = min(j.killBy, j.graceEnd)
	default:
		return next
	}
	if j.exitSeen != 0 {
		next = min(next, j.exitSeen+exitTimeout)
	}
	return next
}

// stop sends the stop signal, once. The job is killed at the end of its grace, or at kill-by if
// that is earlier. If a start is under way, the signal follows when the command has been executed.
func (j *job) stop(graceEnd time.Duration, why string) {
	switch j.state {
	case jobForking, jobRunning:
		j.graceEnd = graceEnd
		switch {
		case j.pid != 0:
			proctree.SignalPidfd(j.pidfd, j.g.cfg.StopSignal)
		case j.g.cfg.PreStart != nil && j.unanswered: // the hook may take long
			j.signalled = true
			// The signal may be one that the start ignores. Then nothing is started after the hook.
			atomic.StoreInt32(&j.g.spawner.area.cancelled, j.serial)
			j.g.spawner.signal(j.serial, j.g.cfg.StopSignal)
		}
		j.transition(jobStopping, why)
	case jobStopping: // the elector asks for it too, or another one does again
		j.ordered = true
		j.graceEnd = min(j.graceEnd, graceEnd)
	case jobFreezing, jobFrozen, jobThawing: // it can't act on the signal, and is thawed no more
		j.kill(ipc.KilledFrozen)
	case jobIdle, jobKilling, jobPostStop: // there is nothing left to stop
	default:
		j.invalid(why)
	}
}

// kill begins the kill. SIGKILL goes out before anything is logged. If the first process has
// exited, for whatever reason, only the spawner kills what it left behind in the first round. From
// the next round on we do too.
func (j *job) kill(reason ipc.KillReason) {
	switch j.state {
	case jobForking, jobRunning, jobStopping, jobFreezing, jobFrozen, jobThawing:
	case jobIdle, jobKilling, jobPostStop: // nothing is left to kill, or it is under way
		return
	default:
		j.invalid("kill")
		return
	}
	g := j.g
	if j.unanswered {
		atomic.StoreInt32(&g.spawner.area.cancelled, j.serial)
	}
	if !j.childless && g.spawner.pid != 0 {
		g.spawner.send(ipc.SpawnerKill, j.serial)
	}
	if reason != ipc.KilledLeftover {
		j.killNow()
	}
	if j.frozenAt != 0 {
		g.freezer.rest()
	}
	j.reason = reason
	j.transition(jobKilling, reason.String())
}

// invalid fails loudly: an event came in a state that can't have it. It kills what may live. A
// panic would leave that to other processes.
func (j *job) invalid(event string) {
	j.g.log.Error("event in a state that can't have it: killing the job",
		"event", event, "state", string(j.state))
	switch j.state {
	case jobIdle, jobForking, jobRunning, jobStopping, jobFreezing, jobFrozen, jobThawing,
		jobKilling, jobPostStop:
	default:
		j.state = jobRunning // there is no such state
	}
	j.kill(ipc.KilledFault)
}

// transition is the one place where the state of the job changes, and where that is logged and
// published.
func (j *job) transition(to jobState, why string) {
	from, now := j.state, boottime.Now()
	j.state = to
	j.g.log.Debug("job state",
		"machine", "guard", "from", string(from), "to", string(to), "reason", why)
	switch to {
	case jobForking:
	case jobRunning:
		if from == jobThawing {
			j.g.log.Info("job thawed: the lease is renewed",
				"elapsed", (now - j.frozenAt).Round(time.Millisecond).String())
		}
	case jobFreezing:
		j.frozenAt = now
		j.g.log.Warn("job is being frozen: "+why,
			"kill_by_in", (j.killBy - now).Round(time.Millisecond).String())
	case jobFrozen:
		j.g.log.Info("job frozen", "elapsed", (now - j.frozenAt).String())
	case jobThawing:
		j.thawAsked, j.complainAt = now, now+j.killBy-j.stopAt
	case jobStopping:
		j.endAt, j.ordered = now, j.ordered || why != isUnhealthy
		j.g.send(ipc.Ending{})
		level := slog.LevelInfo
		if why == noRenewal {
			level = slog.LevelWarn
		}
		j.g.log.Log(context.Background(), level, "job asked to stop: "+why,
			"signal", j.g.cfg.StopSignal.String(),
			"kill_by_in", (j.killBy - now).Round(time.Millisecond).String())
	case jobKilling:
		j.killAt, j.complainAt = now, now+10*time.Second
		j.g.send(ipc.Ending{})
		if j.endAt == 0 {
			j.endAt = now
		}
		graceOver := j.reason == ipc.KilledGrace && j.g.known.Unhealthy
		j.ordered = j.ordered || j.reason != ipc.KilledLeftover && !graceOver
	case jobPostStop:
		j.goneAt = now
		j.g.hook.begin(j.g, now)
	case jobIdle:
		j.reportGone(now)
		if j.frozenAt != 0 { // the next one is started in the same cgroup
			j.g.freezer.thaw(forever)
		}
		*j = job{g: j.g, state: jobIdle}
		j.g.jobGone(now)
	default:
		j.invalid(why)
	}
}

// reportGone tells the elector and the log that nothing of the job is left.
func (j *job) reportGone(now time.Duration) {
	if j.started && j.pidfd >= 0 {
		proctree.CloseRaw(j.pidfd)
	}
	j.g.known.LastExit.Ordered = j.ordered
	if j.goneAt != 0 {
		now = j.goneAt
	}
	reason, elapsed := j.reason, now-j.endAt
	if reason == ipc.KilledLeftover && j.rounds == 0 {
		reason = ipc.NotKilled
	}
	j.g.send(ipc.Gone{Elapsed: elapsed, Reason: reason, Ordered: j.ordered})
	var attrs []any
	if j.ordered || reason != ipc.NotKilled { // else it would read as how long the job ran
		attrs = append(attrs, "elapsed", elapsed.String())
	}
	if j.started {
		exit := proctree.ExitOf(j.status)
		attrs = append(attrs, "exit_code", exit.Code, "signal", exit.Signal)
	}
	level, text := slog.LevelInfo, "job exited"
	switch {
	case reason == ipc.NotKilled:
	case reason == ipc.KilledLeftover && j.ordered: // a shell that stops leaves its child behind
		text += " after the stop signal: killed " + reason.String()
	case reason == ipc.KilledLeftover:
		level, text = slog.LevelWarn, text+": killed "+reason.String()
	default:
		level, text = slog.LevelWarn, "job killed: "+reason.String()
	}
	if reason != ipc.NotKilled {
		attrs = append(attrs, "reason", reason.Label())
	}
	if j.g.latency > 0 {
		attrs = append(attrs, "timer_latency", j.g.latency.String())
	}
	j.g.log.Log(context.Background(), level, text, attrs...)
}

// jobGone adapts the rest of the guard when nothing of a job is left.
func (g *guard) jobGone(now time.Duration) {
	g.latency = 0
	g.spawner.awaited = false
	if g.stopSignals > 1 {
		g.forceBy = now + forceTimeout // until now the elector had to renew the lease
	}
	// An elector without a job pings less often, unless the daemon stops: the release waits for it.
	g.elector.missedChecks = 0
	if g.stopSignals > 0 {
		g.elector.checkAt = now + 3*time.Second
	} else {
		g.elector.checkAt = max(g.elector.checkAt, g.silentUntil(now))
	}
	g.tidyAt = now + time.Second
}

// missed reports by how much a deadline was missed. What follows from the deadline is under way
// already.
func (g *guard) missed(by time.Duration) {
	g.latency = max(g.latency, by)
	g.send(ipc.TimerLatency{By: by})
}
