//go:build linux

// Package app is the daemon: it wires what the other packages are into the processes guard and elector,
// and into the commands that only ask.
package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	ossignal "os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/boottime"
	"leasehold/internal/quote"
	"leasehold/supervisor"
)

// Build says what was built.
type Build struct{ Version, Commit, Date string }

var build Build

// Roles that leasehold gives to its own processes. Users have no use for them.
const (
	roleElector = "elector"
	roleRevoke  = "revoke"
	roleProbe   = "probe"
)

var (
	errPlannedStop = errors.New("planned stop")
	errLost        = errors.New("leadership lost, and the job is not restarted")
)

// Main runs leasehold and returns its exit code.
func Main(args []string, b Build) int {
	build = b
	closeOnExec()
	if len(args) == 0 {
		return wrongUsage(args)
	}
	switch name, rest := args[0], args[1:]; {
	case name == "--" && len(rest) > 0:
		return guard(rest)
	case name == "run" && len(rest) > 1 && rest[0] == "--":
		return guard(rest[1:])
	case name == "elect" && len(rest) == 0:
		return elect()
	case name == "status" && (len(rest) == 0 || len(rest) == 1 && rest[0] == "--json"):
		return status(len(rest) == 1)
	case name == "check" && (len(rest) == 0 || len(rest) == 1 && slices.Contains(health.Checks(), rest[0])):
		return check(rest)
	case name == "install" && len(rest) == 1 && rest[0] != "" && rest[0][0] != '-':
		return install(rest[0])
	case name == "version" && len(rest) == 0:
		fmt.Printf("leasehold %s (commit %s, %s)\n", build.Version, build.Commit, build.Date)
		return 0
	case (name == "help" || name == "-h" || name == "--help") && len(rest) == 0:
		fmt.Print(help())
		return 0
	case name == roleElector && len(rest) >= 2:
		return elector(rest)
	case name == roleRevoke && len(rest) == 2:
		return revoke(rest)
	case name == roleProbe:
		fmt.Print("\n")
		time.Sleep(10 * time.Second) // until the guard kills it
		return 0
	}
	return wrongUsage(args)
}

// wrongUsage tells the user what is wrong, on standard error, and where Kubernetes shows it. The subcommands that a probe runs
// have no say there: the container's last words are those of the process that it was started for.
func wrongUsage(args []string) int {
	hint := usageHint(args)
	fmt.Fprint(os.Stderr, hint)
	if len(args) == 0 || args[0] != "status" && args[0] != "check" {
		leaveMessage(terminationLog, hint, false)
	}
	return exitUsage
}

// closeOnExec sees to it that no descriptor but the standard streams is ever inherited, also those that came to us by accident.
func closeOnExec() {
	if unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	// Linux before 5.11
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
}

// configure reads the configuration of a subcommand and makes the logger. It tells what is wrong.
func configure(subcommand string) (config.Config, *slog.Logger, *logWriter, error) {
	cfg, err := config.Load(subcommand, os.Environ())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return config.Config{}, nil, nil, err
	}
	log, lines := newLogger(cfg.Log)
	return cfg, log, lines, nil
}

const flushTime = 200 * time.Millisecond

// guard is the process that the user starts. It makes the elector, and runs and kills the job.
func guard(command []string) (code int) {
	caught := catchSignals(unix.SIGALRM) // what is neither handled nor passed on is dropped
	children := make(chan os.Signal, 1)
	ossignal.Notify(children, unix.SIGCHLD)
	// A crash ends us by a signal: the runtime's exit code for it, 2, would be taken for the job's.
	debug.SetTraceback("crash")

	cfg, log, lines, err := configure("run")
	if err != nil {
		leaveMessage(terminationLog, err.Error(), false)
		return exitConfig
	}
	defer func() { lines.end(code) }()
	// What would stop us. Not before the configuration is read, whose faults are written from here: see newLogWriter.
	ossignal.Notify(caught.signals, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)
	go caught.relayHangUps(log)
	notify, told := newNotifier()
	defer told()
	if err := leaveStdin(); err != nil {
		log.Error("leave the terminal to the shell", "err", err)
		return exitOS
	}
	path, code := lookCommand(command[0], log)
	if code != 0 {
		return code
	}
	return supervisor.RunGuard(supervisor.GuardConfig{
		Path: path, Argv: command, Env: withoutOurs(os.Environ()),
		Election: cfg.Election, Identity: cfg.Identity,
		TTL: cfg.TTL.Duration, Margin: election.NewTiming(cfg.TTL.Duration, -1, cfg.Margin.Or(-1)).Margin,
		StopSignal: cfg.StopSignal.Signal, NewPrivs: cfg.NoNewPrivs == "off",
		Elector: []string{"leasehold", roleElector},
		Probe:   []string{"leasehold", roleProbe},
		Revoke: func(lease int64, within time.Duration) []string {
			return []string{"leasehold", roleRevoke, strconv.FormatInt(lease, 16), within.String()}
		},
		Signals: caught.signals, Children: children, Ignored: caught.ignoredByJob(cfg.StopSignal.Signal),
		Notify: notify, Stopping: stopping(cfg), Turned: newWatchdog(),
		Logger: log,
	})
}

// withoutOurs drops from an environment what is the daemon's alone: its settings, secrets among them, and its line to systemd.
func withoutOurs(environ []string) []string {
	return slices.DeleteFunc(environ, func(entry string) bool {
		return strings.HasPrefix(entry, "LEASEHOLD_") || strings.HasPrefix(entry, "NOTIFY_SOCKET=") || strings.HasPrefix(entry, "WATCHDOG_")
	})
}

// lookCommand finds the job's executable as a shell would.
func lookCommand(name string, log *slog.Logger) (string, int) {
	path, err := exec.LookPath(name)
	switch {
	case err == nil || errors.Is(err, exec.ErrDot):
		return path, 0
	case errors.Is(err, os.ErrPermission), errors.Is(err, unix.EISDIR):
		log.Error(fmt.Sprintf("the command %q is not executable", name), "err", err, "exit_code", exitNotExec)
		return "", exitNotExec
	}
	log.Error(fmt.Sprintf("the command %q is not found", name), "err", err, "exit_code", exitNotFound)
	return "", exitNotFound
}

// newNotifier makes the function that tells systemd, and one that at the end waits for a moment until systemd has been told. A slow
// systemd loses notifications, and holds up nobody.
func newNotifier() (notify func(state string), told func()) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return func(string) {}, func() {}
	}
	states, done := make(chan string, 64), make(chan struct{})
	go func() { // lives as long as the process, where systemd does not listen
		for s := range states {
			_, _ = daemon.SdNotify(false, s)
		}
		close(done)
	}()
	notify = func(state string) {
		select {
		case states <- state:
		default:
		}
	}
	told = func() {
		close(states)
		select {
		case <-done:
		case <-time.After(flushTime):
		}
	}
	return notify, told
}

// stopping tells systemd that the daemon stops, and how long that may take: where it is longer than the unit's TimeoutStopSec=,
// systemd waits. Beside the grace that is the time for a kill, and for giving the lease back.
func stopping(cfg config.Config) string {
	return fmt.Sprintf("STOPPING=1\nEXTEND_TIMEOUT_USEC=%d", (cfg.StopGrace.Duration + 30*time.Second).Microseconds())
}

// newWatchdog makes the function that tells systemd's watchdog that the daemon turns, at most once in a third of what it allows.
// It has a socket of its own and makes nothing: the guard calls it again and again, and collects no garbage.
func newWatchdog() func() {
	allowed, err := daemon.SdWatchdogEnabled(false)
	if err != nil || allowed == 0 {
		return func() {}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil || unix.Connect(fd, &unix.SockaddrUnix{Name: os.Getenv("NOTIFY_SOCKET")}) != nil {
		return func() {}
	}
	beat, last := []byte("WATCHDOG=1"), time.Duration(0)
	return func() {
		if now := boottime.Now(); now-last >= allowed/3 || last == 0 {
			if _, err := unix.Write(fd, beat); err == nil {
				last = now
			}
		}
	}
}

// A jobHolder runs the job for the candidate.
type jobHolder struct {
	handle *supervisor.Handle
	cfg    config.Config
	margin atomic.Int64
	// stopping says if the daemon was told to stop: the job may have ended for that before the term has.
	stopping func() bool
}

func (h *jobHolder) Leased(id int64, ttl time.Duration) { h.handle.Lease(id, ttl) }
func (h *jobHolder) Extended(d election.Deadlines)      { h.handle.Extend(d.StopAt, d.KillBy) }
func (h *jobHolder) grantedMargin() time.Duration       { return time.Duration(h.margin.Load()) }

func (h *jobHolder) Lead(ctx context.Context, t election.Term) error {
	h.margin.Store(int64(t.Timing.Margin))
	err := h.handle.Supervise(ctx, supervisor.Term{
		Key: t.Key, Token: t.Token, LeaseID: t.LeaseID, StopAt: t.Deadlines.StopAt, KillBy: t.Deadlines.KillBy, Lost: t.Lost,
	}, func(cause error) time.Duration {
		switch {
		case errors.Is(cause, errPlannedStop):
			return h.cfg.StopGrace.Duration
		case errors.Is(cause, election.ErrContactLost):
			return -1 // until kill-by
		}
		return 0
	})
	var resign *supervisor.ResignError
	switch {
	case errors.As(err, &resign):
		return &election.Backoff{For: resign.After}
	case err == nil && h.cfg.Restart == string(supervisor.RestartNever) && !h.stopping() && !h.handle.Snapshot().StartedAt.IsZero():
		return errLost
	}
	return err
}

// elector is the guard's child: etcd, HTTP, decisions.
//
//	config → candidate (etcd) → handle (the job, by way of the guard)
//	             └──────────────────┴→ server (what is true now)
//
// The candidate and the handle are one actor, since their order at the end matters: the candidate revokes its lease when the
// job is dead, and the handle listens until then.
func elector(args []string) int {
	// The guard alone hears what the user says; what reaches us directly is dropped.
	ossignal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGQUIT)
	cfg, log, lines, err := configure("run")
	if err != nil {
		return exitConfig
	}
	defer lines.Flush(flushTime)
	guardPid, err := strconv.Atoi(args[0])
	spawnerPid, err2 := strconv.Atoi(args[1])
	if errors.Join(err, err2) != nil {
		fmt.Fprint(os.Stderr, usageHint([]string{roleElector}))
		return exitUsage
	}
	cgroupDir := ""
	if len(args) > 2 {
		cgroupDir = args[2]
	}

	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	changed := make(chan struct{}, 1)
	registry := prometheus.NewRegistry()
	holder := &jobHolder{cfg: cfg, stopping: func() bool { return ctx.Err() != nil }}
	holder.margin.Store(int64(election.NewTiming(cfg.TTL.Duration, -1, cfg.Margin.Or(-1)).Margin))
	var candidate *election.Candidate
	handle, err := supervisor.Connect(supervisor.HandleConfig{
		In: 3, Out: 4, SpawnerSock: 5, SpawnerPidfd: 6, Guard: guardPid, Spawner: spawnerPid, CgroupDir: cgroupDir,
		TTL: cfg.TTL.Duration, Margin: holder.grantedMargin,
		Restart: supervisor.Restart(cfg.Restart), RestartLimit: cfg.RestartLimit.N,
		Signal:  func(unix.Signal) { cancel(errPlannedStop) },
		Turning: func() bool { return turning(candidate.Snapshot()) == nil },
		Changed: func() { signalChange(changed) },
		Logger:  log, Registerer: registry,
	})
	if err != nil {
		log.Error("connect to the guard", "err", err)
		return exitInternal
	}
	holder.handle = handle
	end := func() ending {
		candidate, err = newCandidate(cfg, log, registry, holder, changed, handle.Token)
		if err != nil {
			return ending{exitConfig, "set up the candidate: " + err.Error()}
		}
		snapshot := func() health.Snapshot {
			s := healthSnapshot(cfg, candidate.Snapshot())
			s.JobWanted, s.Job = true, healthJob(handle.Snapshot())
			return s
		}
		var g run.Group
		if err := addServer(&g, cfg, log, registry, snapshot); err != nil {
			return ending{exitOS, err.Error()}
		}
		guardGone, stop := make(chan struct{}), make(chan struct{})
		g.Add(func() error { return campaignWithJob(ctx, cancel, candidate, handle, guardGone) }, func(error) { cancel(errPlannedStop) })
		// The endpoint is given up before the lease is, which may take long: whoever is started in our place wants to listen.
		g.Add(func() error {
			select {
			case <-guardGone:
				return supervisor.ErrGuardGone
			case <-stop:
				return nil
			}
		}, func(error) { close(stop) })
		addStatus(&g, candidate, changed, handle.Status)
		handle.Ready()
		err := g.Run()
		if errors.Is(err, supervisor.ErrGuardGone) { // the last line is ours, then
			log.Error("exiting: "+err.Error(), "exit_code", exitInternal)
		}
		return endingOf(err)
	}()
	handle.Status(quote.Printable("exiting: " + end.text)) // the unit restarts nothing where the code is the job's own
	handle.Exit(end.code, end.text)
	return end.code
}

// campaignWithJob runs the candidate, and beside it the handle until the candidate is done. It closes guardGone if the guard is,
// once the job is dead.
func campaignWithJob(ctx context.Context, cancel context.CancelCauseFunc, candidate *election.Candidate, handle *supervisor.Handle,
	guardGone chan<- struct{},
) error {
	handleCtx, stop := context.WithCancel(context.Background())
	handleDone := make(chan error, 1)
	go func() {
		err := handle.Run(handleCtx)
		if err != nil {
			cancel(err)
		}
		if errors.Is(err, supervisor.ErrGuardGone) {
			close(guardGone)
		}
		handleDone <- err
	}()
	err := candidate.Run(ctx)
	stop()
	return errors.Join(<-handleDone, err)
}

// elect campaigns and reports, and runs no job.
func elect() (code int) {
	caught := catchSignals()
	cfg, log, lines, err := configure("elect")
	if err != nil {
		leaveMessage(terminationLog, err.Error(), false)
		return exitConfig
	}
	defer func() { lines.end(code) }()
	if err := hideMemory(); err != nil {
		log.Error("set dumpable", "err", err)
		return exitOS
	}
	go caught.relayHangUps(log)

	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	changed := make(chan struct{}, 1)
	registry := prometheus.NewRegistry()
	if loss := election.NewTiming(cfg.TTL.Duration, cfg.LossGrace.Or(-1), -1).LossGrace; cfg.StopGrace.Duration < loss {
		log.Warn("LEASEHOLD_STOP_GRACE is shorter than LEASEHOLD_LOSS_GRACE: after a planned stop whoever asks has less time to stop than after a loss",
			"stop_grace", cfg.StopGrace.String(), "loss_grace", loss.String())
	}
	holder := &leaseHolder{grace: cfg.StopGrace.Duration, hurry: make(chan struct{})}
	candidate, err := newCandidate(cfg, log, registry, holder, changed, nil)
	if err != nil {
		log.Error("set up the candidate", "err", err)
		return exitConfig
	}
	snapshot := func() health.Snapshot { return healthSnapshot(cfg, candidate.Snapshot()) }
	notify, told := newNotifier()
	defer told()
	turned := newWatchdog()

	var g run.Group
	if err := addServer(&g, cfg, log, registry, snapshot); err != nil {
		log.Error("exiting: "+err.Error(), "exit_code", exitOS)
		return exitOS
	}
	g.Add(func() error { return candidate.Run(ctx) }, func(error) { cancel(errPlannedStop) })
	addStatus(&g, candidate, changed, func(text string) { notify("STATUS=" + text) })
	stop := make(chan struct{})
	g.Add(func() error {
		watchdog := time.NewTicker(time.Second)
		defer watchdog.Stop()
		for received := 0; ; {
			select {
			case <-stop:
				return nil
			case <-watchdog.C:
				if turning(candidate.Snapshot()) == nil {
					turned()
				}
			case s := <-caught.signals:
				if s != unix.SIGTERM && s != unix.SIGINT {
					continue
				}
				if received++; received == 1 {
					notify(stopping(cfg))
					cancel(errPlannedStop)
				} else if received == 2 {
					close(holder.hurry)
				}
			}
		}
	}, func(error) { close(stop) })
	notify("READY=1")
	end := endingOf(g.Run())
	level := slog.LevelInfo
	if end.code != 0 {
		level = slog.LevelError
	}
	log.Log(context.Background(), level, "exiting: "+end.text, "exit_code", end.code)
	return end.code
}

// A leaseHolder holds the lease for those who ask this daemon if it leads, and gives them the time to stop that a job would have.
type leaseHolder struct {
	grace time.Duration
	hurry chan struct{} // closed at a second signal
	end   atomic.Int64  // kill-by, in time since boot
}

func (h *leaseHolder) Leased(int64, time.Duration)   {}
func (h *leaseHolder) Extended(d election.Deadlines) { h.end.Store(int64(d.KillBy)) }

func (h *leaseHolder) Lead(ctx context.Context, t election.Term) error {
	h.end.Store(max(h.end.Load(), int64(t.Deadlines.KillBy)))
	<-ctx.Done()
	var hold time.Duration
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errPlannedStop):
		hold = h.grace
	case errors.Is(cause, election.ErrContactLost), errors.Is(cause, election.ErrKeyOverwritten):
		// Nobody else can lead yet: not before the lease ends, or not before the key is removed, which is for us to do.
		hold = time.Duration(h.end.Load()) - boottime.Now()
	}
	timer := time.NewTimer(hold)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-h.hurry:
	case <-t.Lost:
	}
	return nil
}

// electionConfig is the part of the configuration that concerns etcd.
func electionConfig(cfg config.Config, log *slog.Logger) election.Config {
	c := election.Config{
		Endpoints: cfg.Endpoints, Election: cfg.Election, Identity: cfg.Identity,
		TTL: cfg.TTL.Duration, LossGrace: cfg.LossGrace.Or(-1), Margin: cfg.Margin.Or(-1), Wait: cfg.Wait.Or(-1),
		DialTimeout: cfg.DialTimeout.Duration,
		TLS:         election.TLS{CAFile: cfg.TLS.CAFile, CertFile: cfg.TLS.CertFile, KeyFile: cfg.TLS.KeyFile, ServerName: cfg.TLS.ServerName},
		Now:         boottime.Now,
		Logger:      log,
	}
	if cfg.Username != "" {
		c.Username, c.Password = cfg.Username, cfg.ReadPassword
	}
	return c
}

func newCandidate(cfg config.Config, log *slog.Logger, registry *prometheus.Registry, holder election.Callbacks, changed chan struct{},
	authenticated func(token string),
) (*election.Candidate, error) {
	c := electionConfig(cfg, log)
	c.Authenticated = authenticated
	c.Registerer, c.Callbacks, c.Changed = registry, holder, func() { signalChange(changed) }
	return election.New(c)
}

func signalChange(changed chan<- struct{}) {
	select {
	case changed <- struct{}{}:
	default:
	}
}

// addServer binds the health endpoint before anything runs, so that a port in use is told before any campaign.
func addServer(g *run.Group, cfg config.Config, log *slog.Logger, registry *prometheus.Registry, snapshot func() health.Snapshot) error {
	if cfg.Listen == "off" {
		return nil
	}
	listener, err := new(net.ListenConfig).Listen(context.Background(), "tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("LEASEHOLD_LISTEN: the health endpoint can't be bound, choose another address, or off: %w", err)
	}
	name, _, _ := net.SplitHostPort(cfg.Listen) // sound, or nothing could be bound
	server := health.New(health.Config{
		Logger: log, Registry: registry, Snapshot: snapshot, Now: boottime.Now, Version: build.Version, Name: name,
	})
	ctx, cancel := context.WithCancel(context.Background())
	g.Add(func() error { return server.Run(ctx, listener) }, func(error) { cancel() })
	return nil
}

// addStatus tells systemd at each change what the candidate does. It is one line, for a leader may have any name, and
// systemd takes each line for an order.
func addStatus(g *run.Group, candidate *election.Candidate, changed <-chan struct{}, tell func(text string)) {
	stop := make(chan struct{})
	g.Add(func() error {
		last := ""
		for {
			if text := quote.Printable(statusText(candidate.Snapshot())); text != last {
				tell(text)
				last = text
			}
			select {
			case <-changed:
			case <-stop:
				return nil
			}
		}
	}, func(error) { close(stop) })
}

func statusText(s election.Snapshot) string {
	switch {
	case s.State == election.Connecting:
		return "connecting to etcd: " + s.Reason
	case s.State == election.Standby && s.Leader != nil:
		return "standby, leader is " + s.Leader.Identity
	case s.State == election.Standby:
		return "standby, no leader is known"
	case s.State == election.Leading && s.Leader != nil:
		return fmt.Sprintf("leading, token %d", s.Leader.Token)
	}
	return string(s.State)
}

// turning says if the candidate's loops turn.
func turning(s election.Snapshot) error {
	// Zero: they have yet to begin.
	if idle := boottime.Now() - s.LastHeartbeat; s.LastHeartbeat != 0 && idle > 2*election.HeartbeatInterval {
		return fmt.Errorf("the election's loops have not turned for %s", idle.Round(time.Second))
	}
	return nil
}

// healthSnapshot says what the endpoint needs to know in the endpoint's words.
func healthSnapshot(cfg config.Config, c election.Snapshot) health.Snapshot {
	s := health.Snapshot{
		Election: cfg.Election, Identity: cfg.Identity,
		State: string(c.State), Reason: c.Reason, Since: c.Since,
		LeaseID: c.LeaseID, TTL: c.TTL, StopAt: c.Deadlines.StopAt, End: c.Deadlines.End,
		Leading: c.Leading, Live: turning(c),
		Job: health.Job{State: string(supervisor.JobNone)},
	}
	if c.Leader != nil {
		s.Leader = &health.Leader{Identity: c.Leader.Identity, Key: c.Leader.Key, Token: c.Leader.Token}
	}
	if c.Blocker != nil {
		s.Blocker = &health.Blocker{Key: c.Blocker.Key, Why: c.Blocker.Why, Remedy: c.Blocker.Remedy}
	}
	return s
}

func healthJob(j supervisor.Job) health.Job {
	h := health.Job{State: string(j.State), PID: j.PID, StartedAt: j.StartedAt, Restarts: j.Restarts}
	if j.LastExit != nil {
		h.LastExit = &health.Exit{Code: j.LastExit.Code, At: j.LastExit.At}
		if j.LastExit.Signal != 0 {
			h.LastExit.Signal = unix.SignalName(syscall.Signal(j.LastExit.Signal))
		}
	}
	return h
}

// An ending is why the daemon ends, and the code that says so to whoever started it.
type ending struct {
	code int
	text string
}

func endingOf(err error) ending {
	var ended *supervisor.ExitError
	switch {
	case err == nil:
		return ending{0, "planned stop"}
	case errors.As(err, &ended):
		return ending{ended.Code, "with the job's own code: " + ended.Error()}
	case errors.Is(err, election.ErrNotElected):
		return ending{exitNotElected, "not elected within LEASEHOLD_WAIT"}
	case errors.Is(err, errLost):
		return ending{exitLost, err.Error()}
	}
	return ending{exitInternal, err.Error()}
}

// hideMemory keeps this process's memory, which holds secrets, from other processes of its user. Guard and elector do it themselves.
func hideMemory() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }

// revoke gives a dead elector's lease back. Its arguments are the lease in hex and for how long to try. On its standard input it
// reads the token that etcd gave the elector, if any.
func revoke(args []string) int {
	_ = hideMemory() // without, the lease must be revoked all the same
	lease, err := strconv.ParseInt(args[0], 16, 64)
	within, err2 := time.ParseDuration(args[1])
	if errors.Join(err, err2) != nil {
		fmt.Fprint(os.Stderr, usageHint([]string{roleRevoke}))
		return exitUsage
	}
	// What does not concern etcd must not stand in the way.
	cfg, log, lines, err := configure("status")
	if err != nil {
		return exitConfig
	}
	defer lines.Flush(flushTime)
	token, err := io.ReadAll(os.Stdin)
	if err != nil {
		log.Warn("read the elector's token: etcd has to check the password instead", "err", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	ec := electionConfig(cfg, log)
	ec.AuthToken = string(token)
	if err := election.Revoke(ctx, ec, lease); err != nil {
		log.Warn("revoke the lease", "lease", args[0], "err", err)
		return exitUnavailable
	}
	return 0
}

// status prints the election as etcd has it.
func status(asJSON bool) int {
	cfg, log, lines, err := configure("status")
	if err != nil {
		return exitConfig
	}
	defer lines.Flush(flushTime)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	report, err := election.Query(ctx, electionConfig(cfg, log))
	if err != nil {
		fmt.Fprintf(os.Stderr, "etcd does not answer: %v\n", err)
		return exitUnavailable
	}
	if asJSON {
		err = json.NewEncoder(os.Stdout).Encode(reportJSON(cfg.Election, report))
	} else {
		_, err = io.WriteString(os.Stdout, reportText(cfg.Election, report))
	}
	if err != nil {
		return exitInternal
	}
	if report.Leader == nil {
		return 1
	}
	return 0
}

// check asks the local daemon, for exec probes and images without curl.
func check(args []string) int {
	cfg, _, lines, err := configure("check")
	if err != nil {
		return exitConfig
	}
	defer lines.Flush(flushTime)
	what := health.Checks()[0]
	if len(args) == 1 {
		what = args[0]
	}
	return health.Check(context.Background(), cfg.Listen, what, os.Stdout)
}
