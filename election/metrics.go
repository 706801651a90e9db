package election

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The values of the label result of leasehold_lease_renewals_total.
const (
	renewalOK          = "ok"
	renewalFailed      = "failed"      // answered with an error
	renewalAbandoned   = "abandoned"   // not answered within a renewal interval
	renewalUnconfirmed = "unconfirmed" // answered by a member that is no longer etcd's leader
)

type metrics struct {
	renewals *prometheus.CounterVec
	duration prometheus.Histogram
	terms    prometheus.Counter
	losses   *prometheus.CounterVec
}

// lossReasons maps the causes of a loss to the values of the label reason of
// leasehold_losses_total.
var lossReasons = map[error]string{
	ErrContactLost:    "contact_lost",
	ErrLeaseLost:      "lease_lost",
	ErrKeyDeleted:     "key_deleted",
	ErrKeyOverwritten: "key_overwritten",
}

func newMetrics(
	r prometheus.Registerer, snapshot func() Snapshot, now func() time.Duration,
) (*metrics, error) {
	m := &metrics{
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "leasehold_lease_renewals_total",
			Help: "Attempts to renew the lease, by result.",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "leasehold_lease_renewal_duration_seconds",
			Help:    "Time from sending a lease renewal until it counts.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
		}),
		terms: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "leasehold_terms_total",
			Help: "Terms that this candidate has begun to lead.",
		}),
		losses: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "leasehold_losses_total",
			Help: "Terms that ended against this candidate's will, by reason.",
		}, []string{"reason"}),
	}
	for _, result := range []string{
		renewalOK, renewalFailed, renewalAbandoned, renewalUnconfirmed,
	} {
		m.renewals.WithLabelValues(result)
	}
	for _, reason := range lossReasons {
		m.losses.WithLabelValues(reason)
	}
	if r == nil {
		return m, nil
	}
	leading := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "leasehold_leader",
		Help: "1 while this candidate leads and stop-at has not passed, else 0.",
	}, func() float64 {
		if s := snapshot(); s.Leading && now() < s.Deadlines.StopAt {
			return 1
		}
		return 0
	})
	valid := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "leasehold_lease_valid_seconds",
		Help: "Time for which the lease is sure to hold from now on, 0 without one.",
	}, func() float64 { return max(0, snapshot().Deadlines.End-now()).Seconds() })
	for _, c := range []prometheus.Collector{
		m.renewals, m.duration, m.terms, m.losses, leading, valid,
	} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}
