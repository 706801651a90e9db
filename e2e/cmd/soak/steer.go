//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/control"
	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// Beside the faults an operator steers the election, with one command after the other. steered.go
// judges what becomes of that.

const (
	holdLasts     = 2 * time.Second // of hold --for
	commandTakes  = 10 * time.Second
	switchTimeout = 3 * time.Second
	// lateAnswer is how long after the end of a command that was not answered in time its request
	// may still be served.
	lateAnswer = 30 * time.Second
	// commandEvery is how many faults there are for each command.
	commandEvery = 4
)

// commands are what the operator does. How long it lasts is from a hold to its release.
var commands = []kind{
	{3, "hold", anElectionsFuture, 0.3, 1.5, nil, ""},
	{2, "hold-stop", anElectionsFuture, 0.5, 2.2, nil, ""},
	{2, "hold-for", anElectionsFuture, 0.9, 1.5, nil, ""},
	{4, "switchover", anElectionsFuture, 0, 0, nil, ""},
	{4, "switchover-to", anElectionsFuture, 0, 0, nil, " CANDIDATE"},
	{4, "priority-reload", anElectionsFuture, 0, 0, nil, ": CANDIDATE, PRIORITY"},
	{2, "priority-restart", anElectionsFuture, 0, 0, nil, ": CANDIDATE, PRIORITY"},
}

// priorities are what candidates may have. At first all have the one in the middle.
var priorities = []int{10, 50, 90}

// failback is how long a leader of some candidates waits for one with a higher priority.
const failback = time.Second

// drawCommands adds commands to a schedule of faults, which stay as they are.
func drawCommands(set settings, schedule []drawn) []drawn {
	rng := rand.New(rand.NewPCG(set.seed, 2))
	var bag []*kind
	for n := range commands {
		bag = append(bag, slices.Repeat([]*kind{&commands[n]}, commands[n].weight)...)
	}
	free := time.Duration(0)
	for n := commandEvery - 1; n < set.faults; n += commandEvery {
		k := bag[rng.IntN(len(bag))]
		lasts := time.Duration((k.from + (k.to-k.from)*rng.Float64()) * float64(set.ttl))
		c := drawn{
			kind: k, number: len(schedule) + 1, lasts: lasts.Round(time.Millisecond),
			at:    max(free, schedule[n].at+time.Duration(rng.IntN(1000))*time.Millisecond),
			index: rng.IntN(candidateCount), priority: priorities[rng.IntN(len(priorities))],
		}
		if free = c.at + c.lasts + 2*time.Second; c.isSwitchover() {
			free += switchTimeout
		}
		schedule = append(schedule, c)
	}
	slices.SortStableFunc(schedule, func(a, b drawn) int { return int(a.at - b.at) })
	return schedule
}

func (f drawn) isSwitchover() bool { return strings.HasPrefix(f.name, "switchover") }

// switchesTo is whom a command asks to lead; "": anybody.
func (f drawn) switchesTo() string {
	if f.name == "switchover-to" {
		return candidateName(f.index)
	}
	return ""
}

// steer carries out a command, while other faults begin.
func (r *run) steer(ctx context.Context, i *injection) {
	if !r.implementation.Ours() {
		r.idle(i, errors.New("it knows no commands"))
		return
	}
	if !r.steering.TryLock() {
		r.idle(i, errors.New("etcd has not carried out the last one"))
		return
	}
	r.check.begins(i)
	i.To = i.From + i.lasts
	do := r.switchOver
	switch {
	case strings.HasPrefix(i.name, "hold"):
		do = r.hold
	case strings.HasPrefix(i.name, "priority"):
		do = r.prioritize
	}
	r.busy.Go(func() {
		defer r.steering.Unlock()
		if err := do(ctx, i); err != nil {
			r.idle(i, err)
		}
	})
}

// leasehold runs a command of leasehold's.
func (r *run) leasehold(
	ctx context.Context, election string, args ...string,
) (code int, said string, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTakes)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, r.programs.Leasehold, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "LEASEHOLD_ELECTION=" + election,
		"LEASEHOLD_ENDPOINTS=" + strings.Join(r.Etcd.Endpoints(), ","),
	}
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		err = nil
	}
	return cmd.ProcessState.ExitCode(), strings.TrimSpace(out.String()), err
}

// hold holds the election for a while, and releases it.
func (r *run) hold(ctx context.Context, i *injection) error {
	name, args := election, []string{"hold", "--reason", "soak"}
	if r.misheld {
		name += "-other"
	}
	h, ends := &held{to: check.Forever}, check.Forever
	if i.calm {
		h.stopsIn = stopGrace + recovers
	}
	switch i.name {
	case "hold-stop":
		args, h.stop = append(args, "--stop"), true
	case "hold-for":
		args = append(args, "--for", holdLasts.String())
	}
	var failed error // the last attempt that did, whose request may be carried out later
	code, said, err := 0, "", error(nil)
	for {
		if i.name == "hold-for" {
			ends = harness.Now() + holdLasts
		}
		code, said, err = r.leasehold(ctx, name, args...)
		r.mayFail(err, code, said, args[0])
		if err == nil && code != 0 {
			err = fmt.Errorf("leasehold %q ended with %d: %s", args, code, said)
		}
		if err == nil || ctx.Err() != nil || harness.Now() > i.From+commandTakes {
			break
		}
		failed = err
	}
	failed = errors.Join(failed, err)
	if err == nil {
		h.from, h.to = harness.Now(), ends
		if err = r.readHold(ctx, name, h); err == nil {
			r.check.holds(h)
			r.check.does(i.name)
		}
	}
	if r.misheld { // somebody is to start
		_, _, _ = r.leasehold(ctx, election, "switchover", "--timeout", switchTimeout.String())
	}
	if i.calm { // it is refused
		_ = r.command(ctx, r.switchOver, "switchover", drawn{})
	}
	_ = harness.Wait(ctx, i.lasts) // if all ends, the hold does, too
	r.check.releases(h)
	err = errors.Join(err, r.release(ctx, name))
	if failed != nil { // the request may be carried out later
		_ = harness.Wait(ctx, etcdWorks)
		err = errors.Join(err, r.release(ctx, name))
	}
	return err
}

// mayFail says what a command may come to that is never refused: etcd does not answer it.
func (r *run) mayFail(err error, code int, said, name string) {
	if err == nil && code != 0 && code != 69 {
		r.check.violate(nil, "leasehold %s has ended with %d, and says: %s", name, code, said)
	}
}

// release releases the election, however long that takes.
func (r *run) release(ctx context.Context, name string) error {
	for {
		code, said, err := r.leasehold(ctx, name, "release")
		r.mayFail(err, code, said, "release")
		if err == nil && code == 0 || ctx.Err() != nil {
			return err
		}
		r.check.note("  not released yet: %d, %s, %v", code, said, err)
	}
}

// readHold reads whom the hold names, and at what revision it was made.
func (r *run) readHold(ctx context.Context, name string, h *held) error {
	ctx, cancel := context.WithTimeout(ctx, operatorWaits)
	defer cancel()
	var there control.Hold
	got, err := clientv3.NewKV(r.Client).Get(ctx, control.HoldOf(name))
	if err == nil && len(got.Kvs) == 0 {
		err = errors.New("the hold is over")
	}
	if err == nil {
		err = control.Decode(got.Kvs[0].Value, &there)
	}
	if err == nil {
		h.token, h.made = there.Token, got.Kvs[0].ModRevision
	}
	return err
}

// switchOver asks for a switchover. It is served, refused or withdrawn within its time.
func (r *run) switchOver(ctx context.Context, i *injection) error {
	args := []string{"switchover", "--timeout", switchTimeout.String()}
	if to := i.switchesTo(); to != "" {
		args = append(args, "--to", to)
	}
	began := time.Now()
	code, said, err := r.leasehold(ctx, election, args...)
	if err != nil {
		r.check.violate(nil, "leasehold %q has not ended within %v: %v", args, commandTakes, err)
		return err
	}
	r.check.note("  #%d has ended with %d: %s", i.number, code, said)
	if i.calm && code == 75 && r.check.isCalm(i.From) {
		r.check.violate(nil, "nothing else was wrong, and a switchover was neither served nor "+
			"refused: %s", said)
	}
	return r.check.answered(i, code, said, began, func() (handovers []check.Entry) {
		for _, c := range r.candidates {
			handovers = append(handovers, check.Handovers(c.log())...)
		}
		return handovers
	})
}

// command carries out a command while nothing else is wrong. It returns why it came to nothing.
func (r *run) command(
	ctx context.Context, do func(context.Context, *injection) error, name string, d drawn,
) error {
	n := slices.IndexFunc(commands, func(k kind) bool { return k.name == name })
	d.kind, d.number = &commands[n], len(r.schedule)+1
	now := harness.Now()
	i := &injection{drawn: d, Interval: check.Interval{From: now, To: now + d.lasts}, calm: true}
	r.injected = append(r.injected, i)
	r.check.begins(i)
	err := do(ctx, i)
	if err != nil {
		r.idle(i, err)
	}
	return err
}

// failsBackWithin is within how many TTLs a failback comes: the new elector has to see the others
// for two, lets some of them queue again, and looks once in each.
const failsBackWithin = 8

// drillFailback has a leader that makes failbacks get a lower priority than another candidate. Then
// it may not lead on, unless its job ends meanwhile: it waits longer then.
func (r *run) drillFailback(ctx context.Context) {
	if r.misheld {
		return
	}
	from := harness.Now()
	err := errors.Join(
		r.command(ctx, r.switchOver, "switchover-to", drawn{index: 0}),
		r.command(ctx, r.prioritize, "priority-reload", drawn{index: 0, priority: 10}),
		r.command(ctx, r.prioritize, "priority-reload", drawn{index: 1, priority: 90}))
	token, job := r.check.jobOf(candidateName(0))
	if err != nil || token == 0 {
		return
	}
	until := harness.Now() + failsBackWithin*r.ttl
	for harness.Now() < until {
		if t, j := r.check.jobOf(candidateName(0)); t != token || j != job {
			return
		}
		if harness.Wait(ctx, sampleEvery) != nil {
			return
		}
	}
	if r.check.isCalm(from) {
		r.check.violate([]string{candidateName(0), candidateName(1)}, "nothing else was wrong, "+
			"and %s leads %v after %s got a higher priority, token %d", candidateName(0),
			failsBackWithin*r.ttl, candidateName(1), token)
	}
}

// drill has the operator ask for a switchover, stop the job with a hold, and release it, while
// nothing else is wrong. Then each must be done soon.
func (r *run) drill(ctx context.Context) error {
	if r.misheld {
		return nil
	}
	// Until then those that a fault has killed may be in the queue.
	if err := harness.Wait(ctx, r.ttl+recovers); err != nil {
		return err
	}
	nobody := drawn{index: candidateCount} // is of that name
	lasts := stopGrace + recovers + 200*time.Millisecond
	_ = r.command(ctx, r.switchOver, "switchover", drawn{})
	_ = r.command(ctx, r.switchOver, "switchover-to", nobody)
	_ = r.command(ctx, r.hold, "hold-stop", drawn{lasts: lasts})
	took, err := r.jobWithin(ctx, harness.Now(), r.recoveryBound(), "the release of a hold")
	r.check.returned(took)
	return err
}

// prioritize gives a candidate another priority, by a reload or by a restart.
func (r *run) prioritize(ctx context.Context, i *injection) error {
	c := r.candidates[i.index]
	c.priority.Store(int32(i.priority))
	d := c.running()
	if d == nil {
		return errors.New("its next daemon has the priority")
	}
	if i.name == "priority-restart" {
		r.check.does(i.name)
		return d.Signal(syscall.SIGTERM)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTakes)
	defer cancel()
	cmd := exec.Command(r.programs.Leasehold, "reload", "--env", fmt.Sprint(d.Guard()))
	cmd.Env = append(d.Env(), c.priorityEntry())
	reload, err := harness.StartChild("reload", d.Node, cmd)
	if err != nil {
		return err
	}
	defer reload.Kill()
	code, err := reload.Wait(ctx)
	if err == nil && code != 0 { // its etcd does not answer, or it is at its end
		err = fmt.Errorf("leasehold reload ended with %d: %s", code, reload.Log())
	}
	if err == nil {
		r.check.does(i.name)
	}
	return err
}

// priorityEntry is of a daemon's environment.
func (c *candidate) priorityEntry() string {
	return fmt.Sprintf("LEASEHOLD_PRIORITY=%d", c.priority.Load())
}
