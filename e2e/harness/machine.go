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

// Machine is where one candidate runs, as a host of its own: its node of the
// network, its links to etcd, and the cgroup that nothing it starts gets out of.
type Machine struct {
	*Candidate     // what runs there; nil before Start
	Implementation Implementation
	Name           string
	Node           *Node    // nil on 127.0.0.1
	Proxies        []*Proxy // to each member of etcd; nil without
	Cgroup         *Cgroup  // nil without

	testbed *Testbed
}

// MachineConfig says what a machine has.
type MachineConfig struct {
	Name    string
	Cgroup  *Cgroup // removed by Close; may be nil
	Proxied bool    // it reaches each member of etcd through a proxy of its own
}

// NewMachine makes a machine on which nothing runs yet.
func (b *Testbed) NewMachine(cfg MachineConfig) (*Machine, error) {
	m := &Machine{Name: cfg.Name, Cgroup: cfg.Cgroup, testbed: b}
	var err error
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

// Start starts a candidate there. change may be nil.
func (m *Machine) Start(of Implementation, c Candidacy, change func(*CandidateConfig) error) error {
	m.Implementation = of
	c.Etcd, c.Endpoints, c.Identity = m.testbed.Etcd, m.Endpoints(), m.Name
	cfg := of.Config(c)
	cfg.Node = m.Node
	if of.Ours() {
		cfg.Env = append(cfg.Env, m.testbed.Etcd.CandidateEnv()...)
	}
	if m.Cgroup != nil {
		cfg.Prepare = m.Cgroup.Enter
	}
	if change != nil {
		if err := change(&cfg); err != nil {
			return err
		}
	}
	var err error
	m.Candidate, err = StartCandidate(cfg)
	return err
}

// Stop asks the candidate to end.
func (m *Machine) Stop() error { return m.Implementation.Stop(m.Candidate) }

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

// Wake ends whatever keeps the machine's processes from running, and its
// proxies from passing data on.
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
	return err
}
