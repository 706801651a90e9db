//go:build linux

package systemd

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// A planned stop costs milliseconds, and so does a guard that is killed, though
// systemd clears up after it, and the third elector within a minute. TRIALS=15
// for a figure.
func TestHandOver(t *testing.T) { // not beside others: it measures
	trials := 5
	if n, err := strconv.Atoi(os.Getenv("TRIALS")); err == nil {
		trials = n
	}
	w := newWorld(t)
	leader, standby, life := w.pair("/usr/bin/testjob setsid daemonize")
	for _, fault := range []string{"systemctl stop", "guard killed", "electors killed"} {
		var dead, took []float64
		for range trials {
			w.waitLeading(leader)
			w.waitStandby(standby, leader)
			guard, elector := w.processes(leader)
			if fault == "electors killed" {
				for range 2 {
					elector = w.replaceElector(leader)
				}
			}
			at := harness.Now()
			switch fault {
			case "systemctl stop":
				w.run(leader, "systemctl", "stop", "--no-block", unit)
			case "guard killed":
				w.must(unix.Kill(guard, unix.SIGKILL))
			case "electors killed":
				w.must(unix.Kill(elector, unix.SIGKILL))
			}
			next := w.waitNext(life, waitTimeout)
			if next.Candidate != standby.Name {
				t.Errorf("the next job is of %s", next.Candidate)
			}
			took = append(took, harness.Milliseconds(next.Started-at))
			dead = append(dead, harness.Milliseconds(w.waitDead(life, waitTimeout)-at))
			if fault == "systemctl stop" {
				w.waitFor(leader, unit, waitTimeout, state{"ActiveState": "inactive"})
				w.run(leader, "systemctl", "start", unit)
			}
			life, leader, standby = next, standby, leader
		}
		t.Logf("%s, %d trials: job dead after %s, "+
			"next job on the other machine after %s (medians; longest %s)", fault, trials,
			harness.Span(harness.Median(dead)), harness.Span(harness.Median(took)),
			harness.Span(harness.Percentile(took, 100)))
		// Ten times what was seen. Whatever waits for the lease to expire takes 15 s.
		if median := harness.Median(took); median > 1000 {
			t.Errorf("%s: %s to the next job, want 1 s at most: %.0f",
				fault, harness.Span(median), took)
		}
	}
	w.waitStandby(standby, leader)
	w.noOverlaps()
	for _, m := range w.machines {
		properties, err := m.Show(w.ctx, unit)
		w.must(err)
		if n, err := strconv.Atoi(properties["NRestarts"]); err != nil || n < trials-1 {
			t.Errorf("%s was restarted %s times on %s", unit, properties["NRestarts"], m.Name)
		}
	}
}

// An elector that is killed, or hangs, is replaced: systemd has nothing to do, and
// the job none of it. The unit's watchdog would be slower, however long the TTL.
func TestElectorReplaced(t *testing.T) {
	for _, c := range []struct {
		name    string
		ttl     string
		sig     unix.Signal
		standby bool
	}{
		{"leader, killed", "15s", unix.SIGKILL, false},
		{"leader, hangs", "5s", unix.SIGSTOP, false},
		{"leader, hangs, long TTL", "5m", unix.SIGSTOP, false},
		{"standby, killed", "15s", unix.SIGKILL, true},
		{"standby, hangs", "5s", unix.SIGSTOP, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			leader, standby, life := w.pair("/usr/bin/testjob setsid daemonize",
				"LEASEHOLD_TTL="+c.ttl)
			struck := leader
			if c.standby {
				struck = standby
			}
			_, elector := w.processes(struck)
			w.must(unix.Kill(elector, c.sig))
			w.waitOther(struck, elector)
			w.until(waitTimeout, func() error {
				if !strings.Contains(struck.Journal(w.ctx, unit), "another elector runs") {
					return errors.New("the journal does not say that another elector runs")
				}
				return nil
			})
			w.waitLeading(leader)
			w.waitStandby(standby, leader)
			for _, l := range w.witness.Lives() {
				if l.Token != life.Token || !l.Alive() {
					t.Errorf("another job, or one that has exited: %+v", l)
				}
			}
			properties, err := struck.Show(w.ctx, unit)
			w.must(err)
			if n := properties["NRestarts"]; n != "0" {
				t.Errorf("the unit was restarted %s times", n)
			}
		})
	}
}

// Where the guard is killed and the elector hangs nobody is left but the unit
// to kill the job, and it does so before the lease ends: whatever PATH the env
// file has, and wherever cgroup v2 is mounted.
func TestKilled_GuardWhileElectorHangs(t *testing.T) {
	for _, c := range []struct {
		name  string
		more  []string // in the env file
		moved bool     // cgroup v2 is not where systemd has it
	}{
		{name: "with a PATH that leads nowhere", more: []string{"PATH=/nowhere"}},
		{name: "with another mount point", moved: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			leader, standby, life := w.pair(stubborn, c.more...)
			if c.moved {
				w.clearUpWith(leader,
					"mkdir -p /run/unified && mount --move /sys/fs/cgroup /run/unified")
			}
			guard, elector := w.processes(leader)
			w.must(unix.Kill(elector, unix.SIGSTOP))
			at := harness.Now()
			w.must(unix.Kill(guard, unix.SIGKILL))
			// The lease has 12 s more at least.
			if took := w.waitDead(life, waitTimeout) - at; took > 8*time.Second {
				t.Errorf("the job was dead after %v", took)
			}
			w.waitFor(leader, unit, waitTimeout, state{
				"ActiveState": "active", "NRestarts": "1", "Result": "success",
			})
			if next := w.waitNext(life, waitTimeout); next.Candidate != standby.Name {
				t.Errorf("the next job is of %s", next.Candidate)
			}
			journal := leader.Journal(w.ctx, unit)
			for _, bad := range []string{
				"left-over", "Control process exited", "find its own cgroup",
			} {
				if strings.Contains(journal, bad) {
					t.Errorf("something is left, or the unit could not clear up:\n%s", journal)
					break
				}
			}
			w.noOverlaps()
		})
	}
}

// Where there is no cgroup v2 the unit can't clear up, and says so.
func TestKilled_NoCgroup(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.boot("a")
	w.configure(m, "/usr/bin/testjob")
	w.run(m, "systemctl", "start", unit)
	w.waitJob(m)
	w.clearUpWith(m, "umount -l /sys/fs/cgroup")
	w.run(m, "systemctl", "stop", unit)
	w.waitFor(m, unit, waitTimeout, state{"ActiveState": "inactive", "Result": "success"})
	journal := m.Journal(w.ctx, unit)
	if !strings.Contains(journal, "the unit cannot find its own cgroup") {
		t.Errorf("the journal does not say that the unit can't clear up:\n%s", journal)
	}
}

// clearUpWith lets what the unit does at its end do it in a mount namespace of
// its own, after the commands.
func (w *world) clearUpWith(m *Machine, commands string) {
	w.t.Helper()
	text := w.run(m, "systemctl", "cat", unit)
	_, command, found := strings.Cut(text, "\nExecStopPost=+/bin/sh ")
	command, _, ended := strings.Cut(command, "\n\n")
	if !found || !ended {
		w.t.Fatalf("the unit has no ExecStopPost= that is known here:\n%s", text)
	}
	w.must(m.Write("/usr/bin/before", "#!/bin/sh\n"+commands+" && exec /bin/sh \"$@\"\n"))
	w.must(os.Chmod(m.Path("/usr/bin/before"), 0o755))
	w.dropIn(m, "[Service]\nExecStopPost=\n"+
		"ExecStopPost=+/usr/bin/unshare --mount --propagation private -- "+
		"/usr/bin/before "+command+"\n")
}

// Where all of it is killed at once, as docs/recovery.md types it, the unit's next
// start revokes the lease: the next job need not wait until it has expired.
func TestKilled_Everything(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	leader, standby, life := w.pair("/usr/bin/testjob setsid daemonize", "LEASEHOLD_TTL=2m")
	root, err := harness.ModuleRoot()
	w.must(err)
	text, err := os.ReadFile(filepath.Join(root, "docs", "recovery.md"))
	w.must(err)
	page := harness.ReadPage(string(text))
	if page.Len() == 0 {
		t.Fatal("docs/recovery.md has no commands")
	}
	w.must(page.Check(w.run(leader, "bash", "-c",
		strings.ReplaceAll(page.Script(""), "leasehold@backup", "leasehold@job"))))
	w.waitDead(life, waitTimeout)
	if next := w.waitNext(life, waitTimeout); next.Candidate != standby.Name {
		t.Errorf("the next job is of %s", next.Candidate)
	}
	w.waitStandby(leader, standby)
	const says = "its cgroup is empty"
	if journal := leader.Journal(w.ctx, unit); !strings.Contains(journal, says) {
		t.Errorf("the journal does not say %q:\n%s", says, journal)
	}
	w.noOverlaps()
}

// Where the guard hangs, the next job starts in time, never beside the old one,
// and the unit comes back.
func TestHung(t *testing.T) {
	for _, c := range []struct {
		name     string
		ttl      string
		standby  bool          // it is the standby that has it
		watchdog bool          // nothing else helps
		within   time.Duration // next job
	}{
		// The elector takes over from a margin before kill-by on: up to 12 s after the last renewal
		// that the guard has seen, and a moment. The watchdog comes after 30 s.
		{name: "guard of the leader", ttl: "15s", within: 15 * time.Second},
		{name: "guard of the standby", ttl: "5s", standby: true, watchdog: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			leader, standby, life := w.pair(stubborn, "LEASEHOLD_TTL="+c.ttl)
			struck := leader
			if c.standby {
				struck = standby
			}
			guard, _ := w.processes(struck)
			w.must(unix.Kill(guard, unix.SIGSTOP))
			if c.standby {
				w.waitFor(struck, unit, 2*time.Minute, state{
					"ActiveState": "active", "NRestarts": "1", "StatusText": "standby, leader is a",
				})
				if !w.waitJob(leader).Alive() || len(check.NewHistory(w.witness.Lives())) != 1 {
					t.Errorf("the job was moved: %v", w.witness.Lives())
				}
			} else {
				next := w.waitNext(life, c.within)
				if next.Candidate != standby.Name {
					t.Errorf("the next job is of %s", next.Candidate)
				}
				w.waitFor(struck, unit, time.Minute, state{
					"ActiveState": "active", "NRestarts": "1", "StatusText": "standby, leader is b",
				})
			}
			said := strings.Contains(struck.Journal(w.ctx, unit), "Watchdog timeout")
			if said != c.watchdog {
				t.Errorf("the watchdog has acted: %v, want %v", said, c.watchdog)
			}
			w.noOverlaps()
		})
	}
}
