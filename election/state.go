package election

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"leasehold/control"
	"leasehold/internal/quote"
)

// machine is the candidate's state machine, and all that Snapshot shows. Each event is a method.
// transition is the only way into a state.
//
//	    ┌────────────────── campaigningAgain, connecting ──────────────────────┐
//	    v                                                                      │
//	Connecting ── queued ──> Standby ── elected ──> Leading ── termEnded ──> Stopping
//	    ^                       │                      │                       ^
//	    └─ connecting, entryLost┘                      └──── leadReturned ─────┘
//
//	                  suspended
//	         Leading <─────────> Suspended ── termEnded, leadReturned ──> Stopping
//	                  renewed
//
// adopted leads from Connecting to Leading. runEnded leads to Stopping from everywhere but Leading:
// Lead returns first. A candidate whose lease could not be renewed is Connecting while its key is
// still in the queue, and may be elected from there; one that has won too late campaigns again from
// Standby.
type machine struct {
	log     *slog.Logger
	metrics *metrics
	now     func() time.Duration
	changed func() // called after each change, without the lock; may be nil

	logging sync.Mutex // held while lines are written, so that they stay in order

	mu          sync.Mutex
	lines       []func() // what is to be logged without the lock: a log may block
	snapshot    Snapshot
	term        *term // from before Lead is called until it has returned
	unpublished bool
}

// term is a term in which Lead is called.
type term struct {
	end         context.CancelCauseFunc
	over        bool // end was called
	contactLost bool // stop-at has passed
	lost        chan struct{}
	gone        bool // lost is closed
}

func newMachine(cfg Config) *machine {
	return &machine{
		log: cfg.Logger, now: cfg.Now, changed: cfg.Changed,
		snapshot: Snapshot{State: Connecting, Reason: "not started", Since: time.Now()},
	}
}

// change is a transition.
type change struct {
	to     State
	reason string
	loss   string // an unplanned loss of leadership, as lossReasons has it; else ""
	warn   string // a message in place of "state changed", at level WARN, also in the same state
	attrs  []any
	// adopted: the term is not a new one.
	adopted bool
}

// transition enters a state. Nothing else logs, counts or publishes that. Its caller, an event,
// holds m.mu and has checked the state.
func (m *machine) transition(c change) {
	from, before := m.snapshot.State, m.snapshot.Reason
	isNew := from != c.to
	m.unpublished = m.unpublished || isNew || before != c.reason
	m.snapshot.State, m.snapshot.Reason = c.to, c.reason
	if isNew {
		m.snapshot.Since = time.Now()
	}
	if isNew && c.to == Leading && from != Suspended && !c.adopted {
		m.metrics.terms.Inc()
	}
	if !isNew && c.warn == "" {
		return
	}
	level, message := slog.LevelInfo, "state changed"
	if c.loss != "" {
		m.metrics.losses.WithLabelValues(c.loss).Inc()
		c.warn = "leadership lost"
	}
	if c.warn != "" {
		level, message = slog.LevelWarn, c.warn
	}
	attrs := append([]any{"from", from, "to", c.to}, c.attrs...)
	if c.reason != "" {
		attrs = append(attrs, "reason", c.reason)
	}
	m.say(level, message, attrs...)
}

// say has a line logged when the event has ended. The caller holds m.mu.
func (m *machine) say(level slog.Level, message string, attrs ...any) {
	m.lines = append(m.lines, func() {
		m.log.Log(context.Background(), level, message, attrs...)
	})
}

// flush logs the lines that there are by now.
func (m *machine) flush() {
	m.logging.Lock()
	defer m.logging.Unlock()
	m.mu.Lock()
	lines := m.lines
	m.lines = nil
	m.mu.Unlock()
	for _, write := range lines {
		write()
	}
}

// impossible panics because of an event that the state does not allow, which is an internal error.
// The elector exits, and the guard kills the job.
func (m *machine) impossible(event string) {
	panic(fmt.Sprintf("election: %s in state %q", event, m.snapshot.State))
}

// unlock ends an event. It logs the event's lines and publishes what the event has changed.
func (m *machine) unlock() {
	publish, logs := m.unpublished, len(m.lines) > 0
	m.unpublished = false
	m.mu.Unlock()
	if logs {
		m.flush()
	}
	if publish {
		m.publish()
	}
}

func (m *machine) publish() {
	if m.changed != nil {
		m.changed()
	}
}

// get returns the snapshot, without the heartbeats.
func (m *machine) get() Snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.snapshot
}

// connecting: the candidate is not in the election, for this reason.
func (m *machine) connecting(reason string) {
	m.mu.Lock()
	defer m.unlock()
	switch m.snapshot.State {
	case Connecting, Standby, Stopping:
		m.transition(change{to: Connecting, reason: reason})
	default:
		m.impossible("connecting")
	}
}

// campaigningAgain: a session begins. The reason why the last one ended stays.
func (m *machine) campaigningAgain() {
	m.mu.Lock()
	defer m.unlock()
	switch m.snapshot.State {
	case Connecting:
	case Standby, Stopping:
		m.transition(change{to: Connecting, reason: "campaigning again"})
	default:
		m.impossible("campaigning again")
	}
}

// queued: the candidate's key is in the queue.
func (m *machine) queued() {
	m.mu.Lock()
	defer m.unlock()
	switch m.snapshot.State {
	case Connecting, Standby:
		m.transition(change{to: Standby})
	default:
		m.impossible("queued")
	}
}

// entryLost: the key or the lease is gone before the candidate was elected.
func (m *machine) entryLost(cause error) {
	m.mu.Lock()
	defer m.unlock()
	switch m.snapshot.State {
	case Connecting, Standby:
		m.transition(change{
			to: Connecting, reason: cause.Error(),
			warn: "queue entry lost, campaigning again with a new lease",
		})
	default:
		m.impossible("queue entry lost")
	}
}

// elected: the candidate has won. It returns false, and does nothing, if stop-at has passed.
func (m *machine) elected(t *term, self Entry) (Deadlines, bool) {
	m.mu.Lock()
	defer m.unlock()
	deadlines := m.snapshot.Deadlines
	if m.now() >= deadlines.StopAt {
		return deadlines, false
	}
	switch m.snapshot.State {
	case Connecting, Standby:
		m.term = t
		m.snapshot.Leading, m.snapshot.Leader, m.snapshot.Blocker = true, &self, nil
		m.transition(change{to: Leading, attrs: []any{
			"token", self.Token,
			"lease", fmt.Sprintf("%x", m.snapshot.LeaseID), "ttl", m.snapshot.TTL.String(),
		}})
	default:
		m.impossible("elected")
	}
	return deadlines, true
}

// adopted: the term of a process before this one goes on.
func (m *machine) adopted(t *term, self Entry) {
	m.mu.Lock()
	defer m.unlock()
	switch m.snapshot.State {
	case Connecting:
		m.term = t
		m.snapshot.Leading, m.snapshot.Leader = true, &self
		m.transition(change{to: Leading, adopted: true, attrs: []any{
			"token", self.Token, "adopted", true,
			"lease", fmt.Sprintf("%x", m.snapshot.LeaseID), "ttl", m.snapshot.TTL.String(),
		}})
	default:
		m.impossible("adopted")
	}
}

// suspended: stop-at has passed, and the leader's work is frozen. It returns false, and does
// nothing, if no term runs, or if the term is over.
func (m *machine) suspended() bool {
	m.mu.Lock()
	defer m.unlock()
	if m.term == nil || m.term.over {
		return false
	}
	switch m.snapshot.State {
	case Leading:
		m.transition(change{
			to: Suspended, reason: ErrContactLost.Error(),
			warn: "term suspended: it goes on if etcd renews the lease",
		})
	case Suspended: // also the lease that was taken over finds that out
	default:
		m.impossible("suspended")
	}
	return true
}

// termEnded: the term is over for this cause, if one runs. The first cause counts. But Lead also
// learns later that the lease or the key is lost.
func (m *machine) termEnded(cause error) {
	m.mu.Lock()
	defer m.unlock()
	t := m.term
	if t == nil {
		return
	}
	if errors.Is(cause, ErrContactLost) || m.snapshot.State == Suspended {
		t.contactLost = true
	}
	first := !t.over
	if first {
		t.over = true
		m.snapshot.Leading = false
		t.end(cause) // before anything that takes time
	}
	if !t.gone && (errors.Is(cause, ErrLeaseLost) || errors.Is(cause, ErrKeyDeleted)) {
		t.gone = true
		close(t.lost)
	}
	switch m.snapshot.State {
	case Leading, Suspended:
		m.transition(change{to: Stopping, reason: cause.Error(), loss: lossReasons[cause]})
	case Stopping:
	default:
		m.impossible("term ended")
	}
}

// leadReturned: Lead has returned, because the term ended for this cause, or by itself (nil).
func (m *machine) leadReturned(cause error) {
	m.mu.Lock()
	defer m.unlock()
	m.term, m.snapshot.Leading = nil, false
	reason := ""
	if cause != nil {
		reason = cause.Error()
	}
	switch m.snapshot.State {
	case Leading, Suspended, Stopping:
		m.transition(change{to: Stopping, reason: reason})
	default:
		m.impossible("lead returned")
	}
}

// runEnded: the context of Run has ended, and the lease is revoked, or is left to expire.
func (m *machine) runEnded() {
	m.mu.Lock()
	defer m.unlock()
	switch m.snapshot.State {
	case Connecting, Standby, Stopping:
		m.transition(change{to: Stopping})
	default:
		m.impossible("run ended")
	}
}

// The methods that follow change what we know, but not the state.

// leased publishes the lease; all zero: there is none, and nothing is known of the queue.
func (m *machine) leased(id int64, ttl time.Duration, d Deadlines) {
	m.mu.Lock()
	defer m.unlock()
	m.unpublished = true
	m.snapshot.LeaseID, m.snapshot.TTL, m.snapshot.Deadlines = id, ttl, d
	if id == 0 {
		m.snapshot.Leader, m.snapshot.Blocker = nil, nil
	}
}

// renewed keeps the new deadlines, for the caller to publish. It reports whether they extend a
// term. They don't if stop-at has ended it. A term that is suspended goes on, unless the new
// deadlines have passed, too.
func (m *machine) renewed(d Deadlines) (extends bool) {
	m.mu.Lock()
	defer m.unlock()
	m.snapshot.Deadlines = d
	if m.term == nil || m.term.contactLost || m.term.gone {
		return false
	}
	if m.snapshot.State == Suspended {
		if m.now() >= d.StopAt {
			return false
		}
		m.transition(change{to: Leading, attrs: []any{"token", m.snapshot.Leader.Token}})
	}
	return true
}

// queueChanged publishes who leads, and what keeps the candidate waiting.
func (m *machine) queueChanged(leader *Entry, blocker *Blocker) {
	m.mu.Lock()
	defer m.unlock()
	if m.snapshot.Leading {
		// We lead: that was verified, and the watch may lag behind.
		leader, blocker = m.snapshot.Leader, nil
	}
	newLeader := !same(m.snapshot.Leader, leader)
	m.unpublished = newLeader || !same(m.snapshot.Blocker, blocker)
	m.snapshot.Leader, m.snapshot.Blocker = leader, blocker
	if newLeader && leader != nil {
		m.say(slog.LevelInfo, "leader changed",
			"leader", quote.Printable(leader.Identity), "token", leader.Token)
	}
}

// held publishes the hold, or why it can't be read.
func (m *machine) held(hold *control.Hold, unreadable string) {
	m.mu.Lock()
	defer m.unlock()
	s := &m.snapshot
	if s.Hold == hold && s.ControlProblem == unreadable {
		return
	}
	m.unpublished = true
	switch {
	case hold != nil && !same(s.Hold, hold):
		m.say(slog.LevelInfo, "election held: nobody new becomes leader",
			"by", quote.Printable(hold.By), "since", hold.Since,
			"reason", quote.Printable(hold.Reason), "stop", hold.Stop)
	case hold == nil && s.Hold != nil && unreadable == "":
		m.say(slog.LevelInfo, "hold released")
	}
	if unreadable != "" && unreadable != s.ControlProblem {
		m.say(slog.LevelWarn, "no hold is obeyed and no switchover served, the election goes on",
			"reason", unreadable)
	}
	s.Hold, s.ControlProblem = hold, unreadable
}

// same compares what the pointers point to.
func same[T comparable](a, b *T) bool { return a == b || a != nil && b != nil && *a == *b }
