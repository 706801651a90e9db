//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/json"
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

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

const (
	settle  = 250 * time.Millisecond // from the standby's coming to the fault
	observe = 3 * time.Second        // for how long two jobs are watched running at once
	calm    = 2 * time.Second        // for how long a job is watched that must not move
	// readyTimeout: a virtual machine may have to get a job's gigabytes from its host first.
	readyTimeout = 10 * harness.WaitTimeout

	stopGrace = 500 * time.Millisecond // of leasehold
)

// A Trial lets one pair of candidates, a leader with its job and a standby, have one fault.
type Trial struct {
	*fault.Target
	Scenario *Scenario
	Of       variant
	Witness  *harness.Witness
	Job      harness.Life // the first process of the leader's job
	Term     status       // what the leader has shown of its term
	Standing int64        // the create revision of the standby's key

	runner    *runner
	election  string
	machines  []*harness.Machine
	stress    fault.Fault
	fault     fault.Fault
	lasts     bool                  // the fault was injected and has not been ended
	addresses *harness.AddressWatch // nil: candidates have no hooks
	death     <-chan time.Duration  // nil: its connection tells when the job has ended
	// killed, unless it is 0, is when the old job could run no instruction any more.
	killed time.Duration
	thawed time.Duration // when the fault was ended
	// frozenAt is when the leader's job was first seen frozen, and frozenSince since when it is;
	// 0: it was not, or is not.
	frozenAt, frozenSince atomic.Int64
	sample                Sample
}

// violated notes what leasehold promises and did not keep.
func (t *Trial) violated(format string, args ...any) {
	t.sample.Violations = append(t.sample.Violations, fmt.Sprintf(format, args...))
}

var elections atomic.Int64 // keeps their names apart

func (r *runner) newTrial(bed *harness.Testbed, p planned, stress fault.Fault) *Trial {
	s := p.scenario
	f := s.Fault()
	if s.Standby {
		f = fault.OfStandby(f)
	}
	return &Trial{
		Target:   &fault.Target{Testbed: bed, TTL: s.TTL, Trial: p.index, Jumping: r.jumping},
		Scenario: s, Of: p.of, runner: r, fault: f, stress: stress,
		election: fmt.Sprintf("%s%d", prefix, elections.Add(1)),
		sample:   Sample{Row: s.Name, Candidate: p.of.Title, TTL: s.TTL.Seconds()},
	}
}

// make makes the trial and ends everything that belongs to it.
func (t *Trial) make(ctx context.Context) {
	var err error
	if t.Witness, err = harness.NewWitness(); err != nil {
		t.sample.Failure = err.Error()
		return
	}
	defer t.Witness.Close()
	if t.runner.results.Hooks {
		if t.addresses, err = harness.WatchAddress(); err != nil {
			t.sample.Failure = err.Error()
			return
		}
		defer t.addresses.Close()
	}
	if err = t.run(ctx); err != nil {
		t.sample.Failure = err.Error()
	}
	// Whether or not it was interrupted, what was started is ended.
	t.end(context.WithoutCancel(ctx), err == nil && ctx.Err() == nil)
	if len(t.sample.Violations) > 0 || t.sample.Failure != "" {
		t.sample.evidence = t.evidence()
	}
}

// run brings the pair up, injects the fault, and reads what follows off the witness.
func (t *Trial) run(ctx context.Context) error {
	s := t.Scenario
	bound := 4*harness.WaitTimeout + max(0, s.Duration)
	if s.Job.Ready != nil {
		bound += readyTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, bound, errors.New("the trial came to no end"))
	defer cancel()
	if err := t.ready(ctx); err != nil {
		return fmt.Errorf("bring up a leader and a standby: %w", err)
	}
	if err := t.fault.Prepare.Do(ctx, t.Target); err != nil {
		return fmt.Errorf("prepare the fault: %w", err)
	}
	if t.moved() {
		return errors.New("the job was moved before the fault")
	}
	switch {
	case s.Freeze:
		if err := t.watchFrozen(ctx); err != nil {
			return err
		}
	case s.Job.ByThreads && s.Duration == 0:
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
	if err := errors.Join(t.deathOfThreads(), t.stress.Verify.Do(ctx, t.Target)); err != nil {
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
	for name, d := range t.Figures {
		if t.sample.Figures == nil {
			t.sample.Figures = map[string]float64{}
		}
		t.sample.Figures[name] = harness.Milliseconds(d)
	}
	return ctx.Err()
}

// endFault ends the fault when it has lasted long enough, if it is to end before the trial does.
func (t *Trial) endFault(ctx context.Context) error {
	lasts := t.Scenario.Duration
	if most := t.Scenario.Longest; most > 0 {
		lasts += time.Duration(float64(most-lasts) * fault.Spread(t.Trial))
	}
	if lasts == untilNextJob {
		lasts = time.Second // more: it sleeps on when another leads
		if err := t.waitNext(ctx, t.waitTimeout()); err != nil {
			return err
		}
	}
	if err := harness.Wait(ctx, lasts); err != nil || lasts == 0 || t.fault.Recover == nil {
		return err
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
	if err := t.fault.Verify.Do(ctx, t.Target); err != nil {
		return fmt.Errorf("verify the fault: %w", err)
	}
	return t.until(ctx, 3*harness.WaitTimeout, "no outcome", t.Scenario.Check)
}

// until waits until a condition, which may be nil, is met.
func (t *Trial) until(
	ctx context.Context, bound time.Duration, otherwise string, met func(*Trial) error,
) error {
	if met == nil {
		return nil
	}
	return harness.UntilWithin(ctx, bound, otherwise, func() error { return met(t) })
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
func (t *Trial) ready(ctx context.Context) error {
	err := t.start("a", t.Scenario.Job.Words, t.fault.Configure)
	if err != nil {
		return err
	}
	err = harness.Within(ctx, harness.WaitTimeout, "no job", func(ctx context.Context) error {
		t.Job, err = t.Witness.WaitForJob(ctx, func(l harness.Life) bool {
			return l.Candidate == "a"
		})
		return err
	})
	if err != nil {
		return err
	}
	if err := t.start("b", nil, nil); err != nil {
		return err
	}
	if t.Leading, err = t.WaitQueue(ctx, t.election, 2); err != nil {
		return err
	}
	if t.Of.Ours() {
		if err := t.Others[0].WaitStatus(ctx, "/standby", http.StatusOK); err != nil {
			return err
		}
	}
	if err := t.until(ctx, readyTimeout, "the job is not ready", t.Scenario.Job.Ready); err != nil {
		return err
	}
	if err := t.note(ctx); err != nil {
		return err
	}
	quiet := settle
	if !t.Scenario.alone(t.Of) { // what follows may depend on how long ago the lease was renewed
		quiet += rand.N(t.TTL / 4)
	}
	return harness.Wait(ctx, quiet)
}

// start starts a candidate on a machine, the leader's first. configure may be nil.
func (t *Trial) start(
	name string, words []string, configure func(*fault.Target, *harness.CandidateConfig) error,
) error {
	cgroup, err := harness.NewCgroup(cgroupPrefix)
	if err != nil {
		return err
	}
	m, err := t.NewMachine(harness.MachineConfig{
		Name: name, Cgroup: cgroup, Proxied: t.Scenario.Proxied,
	})
	t.machines = append(t.machines, m)
	t.Machine, t.Others = t.machines[0], t.machines[1:]
	if err == nil && t.addresses != nil {
		err = t.addresses.Add(m.Node)
	}
	if err != nil {
		return err
	}
	return m.Start(t.Of.Implementation, harness.CandidateConfig{
		Election: t.election, TTL: t.TTL, Job: words,
		Witness: t.Witness,
	}, func(cfg *harness.CandidateConfig) error {
		cfg.UID = t.Of.uid
		if t.Of.Ours() {
			cfg.Env = append(cfg.Env, "LEASEHOLD_STOP_GRACE="+stopGrace.String())
			if t.Scenario.Freeze && name == "a" {
				cfg.Env = append(cfg.Env, "LEASEHOLD_CONTACT_LOSS=freeze")
			}
			if t.addresses != nil {
				cfg.Env, cfg.NetAdmin = append(cfg.Env, t.hooks()...), true
			}
		}
		if configure == nil {
			return nil
		}
		return configure(t.Target, cfg)
	})
}

// status is what leasehold shows of a term, and what must not change while that goes on.
type status struct {
	State  string
	Leader struct{ Token int64 }
	Lease  struct{ ID string }
	Job    struct{ PID, Restarts int }
}

// note notes who leads, and who is next.
func (t *Trial) note(ctx context.Context) (err error) {
	if !t.Of.Ours() {
		return nil
	}
	if t.Term, err = t.status(ctx); err != nil {
		return err
	}
	got, err := t.Client.Get(ctx, t.election+"/", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	for _, kv := range got.Kvs {
		t.Standing = max(t.Standing, kv.CreateRevision)
	}
	return nil
}

// status asks the leader.
func (t *Trial) status(ctx context.Context) (now status, err error) {
	code, body, err := t.Machine.Get(ctx, "/status")
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("/status answers %d: %s", code, body)
	}
	if err == nil {
		err = json.Unmarshal([]byte(body), &now)
	}
	return now, err
}

// outcome waits until it is clear what came of the fault.
func (t *Trial) outcome(ctx context.Context) error {
	if t.Scenario.Expect != Failover {
		if err := errors.Join(t.replaced(ctx), t.calm(ctx)); err != nil {
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

// replaced waits until another elector has taken the place of the one that the fault took, and has
// renewed the lease.
func (t *Trial) replaced(ctx context.Context) error {
	if !t.Scenario.Replaced {
		return nil
	}
	hit := t.Machine
	if t.Scenario.Standby {
		hit = t.Others[0]
	}
	err := harness.Within(ctx, t.TTL, "no other elector", func(ctx context.Context) error {
		return hit.WaitReplaced(ctx, 1)
	})
	if err == nil {
		t.Figure("lease renewed again", harness.Now()-t.Began)
	} else if ctx.Err() == nil {
		t.violated("%v", err)
	}
	return ctx.Err()
}

// calm waits until the leader renews its lease again, in the same term, or else can't any more.
func (t *Trial) calm(ctx context.Context) error {
	if err := harness.Wait(ctx, calm); err != nil || !t.Of.Ours() {
		return err
	}
	err := harness.Within(ctx, t.TTL, "no renewals", func(ctx context.Context) error {
		return t.Machine.WaitRenewals(ctx, 2)
	})
	if err == nil && t.Scenario.Expect == NoFailover {
		var now status
		if now, err = t.status(ctx); err == nil && now != t.Term {
			err = fmt.Errorf("the term was %+v, and is %+v", t.Term, now)
		}
	}
	if err != nil && ctx.Err() == nil && !t.moved() {
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
		old := l.Token == t.Job.Token && l.Candidate == t.Job.Candidate
		if l.Role == "job" && l.Started > t.Began && !old {
			return &l
		}
	}
	return nil
}

// deathOfThreads takes for the old job's end the moment that was watched for.
func (t *Trial) deathOfThreads() error {
	term := t.history().Find(t.Job)
	if t.death == nil || term.Alive() { // it runs on, and that is the outcome
		return nil
	}
	// What is seen every 200 µs may have been there before the connection closed.
	if t.killed = min(<-t.death, term.End); t.killed == 0 {
		return errors.New("SIGKILL was not seen at the job's threads")
	}
	figure := "its connection closed after"
	if t.frozenSince.Load() != 0 {
		figure = "frozen for"
	} else if strings.HasPrefix(strings.Join(t.Scenario.Job.Words, " "), "memory=") {
		figure = "memory freed after"
	}
	t.Figure(figure, term.End-t.killed)
	if t.thawed != 0 && t.killed > t.thawed {
		t.Figure("thaw to death", t.killed-t.thawed)
	}
	return nil
}

// over is when the old job could run no instruction any more, if that is known better than by the
// end of its connection; else 0. A job that is frozen still can't either.
func (t *Trial) over() time.Duration {
	return cmp.Or(t.killed, time.Duration(t.frozenSince.Load()))
}

// alive is when the job of a term could run, until now.
func (t *Trial) alive(now time.Duration) func(*check.Term) check.Intervals {
	return func(term *check.Term) check.Intervals {
		could := term.Intervals(now)
		if over := t.over(); over != 0 && term.Of(t.Job) {
			could = could.Without(check.Intervals{{From: over, To: check.Forever}})
		}
		if term.Candidate == t.Machine.Name {
			could = could.Without(t.Frozen)
		}
		return could
	}
}

// read takes the sample's figures from the processes that the witness has seen so far.
func (t *Trial) read() {
	now, s, history := harness.Now(), &t.sample, t.history()
	alive := t.alive(now)
	ms := func(at time.Duration) *float64 {
		v := harness.Milliseconds(at - t.Began)
		return &v
	}
	s.Until, s.Late = *ms(now), harness.Milliseconds(latency(t.Machine))
	for _, term := range history {
		if over := t.over(); term.Of(t.Job) && (!term.Alive() || over != 0) {
			s.Dead = ms(cmp.Or(over, term.End))
		}
		for _, l := range term.Lives {
			if l.Role == "job" && l.Started > t.Began {
				s.Starts++
			}
		}
		for _, i := range alive(term) {
			life := Life{
				Candidate: term.Candidate, Token: term.Token, From: *ms(i.From), To: ms(i.To),
			}
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
	if t.Of.Ours() && t.Scenario.Promise == Never {
		t.together(o.Earlier.Candidate, o.During.Total(), o.String())
	}
}

// together notes what was on two machines at once for so long, which is a violation unless the
// guard of the earlier one was served too late.
func (t *Trial) together(earlier string, d time.Duration, what string) {
	for _, m := range t.started() {
		margin, late := max(t.TTL/10, 200*time.Millisecond), check.KillByLatencies(m.Log())
		if by := check.Latency(late); m.Name == earlier && by > margin && d <= by+margin {
			t.sample.Outside = true
			return
		}
	}
	t.violated("%s", what)
}

// started are the machines on which a candidate was started.
func (t *Trial) started() []*harness.Machine {
	return slices.DeleteFunc(slices.Clone(t.machines), func(m *harness.Machine) bool {
		return m.Candidate == nil
	})
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
	if t.death != nil {
		<-t.death // the trial's context has ended
	}
	if t.lasts {
		failed(t.fault.End(ctx, t.Target))
	}
	failed(t.Recover(ctx))
	for _, m := range t.started() {
		m.Wake(ctx)
	}
	if t.Of.Ours() && checked && t.sample.Failure == "" {
		for _, m := range slices.Backward(t.started()) {
			if err := m.Leave(ctx); err != nil {
				t.violated("%v", err)
			}
		}
		// A lease that could not be revoked from afar ends by itself.
		err := harness.Within(ctx, t.TTL+3*time.Second, "etcd is not empty", t.WaitEmpty)
		if err != nil {
			t.violated("%v", err)
		}
		if t.addresses != nil {
			failed(t.judgeAddresses())
		}
	}
	for _, m := range t.machines {
		failed(m.Close(ctx))
	}
	failed(t.Clear(ctx))
}

// evidence is what one wants to know of a trial that went wrong.
func (t *Trial) evidence() string {
	if t.Began == 0 { // it did not come to a fault
		t.Begin()
	}
	text := fmt.Sprintf("%s, %s: fault at %v", t.Scenario.Name, t.Of.Title, t.Began)
	for _, term := range t.history() {
		until := "now"
		if !term.Alive() {
			until = (term.End - t.Began).String()
		}
		text += fmt.Sprintf("\n  %v, %d processes, from %v to %s",
			term, len(term.Lives), term.Start-t.Began, until)
	}
	for _, m := range t.started() {
		lines := strings.TrimSpace(harness.LastLines(m.Log(), 25))
		text += fmt.Sprintf("\n  log of %s, its last lines:\n    %s",
			m.Name, strings.ReplaceAll(lines, "\n", "\n    "))
	}
	return text
}
