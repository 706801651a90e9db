//go:build linux

package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// waitTimeout is for what takes a second at most.
const waitTimeout = 30 * time.Second

const unit = "leasehold@job.service"

// stubborn is a job that only SIGKILL ends.
const stubborn = "/usr/bin/testjob ignore-term setsid daemonize"

func TestMain(m *testing.M) {
	if os.Getenv("LEASEHOLD_SHIP") == "1" && os.Geteuid() == 0 &&
		os.Getenv(harness.NetworkVariable) == "" {
		os.Exit(inNetwork())
	}
	code := m.Run()
	if built.programs != nil {
		built.programs.Remove()
	}
	os.Exit(code)
}

// inNetwork runs this program in a network namespace of its own, and clears up
// after it, however it ends.
func inNetwork() int {
	dir, err := harness.TempDir("leasehold-systemd-")
	if err == nil {
		err = os.Setenv("TMPDIR", dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	_, code := harness.EnterNetwork()
	cgroups, err := filepath.Glob(filepath.Join(harness.Cgroup2(), cgroupPrefix(os.Getpid())+"*"))
	for _, cgroup := range cgroups {
		err = errors.Join(err, removeCgroupSoon(cgroup))
	}
	if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

var built struct {
	sync.Once
	programs *harness.Programs
	err      error
}

// needs skips a test that can't run here. With E2E_NO_SKIP=1, as CI has it,
// that is a failure.
func needs(t *testing.T) {
	t.Helper()
	if os.Getenv("LEASEHOLD_SHIP") != "1" {
		t.Skip("skipped: boots systemd, which make test-systemd does (LEASEHOLD_SHIP=1)")
	}
	harness.NeedsRoot(t)
	for _, program := range []string{
		"/lib/systemd/systemd", "nsenter", "unshare", "ip", "nft", "dbus-daemon",
	} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("E2E_NO_SKIP") == "1" {
				t.Fatalf("needs %s, and E2E_NO_SKIP=1 forbids to skip", program)
			}
			t.Skipf("skipped: needs %s "+
				"(Debian's systemd, dbus, util-linux, iproute2, nftables)", program)
		}
	}
}

// A world is an etcd and machines on one network, and a witness that hears
// every job on them.
type world struct {
	t        *testing.T
	ctx      context.Context
	network  *harness.Network
	etcd     *harness.Cluster
	witness  *harness.Witness
	files    map[string]string
	machines []*Machine
}

func newWorld(t *testing.T) *world {
	t.Helper()
	needs(t)
	built.Do(func() {
		built.programs, built.err = harness.Build(context.Background(), ".", "./e2e/cmd/testjob")
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	network, err := harness.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(network.Close)
	w := &world{t: t, ctx: ctx, network: network}
	w.etcd = harness.NewTestCluster(t, harness.ClusterConfig{Network: network})
	w.witness = harness.NewTestWitness(t)
	files, err := Install(ctx, t.TempDir(), built.programs.Leasehold)
	w.must(err)
	w.files = map[string]string{"/usr/bin/testjob": built.programs.Testjob}
	for to, from := range files {
		w.files[to] = from
	}
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// boot boots a machine.
func (w *world) boot(name string) *Machine {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
	defer cancel()
	m, err := Boot(ctx, MachineConfig{
		Name: name, Network: w.network, Witness: w.witness, Files: w.files,
		Hosts: map[string]string{"etcd-1": w.etcd.Members[0].Node.Addr},
	})
	w.must(err)
	w.machines = append(w.machines, m)
	w.t.Cleanup(func() {
		if w.t.Failed() {
			out, _ := m.Run(context.Background(),
				"journalctl", "--no-pager", "-n", "200", "-o", "short-monotonic")
			w.t.Logf("journal of machine %s:\n%s", name, out)
		}
		m.Close()
	})
	return m
}

// settings are an env file for a job on a machine.
func (w *world) settings(job string, more ...string) string {
	return strings.Join(append([]string{
		"JOB=" + job,
		"LEASEHOLD_ELECTION=jobs/job",
		"LEASEHOLD_ENDPOINTS=" + strings.Join(w.etcd.Endpoints(), ","),
		harness.WitnessVariable + "=" + w.witness.Addr,
	}, more...), "\n") + "\n"
}

// configure writes the env file of leasehold@job.
func (w *world) configure(m *Machine, job string, more ...string) {
	w.t.Helper()
	w.must(m.Write("/etc/leasehold/job.env", w.settings(job, more...)))
}

// dropIn adds to the unit.
func (w *world) dropIn(m *Machine, text string) {
	w.t.Helper()
	w.must(m.Write("/etc/systemd/system/"+unit+".d/test.conf", text))
	w.run(m, "systemctl", "daemon-reload")
}

// run runs a command that must succeed.
func (w *world) run(m *Machine, args ...string) string {
	w.t.Helper()
	out, err := m.Run(w.ctx, args...)
	if err != nil {
		w.t.Fatalf("%v: %s\n%s", err, out, m.Journal(w.ctx, unit))
	}
	return out
}

// until waits until f returns nil.
func (w *world) until(d time.Duration, f func() error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, d)
	defer cancel()
	w.must(harness.Until(ctx, f))
}

// A state holds properties of a unit, as systemctl shows them.
type state = map[string]string

// waitFor waits until properties of a unit have the values, or begin so where
// the value ends with "…".
func (w *world) waitFor(m *Machine, unit string, d time.Duration, want state) state {
	w.t.Helper()
	var properties map[string]string
	w.until(d, func() (err error) {
		if properties, err = m.Show(w.ctx, unit); err != nil {
			return err
		}
		for name, value := range want {
			begin, whole := strings.CutSuffix(value, "…")
			if got := properties[name]; got != value && (!whole || !strings.HasPrefix(got, begin)) {
				return fmt.Errorf("%s on %s: %s=%s, want %s", unit, m.Name, name, got, value)
			}
		}
		return nil
	})
	return properties
}

func (w *world) waitLeading(m *Machine) {
	w.t.Helper()
	w.waitFor(m, unit, waitTimeout, state{
		"ActiveState": "active", "StatusText": "leading, token …",
	})
}

func (w *world) waitStandby(m, leader *Machine) {
	w.t.Helper()
	w.waitFor(m, unit, waitTimeout, state{
		"ActiveState": "active", "StatusText": "standby, leader is " + leader.Name,
	})
}

// waitJob waits for the job of a machine.
func (w *world) waitJob(m *Machine) harness.Life {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, waitTimeout)
	defer cancel()
	life, err := w.witness.WaitForJob(ctx, func(l harness.Life) bool {
		return l.Candidate == m.Name
	})
	w.must(err)
	return life
}

// waitNext waits for the job of the next term.
func (w *world) waitNext(after harness.Life, d time.Duration) harness.Life {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, d)
	defer cancel()
	life, err := w.witness.WaitForNext(ctx, after)
	w.must(err)
	return life
}

func (w *world) waitDead(life harness.Life, d time.Duration) time.Duration {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, d)
	defer cancel()
	end, err := w.witness.WaitForDead(ctx, life)
	w.must(err)
	return end
}

// pair boots two machines that have the same env file and starts the unit on
// both, so that the first leads.
func (w *world) pair(job string, more ...string) (leader, standby *Machine, life harness.Life) {
	w.t.Helper()
	leader, standby = w.boot("a"), w.boot("b")
	for _, m := range []*Machine{leader, standby} {
		w.configure(m, job, more...)
		w.run(m, "systemctl", "start", unit)
		if m == leader {
			life = w.waitJob(m)
		}
	}
	w.waitLeading(leader)
	w.waitStandby(standby, leader)
	return leader, standby, life
}

// noOverlaps is what all of it is for.
func (w *world) noOverlaps() {
	w.t.Helper()
	for _, o := range check.Overlaps(w.witness.Lives()) {
		w.t.Error(o)
	}
}

func (w *world) processes(m *Machine) (guard, elector int) {
	w.t.Helper()
	guard, elector, err := m.Processes(w.ctx, unit)
	w.must(err)
	return guard, elector
}

// waitOther waits until the unit has another elector, and returns that.
func (w *world) waitOther(m *Machine, elector int) (other int) {
	w.t.Helper()
	w.until(waitTimeout, func() (err error) {
		if _, other, err = m.Processes(w.ctx, unit); err == nil && other == elector {
			err = fmt.Errorf("the elector on %s is still %d", m.Name, elector)
		}
		return err
	})
	return other
}

// replaceElector kills the elector, and returns the next one when it takes part.
func (w *world) replaceElector(m *Machine) int {
	w.t.Helper()
	_, elector := w.processes(m)
	said := strings.Count(m.Journal(w.ctx, unit), "another elector runs")
	w.must(unix.Kill(elector, unix.SIGKILL))
	other := w.waitOther(m, elector)
	w.until(waitTimeout, func() error {
		if strings.Count(m.Journal(w.ctx, unit), "another elector runs") == said {
			return errors.New("the journal does not say that another elector runs")
		}
		return nil
	})
	return other
}
