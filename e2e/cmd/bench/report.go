//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"text/tabwriter"

	"leasehold/e2e/harness"
)

// results are what a run measured. Reports and tables are made from them alone.
type results struct {
	About    harness.About    `json:"about"`
	Exec     []float64        `json:"exec_ms"` // a process' start to its first instruction, without any daemon
	Samples  []Sample         `json:"samples"`
	Memory   []Memory         `json:"memory"`
	CPU      []CPU            `json:"cpu"`
	Binaries map[string]int64 `json:"binary_bytes"`
	Failures []string         `json:"failures"` // trials that came to no end
}

// Sample is one trial. All times are milliseconds from the fault on.
type Sample struct {
	Fault     string  `json:"fault"`
	Contender string  `json:"contender"`
	Road      string  `json:"road"`
	TTL       float64 `json:"ttl_seconds"`
	Dead      float64 `json:"dead_ms"`  // the last process of the old job has ended
	Died      bool    `json:"died"`     // or else lived when nobody looked any more
	Freed     float64 `json:"freed_ms"` // an operator's watch heard that the leader's key is deleted
	Next      float64 `json:"next_ms"`  // first instruction of the next job
	Late      float64 `json:"guard_late_ms"`
}

// overlap is for how long both jobs lived; infinite when the old one did not
// end.
func (s Sample) overlap() float64 {
	if !s.Died {
		return math.Inf(1)
	}
	return max(0, s.Dead-s.Next)
}

// Memory is the proportional set size of each of a standby's processes.
type Memory struct {
	Contender string  `json:"contender"`
	When      string  `json:"when"`
	KiB       []int64 `json:"pss_kib"`
}

// CPU is what a candidate that does nothing used.
type CPU struct {
	Contender string    `json:"contender"`
	Role      string    `json:"role"`
	TTL       float64   `json:"ttl_seconds"`
	Seconds   float64   `json:"seconds"`
	Used      []float64 `json:"cpu_ms"` // by process, the guard first
}

func aboutThisRun(ctx context.Context, etcd harness.Etcd) (*results, error) {
	about, err := harness.AboutThisRun(ctx, etcd)
	return &results{About: about, Binaries: map[string]int64{}}, err
}

func withResults(path string, f func(*results) error) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var r results
	if err := json.Unmarshal(data, &r); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return f(&r)
}

// of are the samples of a contender over a road, for some faults.
func (r *results) of(contender, road string, faults ...string) []Sample {
	var samples []Sample
	for _, s := range r.Samples {
		if s.Contender == contender && s.Road == road && slices.Contains(faults, s.Fault) {
			samples = append(samples, s)
		}
	}
	return samples
}

func column(samples []Sample, f func(Sample) float64) []float64 {
	var c []float64
	for _, s := range samples {
		c = append(c, f(s))
	}
	return c
}

func next(s Sample) float64 { return s.Next }

func overlapping(samples []Sample) int {
	n := 0
	for _, s := range samples {
		if s.overlap() > 0 {
			n++
		}
	}
	return n
}

// writeReport writes all that was measured, and how it compares with what is
// wanted of leasehold.
func writeReport(to io.Writer, r *results) error {
	w := tabwriter.NewWriter(to, 0, 8, 2, ' ', 0)
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) } // Flush reports
	user := "an ordinary user"
	if r.About.Root {
		user = "root"
	}
	p("\n%s: etcd %s, %s, Linux %s, %d CPUs, as %s\n", r.About.Date, r.About.Etcd, r.About.Go, r.About.Kernel, r.About.CPUs, user)
	p("a process' start to its first instruction, which all pay: %s (p99 %s)\n", harness.Span(harness.Median(r.Exec)), harness.Span(harness.Percentile(r.Exec, 99)))

	p("\nfault\tcontender\tvia\tTTL\ttrials\tnext job, median\tp99\tmax\tboth alive\tp50\tp99\tguard late, max\n")
	for _, road := range []string{"plain", "tls", "auth"} {
		for _, f := range faults {
			for _, c := range harness.Implementations {
				samples := r.of(c.Name, road, f.Name)
				if len(samples) == 0 {
					continue
				}
				times, overlaps := column(samples, next), column(samples, Sample.overlap)
				p("%s\t%s\t%s\t%.0fs\t%d\t%s\t%s\t%s\t%d of %d\t%s\t%s\t%s\n", f.Name, c.Name, road, samples[0].TTL, len(samples),
					harness.Span(harness.Median(times)), harness.Span(harness.Percentile(times, 99)), harness.Span(slices.Max(times)),
					overlapping(samples), len(samples), harness.Span(harness.Percentile(overlaps, 50)), harness.Span(harness.Percentile(overlaps, 99)),
					harness.Span(slices.Max(column(samples, func(s Sample) float64 { return s.Late }))))
			}
		}
	}

	p("\nwhere the time goes (medians)\tcontender\tvia\tfault to old job dead\tto its key deleted\tto next job's first instruction\n")
	for _, road := range []string{"plain", "tls", "auth"} {
		for _, f := range []string{"stop", "kill", "kill-elector"} {
			for _, c := range harness.Implementations {
				samples := r.of(c.Name, road, f)
				if len(samples) == 0 || overlapping(samples) > 0 {
					continue
				}
				p("%s\t%s\t%s\t%s\t%s\t%s\n", f, c.Name, road,
					harness.Span(harness.Median(column(samples, func(s Sample) float64 { return s.Dead }))),
					harness.Span(harness.Median(column(samples, func(s Sample) float64 { return s.Freed - s.Dead }))),
					harness.Span(harness.Median(column(samples, func(s Sample) float64 { return s.Next - s.Freed }))))
			}
		}
	}
	for _, f := range r.Failures {
		p("\nFAILED: %s\n", f)
	}
	reportSize(p, r)
	reportGoals(p, r)
	return w.Flush()
}

func reportSize(p func(string, ...any), r *results) {
	if len(r.Memory) > 0 {
		p("\nmemory of a standby\tcontender\tPSS\tby process\n")
		for _, m := range r.Memory {
			p("%s\t%s\t%.1f MiB\t%v KiB\n", m.When, m.Contender, mebibytes(m), m.KiB)
		}
	}
	if len(r.CPU) > 0 {
		p("\nidle CPU\tcontender\tTTL\tof a core\tin\tby process\n")
		for _, c := range r.CPU {
			p("%s\t%s\t%.0fs\t%.3f %%\t%.0f s\t%v ms\n", c.Role, c.Contender, c.TTL, percent(c), c.Seconds, c.Used)
		}
	}
	if len(r.Binaries) > 0 {
		p("\nbinary\tbytes\n")
		for _, c := range harness.Implementations {
			p("%s\t%d\n", c.Name, r.Binaries[c.Name])
		}
	}
}

func mebibytes(m Memory) float64 {
	sum := int64(0)
	for _, kib := range m.KiB {
		sum += kib
	}
	return float64(sum) / 1024
}

func percent(c CPU) float64 {
	sum := 0.0
	for _, ms := range c.Used {
		sum += ms
	}
	return sum / 10 / c.Seconds
}

// reportGoals compares what was measured with what is wanted.
func reportGoals(p func(string, ...any), r *results) {
	p("\nwanted of leasehold\tmeasured\t\t\n")
	goal := func(what string, got, limit float64, show func(float64) string) {
		if math.IsNaN(got) || math.IsNaN(limit) {
			return
		}
		verdict := "yes"
		if got > limit {
			verdict = "NO"
		}
		p("%s\t%s\tat most %s\t%s\n", what, show(got), show(limit), verdict)
	}
	ours := func(f ...string) []Sample { return r.of(harness.Leasehold.Name, "plain", f...) }
	goal("planned hand-over, 1.5 × the stock loop's", harness.Median(column(ours("stop"), next)),
		1.5*harness.Median(column(r.of(harness.StockLoop.Name, "plain", "stop"), next)), harness.Span)
	goal("guard killed", harness.Median(column(ours("kill"), next)), 25, harness.Span)
	goal("elector killed", harness.Median(column(ours("kill-elector"), next)), 25, harness.Span)
	worst := func(contender string) float64 {
		most := math.NaN()
		for _, m := range r.Memory {
			if m.Contender == contender {
				most = mebibytes(m)
			}
		}
		return most
	}
	goal("a standby's memory, etcdctl lock's", worst(harness.Leasehold.Name), worst(harness.EtcdctlLock.Name), func(m float64) string { return fmt.Sprintf("%.1f MiB", m) })
	for _, c := range r.CPU {
		if c.Contender == harness.Leasehold.Name {
			goal("idle CPU of a "+c.Role, percent(c), 0.2, func(x float64) string { return fmt.Sprintf("%.3f %%", x) })
		}
	}
	if size := r.Binaries[harness.Leasehold.Name]; size > 0 {
		goal("binary", float64(size)/1e6, 18, func(x float64) string { return fmt.Sprintf("%.1f MB", x) })
	}
}

// refresh puts the demo's output between its markers in a file.
func refresh(readme, demo string) error {
	output, err := os.ReadFile(demo)
	if err != nil {
		return err
	}
	return harness.Refresh(readme, map[string]string{"demo": "```\n" + string(output) + "```\n"})
}
