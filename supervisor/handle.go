//go:build linux

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

// HandleConfig is what the elector's end needs to know.
type HandleConfig struct {
	In, Out      int    // the pipe pair
	Guard        int    // pid
	CgroupDir    string // "": the job has none
	TTL          time.Duration
	Margin       func() time.Duration // of the lease as granted
	Restart      Restart
	RestartLimit int

	Signal  func(s unix.Signal) // called for each stop request that the guard received; must not block
	Turning func() bool         // do the elector's own loops turn? The guard hears nothing while they don't
	Changed func()              // called after each change of Snapshot; must not block

	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Handle is the elector's end: it asks the guard to run the job, and kills the job itself when the guard is gone.
type Handle struct {
	cfg     HandleConfig
	log     *slog.Logger
	metrics metrics
	restart *restarter

	pipe    *os.File // In, for the netpoller
	guardFd int      // pidfd
	cgroup  *cgroup
	procs   *scanner

	sending sync.Mutex
	sendBuf [maxMessage]byte
	deaf    atomic.Bool // the guard does not take messages

	started chan struct{} // room for one: a job was asked for
	gone    chan struct{} // closed when the guard is gone and the job proven dead
	events  chan message  // what concerns the job under way; a run takes all of it

	mu    sync.Mutex
	job   Job
	term  Term // of the job under way
	alive bool // from the request to start until dead
	jobFd int  // pidfd of the first process, -1: none
	// jobGone says that the first process had ended before it could be opened.
	jobGone bool
	// avenging says that the guard is given up: the deadlines that it knows stay as they are.
	avenging bool
}

// Job is the job as the elector knows it.
type Job struct {
	State     JobState
	PID       int // 0: no first process
	StartedAt time.Time
	Restarts  int
	LastExit  *LastExit
}

// LastExit is how the job's last life ended.
type LastExit struct {
	Exit
	At time.Time
}

// Connect opens the elector's end. It fails when the guard is gone already.
func Connect(cfg HandleConfig) (*Handle, error) {
	h := &Handle{
		cfg: cfg, log: cfg.Logger, metrics: newMetrics(cfg.Registerer), restart: newRestarter(cfg.Restart, cfg.RestartLimit),
		started: make(chan struct{}, 1), gone: make(chan struct{}), events: make(chan message, 16),
		job: Job{State: JobNone}, jobFd: -1, guardFd: -1,
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("set dumpable: %w", err)
	}
	var err error
	if h.guardFd, err = unix.PidfdOpen(cfg.Guard, 0); err != nil {
		return nil, fmt.Errorf("open the guard: %w", err)
	}
	if unix.Getppid() != cfg.Guard {
		return nil, ErrGuardGone
	}
	if cfg.CgroupDir != "" {
		if h.cgroup, err = openCgroup(cfg.CgroupDir); err != nil {
			return nil, fmt.Errorf("open the job's cgroup: %w", err)
		}
	}
	for _, fd := range []int{cfg.In, cfg.Out} {
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("open the guard's pipe: %w", err)
		}
	}
	h.pipe = os.NewFile(uintptr(cfg.In), "guard")
	return h, nil
}

// Ready tells the guard that the elector is up and its endpoint listens.
func (h *Handle) Ready() { h.tell(message{kind: msgReady}) }

// Status tells systemd, through the guard.
func (h *Handle) Status(text string) {
	h.tell(message{kind: msgStatus, text: []byte(text)[:min(len(text), 512)]})
}

// Lease tells the guard which lease to revoke if the elector is lost; 0: none.
func (h *Handle) Lease(id int64, ttl time.Duration) {
	h.tell(message{kind: msgLease, a: id, b: int64(ttl)})
}

// Token hands on what etcd takes in place of the password, so that a revocation need not wait for etcd to check that. What does not
// fit into a message is not handed on.
func (h *Handle) Token(token string) {
	if len(token) > maxText {
		token = ""
	}
	h.tell(message{kind: msgToken, text: []byte(token)})
}

// Extend hands later deadlines to the guard.
func (h *Handle) Extend(stopAt, killBy time.Duration) {
	h.mu.Lock()
	if h.avenging {
		h.mu.Unlock()
		return
	}
	if Now() < h.term.StopAt {
		h.term.StopAt, h.term.KillBy = stopAt, killBy
	}
	h.mu.Unlock()
	h.tell(message{kind: msgExtend, a: int64(stopAt), b: int64(killBy)})
}

// Exit tells the guard that the elector is about to end, and with which code the daemon shall, and why: the last line of the
// log is the guard's.
func (h *Handle) Exit(code int, why string) {
	h.tell(message{kind: msgExit, a: int64(code), text: []byte(why)})
}

// Snapshot is the job as it is now. That its first process has ended is seen at once, not when the guard has told of it: our own
// loops may hang, or have just gone on.
func (h *Handle) Snapshot() Job {
	h.mu.Lock()
	defer h.mu.Unlock()
	job := h.job
	if job.State == JobRunning && (!h.alive || h.jobGone || h.jobFd >= 0 && pidfdEnded(h.jobFd)) {
		job.State = JobStopping
	}
	return job
}

// tell sends a message. A guard that does not take it is as good as dead, which the next tick acts on.
func (h *Handle) tell(m message) {
	h.sending.Lock()
	defer h.sending.Unlock()
	if send(h.cfg.Out, &h.sendBuf, m) != nil {
		h.deaf.Store(true)
	}
}

// Run listens to the guard until ctx ends (nil) or the guard is gone or hung: then it kills the job itself, proves it dead,
// and returns ErrGuardGone. No Supervise may be under way when ctx ends.
func (h *Handle) Run(ctx context.Context) error {
	var owned sync.WaitGroup
	defer owned.Wait()
	defer func() { _ = h.pipe.Close() }()
	stop := make(chan struct{})
	defer close(stop)

	messages := make(chan message)
	owned.Go(func() { h.read(messages, stop) })
	ended := make(chan struct{})
	pipe, err := newPidfdWait(h.guardFd)
	if err != nil {
		return fmt.Errorf("watch the guard: %w", err)
	}
	defer func() { _ = pipe.Close() }()
	owned.Go(func() { pipe.wait(ended) })

	tick := time.NewTimer(0)
	defer tick.Stop()
	var sent, answered int64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ended:
			return h.avenge("the guard is gone")
		case m := <-messages:
			if m.kind == msgPong {
				answered = m.a
				continue
			}
			h.hear(m)
		case <-tick.C:
			if h.deaf.Load() || h.hung(sent-answered) {
				return h.avenge("the guard is hung")
			}
			// Where the job is late to die the guard is asked even if our own loops are stuck: there is nobody else to notice.
			if late := h.strikeLate(); late || h.cfg.Turning() {
				sent++
				h.tell(message{kind: msgPing, a: sent})
			}
			tick.Reset(h.interval(Now()))
		case <-h.started:
			tick.Reset(h.interval(Now()))
		}
	}
}

// hung says if the guard owes us the answers to more than three pings while the job lives. They are counted as we turn, so that
// our own pause, or the host's, is not held against it.
func (h *Handle) hung(owed int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.alive && owed > 3
}

// strikeLate kills, where that needs no look around, a job that the guard should have killed by now: it may be hung, and to
// be sure of that takes several turns, which on a starved machine are long. It says if there is such a job.
func (h *Handle) strikeLate() bool {
	h.mu.Lock()
	defer h.mu.Unlock() // so that no other job begins meanwhile
	if !h.alive || Now() < h.late() {
		return false
	}
	h.strike()
	return true
}

// strike kills what of the job can be named without looking around. The mutex is held.
func (h *Handle) strike() {
	if h.jobFd >= 0 {
		signalPidfd(h.jobFd, unix.SIGKILL)
	}
	if h.cgroup != nil {
		h.cgroup.killAll()
	}
}

// late is when the guard should have killed the job. The mutex is held.
func (h *Handle) late() time.Duration { return h.term.KillBy + h.cfg.Margin()/4 }

// interval is the time from now to the next ping: while the job lives a third of what the guard may take to answer, which is T/10.
// From a quarter of the margin after kill-by on it is far less, for the job should be dead, and the rest of the margin is all
// there is for noticing that the guard hangs and for killing in its place.
func (h *Handle) interval(now time.Duration) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case !h.alive:
		return time.Second
	case now < h.late():
		return min(h.cfg.TTL/30, time.Second, h.late()-now)
	}
	margin := h.cfg.Margin()
	return max(min(max(margin/16, 25*time.Millisecond), margin/8), time.Millisecond)
}

// read hands on what the guard says.
func (h *Handle) read(messages chan<- message, stop <-chan struct{}) {
	conn, err := h.pipe.SyscallConn()
	if err != nil {
		return
	}
	var in inbox
	for {
		var fillErr error
		if err := conn.Read(func(fd uintptr) bool {
			var more bool
			more, fillErr = in.fill(int(fd))
			return more || fillErr != nil
		}); err != nil || fillErr != nil {
			return // end-of-file decides nothing: the guard's pidfd tells if it is gone
		}
		for m, ok := in.next(); ok; m, ok = in.next() {
			m.text = append([]byte(nil), m.text...)
			select {
			case messages <- m:
			case <-stop:
				return
			}
		}
	}
}

// hear acts on a message of the guard's.
func (h *Handle) hear(m message) {
	switch m.kind {
	case msgSignal:
		h.cfg.Signal(unix.Signal(m.a))
		return
	case msgLateness:
		h.metrics.lateness.Observe(time.Duration(m.a).Seconds())
		return
	case msgStarted:
		h.openJob(int(m.a))
	case msgDead:
		h.mu.Lock()
		h.alive = false
		h.closeJob()
		h.mu.Unlock()
	}
	h.events <- m // has room for all of one life, and a run takes all before the next begins
}

// openJob pins the job's first process, to know its end without the guard's help.
func (h *Handle) openJob(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	gone := errors.Is(err, unix.ESRCH)
	if err == nil {
		var procs *scanner
		if procs, err = h.scanner(); err == nil {
			gone = procs.parent(pid) != h.cfg.Guard // reaped already, and the number may be a stranger's
		}
		if gone || err != nil {
			_ = unix.Close(fd)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closeJob()
	h.jobGone = gone
	if !gone && err == nil {
		h.jobFd = fd
	}
}

func (h *Handle) closeJob() {
	if h.jobFd >= 0 {
		_ = unix.Close(h.jobFd)
		h.jobFd = -1
	}
}

// scanner makes the process table's reader when it is first needed; Run's goroutine alone uses it.
func (h *Handle) scanner() (*scanner, error) {
	if h.procs == nil {
		procs, err := newScanner()
		if err != nil {
			return nil, err
		}
		h.procs = procs
	}
	return h.procs, nil
}

// avenge kills the job in the guard's stead, then the guard, and returns when both are proven dead.
//
// While a stopped guard lives, all of the job still descends from it, and its parentage is the best witness there is: the
// guard goes only when that shows nothing alive. Afterwards the cgroup and the environment tell. See scanner for why a clean
// scan is a proof, and why there must be two in a row.
//
// A guard that is PID 1 can't be killed from inside its namespace. It is left, when the job is dead, and when stop-at has
// passed for whatever start it may still find in its pipe.
func (h *Handle) avenge(why string) error {
	h.mu.Lock()
	h.avenging = true
	alive, jobFd, lease, stopAt := h.alive, h.jobFd, h.term.LeaseID, h.term.StopAt
	h.mu.Unlock()
	if alive {
		h.transition(JobStopping, why, nil) // nobody may be told that it runs, from before it is killed
	}
	began := Now()
	procs, err := h.scanner()
	if err != nil {
		h.log.Error("the process table can't be read: orphans of the job are found by its cgroup alone", "err", err)
	}
	strike := func() (left bool) {
		if jobFd >= 0 {
			signalPidfd(jobFd, unix.SIGKILL)
			left = !pidfdEnded(jobFd)
		}
		if h.cgroup != nil {
			h.cgroup.killAll()
			left = left || h.cgroup.populated()
		}
		return left
	}
	complain := began + 10*time.Second
	wait := func() {
		pause := 200 * time.Microsecond
		switch elapsed := Now() - began; {
		case elapsed > 10*time.Second:
			pause = 100 * time.Millisecond
		case elapsed > 100*time.Millisecond:
			pause = time.Millisecond
		}
		time.Sleep(pause)
		if Now() > complain {
			complain += 10 * time.Second
			h.log.Error("the job or its guard can't be killed; the lease is held on to", "elapsed", (Now() - began).Round(time.Second).String())
		}
	}
	for clean := 0; alive && clean < 2 && !pidfdEnded(h.guardFd); {
		clean++
		if left := strike(); left || procs != nil && procs.killDescendants(h.cfg.Guard, unix.Getpid()) {
			clean = 0
			wait()
		}
	}
	signalPidfd(h.guardFd, unix.SIGKILL)
	for clean := 0; clean < 2; {
		guardEnded := pidfdEnded(h.guardFd)
		left := strike()
		if alive && procs != nil && guardEnded && procs.killByEnvironment(leaseEntry(lease), Now() < began+time.Second) {
			left = true
		}
		if !guardEnded && h.cfg.Guard == 1 {
			guardEnded = !alive || Now() >= stopAt
			left = left || procs != nil && procs.killDescendants(h.cfg.Guard, unix.Getpid())
		}
		clean++
		if left || !guardEnded {
			clean = 0
			wait()
		}
	}
	h.log.Error(why+": the job is dead", "elapsed", (Now() - began).String())
	if h.cgroup != nil {
		h.cgroup.remove()
		h.cgroup = nil
	}
	if alive {
		h.metrics.kills.WithLabelValues(killReasons[killGuardGone]).Inc()
	}
	h.mu.Lock()
	h.alive = false
	h.closeJob()
	h.mu.Unlock()
	close(h.gone)
	return ErrGuardGone
}

// Supervise runs the job for one term: it starts it, starts it again as the restart policy says, and when ctx ends has it
// stopped. It returns when nothing of the job is alive: ErrGuardGone, an *ExitError or a *ResignError where that ended it,
// else nil. grace translates the cause of ctx's end: zero kills at once, negative leaves the job the time until kill-by.
func (h *Handle) Supervise(ctx context.Context, t Term, grace func(cause error) time.Duration) error {
	for {
		if over(ctx, t) {
			return nil
		}
		ran := Now()
		exit, ended, err := h.life(ctx, t, grace)
		if err != nil {
			return err
		}
		if !ended {
			return nil
		}
		delay, err := h.restart.after(exit, Now()-ran)
		if err != nil {
			return err
		}
		h.transition(JobBackoff, "the job ended by itself", func(j *Job) { j.Restarts++ })
		h.log.Info("the job ended by itself and is started again", "exit_code", exit.Code, "signal", exit.Signal, "backoff", delay.Round(time.Millisecond).String())
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-h.gone:
			timer.Stop()
			return ErrGuardGone
		case <-ctx.Done():
			timer.Stop()
		}
		if over(ctx, t) {
			h.transition(JobExited, "the term ended", nil)
		}
		h.mu.Lock()
		t.StopAt, t.KillBy = h.term.StopAt, h.term.KillBy
		h.mu.Unlock()
	}
}

// over says if the term has ended: nothing may be started in it any more.
func over(ctx context.Context, t Term) bool {
	select {
	case <-ctx.Done():
		return true
	case <-t.Lost:
		return true
	default:
		return false
	}
}

// life runs the job once. ended says that it ended by itself, and not because ctx did.
func (h *Handle) life(ctx context.Context, t Term, grace func(cause error) time.Duration) (exit ExitError, ended bool, err error) {
	h.mu.Lock()
	if h.avenging {
		h.mu.Unlock()
		return exit, false, ErrGuardGone
	}
	h.term, h.alive = t, true
	h.mu.Unlock()
	h.transition(JobStarting, "elected", nil)
	select {
	case h.started <- struct{}{}:
	default:
	}
	h.tell(message{kind: msgStart, a: t.LeaseID, b: t.Token, c: int64(t.StopAt), d: int64(t.KillBy), text: []byte(t.Key)})

	done, lost := ctx.Done(), t.Lost
	ended = true
	for {
		select {
		case <-lost:
			lost, ended = nil, false
			h.tell(message{kind: msgStop, a: 0})
			// The next leader starts already. The guard has to wake up first, and then sees to all of the job; the first blow is ours.
			h.mu.Lock()
			if !h.avenging { // else that is under way
				h.strike()
			}
			h.mu.Unlock()
		case <-done:
			done, ended = nil, false
			h.transition(JobStopping, context.Cause(ctx).Error(), nil)
			g := grace(context.Cause(ctx))
			h.tell(message{kind: msgStop, a: max(int64(g), untilKillBy)})
		case <-h.gone:
			h.transition(JobExited, ErrGuardGone.Error(), func(j *Job) { j.PID = 0 })
			return exit, false, ErrGuardGone
		case m := <-h.events:
			switch m.kind {
			case msgStarted:
				h.metrics.starts.Inc()
				to := JobRunning
				if !ended {
					to = JobStopping
				}
				h.transition(to, "started", func(j *Job) { j.PID, j.StartedAt = int(m.a), time.Now().UTC() })
			case msgRefused:
				exit = ExitError{Exit: Exit{Code: int(m.a)}, Refused: string(m.text)}
				h.transition(JobStopping, exit.Refused, func(j *Job) { j.LastExit = &LastExit{exit.Exit, time.Now().UTC()} })
			case msgExited:
				exit = ExitError{Exit: Exit{Code: int(m.a), Signal: int(m.b)}}
				h.metrics.exits.WithLabelValues(exitReason(exit.Exit, ended)).Inc()
				h.transition(JobStopping, "the first process has ended", func(j *Job) {
					j.PID, j.LastExit = 0, &LastExit{exit.Exit, time.Now().UTC()}
				})
			case msgDead:
				if r := int(m.b); r != killNone && r < len(killReasons) {
					h.metrics.kills.WithLabelValues(killReasons[r]).Inc()
				}
				h.metrics.stops.Observe(time.Duration(m.a).Seconds())
				h.transition(JobExited, "dead", func(j *Job) { j.PID = 0 })
				// The guard stops the job by its own clock, and at a second signal, without asking us.
				return exit, ended && m.c == 0, nil
			}
		}
	}
}

// transition is the one place where the job's state changes.
func (h *Handle) transition(to JobState, reason string, change func(*Job)) {
	h.mu.Lock()
	from := h.job.State
	if h.avenging && (to == JobStarting || to == JobRunning) {
		to = JobStopping // the guard said so earlier
	}
	h.job.State = to
	if change != nil {
		change(&h.job)
	}
	up := 0.0
	if to == JobRunning {
		up = 1
	}
	pid := h.job.PID
	h.mu.Unlock()
	h.metrics.up.Set(up)
	if from != to {
		h.log.Debug("the job's state", "from", string(from), "to", string(to), "reason", reason)
		if to == JobRunning {
			h.log.Info("the job runs", "pid", pid)
		}
	}
	h.cfg.Changed()
}

func exitReason(e Exit, byItself bool) string {
	switch {
	case !byItself:
		return "stopped"
	case e.Signal != 0:
		return "signal"
	case e.Code != 0:
		return "error"
	}
	return "ok"
}

// pidfdWait waits for a process's end without holding a thread.
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

// wait closes ended when the process has ended; it returns without that once the file is closed.
func (p pidfdWait) wait(ended chan<- struct{}) {
	conn, err := p.SyscallConn()
	if err != nil {
		return
	}
	if conn.Read(func(fd uintptr) bool { return pidfdEnded(int(fd)) }) == nil {
		close(ended)
	}
}
