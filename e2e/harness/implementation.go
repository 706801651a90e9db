//go:build linux

package harness

import (
	"fmt"
	"strings"
	"syscall"
	"time"
)

// Implementation is a program that keeps a job on one machine.
type Implementation struct {
	Name string
	// config says how a candidate of it is started.
	config func(Candidacy) CandidateConfig
	// group: it passes no signal on to its command, so that a stop goes to
	// both, as Ctrl-C or systemd would send it.
	group bool
}

// Candidacy is one candidate of an implementation.
type Candidacy struct {
	Programs  *Programs
	Etcd      *Cluster
	Endpoints []string
	Election  string
	Identity  string
	TTL       time.Duration
	Job       []string // the test job's words
	Witness   *Witness
}

// The implementations. StockLoop is what one usually writes with etcd's own
// packages.
var (
	Leasehold = Implementation{Name: "leasehold", config: func(c Candidacy) CandidateConfig {
		return CandidateConfig{
			Binary: c.Programs.Leasehold, Job: c.job(), Env: []string{"LEASEHOLD_LOG_LEVEL=info"},
		}
	}}
	StockLoop = Implementation{Name: "stock loop", config: func(c Candidacy) CandidateConfig {
		return CandidateConfig{Binary: c.Programs.Stockloop, Args: c.job(), Env: []string{
			"ENDPOINTS=" + strings.Join(c.Endpoints, ","), "ELECTION=" + c.Election,
			"IDENTITY=" + c.Identity, fmt.Sprintf("TTL=%.0f", c.TTL.Seconds()),
		}}
	}}
	EtcdctlLock     = Implementation{Name: "etcdctl lock", group: true, config: etcdctlLock}
	Implementations = []Implementation{Leasehold, StockLoop, EtcdctlLock}
)

func etcdctlLock(c Candidacy) CandidateConfig {
	args := []string{"lock", fmt.Sprintf("--ttl=%.0f", c.TTL.Seconds()), c.Election, "--"}
	lock := c.Etcd.EtcdctlCommand(c.Endpoints, append(args, c.job()...)...)
	return CandidateConfig{Binary: lock.Path, Args: lock.Args[1:]}
}

func (c Candidacy) job() []string { return append([]string{c.Programs.Testjob}, c.Job...) }

// Ours reports whether it is leasehold.
func (i Implementation) Ours() bool { return i.Name == Leasehold.Name }

// Config says how to start a candidate. More may be added to it.
func (i Implementation) Config(c Candidacy) CandidateConfig {
	cfg := i.config(c)
	cfg.Endpoints, cfg.Election, cfg.Identity = c.Endpoints, c.Election, c.Identity
	cfg.TTL, cfg.Witness = c.TTL, c.Witness
	return cfg
}

// Stop asks a candidate of this implementation to end.
func (i Implementation) Stop(c *Candidate) error {
	if i.group {
		return syscall.Kill(-c.Guard(), syscall.SIGTERM)
	}
	return c.Signal(syscall.SIGTERM)
}
