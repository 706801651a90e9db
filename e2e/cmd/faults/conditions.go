//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"leasehold/e2e/check"
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
