//go:build linux

package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	ossignal "os/signal"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/quote"
	"leasehold/kubernetes"
	"leasehold/supervisor"
	"leasehold/supervisor/recovery"
)

// jobCallbacks runs the job for the candidate.
type jobCallbacks struct {
	supervisor *supervisor.Supervisor
	keeper     *recovery.Keeper // nil: there is no state file
	cfg        config.Config
	log        *slog.Logger
	margin     atomic.Int64
	// stopping reports whether the daemon was asked to stop: the job may have ended because of that
	// before the term has ended.
	stopping func() bool
}

func (j *jobCallbacks) Leased(id int64, ttl time.Duration) {
	j.supervisor.Lease(id, ttl)
	j.keeper.Lease(id)
}

func (j *jobCallbacks) Entered(key string, created int64) { j.supervisor.Entered(key, created) }

func (j *jobCallbacks) Releasing(lease int64) error { return j.supervisor.Releasing(lease) }

func (j *jobCallbacks) Extended(d election.Deadlines) { j.supervisor.Extend(d.StopAt, d.KillBy) }

func (j *jobCallbacks) Suspend() bool { return j.supervisor.Suspend() }

func (j *jobCallbacks) grantedMargin() time.Duration { return time.Duration(j.margin.Load()) }

func (j *jobCallbacks) Lead(ctx context.Context, t election.Term) error {
	j.margin.Store(int64(t.Timing.Margin))
	err := j.supervisor.Supervise(ctx, supervisor.Term{
		Key: t.Key, Token: t.Token, LeaseID: t.LeaseID,
		StopAt: t.Deadlines.StopAt, KillBy: t.Deadlines.KillBy, Lost: t.Lost,
		Adopted: t.Adopted,
	}, j.grace)
	var resign *supervisor.ResignError
	never := j.cfg.Restart == string(supervisor.RestartNever)
	switch {
	case errors.As(err, &resign):
		j.log.Warn("LEASEHOLD_RESTART_LIMIT is reached: resigning",
			"restart_limit", j.cfg.RestartLimit.N,
			"exit_code", resign.Last.Code, "signal", resign.Last.Signal,
			"backoff", resign.After.Round(time.Millisecond).String())
		return &election.Backoff{For: resign.After}
	case err == nil && never && !j.stopping() && !j.supervisor.Snapshot().StartedAt.IsZero():
		return errLost
	}
	return err
}

func (j *jobCallbacks) Ended(error, error) {}

// grace is the time that the job has to stop when its term ends for this cause. Negative: until
// kill-by.
func (j *jobCallbacks) grace(cause error) time.Duration {
	switch {
	case errors.Is(cause, errPlannedStop), errors.Is(cause, election.ErrHeld),
		errors.Is(cause, election.ErrSwitchover),
		errors.As(cause, new(*supervisor.UnhealthyError)):
		return max(j.cfg.StopGrace.Duration, 1) // 0 would mean that the lease is lost
	case errors.Is(cause, election.ErrContactLost):
		return -1
	}
	return 0
}

// runElector is the guard's child: etcd, HTTP, decisions.
//
//	config ──→ candidate (etcd) ──→ supervisor (the job, by way of the guard)
//	               ├────────────────────┴──→ health server
//	               ├──→ endpoint of a Service
//	               └──→ status ──→ supervisor ──→ guard ──→ systemd
//
// The candidate and the supervisor are one actor, because their order at the end matters. The
// candidate revokes its lease when nothing of the job is left. The supervisor listens until then.
func runElector(build Build, args []string) int {
	nameProcess(roleElector)
	// A job may already run, as the same user.
	if err := hideMemory(); err != nil {
		fmt.Fprintln(os.Stderr, "leasehold: set dumpable:", err)
		return exitInternal
	}
	// Only the guard acts on the user's signals. Those that reach us directly are dropped.
	ossignal.Notify(make(chan os.Signal, 1),
		unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGQUIT)
	cfg, err := config.Load(config.ForRun)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitConfig
	}
	log := newLog(cfg)
	defer log.flush()
	sc, err := supervisorConfig(args)
	if err != nil {
		log.Error("read the guard's arguments", "err", err)
		return exitUsage
	}

	// More processors (P) only wake threads in vain. But one is too few: neither many clients of
	// the health endpoint nor a check whose exec hangs must keep the election waiting.
	runtime.GOMAXPROCS(2)
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	changed := make(chan struct{}, 1)
	measured := newMetrics(cfg.Election)
	job := &jobCallbacks{
		cfg: cfg, log: log.Logger,
		stopping: func() bool { return ctx.Err() != nil },
	}
	job.margin.Store(int64(cfg.Timing().Margin))
	var d *daemon
	sc.TTL, sc.MaxPing, sc.Margin = cfg.TTL.Duration, maxPing(), job.grantedMargin
	sc.Freeze = cfg.Freezes()
	sc.Restart, sc.RestartLimit = supervisor.Restart(cfg.Restart), cfg.RestartLimit.N
	sc.Health, sc.NotifySock = healthConfig(cfg), -1
	if sc.Health.Notify || sc.Health.Watchdog > 0 {
		sc.NotifySock = notifyFd
	}
	sc.PostStop = postStop(cfg)
	sc.Signal = func(unix.Signal) { stop(errPlannedStop) }
	sc.Running = func() bool { return live(d.candidate.Snapshot()) == nil }
	sc.Changed = func() { signalChange(changed) }
	sc.Logger, sc.Registerer = log.Logger, measured
	super, err := supervisor.Connect(sc)
	if err != nil {
		log.Error("connect to the guard", "err", err)
		return exitInternal
	}
	job.supervisor, job.keeper = super, keep(cfg, super, log.Logger)
	defer job.keeper.Close(flushTime)
	ended := job.ended()
	guardGone := make(chan struct{})
	d, err = wire(ctx, stop, parts{
		cfg: cfg, log: log.Logger, version: build.Version, metrics: measured, changed: changed,
		callbacks: job, configure: job.adopt, status: super.Status, listen: inherit,
		account:  kubernetes.AccountDir,
		suspends: super.Suspend,
		job:      func() health.Job { return healthJob(super.Snapshot()) },
		campaign: func(c *election.Candidate) error {
			if ended != nil { // give the lease back, if there is one
				stop(ended)
			}
			return errors.Join(campaignWithJob(ctx, stop, c, super, guardGone), ended)
		},
	})
	if err == nil {
		addGuardWatch(d, guardGone)
		super.Ready()
		err = d.group.Run()
	}
	end := endingOf(err)
	if errors.Is(err, supervisor.ErrGuardLost) { // without a guard we log the last line
		log.Error("exiting: "+end.text, "exit_code", end.code)
	}
	super.Status(quote.Printable("exiting: " + end.text)) // see jobsOwnCode
	super.Exit(end.code, end.text)
	return end.code
}

// stateFd is the elector's descriptor of the state file; /dev/null if the guard uses none.
const stateFd = 8

// notifyFd is the elector's descriptor of the socket for the job's notifications.
const notifyFd = 9

// keep returns what writes the daemon's lease into the state file.
func keep(cfg config.Config, super *supervisor.Supervisor, log *slog.Logger) *recovery.Keeper {
	var st unix.Stat_t
	if err := unix.Fstat(stateFd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG ||
		cfg.StateDir == "" {
		return nil // the guard has said why
	}
	keeper, err := recovery.Keep(stateFd, log)
	if err != nil {
		log.Warn("the state file can't be used", "err", err)
		return nil
	}
	if r := super.Record(); r.Lease.ID != 0 { // the elector before may not have come to it
		keeper.Lease(r.Lease.ID)
	}
	return keeper
}

// supervisorConfig takes what the guard passes to its elector: the pids of guard and spawner and,
// if the job has one, the directory of its cgroup. The descriptors are those that the guard sets
// up.
func supervisorConfig(args []string) (supervisor.Config, error) {
	guard, err := strconv.Atoi(args[0])
	spawner, err2 := strconv.Atoi(args[1])
	sc := supervisor.Config{
		In: 3, Out: 4, SpawnerSock: 5, SpawnerPidfd: 6, Guard: guard, Spawner: spawner,
	}
	if len(args) > 2 {
		sc.CgroupDir = args[2]
	}
	return sc, errors.Join(err, err2)
}

// addGuardWatch ends the elector once the guard is gone and nothing of the job is left. The health
// endpoint closes while the lease is revoked, which may take long: the daemon that is started next
// needs the address.
func addGuardWatch(d *daemon, guardGone <-chan struct{}) {
	stop := make(chan struct{})
	d.group.Add(func() error {
		select {
		case <-guardGone:
			return supervisor.ErrGuardLost
		case <-stop:
			return nil
		}
	}, func(error) { close(stop) })
}

// campaignWithJob runs the candidate, and the supervisor beside it until the candidate is done. If
// the guard is lost, it closes guardGone when nothing of the job is left.
func campaignWithJob(ctx context.Context, cancel context.CancelCauseFunc,
	candidate *election.Candidate, super *supervisor.Supervisor, guardGone chan<- struct{},
) error {
	superCtx, stop := context.WithCancel(context.Background())
	superDone := make(chan error, 1)
	go func() {
		err := super.Run(superCtx)
		if err != nil {
			cancel(err)
		}
		if errors.Is(err, supervisor.ErrGuardLost) {
			close(guardGone)
		}
		superDone <- err
	}()
	err := candidate.Run(ctx)
	stop()
	return errors.Join(<-superDone, err)
}
