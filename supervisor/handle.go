//go:build linux

package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// HandleConfig is what the elector's end needs to know.
type HandleConfig struct {
	In, Out      int // the pipe pair
	SpawnerSock  int // what the spawner says
	SpawnerPidfd int
	Guard        int    // pid
	Spawner      int    // pid
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

const forever = time.Duration(1<<63 - 1)

// Handle is the elector's end: it asks the guard to run the job, and kills the job itself when the guard is gone.
type Handle struct {
	cfg     HandleConfig
	log     *slog.Logger
	metrics metrics
	restart *restarter

	pipe    *os.File          // In, for the netpoller
	spawner *os.File          // SpawnerSock, the same
	guardFd int               // pidfd
	procs   *proctree.Scanner // Run's goroutine alone uses it
	// killing is held while the cgroup is killed, which may take the kernel a while: not mu, for the endpoint waits for that.
	killing sync.Mutex
	cgroup  *proctree.Cgroup

	sending sync.Mutex
	outbox  ipc.Outbox
	deaf    atomic.Bool // the guard does not take messages

	retime chan struct{}    // room for one: a job was asked for, or its stop, and the next ping may be due earlier
	gone   chan struct{}    // closed when the guard is gone and the job proven dead
	killed chan struct{}    // closed when the spawner has told that the job is gone, and that it starts no other
	events chan ipc.Message // what concerns the job under way; a run takes all of it

	mu    sync.Mutex
	job   Job
	term  Term          // of the job under way
	alive bool          // from the request to start until dead
	asked time.Duration // when the start was asked for
	// due is when the guard was to have the job dead because we asked for its stop; forever: we have not.
	due time.Duration
	// known is the last kill-by that the guard is sure to have read: it has answered a ping that was sent later.
	known  time.Duration
	jobFd  int // pidfd of the first process, -1: none
	jobPid int // its pid: the guard tells of the start in its own time
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
	proctree.Exit
	At time.Time
}

// Connect opens the elector's end. It fails when the guard is gone already.
func Connect(cfg HandleConfig) (*Handle, error) {
	h := &Handle{
		cfg: cfg, log: cfg.Logger, metrics: newMetrics(cfg.Registerer), restart: newRestarter(cfg.Restart, cfg.RestartLimit),
		retime: make(chan struct{}, 1), gone: make(chan struct{}), killed: make(chan struct{}), events: make(chan ipc.Message, 16), outbox: ipc.Outbox{FD: cfg.Out},
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
		if h.cgroup, err = proctree.OpenCgroup(cfg.CgroupDir); err != nil {
			return nil, fmt.Errorf("open the job's cgroup: %w", err)
		}
	}
	for _, fd := range []int{cfg.In, cfg.Out, cfg.SpawnerSock} {
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("open the guard's pipe: %w", err)
		}
	}
	h.pipe, h.spawner = os.NewFile(uintptr(cfg.In), "guard"), os.NewFile(uintptr(cfg.SpawnerSock), "spawner")
	return h, nil
}

// Ready tells the guard that the elector is up and its endpoint listens.
func (h *Handle) Ready() { h.tell(ipc.Ready{}) }

// Status tells systemd, through the guard.
func (h *Handle) Status(text string) {
	h.tell(ipc.Status{Text: text[:min(len(text), 512)]})
}

// Lease tells the guard which lease to revoke if the elector is lost; 0: none.
func (h *Handle) Lease(id int64, ttl time.Duration) {
	h.tell(ipc.Lease{ID: id, TTL: ttl})
}

// Token hands on what etcd takes in place of the password, so that a revocation need not wait for etcd to check that. What does not
// fit into a message is not handed on.
func (h *Handle) Token(token string) {
	if len(token) > ipc.MaxText {
		token = ""
	}
	h.tell(ipc.Token{Value: []byte(token)})
}

// Extend hands later deadlines to the guard.
func (h *Handle) Extend(stopAt, killBy time.Duration) {
	h.mu.Lock()
	if h.avenging {
		h.mu.Unlock()
		return
	}
	if boottime.Now() < h.term.StopAt {
		h.term.StopAt, h.term.KillBy = stopAt, killBy
	}
	h.mu.Unlock()
	h.tell(ipc.Extend{StopAt: stopAt, KillBy: killBy})
}

// Exit tells the guard that the elector is about to end, and with which code the daemon shall, and why: the last line of the
// log is the guard's.
func (h *Handle) Exit(code int, why string) {
	h.tell(ipc.Exiting{Code: code, Why: why})
}

// Snapshot is the job as it is now. That its first process has ended is seen at once, not when the guard has told of it: our own
// loops may hang, or have just gone on.
func (h *Handle) Snapshot() Job {
	h.mu.Lock()
	defer h.mu.Unlock()
	job := h.job
	if job.State == JobRunning && (!h.alive || h.jobFd >= 0 && h.jobPid == job.PID && proctree.PidfdExited(h.jobFd)) {
		job.State = JobStopping
	}
	return job
}

// tell sends a message. A guard that does not take it is as good as dead, which the next tick acts on.
func (h *Handle) tell(message any) {
	h.sending.Lock()
	defer h.sending.Unlock()
	if h.outbox.Send(message) != nil {
		h.deaf.Store(true)
	}
}

// Run listens to the guard until ctx ends (nil) or the guard is gone or hung: then it kills the job itself, proves it dead,
// and returns ErrGuardGone. No Supervise may be under way when ctx ends.
func (h *Handle) Run(ctx context.Context) error {
	var owned sync.WaitGroup
	defer owned.Wait()
	defer func() { _ = errors.Join(h.pipe.Close(), h.spawner.Close()) }()
	stop := make(chan struct{})
	defer close(stop)

	messages := make(chan ipc.Message)
	owned.Go(func() { h.read(messages, stop) })
	owned.Go(h.hearSpawner)
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
	var pinged time.Duration // kill-by when the last ping was sent
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ended:
			return h.avenge("the guard is gone")
		case m := <-messages:
			if m.Kind == ipc.KindPong {
				answered = m.Pong().Number
				continue
			}
			h.hear(m)
		case <-tick.C:
			if h.deaf.Load() || h.hung(sent-answered) {
				return h.avenge("the guard is hung")
			}
			// Where the job is late to die the guard is asked even if our own loops are stuck: there is nobody else to notice.
			if late := h.strikeLate(); late || h.cfg.Turning() {
				h.mu.Lock()
				if sent == answered {
					h.known = max(h.known, pinged)
				}
				pinged = h.term.KillBy
				h.mu.Unlock()
				sent++
				h.tell(ipc.Ping{Number: sent})
			}
			tick.Reset(h.interval(boottime.Now()))
		case <-h.retime:
			tick.Reset(h.interval(boottime.Now()))
		}
	}
}

// hung reports whether the guard is taken for hung: it owes us the answers to more than three pings while there is something for it
// to do. That is the start, what follows the end of the first process, and from a margin before kill-by on the kill. Until then its
// silence does no harm, and a machine that stalls must not cost the job. Pings are counted as we turn, so that our own pause, or
// the host's, is not held against it.
func (h *Handle) hung(owed int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	busy := h.jobFd < 0 && boottime.Now() < h.asked+h.cfg.TTL/3 || h.jobFd >= 0 && proctree.PidfdExited(h.jobFd) || boottime.Now() >= min(h.known-h.cfg.Margin(), h.due)
	return h.alive && owed > 3 && busy
}

// strikeLate kills, where that needs no look around, a job that the guard should have killed by now: it may be hung, and to
// be sure of that takes several turns, which on a starved machine are long. It says if there is such a job.
func (h *Handle) strikeLate() bool {
	h.mu.Lock()
	late := h.alive && boottime.Now() >= h.late()
	h.mu.Unlock()
	if late {
		h.strike()
	}
	return late
}

// strike kills what of the job can be named without looking around. No other job begins meanwhile, unless the guard has told that
// this one is dead.
func (h *Handle) strike() {
	h.mu.Lock()
	if h.jobFd >= 0 {
		proctree.SignalPidfd(h.jobFd, unix.SIGKILL)
	}
	h.mu.Unlock()
	h.killing.Lock()
	defer h.killing.Unlock()
	if h.cgroup != nil {
		h.cgroup.KillAllBlocking()
	}
}

// late is when the guard should have killed the job. The mutex is held.
func (h *Handle) late() time.Duration { return min(h.term.KillBy, h.due) + h.cfg.Margin()/4 }

// interval is the time from now to the next ping: while the job lives a third of T/10, which is what the guard may take to answer
// where that matters. From a quarter of the margin after kill-by on, or after the moment that a stop of ours allows, it is far
// less, for the job should be dead, and the rest of the margin is all there is for noticing that the guard hangs and for killing
// in its place.
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
func (h *Handle) read(messages chan<- ipc.Message, stop <-chan struct{}) {
	conn, err := h.pipe.SyscallConn()
	if err != nil {
		return
	}
	var in ipc.Inbox
	for {
		var fillErr error
		if err := conn.Read(func(fd uintptr) bool {
			var more bool
			more, fillErr = in.Fill(int(fd))
			return more || fillErr != nil
		}); err != nil || fillErr != nil {
			return // end-of-file decides nothing: the guard's pidfd tells if it is gone
		}
		for m, ok := in.Next(); ok; m, ok = in.Next() {
			m = m.Clone()
			select {
			case messages <- m:
			case <-stop:
				return
			}
		}
	}
}

// hear acts on a message of the guard's.
func (h *Handle) hear(m ipc.Message) {
	switch m.Kind {
	case ipc.KindSignal:
		h.cfg.Signal(m.Signal().Signal)
		return
	case ipc.KindTimerLatency:
		h.metrics.lateness.Observe(m.TimerLatency().By.Seconds())
		return
	case ipc.KindGone:
		h.mu.Lock()
		h.alive = false
		h.closeJob()
		h.mu.Unlock()
	}
	h.events <- m // has room for all of one life, and a run takes all before the next begins
}

// hearSpawner takes what the spawner says, until its end or ours. With each start comes a pidfd of the job's first process, by which
// its end is known without the guard's help.
func (h *Handle) hearSpawner() {
	conn, err := h.spawner.SyscallConn()
	if err != nil {
		return
	}
	for {
		var m ipc.SpawnerMessage
		var control [unix.SizeofCmsghdr + 8]byte
		n, controlLen := 0, 0
		var received error
		if err := conn.Read(func(fd uintptr) bool {
			n, controlLen, _, _, received = unix.Recvmsg(int(fd), m.Bytes(), control[:], unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			return !errors.Is(received, unix.EAGAIN)
		}); err != nil || received != nil || n != ipc.SpawnerMessageLen {
			return // end-of-file decides nothing: the spawner's pidfd tells if it is gone
		}
		switch m.Kind {
		case ipc.SpawnerStarted:
			fd := -1
			if messages, err := unix.ParseSocketControlMessage(control[:controlLen]); err == nil && len(messages) == 1 {
				if fds, err := unix.ParseUnixRights(&messages[0]); err == nil && len(fds) == 1 {
					fd = fds[0]
				}
			}
			h.mu.Lock()
			h.closeJob()
			h.jobFd, h.jobPid = fd, int(m.Value)
			h.mu.Unlock()
		case ipc.SpawnerGone:
			select {
			case <-h.killed:
			default:
				close(h.killed)
			}
		}
	}
}

// askSpawner asks the spawner to kill the job, and to start none any more.
func (h *Handle) askSpawner() {
	m := ipc.SpawnerMessage{Kind: ipc.SpawnerKill}
	_ = unix.Sendto(h.cfg.SpawnerSock, m.Bytes(), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, nil)
}

func (h *Handle) closeJob() {
	if h.jobFd >= 0 {
		_ = unix.Close(h.jobFd)
		h.jobFd = -1
	}
}

// scanner makes the process table's reader when it is first needed; Run's goroutine alone uses it.
func (h *Handle) scanner() (*proctree.Scanner, error) {
	if h.procs == nil {
		procs, err := proctree.NewScanner()
		if err != nil {
			return nil, err
		}
		h.procs = procs
	}
	return h.procs, nil
}

// avenge kills the job in the guard's stead, then the guard, and returns when both are proven dead.
//
// The spawner, from which all of the job descends, kills and tells when nothing is left; it starts nothing any more, whatever it
// may still find from the guard. We kill what we see of its descendants beside it: we see more of them at a time.
//
// A guard that is PID 1 can't be killed from inside its namespace. It is left when the job is dead.
func (h *Handle) avenge(why string) error {
	h.mu.Lock()
	h.avenging = true
	alive := h.alive
	h.mu.Unlock()
	if alive {
		h.transition(JobStopping, why, nil) // nobody may be told that it runs, from before it is killed
	}
	began := boottime.Now()
	h.askSpawner()
	if alive {
		h.strike()
	}
	procs, err := h.scanner()
	if err != nil {
		h.log.Error("the process table can't be read: the spawner alone finds the job", "err", err)
	}
	if !proctree.PidfdExited(h.guardFd) {
		h.log.Error(why+": it is killed, and the job with it", "threads", threadStates(h.cfg.Guard))
	}
	complain, killed := began+10*time.Second, h.killed
	// A spawner is taken for hung once nothing was seen to descend from it for a while: it would have told.
	sees, seen, clean := proctree.ProcHidden() == "", began, 0
	done := func() bool {
		hangs := sees && clean >= 3 && boottime.Now() > seen+max(h.cfg.Margin()/2, time.Second)
		gone, left := h.jobGone(procs, boottime.Now() > began+5*time.Millisecond, hangs)
		if clean++; left {
			seen, clean = boottime.Now(), 0
		}
		return gone
	}
	for !done() || !proctree.PidfdExited(h.guardFd) && h.cfg.Guard != 1 {
		pause := 200 * time.Microsecond
		switch elapsed := boottime.Now() - began; {
		case elapsed > 10*time.Second:
			pause = 100 * time.Millisecond
		case elapsed > 100*time.Millisecond:
			pause = time.Millisecond
		}
		select {
		case <-killed:
			killed = nil // what is waited for now does not tell
		case <-time.After(pause):
		}
		if boottime.Now() > complain {
			complain += 10 * time.Second
			h.log.Error("the job or its guard can't be killed; the lease is held on to", "elapsed", (boottime.Now() - began).Round(time.Second).String())
		}
	}
	h.log.Error(why+": the job is dead", "elapsed", (boottime.Now() - began).String())
	h.killing.Lock()
	if h.cgroup != nil {
		h.cgroup.Remove()
		h.cgroup = nil
	}
	h.killing.Unlock()
	if alive {
		h.metrics.kills.WithLabelValues(ipc.KilledGuard.Label()).Inc()
	}
	h.mu.Lock()
	h.alive = false
	h.closeJob()
	h.mu.Unlock()
	close(h.gone)
	return ErrGuardGone
}

// jobGone kills what is left of the job, then the guard. It reports whether nothing of the job is left, and whether something was
// seen of it, or could be there unseen. To look through the process table takes milliseconds, in which the spawner is mostly done.
func (h *Handle) jobGone(procs *proctree.Scanner, look, hangs bool) (gone, left bool) {
	gone, left = true, true
	select {
	case <-h.killed:
	default:
		if gone = proctree.PidfdExited(h.cfg.SpawnerPidfd); gone {
			// Two processes were lost in one moment. What has left the job's cgroup is not found.
			h.mu.Lock()
			gone = h.jobFd < 0 || proctree.PidfdExited(h.jobFd)
			h.mu.Unlock()
		} else {
			h.askSpawner()
			if look && procs != nil {
				left = procs.KillDescendants(h.cfg.Spawner, unix.Getpid())
			}
			if hangs && !left {
				// Stopped it starts nothing between the last look and its end.
				proctree.SignalPidfd(h.cfg.SpawnerPidfd, unix.SIGSTOP)
				end := unix.SIGKILL
				if left = procs.KillDescendants(h.cfg.Spawner, unix.Getpid()); left {
					end = unix.SIGCONT
				}
				proctree.SignalPidfd(h.cfg.SpawnerPidfd, end)
			}
		}
		h.strike()
	}
	if h.cgroup != nil && h.cgroup.Populated() {
		h.strike()
		return false, true
	}
	if gone {
		proctree.SignalPidfd(h.guardFd, unix.SIGKILL)
	}
	return gone, left
}

// threadStates is what the kernel tells of the threads of a process: the state of each, and where in the kernel it waits, as far as
// we may know.
func threadStates(pid int) string {
	var states []string
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*", pid))
	for _, task := range tasks {
		stat, _ := os.ReadFile(task + "/stat")
		wchan, _ := os.ReadFile(task + "/wchan")
		call, _ := os.ReadFile(task + "/syscall")
		state := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]) + " ?")[0]
		number, _, _ := strings.Cut(strings.TrimSpace(string(call)), " ")
		states = append(states, strings.TrimSpace(fmt.Sprintf("%s:%s %s %s", filepath.Base(task), state, wchan, number)))
	}
	return strings.Join(states, ", ")
}

// Supervise runs the job for one term: it starts it, starts it again as the restart policy says, and when ctx ends has it
// stopped. It returns when nothing of the job is alive: ErrGuardGone, an *ExitError or a *ResignError where that ended it,
// else nil. grace translates the cause of ctx's end: zero kills at once, negative leaves the job the time until kill-by.
func (h *Handle) Supervise(ctx context.Context, t Term, grace func(cause error) time.Duration) error {
	for {
		if over(ctx, t) {
			return nil
		}
		ran := boottime.Now()
		exit, ended, err := h.life(ctx, t, grace)
		if err != nil {
			return err
		}
		if !ended {
			return nil
		}
		delay, err := h.restart.after(exit, boottime.Now()-ran)
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
	h.term, h.alive, h.asked, h.due, h.known = t, true, boottime.Now(), forever, t.KillBy
	h.mu.Unlock()
	h.transition(JobStarting, "elected", nil)
	h.pingSoon()
	h.tell(ipc.Start{Key: t.Key, Token: t.Token, LeaseID: t.LeaseID, StopAt: t.StopAt, KillBy: t.KillBy})

	done, lost := ctx.Done(), t.Lost
	ended = true
	for {
		select {
		case <-lost:
			lost, ended = nil, false
			h.tell(ipc.Stop{})
			// The next leader starts already. The guard has to wake up first, and then sees to all of the job; the first blow is ours.
			h.mu.Lock()
			h.due = boottime.Now()
			h.mu.Unlock()
			h.strike()
			h.pingSoon()
		case <-done:
			done, ended = nil, false
			h.transition(JobStopping, context.Cause(ctx).Error(), nil)
			g := grace(context.Cause(ctx))
			h.tell(ipc.Stop{Grace: max(g, ipc.UntilKillBy)})
			if g >= 0 {
				h.mu.Lock()
				h.due = min(h.due, boottime.Now()+g)
				h.mu.Unlock()
				h.pingSoon()
			}
		case <-h.gone:
			h.transition(JobExited, ErrGuardGone.Error(), func(j *Job) { j.PID = 0 })
			return exit, false, ErrGuardGone
		case m := <-h.events:
			switch m.Kind {
			case ipc.KindStarted:
				h.metrics.starts.Inc()
				to := JobRunning
				if !ended {
					to = JobStopping
				}
				h.transition(to, "started", func(j *Job) { j.PID, j.StartedAt = m.Started().PID, time.Now().UTC() })
			case ipc.KindRefused:
				refused := m.Refused()
				exit = ExitError{Exit: proctree.Exit{Code: refused.Code}, Refused: refused.Why}
				h.transition(JobStopping, exit.Refused, func(j *Job) { j.LastExit = &LastExit{exit.Exit, time.Now().UTC()} })
			case ipc.KindExited:
				exit = ExitError{Exit: proctree.Exit(m.Exited())}
				h.metrics.exits.WithLabelValues(exitReason(exit.Exit, ended)).Inc()
				h.transition(JobStopping, "the first process has ended", func(j *Job) {
					j.PID, j.LastExit = 0, &LastExit{exit.Exit, time.Now().UTC()}
				})
			case ipc.KindGone:
				dead := m.Gone()
				if dead.Reason != ipc.NotKilled {
					h.metrics.kills.WithLabelValues(dead.Reason.Label()).Inc()
				}
				h.metrics.stops.Observe(dead.Elapsed.Seconds())
				h.transition(JobExited, "dead", func(j *Job) { j.PID = 0 })
				// The guard stops the job by its own clock, and at a second signal, without asking us.
				return exit, ended && !dead.Ordered, nil
			}
		}
	}
}

// pingSoon has the time of the next ping worked out anew.
func (h *Handle) pingSoon() {
	select {
	case h.retime <- struct{}{}:
	default:
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

func exitReason(e proctree.Exit, byItself bool) string {
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
	if conn.Read(func(fd uintptr) bool { return proctree.PidfdExited(int(fd)) }) == nil {
		close(ended)
	}
}
