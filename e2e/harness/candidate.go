//go:build linux

package harness

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Programs are the programs under test.
type Programs struct {
	Leasehold string
	Testjob   string
	Stockloop string

	dir string
}

// ProgramsIn are the programs in a directory.
func ProgramsIn(dir string) *Programs {
	return &Programs{
		Leasehold: filepath.Join(dir, "leasehold"),
		Testjob:   filepath.Join(dir, "testjob"),
		Stockloop: filepath.Join(dir, "stockloop"),
		dir:       dir,
	}
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
// all; otherwise ".", "./e2e/cmd/testjob" or "./e2e/cmd/stockloop".
func Build(ctx context.Context, packages ...string) (*Programs, error) {
	if len(packages) == 0 {
		packages = []string{".", "./e2e/cmd/testjob", "./e2e/cmd/stockloop"}
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
	// UID runs the daemon as an ordinary user, who can write to no cgroup.
	UID uint32
	// Node has the daemon there, and its health endpoint too. nil: on 127.0.0.1.
	Node *Node
	// Prepare may change the command before it starts. It may be nil.
	Prepare func(*exec.Cmd)
	// Stderr gets the daemon's log as well. It may be nil.
	Stderr io.Writer
}

// Candidate is a running daemon: the guard and what belongs to it.
type Candidate struct {
	Identity string
	Listen   string // host:port of the health endpoint

	guard  *process
	stdout *buffer
	stderr *buffer
	http   *http.Client
}

// StartCandidate starts a daemon. It does not wait for anything. Its
// environment holds nothing of this program's but PATH.
func StartCandidate(cfg CandidateConfig) (*Candidate, error) {
	listen, err := FreeAddr()
	if cfg.Node != nil {
		listen = net.JoinHostPort(cfg.Node.Addr, "4040")
		if cfg.Witness != nil {
			err = errors.Join(err, cfg.Witness.ListenOn(cfg.Node))
		}
	}
	if err != nil {
		return nil, err
	}
	c := &Candidate{
		Identity: cfg.Identity, Listen: listen,
		stdout: &buffer{}, stderr: &buffer{also: cfg.Stderr},
		http: &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}},
	}
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
	cmd.Stdout, cmd.Stderr = c.stdout, c.stderr
	// A job that could not be killed would keep the pipes: don't wait for it.
	cmd.WaitDelay = 100 * time.Millisecond
	if cfg.UID != 0 {
		user := &syscall.Credential{Uid: cfg.UID, Gid: cfg.UID}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user}
	}
	if cfg.Prepare != nil {
		cfg.Prepare(cmd)
	}
	if c.guard, err = startProcessOn(cfg.Node, cmd); err != nil {
		return nil, fmt.Errorf("start candidate %s: %w", cfg.Identity, err)
	}
	return c, nil
}

// Guard is the pid of the process that was started.
func (c *Candidate) Guard() int { return c.guard.cmd.Process.Pid }

// A Process is one of a daemon's own.
type Process string

// The processes of leasehold. Other programs have but the one that was started,
// which takes the guard's place.
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
	for _, pid := range Children(c.Guard()) {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue // it has just ended
		}
		if words := strings.Split(string(cmdline), "\x00"); len(words) > 1 && words[1] == string(p) {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("candidate %s has no %s", c.Identity, p)
}

// Elector is the pid of the guard's child that campaigns.
func (c *Candidate) Elector() (int, error) { return c.Pid(Elector) }

// Spawner is the pid of the guard's child from which the job descends.
func (c *Candidate) Spawner() (int, error) { return c.Pid(Spawner) }

// Signal sends a signal to the guard.
func (c *Candidate) Signal(sig syscall.Signal) error { return c.guard.signal(sig) }

// SignalElector sends a signal to the elector.
func (c *Candidate) SignalElector(sig syscall.Signal) error {
	pid, err := c.Elector()
	if err != nil {
		return err
	}
	return syscall.Kill(pid, sig)
}

// Ended is closed when the guard has ended.
func (c *Candidate) Ended() <-chan struct{} { return c.guard.ended }

// Running reports whether the guard has not ended.
func (c *Candidate) Running() bool { return c.guard.alive() }

// Wait waits for the guard's end and returns its exit code, 128+n after
// signal n.
func (c *Candidate) Wait(ctx context.Context) (int, error) {
	select {
	case <-c.guard.ended:
		return c.guard.code(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for the end of candidate %s: %w", c.Identity, context.Cause(ctx))
	}
}

// Log is what the daemon (and its job) wrote to standard error so far.
func (c *Candidate) Log() string { return c.stderr.String() }

// Output is what the daemon (and its job) wrote to standard output so far.
func (c *Candidate) Output() string { return c.stdout.String() }

// Get asks the health endpoint and returns the status code and the body.
func (c *Candidate) Get(ctx context.Context, path string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.Listen+path, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// Metric adds up the samples whose name and labels begin with prefix.
func (c *Candidate) Metric(ctx context.Context, prefix string) (float64, error) {
	code, body, err := c.Get(ctx, "/metrics")
	if err != nil {
		return 0, err
	}
	if code != http.StatusOK {
		return 0, fmt.Errorf("read /metrics of %s: status %d", c.Identity, code)
	}
	return sumSamples(bufio.NewScanner(strings.NewReader(body)), prefix)
}

// WaitRenewals waits for n more good renewals of the candidate's lease.
func (c *Candidate) WaitRenewals(ctx context.Context, n float64) error {
	const good = `leasehold_lease_renewals_total{result="ok"}`
	before := -1.0
	return Until(ctx, func() error {
		now, err := c.Metric(ctx, good)
		if err != nil {
			return err
		}
		if before < 0 {
			before = now
		}
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
		if err != nil {
			select {
			case <-c.guard.ended:
				return fmt.Errorf("candidate %s has ended with code %d", c.Identity, c.guard.code())
			default:
				return err
			}
		}
		if got != code {
			return fmt.Errorf("%s of candidate %s: %d, want %d: %s",
				path, c.Identity, got, code, strings.TrimSpace(body))
		}
		return nil
	})
}

// Close ends the daemon, politely if it listens, and everything that descends
// from it and could be found.
func (c *Candidate) Close() {
	if !c.guard.alive() {
		return
	}
	elector, _ := c.Elector() // 0: there is none any more
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
	pids := Descendants(c.Guard())
	if elector != 0 {
		_ = syscall.Kill(elector, syscall.SIGKILL)
	}
	c.guard.kill()
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// Children lists the pids of a process' children.
func Children(pid int) []int {
	return parents()[pid]
}

// Descendants lists the pids of all that descend from a process.
func Descendants(pid int) []int {
	children := parents()
	var all []int
	for next := []int{pid}; len(next) > 0; next = next[1:] {
		all = append(all, children[next[0]]...)
		next = append(next, children[next[0]]...)
	}
	return all
}

// parents maps each process to its children.
func parents() map[int][]int {
	children := map[int][]int{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return children
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fields, err := Stat("/proc/" + e.Name())
		if err != nil {
			continue
		}
		if parent, err := strconv.Atoi(fields[1]); err == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	return children
}

// RunOnce runs the binary to its end with an environment of its own and
// returns exit code, standard output and standard error.
func RunOnce(
	ctx context.Context, env []string, binary string, args ...string,
) (code int, stdout, stderr string, err error) {
	cmd := exec.Command(binary, args...)
	cmd.Env = env
	cmd.WaitDelay = 100 * time.Millisecond
	out, errs := &buffer{}, &buffer{}
	cmd.Stdout, cmd.Stderr = out, errs
	p, err := startProcess(cmd)
	if err != nil {
		return 0, "", "", err
	}
	select {
	case <-p.ended:
		return p.code(), out.String(), errs.String(), nil
	case <-ctx.Done():
		p.kill()
		err := fmt.Errorf("run %s %s: %w", binary, strings.Join(args, " "), context.Cause(ctx))
		return 0, out.String(), errs.String(), err
	}
}
