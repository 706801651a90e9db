//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
	"leasehold/e2e/store"
)

const (
	election = "jobs/soak"
	nobody   = 65534
	keptRuns = 5 // of each candidate's daemon, with their logs
)

// run is everything that a run of the soak consists of.
type run struct {
	settings
	*harness.Testbed
	about      harness.About
	version    string // of leasehold
	schedule   []drawn
	programs   *harness.Programs
	cgroup     *harness.Cgroup // in which those of all candidates are
	witness    *harness.Witness
	check      *checker
	candidates []*candidate
	relation   check.Relation
	store      *store.Log // what the clients of the storage do
	storeLog   string     // its path

	injected   []*injection   // by execute's goroutine alone
	busy       sync.WaitGroup // with what an operator does
	supervised sync.WaitGroup // the supervisors of all candidates
	steering   sync.Mutex     // held while a command is carried out
	faulted    check.Interval // from the first fault to the end of the last
	recovered  []float64      // ms from the last fault of each part until a job ran
	stopped    time.Duration  // from the stop of all until they had ended
	cleared    time.Duration  // and until etcd was empty
}

// candidate is one of the election, on a machine of its own with a supervisor.
type candidate struct {
	name string
	root bool
	run  *run
	// freezes: its job is frozen on loss of contact (see frozen.go), and says that it runs.
	freezes  bool
	priority atomic.Int32 // of its next daemon
	failback string       // when it hands over to a candidate with a higher one
	// machine is where it runs. Each life of its daemon has a copy.
	machine *harness.Machine
	state   string                                       // the directory of its state file
	next    func() (words []string, pause time.Duration) // see behaviours
	writes  func() bool                                  // see writes

	// starting is held while a daemon starts, and while the machine is frozen: nothing can start in
	// there.
	starting sync.Mutex

	mu    sync.Mutex
	runs  []*daemon
	exits map[int]int // how often its daemon ended with which code
}

// daemon is one life of a candidate's daemon.
type daemon struct {
	*harness.Machine
	words []string
	began time.Duration
}

func (r *run) open(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute) // etcd may have to be built
	defer cancel()
	etcd, about, err := harness.FindEtcdAndAbout(ctx)
	if err != nil {
		return err
	}
	r.about = about
	if r.programs, err = copyPrograms(); err != nil {
		return err
	}
	if r.version, err = r.programs.Version(ctx); err != nil {
		return err
	}
	r.Testbed, err = harness.NewTestbed(ctx, harness.TestbedConfig{
		Cluster:  harness.ClusterConfig{Etcd: etcd, Size: memberCount},
		Programs: r.programs, Isolated: true, Prefix: election,
	})
	if err != nil {
		return err
	}
	if r.witness, err = harness.NewWitness(); err != nil {
		return err
	}
	if r.cgroup, err = harness.NewCgroup("soak"); err != nil {
		return err
	}
	if err = r.newStore(); err != nil {
		return err
	}
	if r.relation, err = check.ReadRelation(); err != nil {
		return err
	}
	r.check = newChecker(r.settings)
	r.check.log = func(name string) string { return r.candidates[name[0]-'a'].log() }
	for i := range candidateCount {
		root := i < 3
		c := &candidate{
			name: candidateName(i), root: root, freezes: i < freezeCount, run: r,
			exits: map[int]int{},
			next:  behaviours(r.seed, i, root), writes: writes(r.seed, i), failback: "never",
		}
		c.priority.Store(50)
		if i%2 == 0 {
			c.failback = failback.String()
		}
		// An ordinary user can make no cgroup in there, so that the job has none.
		cgroup, err := harness.CgroupAt(filepath.Join(r.cgroup.Path, c.name))
		if err != nil {
			return err
		}
		c.machine, err = r.NewMachine(harness.MachineConfig{Name: c.name, Cgroup: cgroup})
		if err != nil {
			return err
		}
		c.machine.Fresh = true
		r.candidates = append(r.candidates, c)
		if c.state, err = c.machine.StateDir(c.uid()); err != nil {
			return err
		}
	}
	return nil
}

// uid is the user that runs its daemon.
func (c *candidate) uid() uint32 {
	if c.root {
		return 0
	}
	return nobody
}

// copyPrograms copies what is under test, so that building it anew does not change it in the middle
// of a run.
func copyPrograms() (*harness.Programs, error) {
	from, err := harness.ProgramsBeside()
	if err != nil {
		return nil, err
	}
	dir, err := harness.TempDir("leasehold-soak-")
	if err != nil {
		return nil, err
	}
	for _, p := range []string{
		from.Leasehold, from.NaiveClient, from.Testjob, from.Beside("writer"),
	} {
		err = errors.Join(err, harness.CopyProgram(p, filepath.Join(dir, filepath.Base(p))))
	}
	return harness.ProgramsIn(dir), err
}

// close ends whatever still runs.
func (r *run) close() {
	if r.cgroup != nil {
		_ = complain(r.cgroup.Remove(context.Background()))
	}
	for _, c := range r.candidates {
		c.machine.Node.Close()
		_ = os.RemoveAll(c.state)
	}
	if r.witness != nil {
		r.witness.Close()
	}
	if r.Testbed != nil {
		r.Close()
	}
	if r.store != nil {
		_ = r.store.Close()
	}
	if r.programs != nil {
		r.programs.Remove()
	}
}

// start starts the candidate's daemon, with a job of these behaviours.
func (c *candidate) start(ctx context.Context, words []string) (*daemon, error) {
	r := c.run
	c.starting.Lock()
	defer c.starting.Unlock()
	if ctx.Err() != nil {
		return nil, nil // it is over
	}
	machine, began := *c.machine, harness.Now()
	err := machine.Start(r.implementation, harness.CandidateConfig{
		Election: election, TTL: r.ttl, Job: words, Witness: r.witness,
	}, func(cfg *harness.CandidateConfig) error {
		cfg.Env = append(cfg.Env, "LEASEHOLD_STOP_GRACE="+stopGrace.String(),
			"LEASEHOLD_RESTART_LIMIT=3", "LEASEHOLD_LOG_LEVEL=debug",
			store.LogVariable+"="+r.storeLog)
		cfg.Env = append(cfg.Env, c.priorityEntry(), "LEASEHOLD_FAILBACK="+c.failback)
		cfg.UID = c.uid()
		cfg.Env = append(cfg.Env, "LEASEHOLD_STATE_DIR="+c.state)
		if c.freezes {
			cfg.Env = append(cfg.Env, "LEASEHOLD_CONTACT_LOSS=freeze")
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	d := &daemon{Machine: &machine, words: words, began: began}
	if old := c.keep(d); old != nil {
		r.trace(old) // by now its elector has ended too
	}
	return d, nil
}

// keep adds a daemon to the last ones, and returns the one that is no longer among them, or nil.
func (c *candidate) keep(d *daemon) (old *daemon) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.runs = append(c.runs, d)
	if len(c.runs) > keptRuns {
		old, c.runs = c.runs[0], c.runs[1:]
	}
	return old
}

// supervise starts the daemon again whenever it has ended, until ctx ends.
func (c *candidate) supervise(ctx context.Context) error {
	for {
		words, pause := c.next()
		if c.writes() {
			words = append(words, "run="+c.run.programs.Beside("writer"))
		}
		if c.freezes {
			words = append(words, heartbeat)
		}
		d, err := c.start(ctx, words)
		if d == nil || err != nil {
			return err
		}
		c.run.check.note("the daemon of %s starts: its job does %q", c.name, words)
		code, err := d.Wait(context.WithoutCancel(ctx))
		if err != nil {
			return err
		}
		c.mu.Lock()
		c.exits[code]++
		c.mu.Unlock()
		c.run.check.note("the daemon of %s has ended with code %d", c.name, code)
		c.run.check.failedBack(c.name, c.failback, d.Log())
		_ = harness.Wait(ctx, pause) // after the end of ctx nothing starts
	}
}

// running is the candidate's daemon, or nil.
func (c *candidate) running() *daemon {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.runs); n > 0 && c.runs[n-1].Running() {
		return c.runs[n-1]
	}
	return nil
}

// started is running after a start that is under way.
func (c *candidate) started() *daemon {
	c.starting.Lock()
	defer c.starting.Unlock()
	return c.running()
}

// log is what its last daemons wrote.
func (c *candidate) log() (text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, d := range c.runs {
		text += d.Log()
	}
	return text
}

// soak runs the schedule and returns a *violation where a promise is broken.
func (r *run) soak(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r.check.broken = cancel
	var running sync.WaitGroup
	defer running.Wait()
	// Whoever watches, or uses the storage, goes on until everything has ended.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWatching()
	running.Go(func() { r.witness.Follow(watching, sampleEvery, r.check.saw) })
	if r.implementation.Ours() {
		for _, c := range r.candidates {
			running.Go(func() { r.check.ask(watching, c.name, c.machine.Node.Addr+":4040") })
		}
		running.Go(func() { r.watchLeases(watching) })
		running.Go(func() { r.followElection(watching) })
		for _, c := range r.candidates[:freezeCount] {
			running.Go(func() { c.watchFrozen(watching) })
		}
	}

	for _, url := range r.Etcd.Endpoints() {
		running.Go(func() { cancelOn(r.useStore(watching, url), cancel) })
	}

	supervising, stopSupervising := context.WithCancel(ctx)
	defer stopSupervising()
	for _, c := range r.candidates {
		r.supervised.Go(func() { cancelOn(c.supervise(supervising), cancel) })
	}
	defer func() {
		stopSupervising()
		for _, c := range r.candidates {
			c.started() // and no more is
		}
		_ = r.cgroup.Kill() // it is there
		r.supervised.Wait()
	}()

	if _, err := r.jobWithin(ctx, r.check.began, harness.WaitTimeout, "the start"); err != nil {
		return err
	}
	all := parts(r.schedule)
	for n, part := range all {
		if err := r.execute(ctx, part); err != nil {
			return err
		}
		if !r.implementation.Ours() {
			continue
		}
		took, err := r.jobWithin(ctx, r.faulted.To, r.recoveryBound(), "the last fault")
		r.recovered = append(r.recovered, harness.Milliseconds(took))
		if err == nil {
			err = r.drill(ctx)
		}
		if err != nil {
			return err
		}
		if n%4 == 0 && len(all) > 1 { // it takes up to six TTLs
			r.drillFailback(ctx)
		}
	}
	if !r.implementation.Ours() {
		return nil
	}
	stopSupervising()
	return r.finish(ctx)
}

func cancelOn(err error, cancel context.CancelCauseFunc) {
	if err != nil {
		cancel(err)
	}
}

// recoveryBound is how soon after the end of the last fault a job must run.
func (s settings) recoveryBound() time.Duration { return s.ttl + 6*time.Second + stopGrace }

// jobWithin waits for a living job, and returns how long after a moment it came: see jobAfter.
func (r *run) jobWithin(
	ctx context.Context, from, bound time.Duration, what string,
) (time.Duration, error) {
	for {
		took, found := r.check.jobAfter(from)
		if took > bound {
			r.check.violate(nil, "no job runs %v after %s", bound, what)
		} else if found {
			return took, nil
		}
		if err := harness.Wait(ctx, 5*time.Millisecond); err != nil {
			return took, err
		}
	}
}

// finish stops all candidates, and checks that they leave nothing.
func (r *run) finish(ctx context.Context) error {
	began := harness.Now()
	r.check.note("all candidates are asked to end")
	r.check.ends()
	var asked []*daemon
	for _, c := range r.candidates {
		if d := c.started(); d != nil {
			asked = append(asked, d)
			_ = d.Signal(syscall.SIGTERM) // it may be ending
		}
	}
	left := fmt.Sprintf("%v after the last stop something is left", harness.WaitTimeout)
	ctx, cancel := context.WithTimeoutCause(ctx, harness.WaitTimeout, &violation{
		at: began + harness.WaitTimeout, what: left,
	})
	defer cancel()
	for _, d := range asked {
		code, err := d.Wait(ctx)
		if err != nil {
			return err
		}
		if code != 0 {
			r.check.violate([]string{d.Name},
				"candidate %s ended with code %d when it was asked to end", d.Name, code)
		}
	}
	r.stopped = harness.Now() - began
	for _, c := range r.candidates { // whatever a candidate starts is in its cgroup
		if err := c.machine.Cgroup.WaitEmpty(ctx); err != nil {
			return fmt.Errorf("candidate %s: %w", c.name, err)
		}
	}
	err := harness.Until(ctx, func() error {
		for _, c := range r.candidates {
			for _, path := range c.machine.Cgroup.Children() {
				if strings.HasPrefix(filepath.Base(path), "leasehold-") {
					return fmt.Errorf("candidate %s has left the cgroup %s", c.name, path)
				}
			}
		}
		if name := r.check.leading(); name != "" {
			return fmt.Errorf("the job of candidate %s is alive", name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.supervised.Wait()
	r.traceAll()
	// What a crash has left in etcd expires; that of a clean end is gone.
	err = r.WaitEmpty(ctx)
	r.cleared = harness.Now() - began
	if limit := r.ttl + 4*time.Second; err == nil && r.cleared > limit {
		r.check.violate(nil, "it took %v, more than %v, until etcd was empty", r.cleared, limit)
	}
	return errors.Join(err, r.check.verdict())
}
