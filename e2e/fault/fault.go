//go:build linux

// Package fault is the library of faults. The table (e2e/cmd/faults), the soak, the bench and the
// scenarios (e2e/scenario) inject these and no others. README.md beside it shows how to add one.
package fault

import (
	"context"
	"errors"
	"math"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// Fault is something that goes wrong. A value is good for one use: what Inject
// learns, Recover and Verify know. All functions but Inject may be nil.
type Fault struct {
	// Name is in kebab-case, and says what is broken and how.
	Name string
	// Configure changes how a candidate is started, before there is a fault.
	// on.Machine is that candidate's.
	Configure func(on *Target, cfg *harness.CandidateConfig) error
	// Prepare does what must be done beforehand and takes time.
	Prepare Step
	// Inject makes the fault. Where it takes time to find what to break, Inject
	// calls on.Begin when it has.
	Inject Step
	// Recover ends the fault. Without it the fault lasts until testbed and machine
	// recover or close.
	Recover Step
	// Verify returns an error if nothing went wrong, for then nothing was tested.
	// It is called while the fault lasts: before Recover, or when all is over.
	Verify Step
}

// Step is what a fault does to its target, or finds out about it.
type Step func(ctx context.Context, on *Target) error

// Do does the step, if there is one.
func (s Step) Do(ctx context.Context, on *Target) error {
	if s == nil {
		return nil
	}
	return s(ctx, on)
}

// Then is the step and another one, whether or not the first succeeds.
func (s Step) Then(next Step) Step {
	return func(ctx context.Context, on *Target) error {
		return errors.Join(s.Do(ctx, on), next.Do(ctx, on))
	}
}

// Start injects the fault, which begins now.
func (f Fault) Start(ctx context.Context, on *Target) error {
	on.Begin()
	return f.Inject(ctx, on)
}

// End calls Recover, if there is one.
func (f Fault) End(ctx context.Context, on *Target) error { return f.Recover.Do(ctx, on) }

// Both is two faults, the second as soon as the first is there.
func Both(name string, a, b Fault) Fault {
	return Fault{
		Name:    name,
		Prepare: a.Prepare.Then(b.Prepare), Inject: a.Inject.Then(b.Inject),
		Recover: a.Recover.Then(b.Recover), Verify: a.Verify.Then(b.Verify),
	}
}

// OfStandby has a fault of the daemon hit the next in the queue, and not the leader.
func OfStandby(f Fault) Fault {
	hit := func(s Step) Step {
		if s == nil {
			return nil
		}
		return func(ctx context.Context, on *Target) error {
			leader, others := on.Machine, on.Others
			on.Machine, on.Others = others[0], append([]*harness.Machine{leader}, others[1:]...)
			defer func() { on.Machine, on.Others = leader, others }()
			return s(ctx, on)
		}
	}
	f.Name += "-standby"
	f.Prepare, f.Inject, f.Recover, f.Verify =
		hit(f.Prepare), hit(f.Inject), hit(f.Recover), hit(f.Verify)
	return f
}

// Target is what a fault breaks.
type Target struct {
	*harness.Testbed
	Machine *harness.Machine   // whose candidate the fault is for: as a rule the leader
	Others  []*harness.Machine // of the same election
	Leading harness.Leading    // the election's first key, for an operator's faults
	Member  *harness.Member    // of etcd; nil: the fault chooses one and sets it
	TTL     time.Duration
	// Jumping are programs whose wall clock can jump: see BuildJumping.
	Jumping *harness.Programs
	// Trial counts uses from 0. Which member or moment a fault chooses depends on it.
	Trial int

	// Began is when the fault began.
	Began time.Duration
	// Frozen is when nothing on Machine could run.
	Frozen check.Intervals
	// Figures are times that are the fault's own.
	Figures map[string]time.Duration
}

// Begin says that the fault begins now.
func (on *Target) Begin() { on.Began = harness.Now() }

// Figure reports a time that is the fault's own.
func (on *Target) Figure(name string, d time.Duration) {
	if on.Figures == nil {
		on.Figures = map[string]time.Duration{}
	}
	on.Figures[name] = d
}

// machines are all of the election.
func (on *Target) machines() []*harness.Machine {
	return append([]*harness.Machine{on.Machine}, on.Others...)
}

// Spread is a number from 0 to 1 for each trial. Those of the first few trials
// are spread as evenly as those of many.
func Spread(trial int) float64 {
	_, f := math.Modf(float64(trial) * (math.Sqrt(5) - 1) / 2)
	return f
}
