//go:build linux

package systemd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

func TestUnit_Verify(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.boot("a")
	w.configure(m, "/usr/bin/testjob")
	if out := w.run(m, "systemd-analyze", "verify", unit); out != "" {
		t.Errorf("systemd-analyze verify complains:\n%s", out)
	}
	path, err := m.Show(w.ctx, unit)
	w.must(err)
	out := w.run(m, "systemd-analyze", "security", "--offline=yes", "--no-pager",
		path["FragmentPath"])
	level := regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`).FindStringSubmatch(out)
	if level == nil {
		t.Fatalf("no exposure level in:\n%s", out)
	}
	t.Logf("systemd-analyze security: %s", level[1])
	if f, err := strconv.ParseFloat(level[1], 64); err != nil || f > 3.0 {
		t.Errorf("exposure level %s, want 3.0 at most:\n%s", level[1], out)
	}
}

// From start to stop, on two machines.
func TestUnit_StartAndStop(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b, life := w.pair("/usr/bin/testjob slow-stop=2s", "LEASEHOLD_STOP_GRACE=20s")

	for m, want := range map[*Machine]string{
		a: fmt.Sprintf(`Status: "leading, token %d"`, life.Token),
		b: `Status: "standby, leader is a"`,
	} {
		out := m.Status(w.ctx, unit)
		if !strings.Contains(out, want) {
			t.Errorf("systemctl status on %s does not say %s:\n%s", m.Name, want, out)
		}
	}
	out := a.Status(w.ctx, unit)
	if !strings.Contains(out, `msg="job started"`) {
		t.Errorf("systemctl status does not show the log:\n%s", out)
	}

	// The job has a cgroup of its own, and none of the daemon's processes is in it.
	cgroup, err := a.Cgroup(w.ctx, unit)
	w.must(err)
	guard, elector := w.processes(a)
	own, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	w.must(err)
	for _, pid := range []int{guard, elector} {
		if !strings.Contains("\n"+string(own), fmt.Sprintf("\n%d\n", pid)) {
			t.Errorf("%d is not right in the unit's cgroup: %q", pid, own)
		}
	}
	leaves, err := filepath.Glob(filepath.Join(cgroup, "leasehold-*", "*", "cgroup.procs"))
	w.must(err)
	if len(leaves) != 1 {
		t.Fatalf("cgroups of the job: %q", leaves)
	}
	if procs, err := os.ReadFile(leaves[0]); err != nil || len(strings.Fields(string(procs))) != 1 {
		t.Errorf("in the job's cgroup: %q, %v", procs, err)
	}
	// The guard's thread has SCHED_FIFO (policy 1, field 41 of its stat), where this machine
	// lets systemd raise limits.
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", guard))
	w.must(err)
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", guard, guard))
	w.must(err)
	policy := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+2:]))[38]
	raised := regexp.MustCompile(`(?m)^Max realtime priority +1 `).Match(limits)
	if raised && policy != "1" {
		t.Errorf("the guard's scheduling policy is %s, want 1", policy)
	} else if !raised {
		t.Log("LimitRTPRIO= can't be raised here: the guard has no real-time priority")
	}
	// No endpoint, unless the file says so.
	if out, err := a.Run(w.ctx, "leasehold", "check"); err == nil {
		t.Errorf("something listens: %s", out)
	}
	// The job is no more than it has to be.
	status := life.Status
	if uid := strings.Fields(status["Uid"]); len(uid) == 0 || uid[0] == "0" {
		t.Errorf("the job's user is %s", status["Uid"])
	}
	if status["CapEff"] != "0000000000000000" || status["NoNewPrivs"] != "1" ||
		status["Seccomp"] != "2" {
		t.Errorf("the job's capabilities %s, NoNewPrivs %s, Seccomp %s",
			status["CapEff"], status["NoNewPrivs"], status["Seccomp"])
	}

	// A job that takes its time gets it.
	began := harness.Now()
	w.run(a, "systemctl", "stop", unit)
	if took := harness.Now() - began; took < 2*time.Second {
		t.Errorf("the stop took %v, and the job wants 2s", took)
	}
	next := w.waitNext(life, waitTimeout)
	if next.Candidate != "b" {
		t.Errorf("the next job is of %s", next.Candidate)
	}
	w.waitFor(a, unit, waitTimeout, state{"ActiveState": "inactive", "Result": "success"})
	w.waitLeading(b)
	journal := a.Journal(w.ctx, unit)
	for _, want := range []string{
		`level=INFO msg="job exited"`, `elapsed=2(\.\d+)?s`,
		`level=INFO msg="exiting: planned stop"`, `exit_code=0`,
	} {
		if !regexp.MustCompile(want).MatchString(journal) {
			t.Errorf("the journal does not say %s:\n%s", want, journal)
		}
	}

	// It leaves nothing, and starts again.
	if left, err := os.ReadDir(cgroup); err == nil {
		t.Errorf("the unit's cgroup is left: %v", left)
	}
	w.run(a, "systemctl", "start", unit)
	w.waitStandby(a, b)
	w.noOverlaps()
}

// A job that does not listen is killed after its grace, and no sooner.
func TestUnit_StopStubborn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b, life := w.pair(stubborn, "LEASEHOLD_STOP_GRACE=3s")
	began := harness.Now()
	w.run(a, "systemctl", "stop", unit)
	if took := harness.Now() - began; took < 3*time.Second {
		t.Errorf("the stop took %v, and the grace is 3s", took)
	}
	w.waitFor(a, unit, waitTimeout, state{"ActiveState": "inactive", "Result": "success"})
	w.waitNext(life, waitTimeout)
	w.waitLeading(b)
	w.noOverlaps()
}

// systemd waits as long as the job may take, whatever the unit says.
func TestUnit_GraceAboveTimeoutStop(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.boot("a")
	w.dropIn(m, "[Service]\nTimeoutStopSec=1s\n")
	w.configure(m, "/usr/bin/testjob slow-stop=5s", "LEASEHOLD_STOP_GRACE=2m")
	w.run(m, "systemctl", "start", unit)
	life := w.waitJob(m)
	began := harness.Now()
	w.run(m, "systemctl", "stop", unit)
	if took := w.waitDead(life, waitTimeout) - began; took < 5*time.Second {
		t.Errorf("the job was dead after %v, and wants 5s", took)
	}
	w.waitFor(m, unit, waitTimeout, state{"ActiveState": "inactive", "Result": "success"})
}

// A stop in the middle of a start is as quick as any other.
func TestUnit_StopWhileStarting(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.boot("a")
	w.configure(m, "/usr/bin/testjob")
	for range 5 {
		w.run(m, "systemctl", "start", "--no-block", unit)
		began := harness.Now()
		w.run(m, "systemctl", "stop", unit)
		if took := harness.Now() - began; took > 20*time.Second {
			t.Errorf("the stop took %v", took)
		}
		w.waitFor(m, unit, waitTimeout, state{"ActiveState": "inactive"})
	}
}

// Changes of the env file come into force with a restart.
func TestUnit_RestartReadsSettings(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.boot("a")
	// What the docs say of quotes.
	w.configure(m, `/usr/bin/testjob "two words" 'and "three" more' back\\ slash $HOME ; *`)
	w.run(m, "systemctl", "start", unit)
	life := w.waitJob(m)
	want := []string{"two words", `and "three" more`, "back slash", "$HOME", ";", "*"}
	if !slices.Equal(life.Args[1:], want) {
		t.Errorf("the job's arguments are %q, want %q", life.Args[1:], want)
	}
	w.configure(m, `'"/usr/bin/testjob" "two words" more'`)
	w.run(m, "systemctl", "restart", unit)
	life = w.waitNext(life, waitTimeout)
	if got, want := fmt.Sprintf("%q", life.Args[1:]), `["two words" "more"]`; got != want {
		t.Errorf("in quotes as a whole, the job's arguments are %s, want %s", got, want)
	}
	w.configure(m, `"/usr/bin/testjob" "changed"`) // joined
	if out, err := m.Run(w.ctx, "systemctl", "restart", unit); err == nil {
		t.Errorf("a command that begins with quotes is no longer joined: %s", out)
	}
	w.waitFor(m, unit, waitTimeout, state{"ActiveState": "failed", "ExecMainStatus": "127"})
	journal := m.Journal(w.ctx, unit)
	if !strings.Contains(journal, `the command \"/usr/bin/testjobchanged\" is not found`) {
		t.Errorf("the journal does not name the command as it came:\n%s", journal)
	}
	w.configure(m, "/usr/bin/testjob changed", "LEASEHOLD_IDENTITY=somebody")
	w.run(m, "systemctl", "restart", unit)
	next := w.waitNext(life, waitTimeout)
	if next.Candidate != "somebody" || next.Args[1] != "changed" {
		t.Errorf("after the restart the job of %s runs as %q", next.Candidate, next.Args)
	}
	w.noOverlaps()
}

// Two instances on one machine are two elections, and don't collide.
func TestUnit_TwoInstances(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.boot("a")
	for _, name := range []string{"x", "y"} {
		settings := w.settings("/usr/bin/testjob "+name,
			"LEASEHOLD_ELECTION=jobs/"+name, "LEASEHOLD_IDENTITY="+name)
		w.must(m.Write("/etc/leasehold/"+name+".env", settings))
		w.run(m, "systemctl", "start", "leasehold@"+name)
	}
	for _, name := range []string{"x", "y"} {
		w.waitFor(m, "leasehold@"+name, waitTimeout, state{
			"ActiveState": "active", "StatusText": "leading, token …",
		})
	}
	w.run(m, "systemctl", "stop", "leasehold@x")
	w.waitFor(m, "leasehold@y", waitTimeout, state{
		"ActiveState": "active", "StatusText": "leading, token …",
	})
}

// What is wrong with the settings is told in full, and tried once.
func TestUnit_BadSettings(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.boot("a")
	for _, c := range []struct {
		name, text string
		code       string
		want       []string
	}{
		{
			"every fault",
			w.settings("/usr/bin/testjob", "LEASEHOLD_TTL=15", "LEASEHOLD_RESTRAT=never",
				"LEASEHOLD_LISTEN=nowhere", "LEASEHOLD_STOP_SIGNAL=9",
				"LEASEHOLD_RESTART_LIMIT=some"),
			"78",
			[]string{
				`LEASEHOLD_TTL: "15" has no unit: write 15s`,
				"LEASEHOLD_RESTRAT: unknown variable: did you mean LEASEHOLD_RESTART?",
				"LEASEHOLD_LISTEN: ", "LEASEHOLD_STOP_SIGNAL: ", "LEASEHOLD_RESTART_LIMIT: ",
			},
		},
		{
			"no JOB", "LEASEHOLD_ELECTION=jobs/job\n", "64",
			[]string{"there is no command after --", "JOB"},
		},
		{
			"no such command", w.settings("/no/such/command"), "127",
			[]string{`the command \"/no/such/command\" is not found`},
		},
		{
			"not executable", w.settings("/etc/hosts"), "126",
			[]string{`the command \"/etc/hosts\" is not executable`},
		},
	} {
		w.must(m.Write("/etc/leasehold/job.env", c.text))
		if out, err := m.Run(w.ctx, "systemctl", "start", unit); err == nil {
			t.Errorf("%s: the start succeeds: %s", c.name, out)
		}
		// While it is to be restarted the state is activating.
		w.waitFor(m, unit, waitTimeout, state{
			"ActiveState": "failed", "SubState": "failed", "NRestarts": "0",
			"ExecMainStatus": c.code, "Result": "exit-code",
		})
		out := m.Status(w.ctx, unit)
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: systemctl status does not say %s:\n%s", c.name, want, out)
			}
		}
	}

	w.must(os.Remove(m.Path("/etc/leasehold/job.env")))
	if out, err := m.Run(w.ctx, "systemctl", "start", unit); err == nil ||
		!strings.Contains(out, "Assertion failed") {
		t.Errorf("without a file: %v, %s", err, out)
	}
	out := m.Status(w.ctx, unit)
	if !strings.Contains(out, "AssertPathExists=/etc/leasehold/job.env was not met") {
		t.Errorf("systemctl status does not say that the file is missing:\n%s", out)
	}
	w.waitFor(m, unit, waitTimeout, state{"ActiveState": "failed…", "NRestarts": "0"})
}

// A job that has ended for good is left alone; what a restart can help is
// started again.
func TestUnit_ExitCodes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.boot("a")
	start := func(job string, more ...string) {
		t.Helper()
		w.run(m, "systemctl", "reset-failed")
		w.configure(m, job, more...)
		_, _ = m.Run(w.ctx, "systemctl", "start", unit) // it may end before systemd has looked
	}
	stop := func() {
		t.Helper()
		w.run(m, "systemctl", "stop", unit)
		w.run(m, "systemctl", "reset-failed") // its last exit may have been one that is restarted
		w.waitFor(m, unit, waitTimeout, state{"ActiveState": "inactive"})
	}

	// It may be restarted more often until somebody looks.
	waitRestarts := func(code string, atLeast int) {
		t.Helper()
		w.until(waitTimeout, func() error {
			p, err := m.Show(w.ctx, unit)
			if err != nil {
				return err
			}
			n, err := strconv.Atoi(p["NRestarts"])
			if err != nil || n < atLeast || p["ExecMainStatus"] != code {
				return fmt.Errorf("%s restarts after exit code %s, want %d after %s",
					p["NRestarts"], p["ExecMainStatus"], atLeast, code)
			}
			return nil
		})
	}

	start("/usr/bin/testjob exit=0")
	w.until(waitTimeout, func() error { // systemd forgets a unit that is inactive
		const exiting = `exiting: with the job's own code: the job exited with code 0"`
		journal := m.Journal(w.ctx, unit)
		if !strings.Contains(journal, exiting) ||
			!strings.Contains(journal, "Deactivated successfully") {
			return errors.New(journal)
		}
		return nil
	})
	w.waitFor(m, unit, waitTimeout, state{"ActiveState": "inactive"})
	// The daemon's own are among them.
	for _, code := range []string{"1", "2", "3", "69", "70", "71", "75", "76", "143"} {
		start("/usr/bin/testjob exit="+code, "LEASEHOLD_RESTART=never")
		w.waitFor(m, unit, waitTimeout, state{
			"ActiveState": "failed", "ExecMainStatus": code, "NRestarts": "0",
		})
	}

	// Lost under RESTART=never: 76.
	start("/usr/bin/testjob", "LEASEHOLD_RESTART=never")
	life := w.waitJob(m)
	if _, err := w.etcd.Etcdctl(w.ctx, "del", "--prefix", "jobs/job/"); err != nil {
		t.Fatal(err)
	}
	next := w.waitNext(life, waitTimeout)
	w.waitFor(m, unit, waitTimeout, state{"ActiveState": "active", "NRestarts": "1"})
	stop()

	// Not elected in time: 75.
	other := w.boot("b")
	w.configure(other, "/usr/bin/testjob")
	w.run(other, "systemctl", "start", unit)
	w.waitNext(next, waitTimeout)
	start("/usr/bin/testjob", "LEASEHOLD_WAIT=0s")
	waitRestarts("75", 2)
	stop()

	// The address is none of the machine's, and so it may be later: 71.
	start("/usr/bin/testjob", "LEASEHOLD_LISTEN=192.0.2.1:4040")
	w.waitFor(m, unit, waitTimeout, state{
		"ActiveState": "activating", "SubState": "auto-restart", "ExecMainStatus": "71",
	})
	stop()

	// The address is taken: 71.
	w.must(m.Write("/etc/leasehold/x.env", w.settings("/bin/sleep 3600",
		"LEASEHOLD_ELECTION=jobs/x", "LEASEHOLD_LISTEN=127.0.0.1:4040")))
	w.run(m, "systemctl", "start", "leasehold@x")
	start("/usr/bin/testjob", "LEASEHOLD_LISTEN=127.0.0.1:4040")
	waitRestarts("71", 1)
	w.run(m, "systemctl", "stop", "leasehold@x")
	w.waitStandby(m, other)

	// A crash: a signal that Go's runtime takes for one of its own.
	properties, err := m.Show(w.ctx, unit)
	w.must(err)
	restarts, err := strconv.Atoi(properties["NRestarts"])
	w.must(err)
	guard, _ := w.processes(m)
	w.must(unix.Kill(guard, unix.SIGSEGV))
	w.waitFor(m, unit, waitTimeout, state{
		"ActiveState": "active", "StatusText": "standby, leader is b",
		"NRestarts": strconv.Itoa(restarts + 1),
	})
	w.noOverlaps()
}
