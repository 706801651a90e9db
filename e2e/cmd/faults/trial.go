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

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

const (
	settle  = 250 * time.Millisecond // from the standby's coming to the fault
	observe = 3 * time.Second        // for how long two jobs are watched running at once
	calm    = 2 * time.Second        // for how long a job is watched that must not move
)

// A Trial lets one pair of candidates, a leader with its job and a standby, have
// one fault.
type Trial struct {
	*fault.Target
	Scenario *Scenario
	Of       variant
	Witness  *harness.Witness
	Job      harness.Life // the first process of the leader's job

	runner   *runner
	election string
	fault    fault.Fault
	lasts    bool   // the fault was injected and has not been ended
	death    *death // nil: its connection tells when the job has ended
	ended    bool   // death was asked
	// killed, unless it is 0, is when the old job could run no instruction any more.
	killed time.Duration
	thawed time.Duration // when the fault was ended
	sample Sample
}

// violated notes what leasehold promises and did not keep.
func (t *Trial) violated(format string, args ...any) {
	t.sample.Violations = append(t.sample.Violations, fmt.Sprintf(format, args...))
}

var elections atomic.Int64 // keeps their names apart

// trial makes one trial and ends everything that belongs to it.
func (r *runner) trial(
	ctx context.Context, bed *harness.Testbed, s *Scenario, of variant, index int,
) Sample {
	t := &Trial{
		Target:   &fault.Target{Testbed: bed, TTL: s.ttl(), Trial: index, Jumping: r.jumping},
		Scenario: s, Of: of, runner: r, fault: s.Fault(),
		election: fmt.Sprintf("%s%d", prefix, elections.Add(1)),
		sample:   Sample{Row: s.Name, Candidate: of.Title, TTL: s.ttl().Seconds()},
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

// run brings the pair up, injects the fault, and reads what follows off the witness.
func (t *Trial) run(ctx context.Context) error {
	s := t.Scenario
	ctx, cancel := context.WithTimeoutCause(ctx,
		4*harness.WaitTimeout+max(0, s.Duration), errors.New("the trial came to no end"))
	defer cancel()
	if err := t.ready(ctx); err != nil {
		return fmt.Errorf("bring up a leader and a standby: %w", err)
	}
	for _, prepare := range []func() error{
		func() error { return s.Job.ready(ctx, t) },
		func() error {
			if t.fault.Prepare == nil {
				return nil
			}
			return t.fault.Prepare(ctx, t.Target)
		},
	} {
		if err := prepare(); err != nil {
			return fmt.Errorf("prepare the fault: %w", err)
		}
	}
	if t.moved() {
		return errors.New("the job was moved before the fault")
	}
	if s.Job.ByThreads && s.Duration == 0 {
		t.death = watchDeath(ctx, t.Job.Pid)
	}
	if err := t.fault.Start(ctx, t.Target); err != nil {
		return fmt.Errorf("inject the fault: %w", err)
	}
	t.lasts = true
	if err := t.endFault(ctx); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	if err := t.outcome(ctx); err != nil {
		return err
	}
	if err := errors.Join(t.deathOfThreads(), t.runner.stressed(s)); err != nil {
		return err
	}
	t.read()
	if t.Of.Ours() && s.Expect == NoFailover && !t.moved() {
		t.handOver(ctx)
	}
	if t.lasts {
		if err := t.verify(ctx); err != nil {
			return err
		}
	}
	t.figures()
	return ctx.Err()
}

func (j job) ready(ctx context.Context, t *Trial) error {
	if j.Ready == nil {
		return nil
	}
	return j.Ready(ctx, t)
}

// endFault ends the fault when it has lasted long enough, if it is to end before the
// trial does.
func (t *Trial) endFault(ctx context.Context) error {
	switch d := t.Scenario.Duration; d {
	case 0:
		return nil
	case untilNextJob: // and a while longer: it sleeps on when another leads
		err := t.waitNext(ctx, t.waitTimeout())
		if err := errors.Join(err, harness.Wait(ctx, time.Second)); err != nil {
			return err
		}
	default:
		if err := harness.Wait(ctx, d); err != nil {
			return err
		}
	}
	if t.fault.Recover == nil {
		return nil
	}
	if err := t.verify(ctx); err != nil {
		return err
	}
	if t.Scenario.Job.ByThreads {
		t.death = watchDeath(ctx, t.Job.Pid)
	}
	t.lasts, t.thawed = false, harness.Now()
	return errors.Join(t.fault.End(ctx, t.Target), t.Etcd.WaitHealthy(ctx))
}

// verify looks at what the fault has done.
func (t *Trial) verify(ctx context.Context) error {
	if err := t.fault.Check(ctx, t.Target); err != nil {
		return fmt.Errorf("verify the fault: %w", err)
	}
	if t.Scenario.Check != nil {
		return t.Scenario.Check(ctx, t)
	}
	return nil
}

// handOver tries whether a planned stop still does what it should: what a fault did
// to the queue or to the standby would show now.
func (t *Trial) handOver(ctx context.Context) {
	at := harness.Now()
	err := t.Machine.Stop()
	if err == nil {
		err = t.waitNext(ctx, t.TTL/2)
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
	if t.Machine, err = t.start("a", t.Scenario.Job.Words, true); err != nil {
		return err
	}
	err = harness.Within(ctx, harness.WaitTimeout, "no job", func(ctx context.Context) error {
		t.Job, err = t.Witness.WaitForJob(ctx, func(l harness.Life) bool { return l.Candidate == "a" })
		return err
	})
	if err != nil {
		return err
	}
	standby, err := t.start("b", nil, false)
	t.Others = append(t.Others, standby)
	if err != nil {
		return err
	}
	if t.Leading, err = t.WaitQueue(ctx, t.election, 2); err != nil {
		return err
	}
	if t.Of.Ours() {
		if err := standby.WaitStatus(ctx, "/standby", http.StatusOK); err != nil {
			return err
		}
	}
	quiet := settle
	if !t.Scenario.alone(t.Of) { // what follows may depend on how long ago the lease was renewed
		quiet += rand.N(t.TTL / 4)
	}
	return harness.Wait(ctx, quiet)
}

// start starts a candidate, on a machine that the caller has to end also when there
// is an error.
func (t *Trial) start(name string, words []string, leads bool) (*harness.Machine, error) {
	cgroup, err := harness.NewCgroup(cgroupPrefix)
	if err != nil {
		return nil, err
	}
	m, err := t.NewMachine(harness.MachineConfig{
		Name: name, Cgroup: cgroup, Proxied: t.Scenario.Proxied,
	})
	if err != nil {
		return m, err
	}
	if leads {
		t.Machine = m
	}
	return m, m.Start(t.Of.Implementation, harness.Candidacy{
		Programs: t.runner.programs, Election: t.election, TTL: t.TTL, Job: words, Witness: t.Witness,
	}, func(cfg *harness.CandidateConfig) error {
		cfg.UID = t.Of.uid
		if t.Of.Ours() {
			cfg.Env = append(cfg.Env, "LEASEHOLD_STOP_GRACE=500ms")
		}
		if !leads || t.fault.Configure == nil {
			return nil
		}
		return t.fault.Configure(t.Target, cfg)
	})
}

// outcome waits until it is clear what came of the fault.
func (t *Trial) outcome(ctx context.Context) error {
	if t.Scenario.Expect != Failover {
		if err := t.calm(ctx); err != nil {
			return err
		}
		if !t.moved() {
			return nil
		}
	}
	// A job that does not come back is an outcome, and not a trial without one.
	if t.waitNext(ctx, t.waitTimeout()) != nil {
		return context.Cause(ctx)
	}
	_ = t.waitDead(ctx, observe) // the old job may run on
	return context.Cause(ctx)
}

// waitTimeout is for how long a next job is awaited.
func (t *Trial) waitTimeout() time.Duration {
	if t.Of.Ours() {
		return t.TTL + harness.WaitTimeout
	}
	return t.TTL + harness.WaitTimeout/2
}

func (t *Trial) waitNext(ctx context.Context, d time.Duration) error {
	return harness.Within(ctx, d, "no next job", func(ctx context.Context) error {
		return t.Witness.Wait(ctx, func([]harness.Life) bool { return t.next() != nil })
	})
}

func (t *Trial) waitDead(ctx context.Context, d time.Duration) error {
	return harness.Within(ctx, d, "the old job has not ended", func(ctx context.Context) error {
		_, err := t.Witness.WaitForDead(ctx, t.Job)
		return err
	})
}

// calm waits until the leader renews its lease again, or else can't any more.
func (t *Trial) calm(ctx context.Context) error {
	if err := harness.Wait(ctx, calm); err != nil || !t.Of.Ours() {
		return err
	}
	err := harness.Within(ctx, t.TTL, "no renewals", func(ctx context.Context) error {
		err := t.Machine.WaitRenewals(ctx, 2)
		if t.moved() {
			return nil
		}
		return err
	})
	if err != nil && ctx.Err() == nil {
		t.violated("%v", err)
	}
	return ctx.Err()
}

func (t *Trial) history() check.History { return check.NewHistory(t.Witness.Lives()) }

// moved reports whether the old job has ended, or any other begun.
func (t *Trial) moved() bool {
	return slices.ContainsFunc(t.Witness.Lives(), func(l harness.Life) bool {
		return l.Role == "job" && (!l.Alive() || l.Pid != t.Job.Pid)
	})
}

// next is the first process of the next term's job, once there is one.
func (t *Trial) next() *harness.Life {
	for _, l := range t.Witness.Lives() {
		if l.Role == "job" && l.Started > t.Began && !t.old(l) {
			return &l
		}
	}
	return nil
}

// old reports whether a process belongs to the term in which the fault began.
func (t *Trial) old(l harness.Life) bool {
	return l.Token == t.Job.Token && l.Candidate == t.Job.Candidate
}

// deathOfThreads takes for the old job's end the moment that was watched for.
func (t *Trial) deathOfThreads() error {
	term := t.history().Find(t.Job)
	if t.death == nil || term.Alive() { // it runs on, and that is the outcome
		return nil
	}
	t.ended = true
	// What is seen every 200 µs may have been there before the connection closed.
	if t.killed = min(<-t.death.found, term.End); t.killed == 0 {
		return errors.New("SIGKILL was not seen at the job's threads")
	}
	figure := "its connection closed after"
	if slices.ContainsFunc(t.Scenario.Job.Words, func(w string) bool {
		return strings.HasPrefix(w, "memory=")
	}) {
		figure = "memory freed after"
	}
	t.Figure(figure, term.End-t.killed)
	if t.thawed != 0 {
		t.Figure("thaw to death", t.killed-t.thawed)
	}
	return nil
}

// figures puts the fault's own figures into the sample.
func (t *Trial) figures() {
	for name, d := range t.Figures {
		if t.sample.Figures == nil {
			t.sample.Figures = map[string]float64{}
		}
		t.sample.Figures[name] = harness.Milliseconds(d)
	}
}

// alive is when the job of a term could run, until now.
func (t *Trial) alive(now time.Duration) func(*check.Term) check.Intervals {
	return func(term *check.Term) check.Intervals {
		could := term.Intervals(now)
		if t.killed != 0 && term.Of(t.Job) {
			could = could.Without(check.Intervals{{From: t.killed, To: check.Forever}})
		}
		if term.Candidate == t.Machine.Name {
			could = could.Without(t.Frozen)
		}
		return could
	}
}

// read takes the sample's figures from the processes that the witness has seen so
// far.
func (t *Trial) read() {
	now, s, history := harness.Now(), &t.sample, t.history()
	alive := t.alive(now)
	ms := func(at time.Duration) *float64 {
		v := harness.Milliseconds(at - t.Began)
		return &v
	}
	s.Until = *ms(now)
	for _, term := range history {
		if term.Of(t.Job) && !term.Alive() {
			s.Dead = ms(term.End)
			if t.killed != 0 {
				s.Dead = ms(t.killed)
			}
		}
		for _, l := range term.Lives {
			if l.Role == "job" && l.Started > t.Began {
				s.Starts++
			}
		}
		for _, i := range alive(term) {
			life := Life{Candidate: term.Candidate, Token: term.Token, From: *ms(i.From), To: ms(i.To)}
			if i.To == now && term.Alive() {
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
	s.Late = harness.Milliseconds(latency(t.Machine))
	for _, o := range history.Overlaps(alive) {
		t.overlap(o)
	}
	if !t.Of.Ours() {
		return
	}
	switch expect := t.Scenario.Expect; {
	case expect == NoFailover && (s.Dead != nil || s.Starts > 0):
		t.violated("the job was moved: ended after %s, %d starts", duration(s.Dead), s.Starts)
	case s.Next == nil && (expect == Failover || expect == MayFailover && t.moved()):
		t.violated("no next job within %v", t.waitTimeout())
	}
}

// latency is how late a machine's guard served a deadline, at worst.
func latency(m *harness.Machine) time.Duration {
	return check.Latency(check.TimerLatencies(m.Log()))
}

// overlap notes two jobs that ran at once.
func (t *Trial) overlap(o check.Overlap) {
	s := &t.sample
	s.Overlap = max(s.Overlap, harness.Milliseconds(o.During.Total()))
	if o.Earlier.Alive() && o.Earlier.Of(t.Job) {
		s.LivesOn = true
	}
	if !t.Of.Ours() || t.Scenario.Promise != Never {
		return
	}
	for _, m := range t.all() {
		if m.Name == o.Earlier.Candidate && latency(m) > max(t.TTL/10, 200*time.Millisecond) {
			s.Outside = true
			return
		}
	}
	t.violated("%v", o)
}

// all are the machines on which a candidate was started.
func (t *Trial) all() []*harness.Machine {
	return slices.DeleteFunc(append([]*harness.Machine{t.Machine}, t.Others...),
		func(m *harness.Machine) bool { return m == nil || m.Candidate == nil })
}

// end mends what was broken and ends all that was started. Of leasehold it checks
// that nothing is left.
func (t *Trial) end(ctx context.Context, checked bool) {
	failed := func(err error) {
		if err != nil && t.sample.Failure == "" {
			t.sample.Failure = err.Error()
		}
	}
	if t.killed != 0 { // its connection is open still
		_ = t.waitDead(ctx, harness.WaitTimeout)
	}
	if t.death != nil && !t.ended {
		t.death.end()
	}
	if t.lasts {
		failed(t.fault.End(ctx, t.Target))
	}
	failed(t.Recover(ctx))
	all := t.all()
	for _, m := range all {
		m.Wake(ctx)
	}
	if t.Of.Ours() && checked && t.sample.Failure == "" {
		for _, m := range slices.Backward(all) {
			if err := m.Leave(ctx); err != nil {
				t.violated("%v", err)
			}
		}
		// A lease that could not be revoked from afar ends by itself.
		err := harness.Within(ctx, t.TTL+3*time.Second, "etcd is not empty", t.WaitEmpty)
		if err != nil {
			t.violated("%v", err)
		}
	}
	for _, m := range append([]*harness.Machine{t.Machine}, t.Others...) {
		if m != nil {
			failed(m.Close(ctx))
		}
	}
	failed(t.Clear(ctx))
}

// evidence is what one wants to know of a trial that went wrong.
func (t *Trial) evidence() string {
	var text strings.Builder
	if t.Began == 0 { // it did not come to a fault
		t.Begin()
	}
	fmt.Fprintf(&text, "%s, %s: fault at %v", t.Scenario.Name, t.Of.Title, t.Began)
	if t.Witness != nil {
		for _, term := range t.history() {
			until := "now"
			if !term.Alive() {
				until = (term.End - t.Began).String()
			}
			fmt.Fprintf(&text, "\n  %v, %d processes, from %v to %s",
				term, len(term.Lives), term.Start-t.Began, until)
		}
	}
	for _, m := range t.all() {
		lines := strings.Split(strings.TrimSpace(m.Log()), "\n")
		fmt.Fprintf(&text, "\n  log of %s, its last lines:\n    %s",
			m.Name, strings.Join(lines[max(0, len(lines)-25):], "\n    "))
	}
	return text.String()
}
