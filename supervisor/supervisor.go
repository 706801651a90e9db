//go:build linux

// Package supervisor is the elector's side of the job: it asks the guard to run the job for a term,
// restarts it, and kills it if the guard is lost.
//
// Three processes look after the job. The guard (package guard) is the process that the user
// started. It holds the deadlines and kills. The elector is its child. It has a Supervisor, with
// which it asks for a start, extends the deadlines and learns of the job's end. The spawner is a
// child of the guard too. It starts the job, and becomes the parent of all that the job leaves
// behind. If guard or spawner is lost, the others kill the job. If the elector is lost, the guard
// starts another one, and the job goes on.
//
// Promised: once a deadline has passed, or guard or spawner is lost, every process of the job is
// killed. The job is reported gone only when the kernel shows nothing of it: no child of the
// spawner, nothing in the job's cgroup.
//
// Not promised: anything about work that the job gave to another service. A job in uninterruptible
// sleep exits when that ends, and is not reported gone until then. If guard and spawner are killed
// at the same moment, processes that have left the job's cgroup survive.
//
// Where to look: job.go is the state of the job, term.go runs it for a term, takeover.go takes over
// a job from another elector, guard.go watches the guard, guardlost.go kills in the guard's place.
package supervisor

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/check"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// Config is what a Supervisor needs to know.
type Config struct {
	In, Out      int // the pipe pair to the guard
	SpawnerSock  int // the socket to the spawner
	SpawnerPidfd int
	Guard        int    // pid
	Spawner      int    // pid
	CgroupDir    string // "": the job has none
	TTL          time.Duration
	MaxPing      time.Duration        // the longest time between two pings
	Margin       func() time.Duration // of the lease as granted
	Freeze       bool                 // the guard freezes the job at stop-at
	Restart      Restart
	RestartLimit int
	Health       HealthConfig
	PostStop     *check.Hook // that follows the job; nil: there is none
	NotifySock   int         // from which the job's notifications come; -1: it has none

	// None of these may block or call the Supervisor.
	Signal  func(s unix.Signal) // called for each stop request that the guard received
	Running func() bool         // whether the elector's own loops run; if not, no pings
	Changed func()              // called after each change of Snapshot

	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// ErrGuardLost means that the guard has exited or hangs. Nothing of the job is left by the time it
// is returned.
var ErrGuardLost = errors.New("guard lost")

const forever = time.Duration(1<<63 - 1)

// Supervisor asks the guard to run the job, and kills the job itself when the guard is lost.
type Supervisor struct {
	cfg     Config
	log     *slog.Logger
	metrics metrics
	restart *restarter
	// restarts is what the guard knows of the restart policy. Only Supervise uses it.
	restarts ipc.Restarts

	record    ipc.Record
	authToken string
	ended     *ExitError // the job had ended for good before we began; nil: it had not

	pipe    *os.File // In, for the netpoller
	inbox   ipc.Inbox
	spawner *os.File // SpawnerSock, the same
	notify  *os.File // NotifySock, the same; nil: there is none
	guardFd int      // pidfd
	// killing is held while the cgroup is killed, which may take the kernel a while. mu would not
	// do, because the health endpoint waits for it.
	killing sync.Mutex
	cgroup  *proctree.Cgroup

	sending     sync.Mutex
	outbox      ipc.Outbox
	unreachable atomic.Bool // the guard does not take messages

	monitors    sync.WaitGroup
	pingDue     chan struct{} // room for one: the next ping may be due earlier
	guardGone   chan struct{} // closed when the guard is lost and nothing of the job is left
	spawnerDone chan struct{} // closed when the spawner reports that nothing is left
	hookDone    chan unix.WaitStatus

	mu      sync.Mutex
	stopped bool // the user has asked for the end: the guard stops the job, before we ask for that
	job     job
	decided restartDecision
	// jobChanged wakes the monitor of the last run; nil: there was none.
	jobChanged chan<- struct{}
}

// Connect opens the elector's end of the pipes, and takes over what the guard knows of the daemon.
// It fails with ErrGuardLost if the guard has exited already.
func Connect(cfg Config) (*Supervisor, error) {
	s := &Supervisor{
		cfg: cfg, log: cfg.Logger, metrics: newMetrics(cfg.Registerer),
		restart: newRestarter(cfg.Restart, cfg.RestartLimit),
		guardFd: -1, outbox: ipc.Outbox{FD: cfg.Out},
		pingDue:   make(chan struct{}, 1),
		guardGone: make(chan struct{}), spawnerDone: make(chan struct{}),
		hookDone: make(chan unix.WaitStatus, 1),
		job:      job{shown: Job{State: JobNone}, pidfd: -1},
	}
	var err error
	if s.guardFd, err = unix.PidfdOpen(cfg.Guard, 0); err != nil {
		return nil, fmt.Errorf("open the guard: %w", err)
	}
	if unix.Getppid() != cfg.Guard {
		return nil, ErrGuardLost
	}
	if cfg.CgroupDir != "" {
		if s.cgroup, err = proctree.OpenCgroup(cfg.CgroupDir); err != nil {
			return nil, fmt.Errorf("open the job's cgroup: %w", err)
		}
	}
	for _, fd := range []int{cfg.In, cfg.Out, cfg.SpawnerSock} {
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("open the guard's pipe: %w", err)
		}
	}
	s.pipe = os.NewFile(uintptr(cfg.In), "guard")
	s.spawner = os.NewFile(uintptr(cfg.SpawnerSock), "spawner")
	if err := s.openNotify(); err != nil {
		return nil, fmt.Errorf("open the job's notifications: %w", err)
	}
	if err := s.readRecord(); err != nil {
		return nil, err
	}
	s.takeOver()
	for range s.record.StopSignals { // as if they had just come
		cfg.Signal(unix.SIGTERM)
	}
	return s, nil
}

// Awake pings the guard if that would be due soon anyway: the process is awake for something else.
func (s *Supervisor) Awake() { s.pingSoon() }

// Ready tells the guard that the elector is up and its endpoint listens.
func (s *Supervisor) Ready() { s.send(ipc.Ready{}) }

// Status sends a status to systemd, through the guard: at most 512 bytes of the text.
func (s *Supervisor) Status(text string) { s.send(ipc.Status{Text: text[:min(len(text), 512)]}) }

// Lease tells the guard which lease the daemon has; 0: none.
func (s *Supervisor) Lease(id int64, ttl time.Duration) { s.send(ipc.Lease{ID: id, TTL: ttl}) }

// Entered tells the guard that the key of the lease is put, and its create revision.
func (s *Supervisor) Entered(key string, created int64) {
	s.send(ipc.Entered{Key: key, Created: created})
}

// Releasing tells the guard that the lease is about to be given back. After an error no request for
// that may be sent: the elector that follows would not know of it. If the guard has exited, none
// follows.
func (s *Supervisor) Releasing(lease int64) error {
	err := s.trySend(ipc.Lease{ID: lease, Releasing: true})
	if err != nil && !errors.Is(err, ipc.ErrClosed) {
		return fmt.Errorf("tell the guard that the lease is given back: %w", err)
	}
	return nil
}

// Token passes etcd's authentication token to the guard, so that neither another elector nor a
// revocation need wait for etcd to check the password. A token that does not fit into a message is
// not passed on.
func (s *Supervisor) Token(token string) {
	if len(token) > ipc.MaxText {
		token = ""
	}
	s.send(ipc.Token{Value: []byte(token)})
}

// Extend passes later deadlines to the guard. They change nothing once stop-at has passed, unless
// the job is frozen: then they have it thawed, and from this moment on it may run. They change
// nothing if the guard is lost.
func (s *Supervisor) Extend(stopAt, killBy time.Duration) {
	s.mu.Lock()
	j := &s.job
	if j.guardLost {
		s.mu.Unlock()
		return
	}
	if s.cfg.Freeze || boottime.Now() < j.term.StopAt {
		j.term.StopAt, j.term.KillBy, j.frozen = stopAt, killBy, false
	}
	if s.cfg.Freeze {
		s.wakeMonitor() // stop-at may have passed before
	}
	s.mu.Unlock()
	s.send(ipc.Extend{StopAt: stopAt, KillBy: killBy})
	s.pingSoon() // both are awake now
}

// Suspend reports whether the term may go on although stop-at has passed: the guard freezes the
// job, or kills it at kill-by if it can't. It does so by itself. Past kill-by it must have said
// that the job is frozen.
func (s *Supervisor) Suspend() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	return s.cfg.Freeze && !j.guardLost && !j.ordered && !s.stopped &&
		(j.shown.State == JobFrozen ||
			j.shown.State == JobRunning && boottime.Now() < j.term.KillBy)
}

// Exit tells the guard that the elector is about to exit, and with which code the daemon should
// exit and why. The guard logs the last line.
func (s *Supervisor) Exit(code int, why string) { s.send(ipc.Exiting{Code: code, Why: why}) }

// send sends a message. If the guard does not take it, the guard counts as lost at the next ping.
func (s *Supervisor) send(message any) { _ = s.trySend(message) }

func (s *Supervisor) trySend(message any) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	err := s.outbox.Send(message)
	if err != nil {
		s.unreachable.Store(true)
	}
	return err
}

// killNow kills the job's first process and its cgroup, which takes no scan of the process table.
// No other job begins meanwhile, unless the guard has reported this one gone.
func (s *Supervisor) killNow() {
	s.mu.Lock()
	if s.job.pidfd >= 0 {
		proctree.SignalPidfd(s.job.pidfd, unix.SIGKILL)
	}
	s.mu.Unlock()
	s.killing.Lock()
	defer s.killing.Unlock()
	if s.cgroup != nil {
		s.cgroup.KillAllBlocking()
	}
}
