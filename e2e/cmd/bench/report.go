//go:build linux

package main

import (
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
	Exec     []float64        `json:"exec_ms"` // a process's start to its first instruction
	Samples  []Sample         `json:"samples"`
	Memory   []Memory         `json:"memory"`
	CPU      []CPU            `json:"cpu"`
	Binaries map[string]int64 `json:"binary_bytes"`
	Failures []string         `json:"failures"` // trials that came to no end
}

// Sample is one trial. All times are milliseconds from the fault on.
type Sample struct {
	Fault     string  `json:"fault"`
	Contender string  `json:"contender"` // the implementation
	Road      string  `json:"road"`      // plain, tls or auth
	TTL       float64 `json:"ttl_seconds"`
	Dead      float64 `json:"dead_ms"`  // the last process of the old job has exited
	Died      bool    `json:"died"`     // or else lived when nobody looked any more
	Freed     float64 `json:"freed_ms"` // an operator's watch heard that the leader's key is deleted
	Next      float64 `json:"next_ms"`  // first instruction of the next job
	Late      float64 `json:"guard_late_ms"`
}

// overlap is for how long both jobs lived; infinite when the old one did not end.
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

func (m Memory) mebibytes() float64 {
	sum := int64(0)
	for _, kib := range m.KiB {
		sum += kib
	}
	return float64(sum) / 1024
}

// CPU is what a candidate that does nothing used.
type CPU struct {
	Contender string    `json:"contender"`
	Role      string    `json:"role"`
	TTL       float64   `json:"ttl_seconds"`
	Seconds   float64   `json:"seconds"`
	Used      []float64 `json:"cpu_ms"` // by process, the guard first
}

func (c CPU) percent() float64 {
	sum := 0.0
	for _, ms := range c.Used {
		sum += ms
	}
	return sum / 10 / c.Seconds
}

// group is the samples of a fault and an implementation that reaches etcd in one way.
type group []Sample

// of are the samples of such a group. There may be none.
func (r *results) of(fault, implementation, via string) group {
	return slices.DeleteFunc(slices.Clone(group(r.Samples)), func(s Sample) bool {
		return s.Fault != fault || s.Contender != implementation || s.Road != via
	})
}

func (g group) column(f func(Sample) float64) []float64 {
	var c []float64
	for _, s := range g {
		c = append(c, f(s))
	}
	return c
}

func (g group) median(f func(Sample) float64) float64 { return harness.Median(g.column(f)) }

func next(s Sample) float64 { return s.Next }

func (g group) overlapping() int {
	n := 0
	for _, s := range g {
		if s.overlap() > 0 {
			n++
		}
	}
	return n
}

// report writes into a table with tabs. Flush reports its errors.
type report struct{ *tabwriter.Writer }

func (w report) p(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }

// each calls f with each group that is not empty, in the order of the report.
func (r *results) each(f func(fault, implementation, via string, g group)) {
	for _, via := range []string{"plain", "tls", "auth"} {
		for _, k := range kinds {
			for _, of := range harness.Implementations {
				if g := r.of(k.Name, of.Name, via); len(g) > 0 {
					f(k.Name, of.Name, via, g)
				}
			}
		}
	}
}

// writeReport writes all that was measured, and how it compares with what is wanted of leasehold.
func writeReport(to io.Writer, r *results) error {
	w, span := report{tabwriter.NewWriter(to, 0, 8, 2, ' ', 0)}, harness.Span
	user, a := "an ordinary user", r.About
	if a.Root {
		user = "root"
	}
	w.p("\n%s: etcd %s, %s, Linux %s, %d CPUs, as %s\n", a.Date, a.Etcd, a.Go, a.Kernel, a.CPUs, user)
	w.p("a process' start to its first instruction, which all pay: %s (p99 %s)\n",
		span(harness.Median(r.Exec)), span(harness.Percentile(r.Exec, 99)))

	w.p("\nfault\timplementation\tvia\tTTL\ttrials\tnext job, median\tp99\tmax\t" +
		"both alive\tp50\tp99\tguard late, max\n")
	r.each(func(fault, implementation, via string, g group) {
		times, overlaps := g.column(next), g.column(Sample.overlap)
		w.p("%s\t%s\t%s\t%.0fs\t%d\t%s\t%s\t%s\t%d of %d\t%s\t%s\t%s\n",
			fault, implementation, via, g[0].TTL, len(g),
			span(harness.Median(times)), span(harness.Percentile(times, 99)), span(slices.Max(times)),
			g.overlapping(), len(g),
			span(harness.Percentile(overlaps, 50)), span(harness.Percentile(overlaps, 99)),
			span(slices.Max(g.column(func(s Sample) float64 { return s.Late }))))
	})
	w.p("\nwhere the time goes (medians)\timplementation\tvia\tfault to old job exited\t" +
		"to its key deleted\tto next job's first instruction\n")
	r.each(func(fault, implementation, via string, g group) {
		if g.overlapping() > 0 {
			return
		}
		w.p("%s\t%s\t%s\t%s\t%s\t%s\n", fault, implementation, via,
			span(g.median(func(s Sample) float64 { return s.Dead })),
			span(g.median(func(s Sample) float64 { return s.Freed - s.Dead })),
			span(g.median(func(s Sample) float64 { return s.Next - s.Freed })))
	})
	for _, f := range r.Failures {
		w.p("\nFAILED: %s\n", f)
	}
	w.size(r)
	w.goals(r)
	return w.Flush()
}

func (w report) size(r *results) {
	if len(r.Memory) > 0 {
		w.p("\nmemory of a standby\timplementation\tPSS\tby process\n")
		for _, m := range r.Memory {
			w.p("%s\t%s\t%.1f MiB\t%v KiB\n", m.When, m.Contender, m.mebibytes(), m.KiB)
		}
	}
	if len(r.CPU) > 0 {
		w.p("\nidle CPU\timplementation\tTTL\tof a core\tin\tby process\n")
		for _, c := range r.CPU {
			w.p("%s\t%s\t%.0fs\t%.3f %%\t%.0f s\t%v ms\n",
				c.Role, c.Contender, c.TTL, c.percent(), c.Seconds, c.Used)
		}
	}
	if len(r.Binaries) > 0 {
		w.p("\nbinary\tbytes\n")
		for _, of := range harness.Implementations {
			w.p("%s\t%d\n", of.Name, r.Binaries[of.Name])
		}
	}
}

// goals compares what was measured with what is wanted. What was not measured is left out.
func (w report) goals(r *results) {
	w.p("\nwanted of leasehold\tmeasured\t\t\n")
	ours := harness.Leasehold.Name
	goal := func(what string, got, limit float64, show func(float64) string) {
		if math.IsNaN(got) || math.IsNaN(limit) {
			return
		}
		verdict := "yes"
		if got > limit {
			verdict = "NO"
		}
		w.p("%s\t%s\tat most %s\t%s\n", what, show(got), show(limit), verdict)
	}
	in := func(format string) func(float64) string {
		return func(x float64) string { return fmt.Sprintf(format, x) }
	}
	plain := func(fault, implementation string) float64 {
		return r.of(fault, implementation, "plain").median(next)
	}
	goal("planned hand-over, 1.5 × the stock loop's", plain("stop", ours),
		1.5*plain("stop", harness.StockLoop.Name), harness.Span)
	goal("guard killed", plain("kill", ours), 25, harness.Span)
	goal("elector killed", plain("kill-elector", ours), 25, harness.Span)
	memory := map[string]float64{ours: math.NaN(), harness.EtcdctlLock.Name: math.NaN()}
	for _, m := range r.Memory {
		memory[m.Contender] = m.mebibytes() // the last counts
	}
	goal("a standby's memory, etcdctl lock's", memory[ours], memory[harness.EtcdctlLock.Name],
		in("%.1f MiB"))
	for _, c := range r.CPU {
		if c.Contender == ours {
			goal("idle CPU of a "+c.Role, c.percent(), 0.2, in("%.3f %%"))
		}
	}
	if size := r.Binaries[ours]; size > 0 {
		goal("binary", float64(size)/1e6, 18, in("%.1f MB"))
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
