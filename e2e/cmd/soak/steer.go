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

// Beside the faults an operator steers the election, with one command after the other. While it is
// held, nobody starts whom the hold does not name. A switchover that is refused ends no term. (That
// one which is served makes no two jobs shows as after every other fault. So it does after a change
// of priorities, and after the failback that may follow.)

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
	{2, "hold-stop", anElectionsFuture, 0.3, 1.5, nil, ""},
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
		free = c.at + c.lasts + switchTimeout + time.Second
		schedule = append(schedule, c)
	}
	slices.SortStableFunc(schedule, func(a, b drawn) int { return int(a.at - b.at) })
	return schedule
}

// held is a hold, from when it was there until its release was asked for.
type held struct {
	token    int64 // of the leader that goes on
	from, to time.Duration
}

// steered is what has come of the operator's commands.
type steered struct {
	Holds    int `json:"holds"`
	Switched int `json:"switchovers"`
	Refused  int `json:"switchovers_refused"`
	Unserved int `json:"switchovers_not_served"`
	// Priorities are changes of them.
	Priorities int `json:"priorities"`
	Failbacks  int `json:"failbacks"`
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
	switch i.name {
	case "hold-stop":
		args = append(args, "--stop")
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
		if h.token, err = r.heldToken(ctx, name); err == nil {
			r.check.holds(h)
		}
	}
	if r.misheld { // somebody is to start
		_, _, _ = r.leasehold(ctx, election, "switchover", "--timeout", switchTimeout.String())
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

// release releases the election, however long that takes.
func (r *run) release(ctx context.Context, name string) error {
	for {
		code, said, err := r.leasehold(ctx, name, "release")
		if err == nil && code == 0 || ctx.Err() != nil {
			return err
		}
		r.check.note("  not released yet: %d, %s, %v", code, said, err)
	}
}

// heldToken reads whom the hold names.
func (r *run) heldToken(ctx context.Context, name string) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, operatorWaits)
	defer cancel()
	var h control.Hold
	got, err := clientv3.NewKV(r.Client).Get(ctx, control.HoldOf(name))
	if err == nil && len(got.Kvs) == 0 {
		err = errors.New("the hold is over")
	}
	if err == nil {
		err = control.Decode(got.Kvs[0].Value, &h)
	}
	return h.Token, err
}

// switchOver asks for a switchover.
func (r *run) switchOver(ctx context.Context, i *injection) error {
	args := []string{"switchover", "--timeout", switchTimeout.String()}
	if i.name == "switchover-to" {
		args = append(args, "--to", candidateName(i.index))
	}
	began := time.Now()
	code, said, err := r.leasehold(ctx, election, args...)
	if err != nil {
		return err
	}
	r.check.note("  #%d has ended with %d: %s", i.number, code, said)
	return r.check.answered(code, said, began, func() (handovers []check.Entry) {
		for _, c := range r.candidates {
			handovers = append(handovers, check.Handovers(c.log())...)
		}
		return handovers
	})
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
		r.check.prioritized()
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
		r.check.prioritized()
	}
	return err
}

// priorityEntry is of a daemon's environment.
func (c *candidate) priorityEntry() string {
	return fmt.Sprintf("LEASEHOLD_PRIORITY=%d", c.priority.Load())
}

// prioritized counts a change of a priority.
func (k *checker) prioritized() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counts.Steered.Priorities++
}

// answered takes what a switchover came to. One that is refused ends no term.
func (k *checker) answered(
	code int, said string, began time.Time, handovers func() []check.Entry,
) error {
	ended := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	late := k.unserved != 0 && harness.Now()-k.unserved < lateAnswer
	switch {
	case code == 0:
		k.counts.Steered.Switched++
	case code == 75:
		k.counts.Steered.Unserved++
		k.unserved = harness.Now()
	case code == 1 && strings.Contains(said, "refused: "):
		k.counts.Steered.Refused++
		if done := check.Between(handovers(), began, ended); len(done) > 0 && !late {
			k.violate(nil, "a switchover was refused (%s), and a leader handed over to %s",
				said, done[0].Match)
		}
	case code == 1: // another one leads than was asked for
		k.counts.Steered.Switched++
	default:
		k.unserved = harness.Now()
		return fmt.Errorf("it ended with %d: %s", code, said)
	}
	return nil
}

// holds is told of a hold that is there.
func (k *checker) holds(h *held) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counts.Steered.Holds++
	k.held = append(k.held, h)
}

// releases is told that the hold is about to be released.
func (k *checker) releases(h *held) {
	k.mu.Lock()
	defer k.mu.Unlock()
	h.to = min(h.to, harness.Now())
}

// judgeHeld looks for jobs that have started in spite of a hold.
func (k *checker) judgeHeld(now time.Duration) {
	for _, h := range k.held {
		for _, t := range k.since(h.from) {
			for _, l := range t.Lives {
				if l.Role == "job" && t.Token != h.token && h.from < l.Forked && l.Started < h.to {
					k.violateAt(l.Started, []string{t.Candidate}, "the %v, started %v after the "+
						"election was held, and the hold names the token %d",
						t, l.Forked-h.from, h.token)
				}
			}
		}
	}
	k.held = slices.DeleteFunc(k.held, func(h *held) bool { return h.to < now-remembered })
}
