//go:build linux

package guard

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
	"leasehold/supervisor/reload"
)

// open makes everything that the loop needs, so that the loop need not make anything. After a
// failed open, close gives back what it has made.
func (g *guard) open() error {
	fail := func(op string, err error) error { return &SetupError{Op: op, Err: err} }
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fail("become a child subreaper", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fail("set dumpable", err)
	}
	old := g.openState() // before what a predecessor left is killed
	var err error
	if g.procs, err = proctree.NewScanner(); err != nil {
		return fail("read /proc", err)
	}
	g.procs.Yield = g.receiveFromElector // a ping must not wait for the end of a long kill
	g.cgroup, err = proctree.NewCgroup(g.cfg.Probe, g.cfg.Freeze)
	switch {
	case errors.Is(err, proctree.ErrLeftover):
		return fail("kill what a predecessor left", err)
	case err != nil && g.cfg.Freeze && !proctree.IsLasting(err):
		return fail("make a cgroup that freezes the job", err)
	case err != nil && g.cfg.Freeze:
		return fmt.Errorf("LEASEHOLD_CONTACT_LOSS=freeze: %w: %w: give the daemon a delegated "+
			"cgroup v2 (Delegate=yes; a container needs a writable /sys/fs/cgroup), "+
			"or set LEASEHOLD_CONTACT_LOSS=stop", ErrNoFreezer, err)
	case err != nil:
		g.log.Info("the job gets no cgroup of its own; its processes are found by their parentage",
			"reason", err.Error())
	}
	if g.timer, err = unix.TimerfdCreate(unix.CLOCK_BOOTTIME,
		unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		return fail("make a timer", err)
	}
	var wake [2]int
	if err := unix.Pipe2(wake[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fail("make a pipe", err)
	}
	g.wakeR, g.wakeW = wake[0], wake[1]
	if g.askerAddress, err = reload.OwnAddress(); err != nil {
		return fail("read /proc", err)
	}
	g.noNewPrivs = g.wantsNoNewPrivs()
	if err := g.claimState(old); err != nil {
		return fail("empty the state file", err)
	}
	if hidden := proctree.ProcHidden(); hidden != "" {
		g.log.Info("/proc hides processes: the job's are found as children of the spawner",
			"mount_option", hidden)
	}
	// After what a predecessor left is killed: its elector may have listened there.
	if err := g.listen(); err != nil {
		return err
	}
	if err := g.openNotify(); err != nil {
		return fail("make a socket for the job's notifications", err)
	}
	// After the endpoint's address is bound: a daemon that runs already must not lose what its job
	// needs.
	switch ok, err := g.openHook(); {
	case err != nil:
		return fail("make a pipe", err)
	case !ok && g.known.Recovered != 0:
		g.log.Warn("the lease of the daemon before is not revoked after all: it has to expire")
		g.known.Recovered = 0
	}
	if g.spawner, err = newSpawner(g.cfg, g.cgroup, g.procs.Proc, g.stateFd,
		g.noNewPrivs); err != nil {
		return fail("start the spawner", err)
	}
	g.spawner.send(ipc.SpawnerPrepare, 0)
	if g.cgroup != nil {
		go func() {
			for newest := range g.sweep {
				g.cgroup.Sweep(newest)
			}
		}()
	}
	go g.relaySignals()
	warmThreads(6)
	if err := g.openFreezer(); err != nil {
		return fail("make a pipe", err)
	}
	err = g.openStarter()
	if err == nil {
		err = g.startFirst()
	}
	if err != nil {
		return fail("start the elector", err)
	}
	g.tidyAt = boottime.Now() + time.Second
	g.privileges()
	return nil
}

// listen has the elector's socket bound, if it needs one.
func (g *guard) listen() error {
	if g.cfg.Listen == nil {
		return nil
	}
	fd, err := g.cfg.Listen()
	if err != nil {
		return err
	}
	g.listener = fd
	go func() {
		fd := <-g.unlisten
		_ = unix.Shutdown(fd, unix.SHUT_RD) // also for the elector, which may be unable to exit
		_ = unix.Close(fd)
	}()
	return nil
}

// openNotify makes the socket to which the job sends its notifications. The elector reads them. The
// socket is abstract: a job with another root directory reaches it, and it needs no place where the
// daemon may write. A job in another network namespace does not reach it.
func (g *guard) openNotify() error {
	if !g.cfg.JobNotifies {
		return nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	g.notify = fd
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return err
	}
	name := fmt.Sprintf("@leasehold-job-%d-%x", unix.Getpid(), rand.Uint64())
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: name}); err != nil {
		return err
	}
	g.cfg.Env = append(slices.Clone(g.cfg.Env), "NOTIFY_SOCKET="+name)
	if g.cfg.JobWatchdog > 0 {
		g.cfg.Env = append(g.cfg.Env,
			fmt.Sprintf("WATCHDOG_USEC=%d", g.cfg.JobWatchdog.Microseconds()), watchdogPid)
	}
	return nil
}

// close gives back what open made. Nothing of the job is left by now.
func (g *guard) close() {
	if g.spawner != nil {
		g.spawner.close()
	}
	if g.cgroup != nil {
		g.cgroup.Remove()
	}
	if g.procs != nil {
		g.procs.Close()
	}
	g.elector.closeProcess()
	g.closeStarter()
	g.closeFreezer()
	closeAll(g.stateFd, g.notify, g.listener, g.timer, g.wakeR, g.wakeW)
}

// privileges makes the loop's thread real-time and locks the memory, if that is permitted.
func (g *guard) privileges() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil {
		// With a finite limit we would get no more memory once the limit is reached. With a limit
		// of 0, mlockall succeeds only with an effective CAP_IPC_LOCK. (That of a user namespace
		// does not count.)
		none := unix.Rlimit{Max: limit.Max}
		if limit.Cur == unix.RLIM_INFINITY || unix.Setrlimit(unix.RLIMIT_MEMLOCK, &none) == nil {
			_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
			_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit) // the job inherits it
		}
	}
	fifo := unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO,
		Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: 1,
	}
	if unix.SchedSetAttr(0, &fifo, 0) != nil {
		raisePriority()
	}
}

// raisePriority raises the priority of this thread, if that is permitted.
func raisePriority() {
	nice := unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL,
		Flags: unix.SCHED_FLAG_RESET_ON_FORK, Nice: -10,
	}
	_ = unix.SchedSetAttr(0, &nice, 0)
}

// warmThreads makes the runtime create n threads and keep them. If a fork bomb has used up the
// limit of processes and the runtime then needs a new thread, the runtime would end this process.
func warmThreads(n int) {
	var ready, done sync.WaitGroup
	ready.Add(n)
	for range n {
		done.Go(func() {
			runtime.LockOSThread() // each has a thread of its own while it waits for the others
			ready.Done()
			ready.Wait()
			runtime.UnlockOSThread()
		})
	}
	done.Wait()
}

// wantsNoNewPrivs reports whether the job must not gain privileges: without CAP_KILL we can't kill
// a set-user-id process. A cgroup does not help, because such a process can leave it.
func (g *guard) wantsNoNewPrivs() bool {
	if proctree.HasCapability(unix.CAP_KILL) {
		return false
	}
	if !g.cfg.NewPrivs {
		g.log.Info("the job runs with no_new_privs: " +
			"without CAP_KILL a set-user-id process could not be killed")
		return true
	}
	if set, _ := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); set == 0 {
		g.log.Warn("LEASEHOLD_NO_NEW_PRIVS=off, and the daemon lacks CAP_KILL: " +
			"a set-user-id process of the job that can't be killed may run beside the next job")
	}
	return false
}
