//go:build linux

package supervisor

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"leasehold/supervisor/ipc"
)

type metrics struct {
	up           prometheus.Gauge
	healthy      prometheus.Gauge
	starts       prometheus.Counter
	freezes      prometheus.Counter
	exits        *prometheus.CounterVec
	kills        *prometheus.CounterVec
	stops        prometheus.Histogram
	timerLatency prometheus.Histogram
	replacements *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) metrics {
	f := promauto.With(r)
	m := metrics{
		up: f.NewGauge(prometheus.GaugeOpts{
			Name: "leasehold_job_up",
			Help: "1 while the job runs.",
		}),
		healthy: f.NewGauge(prometheus.GaugeOpts{
			Name: "leasehold_job_healthy",
			Help: "1 while the job runs, is ready and is healthy, as far as that is checked.",
		}),
		starts: f.NewCounter(prometheus.CounterOpts{
			Name: "leasehold_job_starts_total",
			Help: "Starts of the job.",
		}),
		freezes: f.NewCounter(prometheus.CounterOpts{
			Name: "leasehold_job_freezes_total",
			Help: "Times that the job was frozen on loss of contact with etcd.",
		}),
		exits: f.NewCounterVec(prometheus.CounterOpts{
			Name: "leasehold_job_exits_total",
			Help: "Exits of the job's first process, by reason.",
		}, []string{"reason"}),
		kills: f.NewCounterVec(prometheus.CounterOpts{
			Name: "leasehold_job_kills_total",
			Help: "Kills of the job, by reason.",
		}, []string{"reason"}),
		stops: f.NewHistogram(prometheus.HistogramOpts{
			Name: "leasehold_job_stop_duration_seconds",
			Help: "From the stop signal, or the kill where there was none, " +
				"until nothing of the job was left.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30, 60},
		}),
		timerLatency: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "leasehold_guard_lateness_seconds",
			Help:    "By how much the guard missed a deadline.",
			Buckets: []float64{.0001, .0005, .001, .005, .01, .05, .1, .2, .5, 1, 5},
		}),
	}
	m.replacements = f.NewCounterVec(prometheus.CounterOpts{
		Name: "leasehold_elector_replacements_total",
		Help: "Electors that were replaced while the daemon went on, by reason.",
	}, []string{"reason"})
	m.replaced(0, 0, 0)
	for _, reason := range []string{"ok", "error", "signal", "stopped", "unhealthy"} {
		m.exits.WithLabelValues(reason)
	}
	for _, reason := range ipc.KillReasons() {
		m.kills.WithLabelValues(reason.Label())
	}
	return m
}

// replaced counts the electors before this one, over the daemon's life.
func (m *metrics) replaced(exited, silent, reloaded int) {
	m.replacements.WithLabelValues("exited").Add(float64(exited))
	m.replacements.WithLabelValues("silent").Add(float64(silent))
	m.replacements.WithLabelValues("reload").Add(float64(reloaded))
}
