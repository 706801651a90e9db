package health

import (
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
)

// register registers what a snapshot shows. What other packages count, they register themselves.
func (s *Server) register(r prometheus.Registerer) {
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "leasehold_build_info",
		Help: "Always 1; " +
			"the labels are the version of leasehold and of the Go it was built with.",
		ConstLabels: prometheus.Labels{"version": s.cfg.Version, "goversion": runtime.Version()},
	})
	build.Set(1)
	r.MustRegister(build)
	gauge := func(name, help string, value func(Snapshot) float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help},
			func() float64 {
				snapshot, _ := s.now()
				return value(snapshot)
			}))
	}
	gauge("leasehold_ready",
		"1 while the candidate is in the election, waiting or leading, else 0.",
		func(s Snapshot) float64 { return oneIf(s.ready() == nil) })
	gauge("leasehold_blocked",
		"1 while a key ahead of the candidate's will not go away by itself, else 0.",
		func(s Snapshot) float64 { return oneIf(s.Blocker != nil) })
	gauge("leasehold_held",
		"1 while a hold keeps everybody from becoming leader, else 0.",
		func(s Snapshot) float64 { return oneIf(s.Hold != nil) })
	gauge("leasehold_candidates",
		"Keys in the queue up to the candidate's own, 0 while that is not known. "+
			"The maximum over all candidates is how many there are.",
		func(s Snapshot) float64 {
			if s.Queue == nil {
				return 0
			}
			return float64(s.Queue.Ahead) + 1
		})
	gauge("leasehold_lease_ttl_seconds",
		"TTL of the candidate's lease, as etcd granted it, 0 without one.",
		func(s Snapshot) float64 { return s.TTL.Seconds() })
	gauge("leasehold_fencing_token",
		"Fencing token of the leader that the candidate knows of, 0 without one.",
		func(s Snapshot) float64 {
			if s.Leader == nil {
				return 0
			}
			return float64(s.Leader.Token)
		})
	gauge("leasehold_last_transition_timestamp_seconds",
		"Unix time at which the candidate's state last changed.",
		func(s Snapshot) float64 {
			if s.Since.IsZero() {
				return 0
			}
			return float64(s.Since.UnixMilli()) / 1000
		})
}

func oneIf(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
