//go:build linux

// Package guard is the process that the user starts, and the dead-man's switch of the job.
//
// The guard starts the elector and the spawner. It holds the job's deadlines, which only the
// elector can move. When kill-by passes, it kills the job and asks nobody. It also kills the job if
// the elector asks for that, and if the spawner is lost. An elector that is lost is replaced, and
// the job goes on.
//
//	guard -+- elector: renews the lease; asks for start, extend and stop (package ipc)
//	       +- spawner: forks the job, reaps it, kills all that descends from it
//	             +- job
//
// If no elector follows a lost one, its lease is revoked, after nothing of the job is left.
//
// Where to look: loop.go waits in one place and does everything in one order. job.go is the state
// machine of the job: its serveDeadlines is where a job is killed on loss of contact. kill.go
// kills, and proves that nothing is left. elector.go watches the elector, replaces it, and revokes
// the lease if none follows. electormake.go forks it. hook.go runs the hook that follows the job.
// spawner.go is the guard's end of the socket to the spawner, and spawnloop.go is the spawner
// itself.
package guard

import (
	"errors"
	"log/slog"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/supervisor/check"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// Config is what a guard needs to know.
type Config struct {
	Path       string   // the job's executable
	Argv       []string // its arguments, the name first
	Env        []string // its environment, to which the term's variables are added
	Election   string
	Identity   string
	TTL        time.Duration // as configured; bounds for how long the elector may be silent
	Margin     time.Duration // of the lease; bounds for how long the spawner may be silent
	StopSignal unix.Signal
	// StopGrace is the time from the stop signal to the kill if the user ends the daemon.
	StopGrace time.Duration
	NewPrivs  bool // the job may gain privileges; then the guard may be unable to kill it
	// Freeze means that the job is frozen at stop-at, and not stopped. It needs the job's cgroup.
	Freeze bool
	// JobNotifies gives the job a socket for notifications, as systemd does, and JobWatchdog has it
	// expect that it is watched there; 0: it is not.
	JobNotifies bool
	JobWatchdog time.Duration
	// Ignored is what the job ignores from its start; every other signal has its default.
	Ignored []unix.Signal

	// PreStart is the argv of the hook before each start, and PreStartPath its executable; nil:
	// there is none. PostStop is the hook after each end; nil: there is none. Then its Env is
	// filled in.
	PreStart     []string
	PreStartPath string
	PostStop     *check.Hook

	Elector []string // argv of the elector; guard, spawner and cgroup are added
	Probe   []string // argv of a process that writes a byte and sleeps
	// Revoke makes the argv of the process that revokes a lease. The process reads the elector's
	// token from standard input.
	Revoke func(lease int64, within time.Duration) []string

	// StateDir is where the state file is, by which the next daemon need not wait for the lease of
	// one that was killed whole; "": nowhere (package recovery).
	StateDir string

	// Listen binds the elector's socket; nil: it needs none. The guard never accepts on it.
	Listen func() (fd int, err error)

	Reload ReloadConfig

	Signals  <-chan os.Signal // every signal that the process catches
	Children <-chan os.Signal // SIGCHLD alone, so that many of them displace no other signal

	// None of these may block.
	Notify    func(state string) // tells systemd
	Stopping  string             // the message to systemd when a stop is asked for
	Heartbeat func()             // called while both the guard's and the elector's loops run
	Logger    *slog.Logger
}

// Exit is how the daemon has to exit, as the elector announced it.
type Exit struct {
	Code int
	Why  string
	// Forced means that the elector was killed, because it had not exited after a second signal.
	Forced bool
}

// ErrLost means that the spawner was lost, or an elector that was not replaced. Nothing of the job
// is left, and the lease is revoked or expires. Whoever started the daemon should start it again.
var ErrLost = errors.New("lost")

// ErrNoFreezer means that the job can't be frozen, although Config.Freeze is set.
var ErrNoFreezer = errors.New("the job can't be frozen")

// SetupError means that the guard could not be set up. Nothing that it has started is left.
type SetupError struct {
	Op  string
	Err error
}

func (e *SetupError) Error() string { return e.Op + ": " + e.Err.Error() }
func (e *SetupError) Unwrap() error { return e.Err }

// forceTimeout is the time that the elector has to give the lease back after a second signal, and
// the revoking process after it.
const forceTimeout = time.Second

const forever = time.Duration(1<<63 - 1)

// guard is the state of the process. One locked thread runs loop. Only that thread waits for
// children and sends signals. Only it uses these fields, except pending and the pipe of wakeups.
type guard struct {
	cfg     Config
	log     *slog.Logger
	procs   *proctree.Scanner
	cgroup  *proctree.Cgroup // nil: the job has none
	spawner *spawner
	elector elector
	starter starter
	freezer freezer
	reload  reloading
	job     job
	hook    hook
	known   ipc.Record // what outlives an elector; the rest of it is filled in for the next one

	askerAddress string // where a reload is answered

	stateFd  int      // the state file, which all processes of the daemon hold; -1: none
	notify   int      // where the job's notifications come, for the elector; -1: it has none
	listener int      // the elector's socket, open while an elector may serve on it; -1: none
	unlisten chan int // room for one: listener, to be closed

	timer    int // timerfd on CLOCK_BOOTTIME
	armedFor time.Duration
	wakeR    int // a byte means that a signal is pending
	wakeW    int
	watched  [watchedLen]unix.PollFd
	scratch  [64]byte
	children []int // those that are not the job's: elector, spawner, revoke, check
	unreaped bool  // there may be more children to reap

	noNewPrivs bool     // the job runs with no_new_privs
	sweep      chan int // cgroups before this one are not needed any more
	starts     int32    // serial of the last start
	tidyAt     time.Duration
	heap       [1]metrics.Sample // what tidy reads
	latency    time.Duration     // the largest timer latency of this job

	pending     [65]atomic.Int32 // signals that were caught and wait for the loop, by number
	stopSignals int              // TERM and INT received
	forceBy     time.Duration    // when the elector must have exited, after the second one; 0: none
	forced      bool             // the elector was killed because of forceBy
}

// Run runs the guard until the elector has exited and nothing of the job is left. The error wraps
// ErrLost or ErrNoFreezer, is a *SetupError, or is that of Config.Listen. Run must be called once,
// from the main goroutine.
func Run(cfg Config) (Exit, error) {
	// A garbage collection starts threads and makes the loop wait. The guard allocates little, and
	// collects it while no job lives.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(math.MaxInt64) // GOMEMLIMIT, meant for the job, would turn it on again
	// With a spare processor (P) for each goroutine, the loop never waits for one when a system
	// call returns.
	runtime.GOMAXPROCS(7)
	runtime.LockOSThread()
	g := newGuard(cfg)
	if err := g.open(); err != nil {
		g.close()
		return Exit{}, err
	}
	exit, err := g.loop()
	g.close() // not deferred: after a panic the spawner must live, because it has to kill the job
	return exit, err
}

func newGuard(cfg Config) *guard {
	g := &guard{
		cfg: cfg, log: cfg.Logger, sweep: make(chan int, 1), children: make([]int, 0, 6),
		stateFd: -1, notify: -1, listener: -1, unlisten: make(chan int, 1),
		timer: -1, wakeR: -1, wakeW: -1,
		elector: elector{state: electorStarting, pidfd: -1, in: -1, pipeEnded: true},
		freezer: freezer{askR: -1, askW: -1},
		starter: starter{
			null: -1, askR: -1, askW: -1, settings: -1, result: -1,
			image: image{fd: -1}, checked: image{fd: -1},
		},
		reload: reloading{state: reloadNone, asker: -1, before: image{fd: -1}},
		hook:   hook{askingR: -1, askingW: -1},
		heap:   [1]metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}},
	}
	g.elector.outbox.FD = -1
	g.job = job{g: g, state: jobIdle}
	return g
}
