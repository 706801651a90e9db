//go:build linux

package scenario_test

import (
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
// sleep, the daemon keeps the lease, so that nobody else leads, and says so every 10 s.
func TestUnkillable(t *testing.T) {
	// Root alone: without a cgroup, on a starved machine, the elector took the guard for hung.
	for _, u := range users()[:1] {
		t.Run(u.name, func(t *testing.T) {
			harness.NeedsRoot(t) // for the freezer
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			tr.ttl = 20 * time.Second // it is over when it is said the second time
			leader, standby, job := tr.pair("")
			wake := sleepUninterruptibly(tr, job.Pid)
			tr.must(leader.Signal(syscall.SIGTERM))
			var said []time.Time
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				if said = unkillable(leader.Log()); len(said) < 2 {
					return fmt.Errorf("said %d times", len(said))
				}
				return nil
			}))
			if every := said[1].Sub(said[0]); every < 10*time.Second {
				t.Errorf("it is said every %v", every)
			}
			tr.waitRenewals(leader, 1)
			tr.waitStatus(standby, "/standby", http.StatusOK)
			if !tr.alive(job) || tr.status(leader).Lease == nil {
				t.Errorf("the job has exited, or the lease is gone: %s", leader.Log())
			}
			wake()
			tr.waitNext(job, waitTimeout)
			tr.waitExit(leader, 0)
			if both := check.Overlaps(tr.witness.Lives()); len(both) > 0 {
				t.Error(both)
			}
			tr.finish()
		})
	}
}

// unkillable is when a daemon wrote that its job can't be killed.
func unkillable(log string) (said []time.Time) {
	for line := range strings.Lines(log) {
		at, found := strings.CutPrefix(line, "time=")
		at, _, _ = strings.Cut(at, " ")
		when, err := time.Parse(time.RFC3339Nano, at)
		if found && err == nil && strings.Contains(line, `msg="job can't be killed: the lease is`) {
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
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error { return os.Remove(dir) }))
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
