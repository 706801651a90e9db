//go:build linux

package guard

import (
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/proctree"
)

// killNow kills everything that it finds without reading the process table. The cgroup comes last,
// because the kernel may make us wait for it (cgroup_mutex). Meanwhile the spawner kills by
// descent.
func (j *job) killNow() {
	g := j.g
	if j.pid != 0 {
		proctree.SignalPidfd(j.pidfd, unix.SIGKILL)
	}
	if g.cgroup == nil || g.spawner.pid == 0 {
		g.procs.KillListed(g.root(), g.children...)
	}
	if g.cgroup != nil {
		g.cgroup.KillAll()
	}
}

// root is the process from which all of the job descends.
func (g *guard) root() int {
	if g.spawner.pid != 0 {
		return g.spawner.pid
	}
	return g.procs.Self
}

// killRound kills what is left, and ends the kill once nothing is.
func (j *job) killRound() {
	g := j.g
	if j.endIfGone() {
		return
	}
	began := boottime.Now()
	if began < j.nextRound {
		return
	}
	j.killNow()
	// Reading the process table takes milliseconds. That is lost time if killNow has reached all of
	// the job.
	if j.rounds++; j.rounds > 8 || g.cgroup == nil && j.pid == 0 {
		g.procs.KillDescendants(g.root(), g.children...)
	}
	j.nextRound = began + j.roundPause(boottime.Now()-began)
	if j.endIfGone() {
		return
	}
	if now := boottime.Now(); now >= j.complainAt {
		j.complainAt = now + 10*time.Second
		text := "job can't be killed: the lease is kept until nothing of it is left"
		if g.elector.givenUp {
			text = "job can't be killed, and nobody renews its lease: another candidate may lead"
		}
		g.log.Error(text, "elapsed", (now - j.killAt).Round(time.Second).String(), "pid", j.pid)
	}
}

// roundPause is the time from the beginning of a round to the next one. The first rounds follow
// each other at once, because a killed process is gone after about 100 µs. Thousands of processes
// take seconds to exit, and need the processor for that. If the kernel has killed them all at once,
// we leave most of the processor to them. If they may still fork, we leave them half.
func (j *job) roundPause(took time.Duration) time.Duration {
	pause, share := 100*time.Microsecond, 1
	switch {
	case j.rounds > 1000:
		pause = 100 * time.Millisecond
	case j.rounds > 100:
		pause = 5 * time.Millisecond
	case j.rounds > 10:
		pause = time.Millisecond
	}
	if j.g.cgroup != nil {
		share = 4
	}
	return took + max(pause, time.Duration(share)*took)
}

// endIfGone ends the kill, and reports it, if nothing of the job is left.
func (j *job) endIfGone() bool {
	j.g.receiveFromSpawner()
	j.g.reap()
	switch {
	case !j.gone():
		return false
	case j.g.cfg.PostStop != nil:
		j.transition(jobPostStop, "nothing is left")
	default:
		j.transition(jobIdle, "nothing is left")
	}
	return true
}

// gone reports whether nothing of the job is left: no start under way, nothing in the cgroup, and
// no child of the spawner, or of the guard if the spawner has exited. The state of a process proves
// nothing: a process whose main thread has exited shows Z while its other threads run.
func (j *job) gone() bool {
	g := j.g
	switch {
	case j.unanswered || j.pid != 0 || g.cgroup != nil && g.cgroup.Populated():
		return false
	case g.spawner.pid != 0:
		return j.childless
	}
	left, known := g.procs.Children(g.noNewPrivs, g.children...)
	return known && left == 0
}
