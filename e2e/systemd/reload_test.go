//go:build linux

package systemd

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// replace replaces a program on the machine as a package manager does.
func (w *world) replace(m *Machine, path, program string) {
	w.t.Helper()
	text, err := os.ReadFile(program)
	w.must(err)
	w.must(os.WriteFile(m.Path(path+".new"), text, 0o755))
	w.must(os.Rename(m.Path(path+".new"), m.Path(path)))
}

// A reload brings another version and other settings, and the job runs on. What is wrong fails, and
// status shows why.
func TestUnit_Reload(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const version = "2.0-test"
	dir := t.TempDir()
	programs, err := harness.BuildIn(w.ctx, dir,
		"-ldflags", "-s -w -X main.version="+version, ".")
	w.must(err)
	leader, standby, life := w.pair("/usr/bin/testjob")
	// Only root may read the file. The daemon is somebody else.
	configure := func(m *Machine, job string, more ...string) {
		t.Helper()
		w.configure(m, job, more...)
		w.must(os.Chmod(m.Path("/etc/leasehold/job.env"), 0o600))
	}
	for _, m := range []*Machine{leader, standby} {
		guard, elector := w.processes(m)
		w.replace(m, "/usr/bin/leasehold", programs.Leasehold)
		configure(m, "/usr/bin/testjob", "LEASEHOLD_LOG_LEVEL=debug")
		w.run(m, "systemctl", "reload", unit)
		journal := m.Journal(w.ctx, unit)
		for _, want := range []string{"reloaded: leasehold " + version, "version=" + version} {
			if !strings.Contains(journal, want) {
				t.Errorf("the journal does not say %q:\n%s", want, journal)
			}
		}
		again, other := w.processes(m)
		environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", other))
		w.must(err)
		if !strings.Contains(string(environ), "LEASEHOLD_LOG_LEVEL=debug\x00") {
			t.Errorf("the new setting does not reach the elector: %q", environ)
		}
		if again != guard || other == elector {
			t.Errorf("the guard was %d, and is %d; the elector was %d, and is %d",
				guard, again, elector, other)
		}
	}
	w.waitLeading(leader)
	w.waitStandby(standby, leader)

	fails := func(want string) {
		t.Helper()
		_, elector := w.processes(leader)
		if out, err := leader.Run(w.ctx, "systemctl", "reload", unit); err == nil {
			t.Errorf("%s: the reload succeeds: %s", want, out)
		}
		out := leader.Status(w.ctx, unit)
		if !strings.Contains(out, want) || !strings.Contains(out, "leading, token") {
			t.Errorf("systemctl status does not say %q:\n%s", want, out)
		}
		if _, other := w.processes(leader); other != elector {
			t.Errorf("%s: the elector is another one", want)
		}
	}
	configure(leader, "/usr/bin/testjob", "LEASEHOLD_TTL=20s")
	fails("LEASEHOLD_TTL can't be changed by a reload")
	configure(leader, "/usr/bin/testjob other")
	fails("the command can't be changed by a reload")
	configure(leader, "/usr/bin/testjob")
	w.run(leader, "systemctl", "reload", unit)
	if lives := w.witness.Lives(); len(lives) != 1 || !lives[0].Alive() ||
		lives[0].Token != life.Token {
		t.Errorf("the jobs: %v", check.NewHistory(lives))
	}
	w.noOverlaps()
}
