//go:build linux

package scenario_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// A loss takes the leadership from the leader and returns once another job runs;
// then what was broken is given back.
type loss struct {
	name string
	do   func(tr *trial, leader, standby *candidate, job harness.Life)
}

// soon bounds a hand-over that must not wait for the lease to run out: it takes
// some ten milliseconds, and the TTL is 3 s.
const soon = 1500 * time.Millisecond

// exits is a fault by which the leader's daemon ends with a code, and the next job
// starts within a time.
func exits(f func() fault.Fault, within time.Duration, code int) loss {
	return loss{f().Name, func(tr *trial, leader, _ *candidate, job harness.Life) {
		tr.inject(f(), leader)
		tr.waitNext(job, within)
		tr.waitExit(leader, code)
	}}
}

// hangs is one of the daemon's processes that hangs until a TTL after the next job's
// start. Another of them has killed it by then.
func hangs(p harness.Process, code int) loss {
	return loss{fault.Hung(p).Name, func(tr *trial, leader, _ *candidate, job harness.Life) {
		end := tr.inject(fault.Hung(p), leader)
		next := tr.waitNext(job, waitTimeout)
		tr.sleepPast(next.Started, tr.ttl)
		end()
		tr.waitExit(leader, code)
	}}
}

func killed(p harness.Process) func() fault.Fault {
	return func() fault.Fault { return fault.Killed(p) }
}

var (
	plannedStop   = exits(fault.Stop, soon+500*time.Millisecond, 0) // and the grace
	guardKilled   = exits(killed(harness.Guard), soon, 128+9)
	spawnerKilled = exits(killed(harness.Spawner), soon, 70)
	guardHung     = hangs(harness.Guard, 128+9)

	// Nobody needs the spawner before the job is to end.
	spawnerHung = exits(func() fault.Fault {
		return fault.Both("spawner-hung-stop", fault.Hung(harness.Spawner), fault.Stop())
	}, waitTimeout, 70)
	spawnerHungUnreachable = exits(func() fault.Fault {
		return fault.HungUnreachable(harness.Spawner)
	}, waitTimeout, 70)

	// One elector alone is replaced: TestReplaced.
	electorsKilled = loss{"electors-killed", func(
		tr *trial, leader, _ *candidate, job harness.Life,
	) {
		tr.loseElectors(leader)
		tr.waitNext(job, soon)
		tr.waitExit(leader, 70)
	}}
	electorHungUnreachable = loss{"elector-hung-unreachable", func(
		tr *trial, leader, _ *candidate, job harness.Life,
	) {
		end := tr.inject(fault.HungUnreachable(harness.Elector), leader)
		tr.waitNext(job, waitTimeout)
		end()
		tr.waitStatus(leader, "/standby", http.StatusOK)
	}}

	unreachable = loss{"link-unreachable", func(tr *trial, leader, _ *candidate, job harness.Life) {
		end := tr.inject(fault.Unreachable(), leader)
		tr.waitNext(job, waitTimeout)
		end()
		tr.waitStatus(leader, "/standby", http.StatusOK)
	}}
)

func etcdStopped(tr *trial, _, _ *candidate, job harness.Life) {
	m := tr.etcd.Members[0]
	tr.must(m.Stop(tr.ctx))
	tr.waitDead(job)
	tr.must(m.Start())
	tr.waitNext(job, waitTimeout)
}

// standbyLeaseLost takes the lease of a candidate that waits: it must come back
// and be good for the next term.
func standbyLeaseLost(tr *trial, leader, standby *candidate, job harness.Life) {
	before := tr.status(standby)
	_, err := tr.etcd.Etcdctl(tr.ctx, "lease", "revoke", before.Lease.ID)
	tr.must(err)
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if now := tr.status(standby); now.State != "standby" || now.Lease == nil ||
			now.Lease.ID == before.Lease.ID {
			return fmt.Errorf("candidate b has not come back: %+v", now)
		}
		return nil
	}))
	if terms := check.NewHistory(tr.witness.Lives()); len(terms) != 1 || terms[0].End != 0 {
		tr.Errorf("the loss of a lease that leads nothing moved the job: %v", tr.summary())
	}
	plannedStop.do(tr, leader, standby, job)
}

// sleepPast waits until ttl after a moment.
func (tr *trial) sleepPast(moment, ttl time.Duration) {
	select {
	case <-time.After(moment + ttl - harness.Now()):
	case <-tr.ctx.Done():
	}
}

// TestNeverTwoJobs is what leasehold is for.
func TestNeverTwoJobs(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute")
	}
	t.Parallel()
	losses := []loss{
		plannedStop, guardKilled, electorsKilled, guardHung, electorHungUnreachable,
		spawnerKilled, spawnerHung, spawnerHungUnreachable, unreachable,
		{"etcd stopped", etcdStopped},
		{"standby's lease lost", standbyLeaseLost},
	}
	for _, u := range users() {
		for _, f := range losses {
			t.Run(u.name+"/"+f.name, func(t *testing.T) {
				t.Parallel()
				neverTwo(t, func(t *testing.T) *trial {
					tr := newTrial(t, u, harness.ClusterConfig{})
					leader, standby, job := tr.pair("")
					f.do(tr, leader, standby, job)
					tr.finish()
					return tr
				})
			})
		}
	}
}

// TestNeverTwoJobs_GuardHangsAtTheLastMoment: while etcd is unreachable, just before it must
// kill. The elector then has but the margin to notice it, and to kill.
func TestNeverTwoJobs_GuardHangsAtTheLastMoment(t *testing.T) {
	t.Parallel()
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			neverTwo(t, func(t *testing.T) *trial {
				tr := newTrial(t, u, harness.ClusterConfig{})
				tr.ttl = 10 * time.Second
				leader, _, job := tr.pair("ignore-term")
				leader.SetReachable(false)
				var end time.Duration
				// What was under way may still count.
				tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
					before := harness.Now()
					lease := tr.status(leader).Lease
					end = before + time.Duration(lease.ValidFor*float64(time.Second))
					if left := end - before; left > tr.ttl/2 {
						return fmt.Errorf("the lease is good for %v", left)
					}
					return nil
				}))
				tr.sleepPast(end-tr.ttl/10-50*time.Millisecond, 0) // kill-by
				tr.must(leader.Signal(syscall.SIGSTOP))
				if late := tr.waitDead(job) - end; late > 0 {
					t.Errorf("the job was dead %v after the end of its lease", late)
				}
				tr.waitNext(job, waitTimeout)
				tr.waitExit(leader, 128+9)
				tr.finish()
				return tr
			})
		})
	}
}

// TestNeverTwoJobs_OfTheUnruly: jobs that do not end when they are asked to,
// or of which a part escapes the usual ways to kill.
func TestNeverTwoJobs_OfTheUnruly(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute")
	}
	jobs := []struct {
		behaviour string
		roles     []string // to wait for before the fault
		alone     bool     // needs the machine for itself
	}{
		{behaviour: "ignore-term"},
		{behaviour: "daemonize", roles: []string{"daemon"}},
		{behaviour: "setsid ignore-term", roles: []string{"setsid"}},
		{behaviour: "main-gone"},
		{behaviour: "hold-pipes", roles: []string{"grandchild"}},
		{behaviour: "fork-bomb=10", alone: true},
		{behaviour: "fill=200"},
	}
	losses := []loss{plannedStop, guardKilled, electorsKilled, guardHung, unreachable}
	for _, u := range users() {
		for _, job := range jobs {
			for _, f := range losses {
				t.Run(u.name+"/"+job.behaviour+"/"+f.name, func(t *testing.T) {
					if !job.alone {
						t.Parallel()
					}
					neverTwo(t, func(t *testing.T) *trial {
						tr := newTrial(t, u, harness.ClusterConfig{})
						leader, standby, life := tr.pair(job.behaviour)
						tr.waitRoles(life, job.roles...)
						f.do(tr, leader, standby, life)
						tr.finish()
						return tr
					})
				})
			}
		}
	}
}

// TestNeverTwoJobs_OfTheHidden: a job of which a descendant can be found neither by its environment
// nor by its cgroup, and where /proc hides it not by its entry either. Whichever process of the
// daemon is lost, it is found by descent.
func TestNeverTwoJobs_OfTheHidden(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	t.Parallel()
	losses := []loss{
		plannedStop, guardKilled, guardHung, electorsKilled,
		spawnerKilled, spawnerHungUnreachable, unreachable,
	}
	for _, u := range append(users(), user{name: "hidepid"}) {
		for _, f := range losses {
			t.Run(u.name+"/"+f.name, func(t *testing.T) {
				t.Parallel()
				neverTwo(t, func(t *testing.T) *trial {
					tr := newTrial(t, u, harness.ClusterConfig{})
					const hidden = "ignore-term daemonize wipe-env huge-env undumpable leave-cgroup"
					leader, standby, job := tr.pair(hidden, func(cfg *harness.CandidateConfig) {
						if u.name == "hidepid" {
							tr.hideProc(cfg)
						}
					})
					tr.waitRoles(job, "daemon")
					says := strings.Contains(leader.Log(), "hidepid=")
					if says != (u.name == "hidepid") {
						t.Errorf("the log says that /proc hides processes: %t", says)
					}
					f.do(tr, leader, standby, job)
					tr.finish()
					return tr
				})
			})
		}
	}
}

// hideProc starts the daemon as an ordinary user where /proc hides what it may not read.
func (tr *trial) hideProc(cfg *harness.CandidateConfig) {
	harness.NeedsRoot(tr) // to mount it
	cfg.UID = 0
	tr.wrap(cfg, "unshare", "--mount", "sh", "-c",
		`mount -t proc -o hidepid=2 proc /proc &&
		exec setpriv --reuid=65534 --regid=65534 --clear-groups "$0" "$@"`)
}

// TestNeverTwoJobs_NoProcessLeft: a job that takes every process there is, so
// that whoever must kill it can start none, no thread either.
func TestNeverTwoJobs_NoProcessLeft(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	limits := []struct {
		name string
		user user
		set  func(tr *trial, cfg *harness.CandidateConfig)
	}{
		{"root/pids.max", user{name: "root", root: true}, limitPids},
		{"user/pids.max", user{name: "user", uid: 65534}, limitPids},
		{"user/RLIMIT_NPROC", user{name: "user", uid: 65534}, limitProcesses},
	}
	faults := []func() fault.Fault{
		fault.Stop, killed(harness.Guard),
		func() fault.Fault { return fault.HungUnreachable(harness.Elector) },
		func() fault.Fault { return fault.Unreachable() },
	}
	for _, limit := range limits {
		for _, f := range faults {
			t.Run(limit.name+"/"+f().Name, func(t *testing.T) {
				harness.NeedsRoot(t) // to set the limit
				neverTwo(t, func(t *testing.T) *trial {
					who := limit.user
					if !who.root {
						// The kernel counts by user: this one runs nothing else, not even what an
						// earlier trial has yet to reap.
						who.uid = 100000 + rand.Uint32N(1<<20)
					}
					tr := newTrial(t, who, harness.ClusterConfig{})
					leader := tr.start("a", "fill=4000 fork-bomb=4",
						func(cfg *harness.CandidateConfig) { limit.set(tr, cfg) })
					// A daemon that can start no thread may die at any time,
					// with any code, and keep the same promise.
					leader.mayExit = true
					job := tr.waitJob(leader)
					tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
						n := len(harness.Descendants(leader.Guard()))
						if leader.ended() || n >= processLimit/2 {
							return nil
						}
						return fmt.Errorf("the daemon has %d descendants", n)
					}))
					if tr.user.uid != 0 {
						tr.user = users()[1] // whom the limit leaves alone
					}
					tr.start("b", "")
					tr.inject(f(), leader)
					tr.waitNext(job, waitTimeout)
					leader.SetReachable(true)
					tr.finish()
					return tr
				})
			})
		}
	}
}

// processLimit leaves room for the daemon: a dozen threads in each process.
const processLimit = 100

// limitPids starts the daemon in a cgroup that holds few processes.
func limitPids(tr *trial, cfg *harness.CandidateConfig) {
	dir, err := os.MkdirTemp("/sys/fs/cgroup/pids", "e2e-")
	tr.must(err)
	tr.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := harness.Until(ctx, func() error { return os.Remove(dir) }); err != nil {
			tr.Error(err)
		}
	})
	tr.must(os.Chmod(dir, 0o755))
	tr.must(os.Chmod(filepath.Join(dir, "cgroup.procs"), 0o666)) // for the ordinary user to enter
	tr.must(os.WriteFile(filepath.Join(dir, "pids.max"), []byte(strconv.Itoa(processLimit)), 0))
	tr.wrap(cfg, "sh", "-c", `echo $$ >"$0"/cgroup.procs && exec "$@"`, dir)
}

func limitProcesses(tr *trial, cfg *harness.CandidateConfig) {
	tr.wrap(cfg, "prlimit", fmt.Sprintf("--nproc=%d", processLimit))
}

// wrap starts the daemon by another program, which executes it in its place.
func (tr *trial) wrap(cfg *harness.CandidateConfig, program string, args ...string) {
	path, err := exec.LookPath(program)
	tr.must(err)
	before := cfg.Prepare
	cfg.Prepare = func(cmd *exec.Cmd) {
		if before != nil {
			before(cmd)
		}
		cmd.Args = slices.Concat([]string{program}, args, []string{cmd.Path}, cmd.Args[1:])
		cmd.Path = path
	}
}
