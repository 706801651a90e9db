//go:build linux

package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

// Implementation is a program that keeps a job on one machine.
type Implementation struct {
	Name string
	// command turns the job into a command of the program.
	command func(m *Machine, cfg *CandidateConfig)
	// group: it passes no signal on to its command, so that a stop goes to both, as Ctrl-C or
	// systemd would send it.
	group bool
}

// The implementations. NaiveClient is what one usually writes with etcd's own packages.
var (
	Leasehold = Implementation{Name: "leasehold", command: func(m *Machine, cfg *CandidateConfig) {
		cfg.Binary = m.testbed.Programs.Leasehold
		cfg.Env = append(m.testbed.Etcd.CandidateEnv(), "LEASEHOLD_LOG_LEVEL=info")
	}}
	NaiveClient = Implementation{Name: "naive client", command: naiveClient}
	EtcdctlLock = Implementation{Name: "etcdctl lock", command: etcdctlLock, group: true}

	Implementations = []Implementation{Leasehold, NaiveClient, EtcdctlLock}
)

func naiveClient(m *Machine, cfg *CandidateConfig) {
	cfg.Binary, cfg.Args, cfg.Job = m.testbed.Programs.NaiveClient, cfg.Job, nil
	cfg.Env = []string{
		"ENDPOINTS=" + strings.Join(cfg.Endpoints, ","), "ELECTION=" + cfg.Election,
		"IDENTITY=" + cfg.Identity, fmt.Sprintf("TTL=%.0f", cfg.TTL.Seconds()),
	}
}

func etcdctlLock(m *Machine, cfg *CandidateConfig) {
	args := []string{"lock", fmt.Sprintf("--ttl=%.0f", cfg.TTL.Seconds()), cfg.Election, "--"}
	lock := m.testbed.Etcd.EtcdctlCommand(cfg.Endpoints, append(args, cfg.Job...)...)
	cfg.Binary, cfg.Args, cfg.Job = lock.Path, lock.Args[1:], nil
}

// Ours reports whether it is leasehold.
func (i Implementation) Ours() bool { return i.Name == Leasehold.Name }

// Machine is where one candidate runs, as a host of its own: its node of the network, its links to
// etcd, and the cgroup that nothing it starts gets out of.
type Machine struct {
	*Candidate     // what runs there; nil before Start
	Implementation Implementation
	Name           string
	Node           *Node    // nil on 127.0.0.1
	Proxies        []*Proxy // to each member of etcd; nil without
	Cgroup         *Cgroup  // nil without
	// Fresh has each start get a new cgroup below Cgroup, as systemd makes one.
	Fresh bool

	testbed *Testbed
	cfg     CandidateConfig // with which the candidate was started last
	state   string          // see StateDir; "" before
}

// MachineConfig says what a machine has.
type MachineConfig struct {
	Name    string
	Cgroup  *Cgroup // removed by Close; may be nil
	Proxied bool    // it reaches each member of etcd through a proxy of its own
}

// NewMachine makes a machine on which nothing runs yet.
func (b *Testbed) NewMachine(cfg MachineConfig) (m *Machine, err error) {
	m = &Machine{Name: cfg.Name, Cgroup: cfg.Cgroup, testbed: b}
	host := "127.0.0.1"
	if b.Network != nil {
		host = b.Network.Host
		if m.Node, err = b.Network.Node(cfg.Name); err != nil {
			return m, err
		}
	}
	for _, member := range b.Etcd.Members {
		if !cfg.Proxied {
			break
		}
		_, addr, _ := strings.Cut(member.ClientURL, "://")
		p, err := StartProxy(host+":0", addr)
		if err != nil {
			return m, err
		}
		m.Proxies = append(m.Proxies, p)
	}
	return m, nil
}

// Endpoints are etcd's as the machine reaches them.
func (m *Machine) Endpoints() []string {
	endpoints := m.testbed.Etcd.Endpoints()
	for i, p := range m.Proxies {
		scheme, _, _ := strings.Cut(endpoints[i], "://")
		endpoints[i] = scheme + "://" + p.Addr()
	}
	return endpoints
}

// Start starts a candidate there. cfg has its election, TTL and witness, and the words of the test
// job; the rest is added. change may change the whole; it may be nil.
func (m *Machine) Start(
	of Implementation, cfg CandidateConfig, change func(*CandidateConfig) error,
) error {
	m.Implementation = of
	cfg.Endpoints, cfg.Identity, cfg.Node = m.Endpoints(), m.Name, m.Node
	cfg.Job = append([]string{m.testbed.Programs.Testjob}, cfg.Job...)
	of.command(m, &cfg)
	if m.Cgroup != nil && !m.Fresh {
		cfg.Prepare = m.Cgroup.Enter
	}
	if change != nil {
		if err := change(&cfg); err != nil {
			return err
		}
	}
	m.cfg = cfg
	return m.StartAgain()
}

// StartAgain starts the candidate as it was started before.
func (m *Machine) StartAgain() error {
	cfg := m.cfg
	if m.Fresh {
		below, err := m.Cgroup.fresh()
		if err != nil {
			return err
		}
		defer func() { _ = below.dir.Close() }()
		cfg.Prepare = below.Enter
	}
	var err error
	m.Candidate, err = StartCandidate(cfg)
	return err
}

// StateDir makes a directory for the state file of a user's daemon. Close removes it.
func (m *Machine) StateDir(uid uint32) (string, error) {
	dir, err := TempDir("leasehold-state-")
	if err != nil {
		return "", err
	}
	m.state = dir
	return dir, errors.Join(os.Chmod(dir, 0o700), os.Chown(dir, int(uid), int(uid)))
}

// Stop asks the candidate to end.
func (m *Machine) Stop() error {
	if m.Implementation.group {
		return syscall.Kill(-m.Guard(), syscall.SIGTERM)
	}
	return m.Signal(syscall.SIGTERM)
}

// SetReachable cuts the machine's proxies, or lets everything pass again.
func (m *Machine) SetReachable(reachable bool) {
	for _, p := range m.Proxies {
		if reachable {
			p.Recover()
		} else {
			p.Cut(BothWays)
		}
	}
}

// Wake ends whatever keeps the machine's processes from running, and its proxies from passing data
// on.
func (m *Machine) Wake(ctx context.Context) {
	m.SetReachable(true)
	if m.Cgroup == nil {
		return
	}
	_ = m.Cgroup.Thaw(ctx) // the kill that may follow needs no thaw
	for _, pid := range m.Cgroup.Processes() {
		_ = syscall.Kill(pid, syscall.SIGCONT) // it may just have ended
	}
}

// Leave asks the candidate to end, and reports what it leaves running.
func (m *Machine) Leave(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := m.Stop(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	if _, err := m.Wait(ctx); err != nil {
		return fmt.Errorf("%s did not end after SIGTERM", m.Name)
	}
	if m.Cgroup == nil {
		return nil
	}
	if err := m.Cgroup.WaitEmpty(ctx); err != nil {
		return fmt.Errorf("%s: %w", m.Name, err)
	}
	return nil
}

// Close ends the machine and everything on it.
func (m *Machine) Close(ctx context.Context) error {
	var err error
	switch {
	case m.Cgroup != nil:
		err = m.Cgroup.Remove(ctx)
	case m.Candidate == nil:
	case m.Implementation.Ours():
		m.Candidate.Close()
	default:
		_ = syscall.Kill(-m.Guard(), syscall.SIGKILL) // the job is in its group
	}
	if m.Candidate != nil {
		_, errWait := m.Wait(ctx)
		err = errors.Join(err, errWait)
	}
	for _, p := range m.Proxies {
		p.Close()
	}
	if m.Node != nil {
		m.Node.Close()
	}
	if m.state != "" {
		err = errors.Join(err, os.RemoveAll(m.state))
	}
	return err
}
