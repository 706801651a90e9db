//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/harness"
)

const (
	settle  = 250 * time.Millisecond // from the standby's coming to the fault
	observe = 3 * time.Second        // for how long two jobs are watched living at once
	calm    = 2 * time.Second        // for how long a job is watched that must not move, when the fault is over
)

// A Trial lets one fault befall one pair of candidates: a leader with its job,
// and a standby.
type Trial struct {
	*Stage
	Row      *Row
	Of       entrant
	Index    int // which of the entrant's trials in this row it is, from 0
	Election string
	Witness  *harness.Witness
	Leader   *Contestant
	Standby  *Contestant

	// Of the leader, from before Prepare on.
	Key   string
	Lease clientv3.LeaseID
	Job   harness.Life // its job's first process

	// At is when the fault began.
	At time.Duration
	// Killed, where it is set, is when the old job could run no instruction any
	// more, though its connection closed later.
	Killed time.Duration
	// Notes are what a row's own functions tell each other.
	Notes map[string]any

	contestants []*Contestant
	frozen      []frozen
	cleanups    []func()
	sample      Sample
	taken       bool // Read has been called
}

// frozen is a time in which a candidate's job could not run.
type frozen struct {
	candidate string
	from, to  time.Duration
}

// Begin says that the fault begins now.
func (t *Trial) Begin() { t.At = harness.Now() }

// Figure reports a time that is the row's own.
func (t *Trial) Figure(name string, d time.Duration) {
	if t.sample.Figures == nil {
		t.sample.Figures = map[string]float64{}
	}
	t.sample.Figures[name] = harness.Milliseconds(d)
}

// cleanup has f called at the trial's end, before anything else is ended.
func (t *Trial) cleanup(f func()) { t.cleanups = append(t.cleanups, f) }

// Frozen says that the job of a candidate could not run in that time. It need
// not be over: to is 0 then.
func (t *Trial) Frozen(c *Contestant, from, to time.Duration) {
	t.frozen = append(t.frozen, frozen{c.Identity, from, to})
}

// violated notes what leasehold promises and did not keep.
func (t *Trial) violated(format string, args ...any) {
	t.sample.Violations = append(t.sample.Violations, fmt.Sprintf(format, args...))
}

var elections atomic.Int64 // keeps their names apart

// trial makes one trial and ends everything that belongs to it.
func (s *Stage) trial(ctx context.Context, row *Row, of entrant, index int) (sample Sample) {
	t := &Trial{
		Stage: s, Row: row, Of: of, Index: index, Election: fmt.Sprintf("%s%d", prefix, elections.Add(1)), Notes: map[string]any{},
		sample: Sample{Row: row.Name, Candidate: of.Title, TTL: row.ttl().Seconds()},
	}
	err := t.run(ctx)
	if err != nil {
		t.sample.Failure = err.Error()
	}
	// Whether or not it was interrupted, what was started is ended.
	t.end(context.WithoutCancel(ctx), err == nil && ctx.Err() == nil)
	if len(t.sample.Violations) > 0 || t.sample.Failure != "" {
		t.sample.evidence = t.evidence()
	}
	if t.Witness != nil {
		t.Witness.Close()
	}
	return t.sample
}

// run brings the pair up, strikes, and reads what follows off the witness.
func (t *Trial) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 4*patience+t.Row.Lasts, errors.New("the trial came to no end"))
	defer cancel()
	if err := t.ready(ctx); err != nil {
		return fmt.Errorf("bring up a leader and a standby: %w", err)
	}
	if t.Row.Prepare != nil {
		if err := t.Row.Prepare(ctx, t); err != nil {
			return fmt.Errorf("prepare the fault: %w", err)
		}
	}
	if t.moved() {
		return errors.New("the job was moved before the fault")
	}
	t.Begin()
	if err := t.Row.Strike(ctx, t); err != nil {
		return fmt.Errorf("strike: %w", err)
	}
	if t.Row.Lasts > 0 {
		if err := harness.Wait(ctx, t.Row.Lasts); err != nil {
			return err
		}
	}
	if t.Row.Heal != nil {
		if err := t.Row.Heal(ctx, t); err != nil {
			return fmt.Errorf("heal: %w", err)
		}
	}
	if err := t.outcome(ctx); err != nil {
		return err
	}
	if t.Row.After != nil {
		if err := t.Row.After(ctx, t); err != nil {
			return fmt.Errorf("look at the outcome: %w", err)
		}
	}
	t.Read()
	if t.Of.ours() && t.Row.Untouched && !t.moved() {
		t.handOver(ctx)
	}
	return ctx.Err()
}

// handOver tries whether a planned stop still does what it should: what a fault
// did to the queue or to the standby would show now.
func (t *Trial) handOver(ctx context.Context) {
	at := harness.Now()
	err := t.Of.Stop(t.Leader.Candidate)
	if err == nil {
		err = within(ctx, t.Row.ttl()/2, "no next job", func(ctx context.Context) error {
			return t.Witness.Wait(ctx, func([]harness.Life) bool { return t.next() != nil })
		})
	}
	if err != nil {
		t.violated("planned hand-over afterwards: %v", err)
		return
	}
	t.Figure("hand-over afterwards", t.next().Started-at)
}

// ready brings up the pair and waits until all is quiet.
func (t *Trial) ready(ctx context.Context) (err error) {
	if t.Witness, err = harness.NewWitness(); err != nil {
		return err
	}
	if t.Leader, err = t.start("a", t.Row.Job); err != nil {
		return err
	}
	err = within(ctx, patience, "no job", func(ctx context.Context) error {
		t.Job, err = t.Witness.WaitForJob(ctx, func(l harness.Life) bool { return l.Candidate == t.Leader.Identity })
		return err
	})
	if err != nil {
		return err
	}
	if t.Standby, err = t.start("b", nil); err != nil {
		return err
	}
	if t.Key, t.Lease, err = t.queue(ctx, t.Election, 2); err != nil {
		return err
	}
	if t.Of.ours() {
		if err := t.Standby.WaitStatus(ctx, "/standby", http.StatusOK); err != nil {
			return err
		}
	}
	quiet := settle
	if !t.Row.alone(t.Of) { // what follows may depend on how long ago the lease was renewed
		quiet += rand.N(t.Row.ttl() / 4)
	}
	return harness.Wait(ctx, quiet)
}

// outcome waits until it is clear what came of the fault.
func (t *Trial) outcome(ctx context.Context) error {
	if t.Row.Untouched || t.Row.Either {
		if err := t.calm(ctx); err != nil {
			return err
		}
		if !t.moved() {
			return nil
		}
	}
	// A job that does not come back is an outcome, and not a trial without one.
	err := within(ctx, t.patience(), "no next job", func(ctx context.Context) error {
		return t.Witness.Wait(ctx, func([]harness.Life) bool { return t.next() != nil })
	})
	if err != nil {
		return context.Cause(ctx)
	}
	_ = within(ctx, observe, "the old job lives on", func(ctx context.Context) error {
		_, err := t.Witness.WaitForDead(ctx, t.Job)
		return err
	})
	return context.Cause(ctx)
}

// patience is for how long a next job is awaited.
func (t *Trial) patience() time.Duration {
	if t.Of.ours() {
		return t.Row.ttl() + patience
	}
	return t.Row.ttl() + patience/2
}

// calm waits until the leader renews its lease again, or else can't any more.
func (t *Trial) calm(ctx context.Context) error {
	const good = `leasehold_lease_renewals_total{result="ok"}`
	if err := harness.Wait(ctx, calm); err != nil || !t.Of.ours() {
		return err
	}
	before := -1.0
	err := within(ctx, t.Row.ttl(), "no renewals", func(ctx context.Context) error {
		return harness.Until(ctx, func() error {
			if t.moved() {
				return nil
			}
			now, err := t.Leader.Metric(ctx, good)
			if err != nil {
				return err
			}
			if before < 0 {
				before = now
			}
			if now < before+2 {
				return fmt.Errorf("%v good renewals after the fault, want 2", now-before)
			}
			return nil
		})
	})
	if err != nil && ctx.Err() == nil {
		t.violated("%v", err)
	}
	return ctx.Err()
}

// moved tells if the old job has ended, or any other begun.
func (t *Trial) moved() bool {
	for _, l := range t.Witness.Lives() {
		if l.Role == "job" && (!l.Alive() || l.Pid != t.Job.Pid) {
			return true
		}
	}
	return false
}

// dead is when the last process of the old job ended, or 0.
func (t *Trial) dead() time.Duration {
	for _, term := range t.Witness.Terms() {
		if term.Token == t.Job.Token && term.Candidate == t.Job.Candidate {
			return term.End
		}
	}
	return 0
}

// next is the first process of the next term's job, once there is one.
func (t *Trial) next() *harness.Life {
	for _, l := range t.Witness.Lives() {
		if l.Role == "job" && l.Started > t.At && (l.Token != t.Job.Token || l.Candidate != t.Job.Candidate) {
			return &l
		}
	}
	return nil
}

// within calls f with a deadline of its own.
func within(ctx context.Context, d time.Duration, otherwise string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d, fmt.Errorf("%s within %v", otherwise, d))
	defer cancel()
	return f(ctx)
}

// Read takes the sample's figures from the lives that the witness has seen so
// far. A row's After calls it itself if it goes on to do what is not the fault.
func (t *Trial) Read() {
	if t.taken {
		return
	}
	t.taken = true
	now, s := harness.Now(), &t.sample
	ms := func(at time.Duration) *float64 {
		v := harness.Milliseconds(at - t.At)
		return &v
	}
	s.Until = *ms(now)
	terms := t.Witness.Terms()
	for i, term := range terms {
		old := term.Token == t.Job.Token && term.Candidate == t.Job.Candidate
		if old && t.Killed != 0 {
			term.End, terms[i].End = t.Killed, t.Killed
		}
		if old && term.End != 0 {
			s.Dead = ms(term.End)
		}
		for _, l := range term.Lives {
			if l.Role == "job" && l.Started > t.At {
				s.Starts++
			}
		}
		for _, alive := range t.alive(term, now) {
			life := Life{Candidate: term.Candidate, Token: term.Token, From: *ms(alive.from), To: ms(alive.to)}
			if alive.to == now && term.End == 0 {
				life.To = nil
			}
			s.Lives = append(s.Lives, life)
		}
	}
	if next := t.next(); next != nil {
		s.Next = ms(next.Started)
	}
	if s.Next != nil && s.Dead != nil {
		s.Gap = math.Round(max(0, *s.Next-*s.Dead)*1000) / 1000
	}
	s.Late = harness.Milliseconds(harness.Lateness(t.Leader.Log()))
	for i, later := range terms {
		for _, earlier := range terms[:i] {
			if d := together(t.alive(earlier, now), t.alive(later, now)); d > 0 {
				t.overlap(earlier, later, d)
			}
		}
	}
	if !t.Of.ours() {
		return
	}
	switch {
	case t.Row.Untouched && (s.Dead != nil || s.Starts > 0):
		t.violated("the job was moved: dead after %s, %d starts", spanOf(s.Dead), s.Starts)
	case s.Next == nil && !t.Row.Untouched && (!t.Row.Either || t.moved()):
		t.violated("no next job within %v", t.patience())
	}
}

// overlap notes two jobs that lived at once.
func (t *Trial) overlap(earlier, later harness.Term, d time.Duration) {
	s := &t.sample
	s.Overlap = max(s.Overlap, harness.Milliseconds(d))
	if earlier.End == 0 && earlier.Token == t.Job.Token && earlier.Candidate == t.Job.Candidate {
		s.LivesOn = true
	}
	if !t.Of.ours() || t.Row.Promise != Never {
		return
	}
	margin := max(t.Row.ttl()/10, 200*time.Millisecond)
	for _, c := range t.contestants {
		if c.Candidate != nil && c.Identity == earlier.Candidate && harness.Lateness(c.Log()) > margin {
			s.Outside = true
			return
		}
	}
	t.violated("%v", harness.Overlap{Earlier: earlier, Later: later, For: d})
}

// interval is from one moment to another.
type interval struct{ from, to time.Duration }

// alive lists when a term's processes could run, until now at most.
func (t *Trial) alive(term harness.Term, now time.Duration) []interval {
	end := term.End
	if end == 0 {
		end = now
	}
	whole := []interval{{term.Start, end}}
	for _, f := range t.frozen {
		if f.candidate != term.Candidate {
			continue
		}
		to := f.to
		if to == 0 {
			to = now
		}
		var rest []interval
		for _, i := range whole {
			if before := (interval{i.from, min(i.to, f.from)}); before.to > before.from {
				rest = append(rest, before)
			}
			if after := (interval{max(i.from, to), i.to}); after.to > after.from {
				rest = append(rest, after)
			}
		}
		whole = rest
	}
	return whole
}

// together is for how long both were alive.
func together(a, b []interval) time.Duration {
	sum := time.Duration(0)
	for _, x := range a {
		for _, y := range b {
			sum += max(0, min(x.to, y.to)-max(x.from, y.from))
		}
	}
	return sum
}

// end mends what was broken and ends all that was started. Of leasehold it
// checks that nothing is left.
func (t *Trial) end(ctx context.Context, check bool) {
	failed := func(err error) {
		if err != nil && t.sample.Failure == "" {
			t.sample.Failure = err.Error()
		}
	}
	if t.Killed != 0 && t.Witness != nil { // else its connection is open still
		_ = within(ctx, patience, "", func(ctx context.Context) error { _, err := t.Witness.WaitForDead(ctx, t.Job); return err })
	}
	for _, f := range t.cleanups {
		f()
	}
	failed(t.mend(ctx))
	for _, c := range t.contestants {
		c.wake(ctx)
	}
	ours := t.Of.ours() && check && t.sample.Failure == ""
	if ours {
		for _, c := range slices.Backward(t.contestants) {
			if err := c.leave(ctx); err != nil {
				t.violated("%v", err)
			}
		}
		if err := t.nothingLeft(ctx, t.Row.ttl()); err != nil {
			t.violated("%v", err)
		}
	}
	for _, c := range t.contestants {
		failed(c.end(ctx))
	}
	failed(t.sweep(ctx))
}

// evidence is what one wants to know of a trial that went wrong.
func (t *Trial) evidence() string {
	var text strings.Builder
	if t.At == 0 { // it did not come to a fault
		t.Begin()
	}
	fmt.Fprintf(&text, "%s, %s: fault at %v", t.Row.Name, t.Of.Title, t.At)
	if t.Witness != nil {
		for _, term := range t.Witness.Terms() {
			until := "now"
			if term.End != 0 {
				until = (term.End - t.At).String()
			}
			fmt.Fprintf(&text, "\n  job of %s, token %d, %d processes, from %v to %s", term.Candidate, term.Token, len(term.Lives), term.Start-t.At, until)
		}
	}
	for _, c := range t.contestants {
		if c.Candidate == nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(c.Log()), "\n")
		fmt.Fprintf(&text, "\n  log of %s, its last lines:\n    %s", c.Identity, strings.Join(lines[max(0, len(lines)-25):], "\n    "))
	}
	return text.String()
}
