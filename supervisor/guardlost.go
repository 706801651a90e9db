//go:build linux

package supervisor

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/check"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// guardLost kills the job in the place of a guard that has exited or hangs. Then it kills the
// guard. It returns ErrGuardLost when both are proven gone.
func (s *Supervisor) guardLost(why string, messages <-chan ipc.Message) error {
	k := killInGuardsPlace{
		s: s, why: why, messages: messages, began: boottime.Now(), spawnerDone: s.spawnerDone,
	}
	k.begin()
	for !k.step() {
		k.pause()
	}
	k.finish()
	return ErrGuardLost
}

// killInGuardsPlace kills the job and then the guard, step by step.
//
// All of the job descends from the spawner. The spawner kills it, and reports when nothing is left.
// It starts nothing any more, even if an earlier request of the guard reaches it. We also kill the
// spawner's descendants ourselves, because we see more of them at a time.
//
// The guard may go on meanwhile. If it took us for silent, it would kill us, and nobody would renew
// the lease of a job that can't be killed. So we go on pinging it.
//
// A guard that is PID 1 can't be killed from inside its namespace. We leave it alone when nothing
// of the job is left.
type killInGuardsPlace struct {
	s        *Supervisor
	why      string
	messages <-chan ipc.Message // the guard's, which are of no interest any more

	began       time.Duration
	pingAt      time.Duration
	complainAt  time.Duration
	alive       bool              // there was a job
	procs       *proctree.Scanner // nil: not needed yet, or the process table can't be read
	spawnerDone <-chan struct{}   // nil: it has reported

	// A spawner is taken for hung if for a while it has no visible descendants and does not report.
	opened   bool          // openProcessTable was called
	seesAll  bool          // /proc hides nothing
	lastSeen time.Duration // when descendants were last seen, or could have been there unseen
	clean    int           // scans in a row that saw none
}

// usualKill is how long the spawner and the kernel may take to kill the job. Whatever takes
// milliseconds itself, such as a scan of the process table, begins only then.
const usualKill = 5 * time.Millisecond

// begin kills what takes no scan of the process table.
func (k *killInGuardsPlace) begin() {
	s := k.s
	k.alive = s.guardIsLost(k.why) // first: from now on nobody reports that the job runs
	s.tellSpawner(ipc.SpawnerKill)
	if k.alive {
		s.killNow()
	}
	k.complainAt, k.lastSeen = k.began+10*time.Second, k.began
	if !proctree.PidfdExited(s.guardFd) {
		s.log.Error(k.why+": killing it and the job", "threads", threadStates(s.cfg.Guard))
	}
}

// step kills what is left, and reports whether job and guard are gone.
func (k *killInGuardsPlace) step() bool {
	s := k.s
	gone, left := k.killJob()
	if k.clean++; left {
		k.lastSeen, k.clean = boottime.Now(), 0
	}
	if !gone {
		return false
	}
	proctree.SignalPidfd(s.guardFd, unix.SIGKILL)
	return proctree.PidfdExited(s.guardFd) || s.cfg.Guard == 1
}

// killJob kills what is left of the job. It reports whether nothing of it is left, and whether it
// saw something of it, or something could be there unseen.
func (k *killInGuardsPlace) killJob() (gone, left bool) {
	s := k.s
	gone, left = true, true
	select {
	case <-s.spawnerDone:
	default:
		if proctree.PidfdExited(s.cfg.SpawnerPidfd) {
			// Guard and spawner are both lost. Processes that have left the job's cgroup are not
			// found.
			s.mu.Lock()
			gone = s.job.pidfd < 0 || proctree.PidfdExited(s.job.pidfd)
			s.mu.Unlock()
		} else {
			gone, left = false, k.killBesideSpawner()
		}
		s.killNow()
	}
	if s.cgroup != nil && s.cgroup.Populated() {
		s.killNow()
		if boottime.Now() > k.began+usualKill {
			s.cgroup.KillEach()
		}
		return false, true
	}
	return gone, left
}

// openProcessTable is called when the kill takes longer than usual.
func (k *killInGuardsPlace) openProcessTable() {
	k.opened, k.seesAll = true, proctree.ProcHidden() == ""
	procs, err := proctree.NewScanner()
	if err != nil {
		k.s.log.Error("process table can't be read: the spawner alone finds the job", "err", err)
		return
	}
	k.procs, procs.Yield = procs, k.ping
}

// killBesideSpawner asks the spawner to kill, and kills the descendants of the spawner that it
// sees. It reports whether it saw any, or some could be there unseen.
func (k *killInGuardsPlace) killBesideSpawner() (left bool) {
	s := k.s
	s.tellSpawner(ipc.SpawnerKill)
	if boottime.Now() <= k.began+usualKill {
		return true
	}
	if !k.opened {
		k.openProcessTable()
	}
	if k.procs == nil {
		return true
	}
	left = k.procs.KillDescendants(s.cfg.Spawner, unix.Getpid())
	waitTimeout := max(s.cfg.Margin()/2, time.Second)
	if left || !k.seesAll || k.clean < 3 || boottime.Now() <= k.lastSeen+waitTimeout {
		return left
	}
	// It hangs. SIGSTOP keeps it from starting anything between the last scan and its end.
	proctree.SignalPidfd(s.cfg.SpawnerPidfd, unix.SIGSTOP)
	end := unix.SIGKILL
	if left = k.procs.KillDescendants(s.cfg.Spawner, unix.Getpid()); left {
		end = unix.SIGCONT
	}
	proctree.SignalPidfd(s.cfg.SpawnerPidfd, end)
	return left
}

// pause waits before the next step, and complains now and then.
func (k *killInGuardsPlace) pause() {
	pause := 200 * time.Microsecond
	elapsed := boottime.Now() - k.began
	switch {
	case elapsed > 10*time.Second:
		pause = 100 * time.Millisecond
	case elapsed > 100*time.Millisecond:
		pause = time.Millisecond
	}
	select {
	case <-k.spawnerDone:
		k.spawnerDone = nil // what we wait for now sends no message
	case <-k.messages:
	case <-time.After(pause):
	}
	k.ping()
	if now := boottime.Now(); now > k.complainAt {
		k.complainAt = now + 10*time.Second
		k.s.log.Error("job or its guard can't be killed: the lease is kept until both are gone",
			"elapsed", elapsed.Round(time.Second).String())
	}
}

// ping pings the guard if it is time to.
func (k *killInGuardsPlace) ping() {
	if now := boottime.Now(); now >= k.pingAt {
		k.pingAt = now + min(k.s.cfg.TTL/30, time.Second)
		k.s.send(ipc.Ping{})
	}
}

// finish reports that nothing of the job is left, and removes the cgroup.
func (k *killInGuardsPlace) finish() {
	s := k.s
	text := k.why + ": there was no job"
	if k.alive {
		text = "job killed: " + k.why
	}
	s.log.Error(text, "elapsed", (boottime.Now() - k.began).String())
	if s.cfg.PostStop != nil {
		k.awaitHook()
	}
	s.goneWithoutGuard()
	close(s.guardGone) // the next job may start: what follows can wait
	s.killing.Lock()
	s.removeCgroup()
	s.killing.Unlock()
}

// removeCgroup removes the job's cgroup. Nothing of the job is left. s.killing is held.
func (s *Supervisor) removeCgroup() {
	if s.cgroup != nil {
		s.cgroup.Remove()
		s.cgroup = nil
	}
}

// awaitHook waits until the spawner has run the hook that follows the job. It does so when the
// guard has exited, unless the guard has run the hook. If the spawner is lost too, nobody is left
// for it but the next daemon. So we exit without giving the lease back.
func (k *killInGuardsPlace) awaitHook() {
	s := k.s
	until := boottime.Now() + 3*s.cfg.PostStop.Timeout + s.cfg.Margin()
	for k.complainAt = until + time.Second; ; k.pause() {
		if s.cfg.Guard == 1 { // it can't be killed from inside its namespace
			s.tellSpawner(ipc.SpawnerHook)
		}
		select {
		case ws := <-s.hookDone:
			if err := s.cfg.PostStop.Exited(ws); err != nil {
				s.log.Error(check.HookFailed, "err", err)
			}
			return
		default:
		}
		now := boottime.Now()
		if proctree.PidfdExited(s.cfg.SpawnerPidfd) { // its last message may be under way
			until = min(until, now+s.cfg.Margin()/2)
		}
		switch {
		case now < until:
		case !k.alive: // the guard has run it after the last job
			return
		default:
			s.log.Error("guard and spawner are lost, and LEASEHOLD_POST_STOP may not be over: " +
				"the lease has to expire")
			if s.killing.TryLock() { // a kill that hangs must not keep us, and with us the lease
				s.removeCgroup()
			}
			time.Sleep(100 * time.Millisecond) // for the log
			_ = unix.Kill(unix.Getpid(), unix.SIGKILL)
		}
	}
}

// threadStates is what the kernel shows of the threads of a process: the state of each, and where
// in the kernel it waits, as far as we may read that.
func threadStates(pid int) string {
	var states []string
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*", pid))
	for _, task := range tasks {
		stat, _ := os.ReadFile(task + "/stat")
		wchan, _ := os.ReadFile(task + "/wchan")
		call, _ := os.ReadFile(task + "/syscall")
		state := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]) + " ?")[0]
		number, _, _ := strings.Cut(strings.TrimSpace(string(call)), " ")
		states = append(states,
			strings.TrimSpace(fmt.Sprintf("%s:%s %s %s", filepath.Base(task), state, wchan,
				number)))
	}
	return strings.Join(states, ", ")
}
