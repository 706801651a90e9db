//go:build linux

package image_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// TestRecovered: a container is killed whole. The next one with the same volume leads without
// waiting for the old lease, whose TTL is far beyond the bound.
func TestRecovered(t *testing.T) {
	s := newTestbed(t)
	state := sharedDir(t)
	start := func() *box {
		return s.start("a", plan{
			image: imageLeasehold, flags: []string{"-v", state + ":/state"},
			env: []string{"LEASEHOLD_STATE_DIR=/state"},
			args: []string{
				"--", "/testjob", "ignore-term", "setsid", "daemonize", "wipe-env",
			},
		})
	}
	first := start()
	job := s.waitJob(first)
	s.waitRoles(job, "job", "setsid", "daemon")
	first.kill(t, "KILL")
	s.waitExit(first, 137)
	s.waitDead(job)

	next := start()
	s.waitJob(next, job.Token)
	const says = "the job of the daemon before has exited: revoking its lease"
	if !strings.Contains(next.Log(), says) {
		t.Errorf("the log does not say %q", says)
	}
	s.must(harness.Until(s.wait(waitTimeout), func() error {
		_, err := loggedAt(next.Log(), "job started")
		return err
	}))
	began, err := loggedAt(next.Log(), "msg=starting ")
	s.must(err)
	started, err := loggedAt(next.Log(), "job started")
	s.must(err)
	t.Logf("the job runs %v after the start of the daemon", started.Sub(began))
	s.overlaps()

	// A volume of its own has no file, and the lease has to expire.
	next.kill(t, "KILL")
	s.waitExit(next, 137)
	state = sharedDir(t)
	alone := start()
	s.waitStatus(alone, "/standby", 200)
	if len(s.mustLeases()) != 2 {
		t.Errorf("leases: %q, want the old one and that of the standby", s.mustLeases())
	}
}

func (s *testbed) mustLeases() []string {
	s.Helper()
	leases, err := s.etcd.Leases(s.ctx)
	s.must(err)
	return leases
}

// loggedAt is when a daemon wrote the first line with that text.
func loggedAt(log, text string) (time.Time, error) {
	for line := range strings.Lines(log) {
		if strings.Contains(line, text) {
			at, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
			return time.Parse(time.RFC3339Nano, at)
		}
	}
	return time.Time{}, fmt.Errorf("not logged: %q", text)
}
