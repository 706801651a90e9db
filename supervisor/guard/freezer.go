//go:build linux

package guard

import (
	"runtime"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/proctree"
)

// freezer freezes and thaws the job, on a thread of its own. The kernel may make a thread that
// changes a cgroup wait for others, and to search the process table takes milliseconds. The loop
// must not wait for that, because it has to kill at kill-by. It asks by a number and a byte in a
// pipe. A new request takes the place of the one before it, also of one that is under way.
type freezer struct {
	cgroup  *proctree.Freezer // nil: the job is not frozen
	spawner int               // pid, from which the job descends

	askR, askW int
	asked      atomic.Int64 // the last request: a number, and what is asked for
	thawBy     atomic.Int64 // no thaw from this time since boot on
	done       atomic.Int64 // the last request that was carried out
	// obstacle is what has kept the job from being seen frozen: the pid of a process outside its
	// cgroup, or one of the numbers below.
	obstacle atomic.Int64
}

const (
	notFrozen  = 0  // cgroup.events does not show it
	unreadable = -1 // /proc can't be read
)

// What the freezer is asked for.
const (
	askedThaw   = int64(iota)
	askedFreeze // and to see that the job is frozen
	askedRest   // leave the cgroup as it is
	askedKinds
)

// openFreezer makes the freezer and its thread, if the job is to be frozen.
func (g *guard) openFreezer() error {
	f := &g.freezer
	if g.cgroup == nil || g.cgroup.Freezer == nil {
		return nil
	}
	var ask [2]int
	if err := unix.Pipe2(ask[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return err
	}
	f.askR, f.askW = ask[0], ask[1]
	f.cgroup, f.spawner = g.cgroup.Freezer, g.spawner.pid
	go f.run(g.wakeW)
	return nil
}

// closeFreezer ends its thread, unless the kernel lets it wait.
func (g *guard) closeFreezer() { closeAll(g.freezer.askW) }

// freeze, thaw and rest ask for one thing each. They never block. A thaw must begin before that
// time since boot.
func (f *freezer) freeze() { f.ask(askedFreeze) }
func (f *freezer) rest()   { f.ask(askedRest) }

func (f *freezer) thaw(before time.Duration) {
	f.thawBy.Store(int64(before))
	f.ask(askedThaw)
}

// thawAgain repeats a thaw that the kernel has refused, before a start in the same cgroup.
func (f *freezer) thawAgain() {
	if !f.isDone() {
		f.thaw(forever)
	}
}

func (f *freezer) ask(kind int64) {
	f.asked.Store((f.asked.Load()/askedKinds+1)*askedKinds + kind)
	_, _ = unix.Write(f.askW, wakeByte) // a full pipe wakes it just as well
}

// isDone reports whether the last request was carried out, and nobody has undone that. After a
// freeze that means: the job was seen frozen, and nothing of it outside its cgroup.
func (f *freezer) isDone() bool { return f.done.Load() == f.asked.Load() }

// run carries out what is asked for, until the pipe is closed.
func (f *freezer) run(wakeW int) {
	runtime.LockOSThread()
	raisePriority() // and not real-time: a search must not keep the loop from running
	for last := int64(0); ; {
		next := f.asked.Load()
		if next == last {
			watches := next%askedKinds == askedFreeze && f.isDone()
			if !f.wait(-1, watches) {
				return
			}
			if watches && !f.staysFrozen() {
				f.done.Store(0)
				_, _ = unix.Write(wakeW, wakeByte)
			}
			continue
		}
		last = next
		if f.carryOut(next) {
			f.done.Store(next)
			_, _ = unix.Write(wakeW, wakeByte)
		}
	}
}

// wait waits for a request, or for so many milliseconds; -1: for ever. If it watches, it also waits
// for a change of the cgroup. It returns false when the pipe is closed.
func (f *freezer) wait(ms int, watches bool) bool {
	fds := [2]unix.PollFd{{Fd: int32(f.askR), Events: unix.POLLIN}, {Fd: -1}}
	if watches {
		fds[1] = unix.PollFd{Fd: int32(f.cgroup.Events), Events: unix.POLLPRI}
	}
	if n, _ := unix.Poll(fds[:], ms); n < 1 || fds[0].Revents == 0 {
		return true
	}
	var b [16]byte
	if n, err := unix.Read(f.askR, b[:]); n == 0 && err == nil {
		_ = unix.Close(f.askR)
		return false
	}
	return true
}

// staysFrozen reports whether the job is frozen still. A process of it that is killed counts as not
// frozen until it has exited, so this waits for a moment.
func (f *freezer) staysFrozen() bool {
	for range 20 {
		if f.cgroup.Frozen() {
			return true
		}
		_, _ = unix.Poll(nil, 1)
	}
	return f.cgroup.Frozen()
}

// carryOut reports whether it has done what was asked for.
func (f *freezer) carryOut(request int64) bool {
	switch request % askedKinds {
	case askedFreeze:
		return f.cgroup.Set(true) == nil && f.seeFrozen(request)
	case askedThaw:
		// The check of the clock comes last. If this thread hangs between check and write, the job
		// counts as running already: it is killed at kill-by.
		return boottime.Now() < time.Duration(f.thawBy.Load()) && f.cgroup.Set(false) == nil
	}
	return false
}

// seeFrozen waits until the job is frozen. It returns false if something else is asked for. The
// write is not the freeze. And whatever has left the cgroup runs on: two searches in a row must
// find nothing. (What is frozen leaves no cgroup, and forks nothing.)
func (f *freezer) seeFrozen(request int64) bool {
	for pause, clean := 1, 0; f.asked.Load() == request; {
		obstacle := notFrozen
		if f.cgroup.Frozen() {
			if obstacle = f.cgroup.Outside(f.spawner); obstacle == 0 {
				if clean++; clean == 2 {
					return true
				}
				continue
			}
		}
		clean = 0
		f.obstacle.Store(int64(obstacle))
		if !f.wait(pause, false) {
			return false
		}
		pause = min(2*pause, 20)
	}
	return false
}

// why is why the job is not seen frozen, for the log.
func (f *freezer) why() string {
	switch obstacle := f.obstacle.Load(); obstacle {
	case notFrozen:
		return "a process is in uninterruptible sleep, or the kernel is slow"
	case unreadable:
		return "the process table can't be read"
	default:
		return "a process has left the job's cgroup: pid " + strconv.FormatInt(obstacle, 10)
	}
}
