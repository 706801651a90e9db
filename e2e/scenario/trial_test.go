//go:build linux

package scenario_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// waitTimeout bounds every wait for an event that must come. Nothing here takes a
// tenth of it on a quiet machine.
const waitTimeout = 60 * time.Second

// revokeTimeout bounds a wait for the revocation of a lease. Where a TTL is longer, the lease has
// not expired by then.
const revokeTimeout = 30 * time.Second

// A user is who runs the daemon.
type user struct {
	name string
	uid  uint32 // 0: as the test
	root bool   // has a cgroup of its own for the job
}

// users are both sorts of user: each of the two ways to kill must do alone.
func users() []user {
	ordinary := user{name: "user"}
	if os.Geteuid() == 0 {
		ordinary.uid = 65534
	}
	return []user{{name: "root", root: true}, ordinary}
}

// trial is two or more candidates in one election, each with a proxy of its own to
// each member of etcd.
type trial struct {
	*testing.T
	ctx      context.Context
	user     user
	programs *harness.Programs
	testbed  *harness.Testbed
	etcd     *harness.Cluster
	witness  *harness.Witness
	election string
	ttl      time.Duration

	asking     []string // the environment of `leasehold reload`
	candidates []*candidate
	relation   check.Relation // that each of their logs is checked against
}

// candidate is a daemon on its machine.
type candidate struct {
	*harness.Machine
	mayExit bool // at any time, with any code
}

var elections atomic.Int64

// newTrial starts etcd and a witness.
func newTrial(t *testing.T, u user, etcd harness.ClusterConfig) *trial {
	t.Helper()
	if u.root {
		harness.NeedsRoot(t)
	}
	programs := allPrograms(t)
	relation, err := check.ReadRelation()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*waitTimeout)
	t.Cleanup(cancel)
	cluster := harness.NewTestCluster(t, etcd)
	tr := &trial{
		T: t, ctx: ctx, user: u, programs: programs, ttl: 3 * time.Second,
		testbed: &harness.Testbed{Etcd: cluster, Programs: programs}, etcd: cluster,
		witness: harness.NewTestWitness(t), election: fmt.Sprintf("jobs/e2e-%d", elections.Add(1)),
		relation: relation,
	}
	t.Cleanup(func() {
		if t.Failed() { // also where the trial came to no end
			t.Logf("%s; overlaps: %v", tr.summary(), check.Overlaps(tr.witness.Lives()))
		}
	})
	return tr
}

// authentications is the metric of etcd that counts the passwords it has checked.
const authentications = `grpc_server_handled_total{grpc_code="OK",grpc_method="Authenticate"`

// A change alters the configuration of a candidate before it starts.
type change = func(*harness.CandidateConfig)

// start starts a candidate whose job has the given behaviours.
func (tr *trial) start(identity, behaviour string, changes ...change) *candidate {
	tr.Helper()
	on := harness.MachineConfig{Name: identity, Proxied: true}
	if tr.user.root {
		on.Cgroup = tr.makeCgroup()
	}
	m, err := tr.testbed.NewMachine(on)
	tr.must(err)
	for _, p := range m.Proxies {
		tr.Cleanup(p.Close)
	}
	return tr.startOn(m, behaviour, changes...)
}

// startOn starts a candidate on a machine on which none runs any more.
func (tr *trial) startOn(m *harness.Machine, behaviour string, changes ...change) *candidate {
	tr.Helper()
	identity, c := m.Name, &candidate{Machine: m}
	tr.must(m.Start(harness.Leasehold, harness.CandidateConfig{
		Election: tr.election, TTL: tr.ttl, Job: strings.Fields(behaviour), Witness: tr.witness,
	}, func(cfg *harness.CandidateConfig) error {
		cfg.UID = tr.user.uid
		// Instead of what it would get by itself: some tests say otherwise.
		cfg.Env = []string{"LEASEHOLD_STOP_GRACE=500ms"}
		for _, f := range changes {
			f(cfg)
		}
		return nil
	}))
	d := m.Candidate
	tr.candidates = append(tr.candidates, c)
	tr.Cleanup(func() {
		if tr.Failed() { // what it knows, before it ends
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			code, body, err := d.Get(ctx, "/status")
			cancel()
			tr.Logf("/status of candidate %s: %d %s %v", identity, code, body, err)
		}
		d.Close()
		tr.trace(identity, d.Log())
		if tr.Failed() {
			tr.Logf("end of the log of candidate %s:\n%s", identity, harness.LastLines(d.Log(), 60))
		}
	})
	return c
}

// trace checks what a daemon logged against the model. Some write to a terminal.
func (tr *trial) trace(identity, log string) {
	tr.Helper()
	n, err := tr.relation.Trace(log)
	if err != nil {
		tr.Errorf("the log of candidate %s does not follow the model: %v", identity, err)
	}
	hadJob := slices.ContainsFunc(tr.witness.Lives(), func(l harness.Life) bool {
		return l.Candidate == identity
	})
	if err := n.Complete(); err != nil && log != "" && hadJob {
		tr.Errorf("candidate %s, whose job was started: %v", identity, err)
	}
}

// makeCgroup makes a cgroup for a daemon and what it makes inside.
func (tr *trial) makeCgroup() *harness.Cgroup {
	c, err := harness.NewCgroup("e2e")
	tr.must(err)
	tr.Cleanup(func() {
		if err := c.Remove(context.Background()); err != nil {
			tr.Errorf("remove the cgroup of a daemon: %v", err)
		}
	})
	return c
}

// jobCgroup is the cgroup that the daemon made for its job.
func (c *candidate) jobCgroup() (string, error) {
	found, err := filepath.Glob(filepath.Join(c.Cgroup.Path, "leasehold-*"))
	if err != nil || len(found) != 1 {
		return "", fmt.Errorf("cgroups in %s: %q, %w",
			c.Cgroup.Path, found, errors.Join(err, os.ErrNotExist))
	}
	return found[0], nil
}

// signalElector sends a signal to the elector.
func (c *candidate) signalElector(sig syscall.Signal) error {
	pid, err := c.Elector()
	if err != nil {
		return err
	}
	return syscall.Kill(pid, sig)
}

func (c *candidate) ended() bool { return !c.Running() }

// inject lets a candidate have a fault of the library, and returns what ends it.
func (tr *trial) inject(f fault.Fault, c *candidate) (end func()) {
	tr.Helper()
	on := &fault.Target{Testbed: tr.testbed, Machine: c.Machine, TTL: tr.ttl}
	tr.must(f.Start(tr.ctx, on))
	return func() { tr.must(f.End(tr.ctx, on)) }
}

// status is what the tests read of /status.
type status struct {
	Name   string
	State  string
	Leader *struct {
		Identity, Key string
		Token         int64
	}
	Lease *struct {
		ID       string
		ValidFor float64 `json:"valid_for_seconds"`
	}
	Job struct {
		State    string
		PID      *int
		Restarts int
		Health   *string
		Ready    bool
		LastExit *struct {
			Code   *int
			Signal *string
		} `json:"last_exit"`
	}
	Blocker *struct{ Key, Why, Remedy string }
}

func (tr *trial) status(c *candidate) status {
	tr.Helper()
	code, body, err := c.Get(tr.ctx, "/status")
	if err != nil || code != http.StatusOK {
		tr.Fatalf("/status of %s: %d, %v", c.Identity, code, err)
	}
	var s status
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		tr.Fatalf("/status of %s: %v in %s", c.Identity, err, body)
	}
	return s
}

// must fails the trial on an error.
func (tr *trial) must(err error) {
	tr.Helper()
	if err != nil {
		tr.Fatal(err)
	}
}

func (tr *trial) waitContext(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeoutCause(tr.ctx, d, fmt.Errorf("not within %v", d))
	tr.Cleanup(cancel)
	return ctx
}

// waitJob waits for the job of a candidate.
func (tr *trial) waitJob(c *candidate) harness.Life {
	tr.Helper()
	life, err := tr.witness.WaitForJob(tr.waitContext(waitTimeout), func(l harness.Life) bool {
		return l.Candidate == c.Identity
	})
	tr.must(err)
	return life
}

// waitNext waits for the job of the term after the given one.
func (tr *trial) waitNext(before harness.Life, bound time.Duration) harness.Life {
	tr.Helper()
	life, err := tr.witness.WaitForNext(tr.waitContext(bound), before)
	tr.must(err)
	return life
}

// waitDead returns when the last process of a term ended.
func (tr *trial) waitDead(l harness.Life) time.Duration {
	tr.Helper()
	end, err := tr.witness.WaitForDead(tr.waitContext(waitTimeout), l)
	tr.must(err)
	return end
}

// waitRoles waits until the job has shown processes in all these roles.
func (tr *trial) waitRoles(l harness.Life, roles ...string) {
	tr.Helper()
	tr.must(tr.witness.Wait(tr.waitContext(waitTimeout), func(lives []harness.Life) bool {
		found := map[string]bool{}
		for _, other := range lives {
			found[other.Role] = found[other.Role] ||
				other.Token == l.Token && other.Candidate == l.Candidate
		}
		for _, r := range roles {
			if !found[r] {
				return false
			}
		}
		return true
	}))
}

// waitStatus waits until an endpoint of the candidate answers so.
func (tr *trial) waitStatus(c *candidate, path string, code int) {
	tr.Helper()
	tr.must(c.WaitStatus(tr.waitContext(waitTimeout), path, code))
}

// waitExit waits for the end of a candidate and checks its code.
func (tr *trial) waitExit(c *candidate, want int) {
	tr.Helper()
	code, err := c.Wait(tr.waitContext(waitTimeout))
	tr.must(err)
	if code != want {
		tr.Errorf("candidate %s ended with code %d, want %d", c.Identity, code, want)
	}
}

// waitRenewals waits for n more good renewals of a candidate's lease.
func (tr *trial) waitRenewals(c *candidate, n float64) {
	tr.Helper()
	tr.must(c.WaitRenewals(tr.waitContext(waitTimeout), n))
}

// pair starts a leader, whose job behaves as given, and a standby.
func (tr *trial) pair(
	behaviour string, changes ...change,
) (leader, standby *candidate, job harness.Life) {
	tr.Helper()
	leader = tr.start("a", behaviour, changes...)
	job = tr.waitJob(leader)
	standby = tr.start("b", "")
	tr.waitStatus(standby, "/standby", http.StatusOK)
	return leader, standby, job
}

// finish stops every candidate and checks that nothing is left: no process of a
// job, no lease, no key.
func (tr *trial) finish() {
	tr.Helper()
	tr.stop()
	tr.nothingLeft()
}

// stop stops every candidate politely, those that run still, and waits until no
// process of any job is alive.
func (tr *trial) stop() {
	tr.Helper()
	for _, c := range tr.candidates {
		if c.ended() {
			continue
		}
		if err := c.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
			tr.must(err)
		}
		code, err := c.Wait(tr.waitContext(waitTimeout))
		tr.must(err)
		if code != 0 && !c.mayExit {
			tr.Errorf("candidate %s ended with code %d after SIGTERM, want 0", c.Identity, code)
		}
	}
	tr.must(tr.witness.Wait(tr.waitContext(waitTimeout), func(lives []harness.Life) bool {
		return !slices.ContainsFunc(lives, harness.Life.Alive)
	}))
}

// nothingLeft checks that etcd holds no lease and no key of the election.
func (tr *trial) nothingLeft() {
	tr.Helper()
	// The revocation of a crashed daemon's lease may be under way.
	tr.must(harness.Until(tr.waitContext(revokeTimeout), func() error {
		leases, err := tr.etcd.Leases(tr.ctx)
		if err != nil {
			return err
		}
		keys, err := tr.etcd.Etcdctl(tr.ctx, "get", "--prefix", "--keys-only", tr.election)
		if err == nil && (len(leases) > 0 || strings.TrimSpace(keys) != "") {
			err = fmt.Errorf("left in etcd: leases %q, keys %q", leases, keys)
		}
		return err
	}))
}

// summary says which jobs lived when.
func (tr *trial) summary() string {
	var text strings.Builder
	for _, term := range check.NewHistory(tr.witness.Lives()) {
		until := "now"
		if !term.Alive() {
			until = term.End.String()
		}
		fmt.Fprintf(&text, "%v, %d processes, from %v to %s; ",
			term, len(term.Lives), term.Start, until)
	}
	return strings.TrimSuffix(text.String(), "; ")
}

// latency is how late a guard served a deadline, by its own account, at worst.
func (c *candidate) latency() time.Duration {
	return check.Latency(check.TimerLatencies(c.Log()))
}

// outside reports whether an overlap is outside the promise: the kernel let the earlier job's guard
// serve kill-by later than its margin.
func (tr *trial) outside(o check.Overlap) bool {
	margin := max(tr.ttl/10, 200*time.Millisecond)
	return slices.ContainsFunc(tr.candidates, func(c *candidate) bool {
		return c.Identity == o.Earlier.Candidate &&
			check.Latency(check.KillByLatencies(c.Log())) > margin
	})
}

// neverTwo runs a trial and fails if two jobs ever lived at once. An overlap
// while the guard was later than its margin is outside the promise: it is
// shown, and the trial is run once more.
func neverTwo(t *testing.T, run func(t *testing.T) *trial) {
	for attempt := 1; ; attempt++ {
		var excused []check.Overlap
		name := fmt.Sprintf("trial-%d", attempt)
		t.Run(name, func(t *testing.T) {
			tr := run(t)
			for _, o := range check.Overlaps(tr.witness.Lives()) {
				if tr.outside(o) {
					excused = append(excused, o)
					continue
				}
				t.Error(o)
			}
			for _, c := range tr.candidates {
				if d := c.latency(); d > 0 {
					t.Logf("the guard of %s was late by %v", c.Identity, d)
				}
			}
			t.Log(tr.summary())
		})
		for _, o := range excused {
			t.Logf("outside the promise, for the guard was later than its margin: %v", o)
		}
		if len(excused) == 0 {
			return
		}
		if attempt == 2 {
			t.Error("outside the promise twice: this machine can't tell")
			return
		}
	}
}
