//go:build linux

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"leasehold/internal/boottime"
	"leasehold/supervisor/check"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// HealthConfig says how the health of the job is known. The zero value: the job is ready and
// healthy while it runs.
type HealthConfig struct {
	Check       check.Probe   // nil: there is none
	Interval    time.Duration // from the end of a check to the next one
	Retries     int           // failures in a row that make a ready job unhealthy
	StartPeriod time.Duration // the job needs to become ready, besides Retries intervals
	Notify      bool          // the job is not ready before it has sent READY=1
	Watchdog    time.Duration // the longest time between two WATCHDOG=1 of a ready job; 0: any
}

func (c *HealthConfig) isNeeded() bool { return c.Check != nil || c.Notify || c.Watchdog > 0 }

// Health is what is known of the job's health.
type Health string

// The states of the job's health. Without a check there is none.
const (
	HealthUnknown  Health = ""
	HealthStarting Health = "starting" // not ready yet
	HealthGood     Health = "healthy"
	HealthBad      Health = "unhealthy" // it is being stopped, or was, because of that
)

// UnhealthyError means that the job is unhealthy. A run that it ends counts as one that the job has
// ended by itself with an error.
type UnhealthyError struct{ Why string }

func (e *UnhealthyError) Error() string { return "job unhealthy: " + e.Why }

// startingInterval is the longest time between two checks while the job is not ready: it should
// count as ready soon after it is.
const startingInterval = time.Second

// monitor watches the health of one run of the job, from when it runs until the run ends.
//
// It says nothing while the job is frozen, and begins anew when it is thawed: a check that has
// waited for a frozen job proves nothing. Past stop-at the job may be being frozen.
type monitor struct {
	s         *Supervisor
	cfg       HealthConfig
	unhealthy chan *UnhealthyError // room for one: why the job has to be stopped
	changed   chan struct{}        // room for one: the job has changed

	readyBy  time.Time // when the job has to be ready
	next     time.Time // when the next check is due
	failures int       // in a row
	last     error     // of the last check that failed
	freezes  int       // of the job, as last seen
	runs     bool      // the job runs, as last seen
	pausedAt time.Time // when it was last seen not to run
	fedSince time.Time // since when the watchdog counts; zero: it does not
	missedAt time.Time // when it was first seen that the job has missed it; zero: it has not
}

// startMonitor starts a monitor for the run that begins. The channel is nil if there is nothing to
// monitor. stop does not wait: a check may hang in the kernel, and what follows must not.
func (s *Supervisor) startMonitor() (unhealthy <-chan *UnhealthyError, stop func()) {
	if !s.cfg.Health.isNeeded() {
		return nil, func() {}
	}
	m := &monitor{
		s: s, cfg: s.cfg.Health, unhealthy: make(chan *UnhealthyError, 1),
		changed: make(chan struct{}, 1),
	}
	s.mu.Lock()
	s.jobChanged = m.changed
	s.mu.Unlock()
	ctx, stop := context.WithCancel(context.Background())
	s.monitors.Go(func() { m.run(ctx) })
	return m.unhealthy, stop
}

// run monitors until ctx ends, or until the job is unhealthy.
func (m *monitor) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var checking checking
	defer checking.stop()
	for ctx.Err() == nil {
		runs, changed := m.look()
		if changed {
			checking.stop()
		}
		if why := m.overdue(runs, checking.result != nil); why != nil {
			m.unhealthy <- why
			return
		}
		if runs && m.cfg.Check != nil && checking.result == nil && !time.Now().Before(m.next) {
			checking.start(ctx, m.s, m.cfg.Check)
		}
		timer.Reset(m.untilNext(runs, checking.result != nil))
		select {
		case <-ctx.Done():
		case <-m.changed:
		case <-timer.C:
		case err := <-checking.result:
			stopped := checking.stopped
			checking.stop()
			checking.result = nil
			if runs, changed := m.look(); !runs || changed || stopped || ctx.Err() != nil {
				continue // it was frozen meanwhile
			}
			if why := m.checked(err); why != nil {
				m.unhealthy <- why
				return
			}
		}
	}
}

// checking is a check that runs.
type checking struct {
	result  chan error // nil: none runs
	cancel  context.CancelFunc
	stopped bool // its result means nothing
}

func (c *checking) start(ctx context.Context, s *Supervisor, probe check.Probe) {
	c.stopped = false
	ctx, c.cancel = context.WithCancel(ctx)
	result := make(chan error, 1)
	c.result = result
	s.monitors.Go(func() { result <- probe(ctx) }) // it ends soon after its context
}

func (c *checking) stop() {
	if c.cancel != nil {
		c.cancel()
	}
	c.stopped = true
}

// look sees whether the job runs, and whether that has changed since, for a moment at least.
func (m *monitor) look() (runs, changed bool) {
	freezes, runs := m.s.judged()
	now := time.Now()
	changed = runs != m.runs || freezes != m.freezes
	if changed && runs {
		switch {
		case m.readyBy.IsZero():
			m.readyBy = now.Add(m.startPeriodLeft() + time.Duration(m.cfg.Retries)*m.cfg.Interval)
		case !m.pausedAt.IsZero():
			m.readyBy = m.readyBy.Add(now.Sub(m.pausedAt))
		}
		m.next, m.failures, m.fedSince = now, 0, time.Time{}
	}
	if !runs && m.pausedAt.IsZero() {
		m.pausedAt = now
	} else if runs {
		m.pausedAt = time.Time{}
	}
	m.runs, m.freezes = runs, freezes
	return runs, changed
}

// startPeriodLeft is what is left of the start period. It goes on if another elector takes over.
func (m *monitor) startPeriodLeft() time.Duration {
	return max(0, m.cfg.StartPeriod-time.Since(m.s.Snapshot().StartedAt))
}

// untilNext is the time until run has something to do.
func (m *monitor) untilNext(runs, checking bool) time.Duration {
	wait := time.Hour
	if !runs { // changed comes
		return wait
	}
	if !checking && m.cfg.Check != nil {
		wait = min(wait, time.Until(m.next))
	}
	if !checking && m.s.health() == HealthStarting {
		wait = min(wait, time.Until(m.readyBy))
	}
	switch {
	case !m.missedAt.IsZero():
		wait = min(wait, time.Until(m.missedAt.Add(missedTwice)))
	case !m.fedSince.IsZero():
		wait = min(wait, time.Until(m.fedSince.Add(m.cfg.Watchdog)))
	}
	return max(wait, 0)
}

// missedTwice is the time between two looks at a watchdog that was missed. The first look may come
// after a pause of our own: what the job has sent meanwhile is read before the second.
const missedTwice = 200 * time.Millisecond

// watchdogMissed returns why the job is unhealthy, if it does not send what the watchdog expects.
func (m *monitor) watchdogMissed() *UnhealthyError {
	state, fedAt, asks := m.s.watchdog()
	now := time.Now()
	switch {
	case asks:
		return &UnhealthyError{"it has sent WATCHDOG=trigger"}
	case m.cfg.Watchdog <= 0 || state != HealthGood:
		return nil
	case m.fedSince.IsZero():
		m.fedSince, m.missedAt = now, time.Time{}
	case fedAt.After(m.fedSince):
		m.fedSince, m.missedAt = fedAt, time.Time{}
	}
	switch {
	case now.Before(m.fedSince.Add(m.cfg.Watchdog)):
	case m.missedAt.IsZero():
		m.missedAt = now
	case now.Sub(m.missedAt) >= missedTwice:
		return &UnhealthyError{fmt.Sprintf("no WATCHDOG=1 within %v", m.cfg.Watchdog)}
	}
	return nil
}

// overdue returns why the job is unhealthy, if it is not ready in time, or misses the watchdog.
// A check that is under way decides: it may pass.
func (m *monitor) overdue(runs, checking bool) *UnhealthyError {
	if runs {
		if why := m.watchdogMissed(); why != nil {
			return why
		}
	}
	if !runs || checking || m.s.health() != HealthStarting || time.Now().Before(m.readyBy) {
		return nil
	}
	why := fmt.Sprintf("not ready within %v", m.cfg.StartPeriod+
		time.Duration(m.cfg.Retries)*m.cfg.Interval)
	switch {
	case m.cfg.Check != nil && !m.s.hasPassed() && m.last != nil:
		why += ": " + m.last.Error()
	case m.cfg.Notify:
		why += ": it has not sent READY=1"
	}
	return &UnhealthyError{why}
}

// checked takes the result of a check. It returns why the job is unhealthy, if it is.
func (m *monitor) checked(err error) *UnhealthyError {
	now := time.Now()
	m.next = now.Add(m.cfg.Interval)
	if errors.Is(err, check.ErrNoResult) {
		m.s.log.Warn("health can't be checked: it counts as unchanged", "reason", err.Error())
		if m.readyBy.Before(m.next) {
			m.readyBy = m.next
		}
		return nil
	}
	if err == nil {
		if m.failures > 0 {
			m.s.log.Info("health check passes again", "failures", m.failures)
		}
		m.failures = 0
		m.s.checkPassed()
		return nil
	}
	m.last = err
	if !m.s.hasPassed() {
		m.next = now.Add(min(m.cfg.Interval, startingInterval))
		m.s.log.Debug("health check failed: the job is not ready", "reason", err.Error())
		return nil
	}
	m.failures++
	m.s.log.Warn("health check failed", "reason", err.Error(),
		"failures", m.failures, "retries", m.cfg.Retries)
	if m.failures >= m.cfg.Retries {
		return &UnhealthyError{err.Error()}
	}
	return nil
}

// What follows is the part of the job's state that is about its health. The mutex of the Supervisor
// guards it.

// jobHealth is the health of a run.
type jobHealth struct {
	state    Health
	passed   bool          // a check has passed
	notified bool          // the job has sent READY=1
	asks     bool          // it has sent WATCHDOG=trigger
	fedAt    time.Time     // when it last sent READY=1 or WATCHDOG=1
	wellAt   time.Duration // when the job last was well, since boot; 0: never
	freezes  int           // of the job
}

// judged reports whether the job runs, so that it can be asked for its health, and how often it was
// frozen.
func (s *Supervisor) judged() (freezes int, runs bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	return j.health.freezes, j.shown.State == JobRunning &&
		(!s.cfg.Freeze || boottime.Now() < j.term.StopAt)
}

func (s *Supervisor) health() Health {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.job.health.state
}

func (s *Supervisor) hasPassed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.job.health.passed
}

func (s *Supervisor) watchdog() (state Health, fedAt time.Time, asks bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &s.job.health
	return h.state, h.fedAt, h.asks
}

// checkPassed: a health check has passed.
func (s *Supervisor) checkPassed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &s.job.health
	if s.job.shown.State == JobRunning && !h.passed {
		h.passed = true
		s.readyChanged()
	}
	if h.state == HealthGood {
		h.wellAt = boottime.Now()
	}
}

// readyChanged: one thing more is known that makes the job ready. The next elector has to know it,
// too. The mutex is held.
func (s *Supervisor) readyChanged() {
	h := &s.job.health
	s.send(ipc.JobReady{Passed: h.passed, Notified: h.notified})
	if h.state == HealthStarting && s.isReady() {
		h.state, h.wellAt = HealthGood, boottime.Now()
		var attrs []any
		if s.job.shown.State == JobRunning {
			attrs = []any{
				"elapsed",
				time.Since(s.job.shown.StartedAt).Round(time.Millisecond).String(),
			}
		}
		s.log.Info("job is ready", attrs...)
	}
	s.showHealth()
}

// isReady reports whether all is known that makes the job ready. The mutex is held.
func (s *Supervisor) isReady() bool {
	h := &s.job.health
	return (s.cfg.Health.Check == nil || h.passed) && (!s.cfg.Health.Notify || h.notified)
}

// healthBegins: a run begins, or is taken over, and this is known of it. The mutex is held.
func (s *Supervisor) healthBegins(known ipc.JobReady) {
	h := &s.job.health
	*h = jobHealth{passed: known.Passed, notified: known.Notified, freezes: h.freezes}
	if s.cfg.Health.isNeeded() {
		if h.state = HealthStarting; s.isReady() {
			h.state, h.wellAt = HealthGood, boottime.Now()
		}
	}
	s.showHealth()
}

// showHealth publishes the health of the job. The mutex is held.
func (s *Supervisor) showHealth() {
	j := &s.job
	h := &j.health
	j.shown.Health = HealthUnknown
	if j.alive() || h.state == HealthBad && j.shown.State == JobBackoff {
		j.shown.Health = h.state
	}
	healthy := 0.0
	if j.shown.State == JobRunning && (h.state == HealthUnknown || h.state == HealthGood) {
		healthy = 1
	}
	s.metrics.healthy.Set(healthy)
	s.wakeMonitor()
	s.cfg.Changed()
}

// wakeMonitor has the monitor look at the job again. The mutex is held.
func (s *Supervisor) wakeMonitor() {
	select {
	case s.jobChanged <- struct{}{}:
	default:
	}
}

// unhealthy: the job is to be stopped for this reason, unless it is ending already: it may just
// have exited with 0.
func (s *Supervisor) unhealthy(why *UnhealthyError) (stop bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	if j.ordered || j.shown.State != JobRunning || j.pidfd >= 0 && proctree.PidfdExited(j.pidfd) {
		return false
	}
	j.health.state, j.unhealthy = HealthBad, why
	s.log.Warn("job is unhealthy: stopping it", "reason", why.Why)
	s.showHealth()
	return true
}

// ended is how a run has ended for the restart policy, and how long it ran. A job that was
// unhealthy has failed, whatever its exit code, and ran for as long as it was well.
func (run outcome) ended(began, end time.Duration) (exit ExitError, ran time.Duration) {
	exit = run.exit
	if run.unhealthy == nil {
		return exit, end - began
	}
	exit.Unhealthy = run.unhealthy.Why
	if exit.Code == 0 {
		exit.Code = 1
	}
	return exit, max(0, run.wellAt-began)
}
