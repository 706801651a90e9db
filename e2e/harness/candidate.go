//go:build linux

package harness

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Programs are the programs under test.
type Programs struct {
	Leasehold   string
	Testjob     string
	NaiveClient string

	dir string
}

// ProgramsIn are the programs in a directory.
func ProgramsIn(dir string) *Programs {
	return &Programs{
		Leasehold:   filepath.Join(dir, "leasehold"),
		Testjob:     filepath.Join(dir, "testjob"),
		NaiveClient: filepath.Join(dir, "naiveclient"),
		dir:         dir,
	}
}

// Version is what leasehold says of its version and commit.
func (p *Programs) Version(ctx context.Context) (string, error) {
	text, err := exec.CommandContext(ctx, p.Leasehold, "version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", p.Leasehold, err)
	}
	return strings.TrimSpace(string(text)), nil
}

// ProgramsBeside are the programs beside the one that runs.
func ProgramsBeside() (*Programs, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return ProgramsIn(filepath.Dir(self)), nil
}

// Build builds the programs into a directory of their own. Without packages it builds
// all; otherwise ".", "./e2e/cmd/testjob" or "./e2e/cmd/naiveclient".
func Build(ctx context.Context, packages ...string) (*Programs, error) {
	if len(packages) == 0 {
		packages = []string{".", "./e2e/cmd/testjob", "./e2e/cmd/naiveclient"}
	}
	dir, err := TempDir("leasehold-programs-")
	if err != nil {
		return nil, err
	}
	p, err := BuildIn(ctx, dir, packages...)
	if err != nil {
		_ = os.RemoveAll(dir)
	}
	return p, err
}

// BuildIn builds programs into a directory as they are released: static and without the
// race detector. It wants the working directory somewhere in the module. Before the
// packages there may be more flags of go build.
func BuildIn(ctx context.Context, dir string, packages ...string) (*Programs, error) {
	root, err := ModuleRoot()
	if err != nil {
		return nil, err
	}
	args := []string{
		"build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", dir + "/",
	}
	cmd := exec.CommandContext(ctx, "go", append(args, packages...)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the programs under test: %w\n%s", err, out)
	}
	return ProgramsIn(dir), nil
}

// Beside is the program of the same name as another one.
func (p *Programs) Beside(path string) string { return filepath.Join(p.dir, filepath.Base(path)) }

// Remove removes the programs.
func (p *Programs) Remove() { _ = os.RemoveAll(p.dir) }

// CandidateConfig says how to start a daemon.
type CandidateConfig struct {
	Binary    string
	Election  string
	Identity  string
	Endpoints []string
	TTL       time.Duration
	Env       []string // more variables; they win over those above
	Job       []string // the command; without one Args says what to do
	Args      []string // the whole command line, where it is no job
	Witness   *Witness // may be nil
	Listen    string   // host:port of the health endpoint; "": a free one
	// UID runs the daemon as an ordinary user, who can write to no cgroup.
	UID uint32
	// NetAdmin lets such a user's daemon, and what it starts, change its network (CAP_NET_ADMIN).
	NetAdmin bool
	// Node has the daemon there, and its health endpoint too. nil: on 127.0.0.1.
	Node *Node
	// Prepare may change the command before it starts. It may be nil.
	Prepare func(*exec.Cmd)
}

// Candidate is a running daemon: the guard, whose end is the candidate's, and what belongs to it.
type Candidate struct {
	*Child   // its Output and Log are also the job's
	Identity string
	Listen   string // host:port of the health endpoint
}

// StartCandidate starts a daemon. It does not wait for anything. Its environment holds nothing of
// this program's but PATH.
func StartCandidate(cfg CandidateConfig) (*Candidate, error) {
	listen, err := cfg.Listen, error(nil)
	if listen == "" {
		listen, err = FreeAddr()
	}
	if cfg.Node != nil {
		listen = net.JoinHostPort(cfg.Node.Addr, "4040")
		if cfg.Witness != nil {
			err = errors.Join(err, cfg.Witness.ListenOn(cfg.Node))
		}
	}
	if err != nil {
		return nil, err
	}
	c := &Candidate{Identity: cfg.Identity, Listen: listen}
	args := cfg.Args
	if len(cfg.Job) > 0 {
		args = append([]string{"--"}, cfg.Job...)
	}
	cmd := exec.Command(cfg.Binary, args...)
	cmd.Dir = "/" // where any user may be
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"),
		"LEASEHOLD_ENDPOINTS=" + strings.Join(cfg.Endpoints, ","),
		"LEASEHOLD_ELECTION=" + cfg.Election,
		"LEASEHOLD_IDENTITY=" + cfg.Identity,
		"LEASEHOLD_LISTEN=" + listen,
		"LEASEHOLD_LOG_LEVEL=debug",
	}
	if cfg.TTL != 0 {
		cmd.Env = append(cmd.Env, "LEASEHOLD_TTL="+cfg.TTL.String())
	}
	if cfg.Witness != nil {
		cmd.Env = append(cmd.Env, WitnessVariable+"="+cfg.Witness.Addr)
	}
	cmd.Env = append(cmd.Env, cfg.Env...)
	if cfg.UID != 0 {
		user := &syscall.Credential{Uid: cfg.UID, Gid: cfg.UID}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user}
		if cfg.NetAdmin {
			cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN}
		}
	}
	if cfg.Prepare != nil {
		cfg.Prepare(cmd)
	}
	if c.Child, err = StartChild("candidate "+cfg.Identity, cfg.Node, cmd); err != nil {
		return nil, err
	}
	return c, nil
}

// A Process is one of a daemon's own.
type Process string

// The processes of leasehold. Other programs have but the one that was started, which takes the
// guard's place.
const (
	Guard   Process = "guard"   // the process that was started
	Elector Process = "elector" // its child that campaigns
	Spawner Process = "spawner" // its child from which the job descends
)

// Pid finds one of the daemon's processes.
func (c *Candidate) Pid(p Process) (int, error) {
	if p == Guard {
		return c.Guard(), nil
	}
	pid, err := FindProcess(c.Guard(), p)
	if err != nil {
		return 0, fmt.Errorf("candidate %s: %w", c.Identity, err)
	}
	return pid, nil
}

// FindProcess finds the elector or the spawner among the children of a guard.
func FindProcess(guard int, p Process) (int, error) {
	for _, pid := range Children(guard) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // it may just have ended
		if words := strings.Split(string(cmdline), "\x00"); len(words) > 1 &&
			words[1] == string(p) {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("guard %d has no %s", guard, p)
}

// Guard is the pid of the process that was started.
func (c *Candidate) Guard() int { return c.cmd.Process.Pid }

// Elector is the pid of the guard's child that campaigns.
func (c *Candidate) Elector() (int, error) { return c.Pid(Elector) }

// Spawner is the pid of the guard's child from which the job descends.
func (c *Candidate) Spawner() (int, error) { return c.Pid(Spawner) }

// Env is the environment with which the daemon was started.
func (c *Candidate) Env() []string { return slices.Clone(c.cmd.Env) }

// Get asks the health endpoint and returns the status code and the body.
func (c *Candidate) Get(ctx context.Context, path string) (int, string, error) {
	return Get(ctx, 2*time.Second, "http://"+c.Listen+path)
}

// Metric adds up the samples whose name and labels begin with prefix.
func (c *Candidate) Metric(ctx context.Context, prefix string) (float64, error) {
	return readMetric(ctx, 2*time.Second, "http://"+c.Listen, prefix)
}

// WaitReplaced waits until n electors of the daemon were replaced, and the last one has renewed the
// lease: a renewal that counts. Each elector counts its own.
func (c *Candidate) WaitReplaced(ctx context.Context, n float64) error {
	for {
		replaced, renewals, err := c.replaced(ctx)
		if err == nil && replaced == n && renewals > 0 {
			return nil
		}
		if Wait(ctx, time.Millisecond) != nil {
			return errors.Join(fmt.Errorf("%w: candidate %s: %v electors were replaced, want %v; "+
				"the last one has renewed the lease %v times",
				context.Cause(ctx), c.Identity, replaced, n, renewals), err)
		}
	}
}

func (c *Candidate) replaced(ctx context.Context) (replaced, renewals float64, err error) {
	text, err := getMetrics(ctx, 2*time.Second, "http://"+c.Listen)
	if err != nil {
		return 0, 0, err
	}
	replaced, err = addSamples(text, "leasehold_elector_replacements_total")
	renewals, errRenewals := addSamples(text, renewed)
	return replaced, renewals, errors.Join(err, errRenewals)
}

// renewed are the renewals that count.
const renewed = `leasehold_lease_renewals_total{result="ok"}`

// WaitRenewals waits for n more good renewals of the candidate's lease.
func (c *Candidate) WaitRenewals(ctx context.Context, n float64) error {
	before := math.Inf(1)
	return Until(ctx, func() error {
		now, err := c.Metric(ctx, renewed)
		if err != nil {
			return err
		}
		before = min(before, now)
		if now < before+n {
			return fmt.Errorf("candidate %s renewed its lease %v times, want %v",
				c.Identity, now-before, n)
		}
		return nil
	})
}

// WaitStatus waits until an endpoint of the daemon answers with the code.
func (c *Candidate) WaitStatus(ctx context.Context, path string, code int) error {
	return Until(ctx, func() error {
		got, body, err := c.Get(ctx, path)
		switch {
		case err != nil && !c.Running():
			ended, _ := c.Wait(context.WithoutCancel(ctx))
			return fmt.Errorf("candidate %s has ended with code %d", c.Identity, ended)
		case err == nil && got != code:
			return fmt.Errorf("%s of candidate %s: %d, want %d: %s",
				path, c.Identity, got, code, strings.TrimSpace(body))
		}
		return err
	})
}

// Close ends the daemon, politely if it listens, and everything that descends from it and could be
// found.
func (c *Candidate) Close() {
	if !c.Running() {
		return
	}
	for _, pid := range append(Descendants(c.Guard()), c.Guard()) {
		_ = syscall.Kill(pid, syscall.SIGCONT)
	}
	for range 2 { // the second one says: at once
		_ = c.Signal(syscall.SIGTERM)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if _, err := c.Wait(ctx); err == nil {
		return
	}
	for _, pid := range Descendants(c.Guard()) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	c.Kill()
}
