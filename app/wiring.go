//go:build linux

package app

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/boottime"
	"leasehold/internal/quote"
	"leasehold/kubernetes"
	"leasehold/supervisor"
)

// parts are what differs between the elector and elect.
type parts struct {
	cfg     config.Config
	log     *slog.Logger
	version string
	metrics metrics
	changed chan struct{} // room for one: a snapshot has changed

	callbacks election.Callbacks
	configure func(*election.Config)          // may be nil
	campaign  func(*election.Candidate) error // nil: the candidate's Run
	job       func() health.Job               // nil: none is wanted
	suspends  func() bool                     // whether a term outlasts stop-at; nil: no
	status    func(text string)               // one line at each change of its state
	listen    func(address string) (net.Listener, error)
	account   string // the directory of the pod's service account
}

// metrics is what this process measures: its own use of the machine, and what is registered. Each
// metric has the election as a label.
type metrics struct {
	prometheus.Registerer
	registry *prometheus.Registry
}

// maxLabel is how many bytes of the election's name the metrics have.
const maxLabel = 256

func newMetrics(election string) metrics {
	registry := prometheus.NewRegistry()
	// Prometheus takes no other text, and etcd takes any. It may refuse a long one, with all else.
	name := strings.ToValidUTF8(election[:min(len(election), maxLabel)], "�")
	m := metrics{
		prometheus.WrapRegistererWith(prometheus.Labels{"election": name}, registry), registry,
	}
	m.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// A daemon is what the elector and elect have in common: the candidate, the health server and the
// status, as actors of one group. Each of the two adds actors of its own.
type daemon struct {
	candidate *election.Candidate
	group     run.Group
	server    *health.Server       // nil: the health endpoint is off
	listening net.Addr             // of it
	service   *kubernetes.Endpoint // nil: no Service routes to the leader
}

// wire makes a daemon that runs until ctx ends; stop ends it. The health endpoint listens before
// anything runs, so that an address in use is reported before any campaign.
func wire(ctx context.Context, stop context.CancelCauseFunc, p parts) (*daemon, error) {
	d := &daemon{}
	ec := p.cfg.ElectionConfig(p.log)
	ec.Registerer, ec.Callbacks = p.metrics, p.callbacks
	ec.Changed = func() { signalChange(p.changed) }
	if p.configure != nil {
		p.configure(&ec)
	}
	recorder := record(&ec, p)
	snapshot := func() health.Snapshot {
		s := healthSnapshot(p.cfg, d.candidate.Snapshot())
		if ahead, first, known := d.candidate.Ahead(shownAhead); known {
			s.Queue = &health.Queue{Ahead: ahead, First: first}
		}
		if p.job != nil {
			s.JobWanted, s.Job = true, p.job()
			s.Suspends = p.suspends != nil && p.suspends()
		}
		s.ControlProblem = cmp.Or(s.ControlProblem, recorder.Problem())
		return s
	}
	d.addService(&ec, p, snapshot)
	var err error
	if d.candidate, err = election.New(ec); err != nil {
		return nil, fmt.Errorf("%w: %w", errSetUp, err)
	}
	if err := d.addServer(p, snapshot); err != nil {
		return nil, err
	}
	campaign := p.campaign
	if campaign == nil {
		campaign = func(c *election.Candidate) error { return c.Run(ctx) }
	}
	d.group.Add(func() error { return campaign(d.candidate) }, func(error) { stop(errPlannedStop) })
	d.addFitness(p, recorder, ec.Adopt != nil && ec.Adopt.Created != 0)
	d.addStatus(p)
	return d, nil
}

// shownAhead is how many of the candidates ahead of ours /status names.
const shownAhead = 8

func signalChange(changed chan<- struct{}) {
	select {
	case changed <- struct{}{}:
	default:
	}
}

func (d *daemon) addServer(p parts, snapshot func() health.Snapshot) error {
	if p.cfg.Listen == "off" {
		return nil
	}
	listener, err := p.listen(p.cfg.Listen)
	if err != nil {
		return err
	}
	d.listening = listener.Addr()
	name, _, _ := net.SplitHostPort(p.cfg.Listen) // sound, or nothing could be bound
	d.server = health.New(health.Config{
		Logger: p.log, Registerer: p.metrics, Gatherer: p.metrics.registry,
		Snapshot: snapshot, Now: boottime.Now, Version: p.version, Name: name,
	})
	ctx, cancel := context.WithCancel(context.Background())
	d.group.Add(func() error { return d.server.Run(ctx, listener) }, func(error) { cancel() })
	return nil
}

// addStatus passes on what the candidate does, at each change: to the subscribers of the health
// endpoint, to the Service, and as a text. The text is one line: a leader may
// have any name, and systemd takes each line as a command.
func (d *daemon) addStatus(p parts) {
	stop := make(chan struct{})
	d.group.Add(func() error {
		last := ""
		for {
			if d.server != nil {
				d.server.Changed()
			}
			if d.service != nil {
				d.service.Changed()
			}
			text := quote.Printable(statusText(d.candidate.Snapshot(), p.isFrozen()))
			if text != last {
				p.status(text)
				last = text
			}
			select {
			case <-p.changed:
			case <-stop:
				return nil
			}
		}
	}, func(error) { close(stop) })
}

// isFrozen reports whether there is a job that is frozen.
func (p *parts) isFrozen() bool {
	return p.job != nil && p.job().State == string(supervisor.JobFrozen)
}

func statusText(s election.Snapshot, frozen bool) string {
	switch {
	case s.State == election.Suspended && frozen && s.Leader != nil:
		return fmt.Sprintf("frozen: %s, token %d", s.Reason, s.Leader.Token)
	case s.State == election.Connecting:
		return "connecting to etcd: " + s.Reason
	case s.State == election.Standby && s.Hold != nil && s.Leader == nil:
		return "standby, held by " + s.Hold.By
	case s.State == election.Standby && s.Leader != nil:
		return "standby, leader is " + s.Leader.Identity
	case s.State == election.Standby:
		return "standby, no leader is known"
	case s.State == election.Leading && s.Leader != nil:
		return fmt.Sprintf("leading, token %d", s.Leader.Token)
	}
	return string(s.State)
}

// live returns an error if the candidate's loops seem to hang.
func live(s election.Snapshot) error {
	// Zero: they have not begun yet.
	silent := boottime.Now() - s.LastHeartbeat
	if s.LastHeartbeat != 0 && silent > 2*election.HeartbeatInterval {
		return fmt.Errorf("no heartbeat of the election's loops for %s", silent.Round(time.Second))
	}
	return nil
}
