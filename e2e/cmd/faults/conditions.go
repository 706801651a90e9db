//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// hasRole returns an error until the job has the descendant that it is to have.
func hasRole(role string) func(*Trial) error {
	return func(t *Trial) error {
		if role != "" && !slices.ContainsFunc(t.Witness.Lives(), func(l harness.Life) bool {
			return l.Role == role
		}) {
			return fmt.Errorf("no process in the role %s", role)
		}
		return nil
	}
}

// hasOrphans returns an error until n orphans are there.
func hasOrphans(n int) func(*Trial) error {
	return func(t *Trial) error {
		spawner, err := t.Machine.Spawner()
		if found := len(harness.Children(spawner)); err == nil && found < n {
			err = fmt.Errorf("%d orphans", found)
		}
		return err
	}
}

// hasTouched returns an error until the job has touched all its memory.
func hasTouched(bytes int) func(*Trial) error {
	return func(t *Trial) error {
		statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", t.Job.Pid))
		if err != nil {
			return err
		}
		pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
		if resident := pages * os.Getpagesize(); err == nil && resident < bytes {
			err = fmt.Errorf("%d MiB are touched", resident>>20)
		}
		return err
	}
}

// timerLatency reads from the leader's log how late the guard served a deadline. The guard writes
// it when all orphans have been reaped. There is none where the elector's stop came first.
func timerLatency(t *Trial) error {
	ended := func(e check.Entry) bool { return e.Match != "started" }
	if !slices.ContainsFunc(check.JobStates(t.Machine.Log()), ended) {
		return errors.New("the leader's log does not say that its job has ended")
	}
	if all := check.TimerLatencies(t.Machine.Log()); len(all) > 0 {
		t.Figure("timer latency", check.Latency(all))
	}
	return nil
}

// noJobWithoutQuorum: that leasehold's job ended in time shows when its lease is taken by the time
// of the last renewal. Etcd itself could not have told it anything.
func noJobWithoutQuorum(t *Trial) error {
	if !t.Of.Ours() {
		return nil
	}
	var end time.Duration
	for _, term := range t.history() {
		if term.Alive() {
			t.violated("a job of %s runs when etcd has had no quorum for %v",
				term.Candidate, harness.Now()-t.Began)
		}
		end = max(end, term.End)
	}
	if took := end - t.Began; took > t.TTL {
		t.violated("the job ended %v after etcd had lost its quorum, after the lease's end", took)
	}
	return nil
}

// inBudget: the job of a leader that has lost contact gets the stop signal at stop-at, and has
// exited by kill-by, whatever becomes of its elector.
func inBudget(t *Trial) error {
	if err := t.anotherElector(); err != nil {
		return err
	}
	// The last renewal may be older than an interval. One that was under way may have counted.
	least, most := t.TTL/4, t.TTL-t.TTL/10+200*time.Millisecond
	if ended := t.sample.Dead; ended == nil || *ended < harness.Milliseconds(least) ||
		*ended > harness.Milliseconds(most) {
		t.violated("the job exited after %s, want %v to %v", duration(ended), least, most)
	}
	return nil
}

// gaveUp: a guard that replaces no elector any more has the lease revoked, so that the next job
// waits for no TTL, and exits with 70.
func gaveUp(t *Trial) error {
	if t.Machine.Running() {
		return errors.New("the leader's daemon has not exited")
	}
	t.exited(70)
	t.startedWithin(time.Second)
	return nil
}

// recovered: a daemon whose job could not leave the machine's cgroup has the old lease revoked as
// soon as it is started again. Root's job could have left it, so that the lease expires.
func recovered(t *Trial) error {
	if !t.Of.Ours() || t.sample.Next == nil {
		return nil
	}
	started := t.Figures[fault.StartedAgain]
	waited := t.next().Started - t.Began - started
	t.Figure("next job after that", waited)
	// With hooks the user may change the network, and for the daemon that is one right too many.
	if t.Of.uid != 0 && t.addresses == nil && waited > t.TTL/2 {
		t.violated("the next job started %v after the daemon, want %v at most", waited, t.TTL/2)
	}
	return nil
}

// stoppedInOrder: the job has had its whole grace, and then the planned stop has gone on.
func stoppedInOrder(t *Trial) error {
	if err := t.anotherElector(); err != nil {
		return err
	}
	if t.Machine.Running() {
		return errors.New("the leader's daemon has not exited")
	}
	least := stopGrace - 50*time.Millisecond
	if ended := t.sample.Dead; ended == nil || *ended < harness.Milliseconds(least) {
		t.violated("the job exited after %s, before its grace of %v was over",
			duration(ended), stopGrace)
	}
	t.exited(0)
	t.startedWithin(stopGrace + time.Second)
	return nil
}

// switched: the candidate that was chosen leads as soon as the old job has exited.
func switched(t *Trial) error {
	if next := t.next(); next != nil && next.Candidate != t.Others[0].Name {
		t.violated("%s leads, and not the next in line", next.Candidate)
	}
	t.startedWithin(stopGrace + t.TTL/2)
	return nil
}

// notBeforeRelease: nobody starts while the election is held, and the old job has exited.
func notBeforeRelease(t *Trial) error {
	if !t.lasts {
		return nil
	}
	if t.history().Find(t.Job).Alive() {
		return errors.New("the old job has not exited")
	}
	if next := t.next(); next != nil {
		t.violated("a job of %s started in spite of the hold", next.Candidate)
	}
	return nil
}

// notBeforeHoldOver: nobody starts before the hold's time is over, and somebody does then.
func notBeforeHoldOver(t *Trial) error {
	over := t.Figures[fault.HoldOver]
	if next := t.next(); next != nil && next.Started < t.Began+over {
		t.violated("a job of %s started %v before the hold was over",
			next.Candidate, t.Began+over-next.Started)
	}
	t.startedWithin(over + t.TTL) // etcd looks for expired leases every 500 ms
	return nil
}

// keptPlace: the standby's key, which is its place in the queue, is the one that it had.
func keptPlace(t *Trial) error {
	if next := t.next(); next != nil && next.Token != t.Standing {
		t.violated("the standby's key was created at %d, and its job has the token %d",
			t.Standing, next.Token)
	}
	return nil
}

// anotherElector returns an error until another elector of the leader's daemon runs.
func (t *Trial) anotherElector() error {
	if !strings.Contains(t.Machine.Log(), "elector takes the place of another one") {
		return errors.New("the leader's log does not tell of another elector")
	}
	return nil
}

// startedWithin notes that the next job has not started so soon.
func (t *Trial) startedWithin(d time.Duration) {
	if next := t.sample.Next; next != nil && *next > harness.Milliseconds(d) {
		t.violated("the next job started after %s, want %v at most", duration(next), d)
	}
}

// exited notes that the leader's daemon, which has exited, has not done so with that code.
func (t *Trial) exited(want int) {
	if code, err := t.Machine.Wait(context.Background()); err != nil || code != want {
		t.violated("the leader's daemon exited with %d, want %d", code, want)
	}
}
