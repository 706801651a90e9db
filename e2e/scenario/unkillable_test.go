//go:build linux

package scenario_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// TestUnkillable: while the kernel does not carry out the SIGKILL of a job in uninterruptible
// sleep, the daemon keeps the lease, so that nobody else leads, and says so every 10 s. So does the
// elector that has taken the guard's place, even if the guard goes on. It runs beside no other
// test: a guard that goes on takes an elector for silent that gets no processor for a sixth of the
// TTL.
func TestUnkillable(t *testing.T) {
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			testUnkillable(t, u, "job can't be killed", 0, func(*trial, *candidate) {})
		})
		t.Run(u.name+"/guard hung for a while", func(t *testing.T) {
			t.Parallel()
			testUnkillable(t, u, "job or its guard can't be killed", 137,
				func(tr *trial, leader *candidate) {
					tr.must(syscall.Kill(leader.Guard(), syscall.SIGSTOP))
					waitLogged(tr, leader, "guard hangs")
					tr.must(syscall.Kill(leader.Guard(), syscall.SIGCONT))
				})
		})
	}
}

// testUnkillable has the job of a daemon asked to stop. Then fault does something to the daemon.
func testUnkillable(t *testing.T, u user, says string, code int, fault func(*trial, *candidate)) {
	t.Helper()
	harness.NeedsRoot(t) // for the freezer
	tr := newTrial(t, u, harness.ClusterConfig{})
	tr.ttl = 10 * time.Second // it is over when it is said the second time
	leader, standby, job := tr.pair("")
	wake := sleepUninterruptibly(tr, job.Pid)
	tr.must(leader.Signal(syscall.SIGTERM))
	waitLogged(tr, leader, "job asked to stop")
	fault(tr, leader)
	var said []time.Time
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if said = whenLogged(leader.Log(), says+": the lease is kept"); len(said) < 2 {
			return fmt.Errorf("said %d times", len(said))
		}
		return nil
	}))
	if every := said[1].Sub(said[0]); every < 8*time.Second {
		t.Errorf("it is said every %v", every)
	}
	tr.waitRenewals(leader, 1)
	tr.waitStatus(standby, "/standby", http.StatusOK)
	if !tr.alive(job) || tr.status(leader).Lease == nil {
		t.Errorf("the job has exited, or the lease is gone: %s", leader.Log())
	}
	wake()
	tr.waitNext(job, waitTimeout)
	tr.waitExit(leader, code)
	if both := check.Overlaps(tr.witness.Lives()); len(both) > 0 {
		t.Error(both)
	}
	tr.finish()
}

// waitLogged waits until a daemon has written such a line.
func waitLogged(tr *trial, c *candidate, text string) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if len(whenLogged(c.Log(), text)) == 0 {
			return fmt.Errorf("candidate %s has not logged %q", c.Identity, text)
		}
		return nil
	}))
}

// whenLogged is when a daemon wrote such a line.
func whenLogged(log, text string) (said []time.Time) {
	for line := range strings.Lines(log) {
		at, found := strings.CutPrefix(line, "time=")
		at, _, _ = strings.Cut(at, " ")
		when, err := time.Parse(time.RFC3339Nano, at)
		if found && err == nil && strings.Contains(line, text) {
			said = append(said, when)
		}
	}
	return said
}

// alive reports whether the witness knows a process as alive.
func (tr *trial) alive(l harness.Life) bool {
	for _, now := range tr.witness.Lives() {
		if now.Pid == l.Pid && now.Started == l.Started {
			return now.Alive()
		}
	}
	return false
}

// sleepUninterruptibly puts a process into uninterruptible sleep until wake is called. The freezer
// of cgroup v1 does that. (In a frozen cgroup v2 a process can be killed.)
func sleepUninterruptibly(tr *trial, pid int) (wake func()) {
	tr.Helper()
	mount := tr.TempDir()
	if err := syscall.Mount("none", mount, "cgroup", 0, "freezer"); err != nil {
		if os.Getenv("E2E_NO_SKIP") == "1" {
			tr.Fatalf("needs the freezer of cgroup v1: %v", err)
		}
		tr.Skipf("skipped: needs the freezer of cgroup v1: %v", err)
	}
	tr.Cleanup(func() { tr.must(syscall.Unmount(mount, 0)) })
	dir := filepath.Join(mount, fmt.Sprintf("e2e-%d", pid))
	tr.must(os.Mkdir(dir, 0o755))
	set := func(file, value string) {
		tr.must(os.WriteFile(filepath.Join(dir, file), []byte(value), 0o644))
	}
	wake = func() { set("freezer.state", "THAWED") }
	tr.Cleanup(func() {
		wake()
		ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
		defer cancel()
		tr.must(harness.Until(ctx, func() error { return os.Remove(dir) }))
	})
	set("cgroup.procs", strconv.Itoa(pid))
	set("freezer.state", "FROZEN")
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err == nil && !strings.Contains(string(stat), ") D ") {
			err = fmt.Errorf("it is not in uninterruptible sleep: %s", stat)
		}
		return err
	}))
	return wake
}
