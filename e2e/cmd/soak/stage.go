//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"leasehold/e2e/harness"
)

const (
	election = "jobs/soak"
	nobody   = 65534
	keptRuns = 5                // of each candidate's daemon, with their logs
	patience = 30 * time.Second // for what takes a tenth of it on a slow machine
)

// stage is everything a run consists of.
type stage struct {
	settings
	about    harness.About
	schedule []fault
	wall     time.Time // of the run's beginning
	programs string
	cgroup   string

	check      *checker
	witness    *harness.Witness
	network    *harness.Network
	etcd       *harness.Cluster
	client     *clientv3.Client // the operator's
	members    []*member
	candidates []*candidate
	roads      roads

	busy    sync.WaitGroup // with an operator's deeds
	done    []done
	stopped time.Duration // from the last heal to the end of everything
	began   time.Duration
	faulted span // from the first fault to the last heal
	recover time.Duration
	cleared time.Duration // until etcd was empty
}

// member is one of etcd's. Nothing but the executor touches it.
type member struct {
	*harness.Member
	index int
	hit   bool // by a fault of its process
}

// candidate is one machine of the election: a node, a cgroup, a supervisor.
type candidate struct {
	name   string
	root   bool
	stage  *stage
	node   *harness.Node
	cgroup string
	dir    *os.File // of the cgroup
	moods  *moods
	hit    bool // by a fault of its processes; the executor's

	// starting is held while the cgroup is frozen: nothing may be started in there.
	starting sync.Mutex

	mu     sync.Mutex
	runs   []*daemon
	exits  map[int]int // how often its daemon ended with which code
	starts int
}

// daemon is one life of a candidate's daemon.
type daemon struct {
	*harness.Candidate
	words []string
	began time.Duration
}

func (d *daemon) alive() bool {
	select {
	case <-d.Ended():
		return false
	default:
		return true
	}
}

func newStage(ctx context.Context, set settings) (*stage, error) {
	s := &stage{settings: set, schedule: draw(set), cgroup: os.Getenv(cgroupVariable), roads: newRoads()}
	if err := s.open(ctx); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *stage) open(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute) // etcd may have to be built
	defer cancel()
	etcd, err := harness.FindEtcd(ctx, os.Stderr)
	if err != nil {
		return err
	}
	if s.about, err = harness.AboutThisRun(ctx, etcd); err != nil {
		return err
	}
	if err := s.copyPrograms(); err != nil {
		return err
	}
	if s.network, err = harness.NewNetwork(); err != nil {
		return err
	}
	if s.etcd, err = harness.StartCluster(ctx, harness.ClusterConfig{Etcd: etcd, Size: memberCount, Network: s.network}); err != nil {
		return err
	}
	for i, m := range s.etcd.Members {
		s.members = append(s.members, &member{Member: m, index: i})
	}
	s.client, err = clientv3.New(clientv3.Config{Endpoints: s.etcd.Endpoints(), DialTimeout: patience, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	if s.witness, err = harness.NewWitness(); err != nil {
		return err
	}
	s.roads.network = s.network
	s.check = newChecker(s.settings)
	s.check.log = s.logAround
	s.began, s.wall = s.check.began, time.Now()
	for i := range candidateCount {
		c := &candidate{name: candidateName(i), root: i < 3, stage: s, moods: newMoods(s.settings, i, i < 3), exits: map[int]int{}}
		s.candidates = append(s.candidates, c)
		if c.node, err = s.network.Node(c.name); err != nil {
			return err
		}
		c.cgroup = filepath.Join(s.cgroup, c.name)
		if err := os.Mkdir(c.cgroup, 0o755); err != nil {
			return err
		}
		if c.dir, err = os.Open(c.cgroup); err != nil {
			return err
		}
	}
	return nil
}

// copyPrograms copies what is under test, so that building it anew does not
// change it in the middle of a run.
func (s *stage) copyPrograms() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if s.programs, err = harness.TempDir("programs-"); err != nil {
		return err
	}
	for _, name := range []string{"leasehold", "stockloop", "testjob"} {
		if err := copyProgram(filepath.Join(filepath.Dir(self), name), filepath.Join(s.programs, name)); err != nil {
			return err
		}
	}
	return nil
}

func copyProgram(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Chmod(0o755), dst.Close())
}

// close ends whatever still runs; the cgroup is killed from outside.
func (s *stage) close() {
	for _, c := range s.candidates {
		if c.dir != nil {
			_ = c.dir.Close()
		}
		if c.node != nil {
			c.node.Close()
		}
	}
	if s.witness != nil {
		s.witness.Close()
	}
	if s.client != nil {
		_ = s.client.Close()
	}
	if s.etcd != nil {
		s.etcd.Close()
	}
	if s.network != nil {
		s.network.Close()
	}
}

// kill ends everything that the candidates have started. No more is started.
func (s *stage) kill() {
	for _, c := range s.candidates {
		c.started()
		_ = os.WriteFile(filepath.Join(c.cgroup, "cgroup.kill"), []byte("1"), 0) // it is there
	}
}

// clock is a moment as the time line shows it.
func (s *stage) clock(at time.Duration) string {
	return fmt.Sprintf("%+9.3fs", (at - s.began).Seconds())
}

// start starts the candidate's daemon with a job of the next mood.
func (c *candidate) start(ctx context.Context, words []string) (*daemon, error) {
	s := c.stage
	contender := harness.Leasehold
	if s.contender == stockloop {
		contender = harness.StockLoop
	}
	cfg := contender.Config(harness.Candidacy{
		Programs: harness.ProgramsIn(s.programs), Etcd: s.etcd, Endpoints: s.etcd.Endpoints(), Election: election, Identity: c.name,
		TTL: s.ttl, Job: words, Witness: s.witness,
	})
	cfg.Node = c.node
	if s.contender == leasehold {
		cfg.Env = append(cfg.Env, "LEASEHOLD_STOP_GRACE="+stopGrace.String(), "LEASEHOLD_RESTART_LIMIT=3", "LEASEHOLD_LOG_LEVEL=debug")
	}
	if !c.root {
		cfg.UID = nobody
	}
	cfg.Prepare = func(cmd *exec.Cmd) {
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		// An ordinary user can make none in there, so that the job has none.
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(c.dir.Fd())
	}
	c.starting.Lock()
	defer c.starting.Unlock()
	if ctx.Err() != nil {
		return nil, nil // it is over
	}
	began := harness.Now()
	running, err := harness.StartCandidate(cfg)
	if err != nil {
		return nil, err
	}
	d := &daemon{Candidate: running, words: words, began: began}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.starts++
	c.runs = append(c.runs, d)
	c.runs = c.runs[max(0, len(c.runs)-keptRuns):]
	return d, nil
}

// supervise starts the daemon again whenever it has ended, until ctx ends.
func (c *candidate) supervise(ctx context.Context) error {
	for {
		words, pause := c.moods.next()
		d, err := c.start(ctx, words)
		if d == nil || err != nil {
			return err
		}
		c.stage.check.note("the daemon of %s starts: its job does %q", c.name, words)
		code, err := d.Wait(context.WithoutCancel(ctx))
		if err != nil {
			return err
		}
		c.mu.Lock()
		c.exits[code]++
		c.mu.Unlock()
		c.stage.check.note("the daemon of %s has ended with code %d", c.name, code)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// running is the candidate's daemon, or nil.
func (c *candidate) running() *daemon {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.runs); n > 0 && c.runs[n-1].alive() {
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

// lastRuns are the daemon's last lives.
func (c *candidate) lastRuns() []*daemon {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.runs)
}

func (s *stage) logAround(name string) string {
	c := s.candidates[slices.IndexFunc(s.candidates, func(c *candidate) bool { return c.name == name })]
	var text strings.Builder
	for _, r := range c.lastRuns() {
		text.WriteString(r.Log())
	}
	return text.String()
}

// soak runs the schedule and returns a *violation where a promise is broken.
func (s *stage) soak(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	defer running.Wait()
	// Whoever watches goes on until everything has ended.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWatching()
	running.Go(func() { s.witness.Follow(watching, 50*time.Millisecond, s.check.saw) })
	if s.contender == leasehold {
		for _, c := range s.candidates {
			running.Go(func() { s.check.ask(watching, c.name, c.node.Addr+":4040") })
		}
		running.Go(func() { s.watchLeases(watching) })
	}
	running.Go(func() {
		select {
		case <-s.check.broken:
			cancel(s.check.first.Load())
		case <-watching.Done():
		}
	})

	supervising, stopSupervising := context.WithCancel(ctx)
	defer stopSupervising()
	for _, c := range s.candidates {
		running.Go(func() {
			if err := c.supervise(supervising); err != nil {
				cancel(err)
			}
		})
	}
	defer func() {
		stopSupervising()
		s.kill()
	}()

	if _, err := s.jobWithin(ctx, s.began, patience); err != nil {
		return err
	}
	err = s.execute(ctx)
	if err != nil {
		return err
	}
	if s.contender == stockloop {
		return nil
	}
	if s.recover, err = s.jobWithin(ctx, s.faulted.to, s.recoveryBound()); err != nil {
		return err
	}
	stopSupervising()
	return s.finish(ctx)
}

// recoveryBound is how soon after the last heal a job must run.
func (s settings) recoveryBound() time.Duration { return s.ttl + 6*time.Second + stopGrace }

// jobWithin waits for a living job, and returns how long after a moment it came.
// Where a leader waits to start a job again that crashes all the time, that is
// the job's doing, and does not count.
func (s *stage) jobWithin(ctx context.Context, from, bound time.Duration) (took time.Duration, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err = harness.Until(ctx, func() error {
		at, found := s.check.aliveSince(from)
		if !found {
			at = harness.Now()
		}
		took = max(0, at-from-s.check.backedOff(span{from, at}))
		if took > bound {
			cancel(&violation{at: harness.Now(), what: fmt.Sprintf("no job runs %v after the last fault was healed", bound)})
		}
		if !found || took > bound {
			return errors.New("there is no job")
		}
		return nil
	})
	return took, err
}

// finish stops all candidates, and checks that they leave nothing.
func (s *stage) finish(ctx context.Context) error {
	began := harness.Now()
	s.check.note("all candidates are asked to end")
	asked := map[*candidate]*daemon{}
	for _, c := range s.candidates {
		if d := c.started(); d != nil {
			asked[c] = d
			_ = d.Signal(syscall.SIGTERM) // it may be ending
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, &violation{what: fmt.Sprintf("%v after the last stop something is left", patience)})
	defer cancel()
	for c, d := range asked {
		code, err := d.Wait(ctx)
		if err != nil {
			return err
		}
		if code != 0 {
			s.check.violate([]string{c.name}, "candidate %s ended with code %d when it was asked to end", c.name, code)
		}
	}
	s.stopped = harness.Now() - began
	for _, c := range s.candidates {
		if err := s.nothingLeftOf(ctx, c); err != nil {
			return err
		}
	}
	if err := harness.Until(ctx, func() error {
		if name := s.check.leading(); name != "" {
			return fmt.Errorf("the job of candidate %s is alive", name)
		}
		return nil
	}); err != nil {
		return err
	}
	// What a crash has left in etcd expires; that of a clean end is gone.
	err := harness.Until(ctx, func() error {
		leases, err := s.etcd.Leases(ctx)
		if err != nil {
			return err
		}
		got, err := s.client.Get(ctx, election, clientv3.WithPrefix(), clientv3.WithKeysOnly())
		if err == nil && (len(leases) > 0 || got.Count > 0) {
			err = fmt.Errorf("left in etcd: leases %q, keys %v", leases, got.Kvs)
		}
		return err
	})
	s.cleared = harness.Now() - began
	if limit := s.ttl + 4*time.Second; err == nil && s.cleared > limit {
		return &violation{at: harness.Now(), what: fmt.Sprintf("it took %v, more than %v, until etcd was empty", s.cleared, limit)}
	}
	return errors.Join(err, s.check.verdict())
}

// nothingLeftOf checks for processes and cgroups. Whatever a candidate starts
// is in its cgroup.
func (s *stage) nothingLeftOf(ctx context.Context, c *candidate) error {
	return harness.Until(ctx, func() error {
		events, err := os.ReadFile(filepath.Join(c.cgroup, "cgroup.events"))
		if err != nil {
			return err
		}
		if !strings.Contains(string(events), "populated 0") {
			return fmt.Errorf("there are processes of candidate %s", c.name)
		}
		if dirs := subtree(c.cgroup); len(dirs) > 1 {
			return fmt.Errorf("there are cgroups of candidate %s: %q", c.name, dirs)
		}
		return nil
	})
}
