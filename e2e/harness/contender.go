//go:build linux

package harness

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Contender is a program that keeps a job on one machine.
type Contender struct {
	Name string
	// config says how a candidate of it is started.
	config func(Entry) CandidateConfig
	// group: it passes no signal on to its command, so that a stop goes to
	// both, as Ctrl-C or systemd would send it.
	group bool
}

// Entry is one candidate of a contender.
type Entry struct {
	Programs  string // the directory of leasehold, stockloop and testjob
	Etcd      *Cluster
	Endpoints []string
	Election  string
	Identity  string
	TTL       time.Duration
	Job       []string // the test job's words
	Witness   *Witness
}

// The contenders. StockLoop is what one usually writes with etcd's own packages.
var (
	Leasehold = Contender{Name: "leasehold", config: func(e Entry) CandidateConfig {
		return CandidateConfig{Binary: filepath.Join(e.Programs, "leasehold"), Job: e.job(), Env: []string{"LEASEHOLD_LOG_LEVEL=info"}}
	}}
	StockLoop = Contender{Name: "stock loop", config: func(e Entry) CandidateConfig {
		return CandidateConfig{Binary: filepath.Join(e.Programs, "stockloop"), Args: e.job(), Env: []string{
			"ENDPOINTS=" + strings.Join(e.Endpoints, ","), "ELECTION=" + e.Election, "IDENTITY=" + e.Identity, fmt.Sprintf("TTL=%.0f", e.TTL.Seconds()),
		}}
	}}
	EtcdctlLock = Contender{Name: "etcdctl lock", group: true, config: func(e Entry) CandidateConfig {
		lock := e.Etcd.EtcdctlCommand(e.Endpoints, append([]string{"lock", fmt.Sprintf("--ttl=%.0f", e.TTL.Seconds()), e.Election, "--"}, e.job()...)...)
		return CandidateConfig{Binary: lock.Path, Args: lock.Args[1:]}
	}}
	Contenders = []Contender{Leasehold, StockLoop, EtcdctlLock}
)

func (e Entry) job() []string {
	return append([]string{filepath.Join(e.Programs, "testjob")}, e.Job...)
}

// Config says how to start a candidate. More may be added to it.
func (c Contender) Config(e Entry) CandidateConfig {
	cfg := c.config(e)
	cfg.Endpoints, cfg.Election, cfg.Identity, cfg.TTL, cfg.Witness = e.Endpoints, e.Election, e.Identity, e.TTL, e.Witness
	return cfg
}

// Stop asks a candidate of this contender to end.
func (c Contender) Stop(candidate *Candidate) error {
	if c.group {
		return syscall.Kill(-candidate.Guard(), syscall.SIGTERM)
	}
	return candidate.Signal(syscall.SIGTERM)
}
