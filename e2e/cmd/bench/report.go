//go:build linux

package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"

	"leasehold/e2e/harness"
)

// results are what a run measured. Reports are made from them alone.
type results struct {
	About    harness.About    `json:"about"`
	Version  string           `json:"version"` // of leasehold, with its commit
	Exec     []float64        `json:"exec_ms"` // a process's start to its first instruction
	Samples  []Sample         `json:"samples"`
	Memory   []Memory         `json:"memory"`
	CPU      []CPU            `json:"cpu"`
	Binaries map[string]int64 `json:"binary_bytes"`
	Failures []string         `json:"failures"` // trials that came to no end
}

// Sample is one trial. All times are milliseconds from the fault on.
type Sample struct {
	Fault          string  `json:"fault"`
	Implementation string  `json:"implementation"`
	Via            string  `json:"road"` // one of vias
	TTL            float64 `json:"ttl_seconds"`
	Dead           float64 `json:"dead_ms"`  // the last process of the old job has exited
	Died           bool    `json:"died"`     // or else lived when nobody looked any more
	Freed          float64 `json:"freed_ms"` // an operator's watch saw the leader's key deleted
	Next           float64 `json:"next_ms"`  // first instruction of the next job
	Late           float64 `json:"guard_late_ms"`
	// Renewed is when the next elector has renewed the lease, of killElector. No job is moved then:
	// all times but this one are 0.
	Renewed float64 `json:"renewed_ms,omitzero"`
}

// overlap is for how long both jobs lived; infinite when the old one did not end.
func (s Sample) overlap() float64 {
	if !s.Died {
		return math.Inf(1)
	}
	return max(0, s.Dead-s.Next)
}

// Memory is the proportional set size of each of a standby's processes, and how much of that one
// more candidate on the machine would need too: it shares the pages of files.
type Memory struct {
	Implementation string  `json:"implementation"`
	When           string  `json:"when"`
	KiB            []int64 `json:"pss_kib"`
	Own            []int64 `json:"own_kib"`
}

func mebibytes(kib []int64) float64 { return float64(sum(kib)) / 1024 }

// CPU is what a candidate that does nothing used.
type CPU struct {
	Implementation string    `json:"implementation"`
	Role           string    `json:"role"`
	TTL            float64   `json:"ttl_seconds"`
	Seconds        float64   `json:"seconds"`
	Used           []float64 `json:"cpu_ms"` // by process, the guard first
}

func (c CPU) percent() float64 { return sum(c.Used) / 10 / c.Seconds }

func sum[T int64 | float64](values []T) (all T) {
	for _, v := range values {
		all += v
	}
	return all
}

// group is the samples of a fault and an implementation that reaches etcd in one way.
type group []Sample

// of are the samples of such a group. There may be none.
func (r *results) of(fault, implementation, via string) group {
	return slices.DeleteFunc(slices.Clone(group(r.Samples)), func(s Sample) bool {
		return s.Fault != fault || s.Implementation != implementation || s.Via != via
	})
}

// groups are those that are not empty, in the order of the report, of faults that move the job, or
// of the one that does not.
func (r *results) groups(moved bool) (all []group) {
	for _, via := range vias {
		for _, row := range rows {
			g := r.of(row.name, row.of.Name, via)
			if len(g) > 0 && moved == (row.name != killElector) {
				all = append(all, g)
			}
		}
	}
	return all
}

// title is three cells of a table.
func (g group) title() string {
	return fmt.Sprintf("%s\t%s\t%s", g[0].Fault, g[0].Implementation, g[0].Via)
}

// spans are median, p99 and maximum of what f returns.
func (g group) spans(f func(Sample) float64) (median, p99, most string) {
	return harness.Spans(g.column(f))
}

func (g group) column(f func(Sample) float64) (values []float64) {
	for _, s := range g {
		values = append(values, f(s))
	}
	return values
}

func next(s Sample) float64 { return s.Next }

func renewed(s Sample) float64 { return s.Renewed }

func (g group) overlapping() int {
	none := func(ms float64) bool { return ms == 0 }
	return len(slices.DeleteFunc(g.column(Sample.overlap), none))
}

// report writes into a table with tabs. Flush reports its errors.
type report struct{ *tabwriter.Writer }

func (w report) p(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }

// writeReport writes all that was measured, and how it compares with what is wanted of leasehold.
func writeReport(to io.Writer, r *results) error {
	w := report{tabwriter.NewWriter(to, 0, 8, 2, ' ', 0)}
	user, a := "an ordinary user", r.About
	if a.Root {
		user = "root"
	}
	w.p("\n%s: etcd %s, %s, Linux %s, %d CPUs, as %s\n",
		a.Date, a.Etcd, a.Go, a.Kernel, a.CPUs, user)
	median, p99, _ := harness.Spans(r.Exec)
	w.p("a process' start to its first instruction, which all pay: %s (p99 %s)\n", median, p99)
	w.times(r)
	w.untouched(r)
	for _, f := range r.Failures {
		w.p("\nFAILED: %s\n", f)
	}
	w.size(r)
	w.goals(r)
	return w.Flush()
}

func (w report) times(r *results) {
	w.p("\nfault\timplementation\tvia\tTTL\ttrials\tnext job, median\tp99\tmax\t" +
		"both alive\tp50\tp99\tguard late, max\n")
	for _, g := range r.groups(true) {
		median, p99, most := g.spans(next)
		both, both99, _ := g.spans(Sample.overlap)
		_, _, late := g.spans(func(s Sample) float64 { return s.Late })
		w.p("%s\t%.0fs\t%d\t%s\t%s\t%s\t%d of %d\t%s\t%s\t%s\n", g.title(), g[0].TTL, len(g),
			median, p99, most, g.overlapping(), len(g), both, both99, late)
	}
	w.p("\nwhere the time goes (medians)\timplementation\tvia\tfault to old job exited\t" +
		"to its key deleted\tto next job's first instruction\n")
	for _, g := range r.groups(true) {
		if g.overlapping() > 0 {
			continue
		}
		dead, _, _ := g.spans(func(s Sample) float64 { return s.Dead })
		freed, _, _ := g.spans(func(s Sample) float64 { return s.Freed - s.Dead })
		next, _, _ := g.spans(func(s Sample) float64 { return s.Next - s.Freed })
		w.p("%s\t%s\t%s\t%s\n", g.title(), dead, freed, next)
	}
}

// untouched are the times until a daemon whose elector was killed is whole again.
func (w report) untouched(r *results) {
	for i, g := range r.groups(false) {
		if i == 0 {
			w.p("\nthe job goes on\timplementation\tvia\tTTL\ttrials\t" +
				"next elector's first renewal, median\tp99\tmax\n")
		}
		median, p99, most := g.spans(renewed)
		w.p("%s\t%.0fs\t%d\t%s\t%s\t%s\n", g.title(), g[0].TTL, len(g), median, p99, most)
	}
}

func (w report) size(r *results) {
	if len(r.Memory) > 0 {
		w.p("\nmemory of a standby\timplementation\tPSS\tby process\tof one more\tby process\n")
	}
	for _, m := range r.Memory {
		w.p("%s\t%s\t%.1f MiB\t%v KiB\t%.1f MiB\t%v KiB\n", m.When, m.Implementation,
			mebibytes(m.KiB), m.KiB, mebibytes(m.Own), m.Own)
	}
	if len(r.CPU) > 0 {
		w.p("\nidle CPU\timplementation\tTTL\tof a core\tin\tby process\n")
	}
	for _, c := range r.CPU {
		w.p("%s\t%s\t%.0fs\t%.3f %%\t%.0f s\t%v ms\n",
			c.Role, c.Implementation, c.TTL, c.percent(), c.Seconds, c.Used)
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
	took := func(fault, implementation string) float64 {
		return harness.Median(r.of(fault, implementation, "plain").column(next))
	}
	again := harness.Median(r.of(killElector, ours, "plain").column(renewed))
	goal("planned hand-over, the naive client's", took("stop", ours),
		took("stop", harness.NaiveClient.Name), harness.Span)
	goal("guard killed", took("kill", ours), 10, harness.Span)
	goal("elector killed: job untouched, lease renewed again", again, 250, harness.Span)
	if len(r.Memory) > 0 {
		last, more := map[string]float64{}, math.NaN()
		for _, m := range r.Memory {
			last[m.Implementation] = mebibytes(m.KiB)
			if m.Implementation == ours {
				more = mebibytes(m.Own)
			}
		}
		goal("a standby's memory, etcdctl lock's", last[ours], last[harness.EtcdctlLock.Name],
			in("%.1f MiB"))
		goal("memory of one more candidate", more, 8, in("%.1f MiB"))
	}
	for _, c := range r.CPU {
		if c.Implementation == ours {
			limit := map[string]float64{"leader": 0.12, "standby": 0.08}[c.Role]
			goal("idle CPU of a "+c.Role, c.percent(), limit, in("%.3f %%"))
		}
	}
	if size := r.Binaries[ours]; size > 0 {
		goal("binary", float64(size)/1e6, 18, in("%.1f MB"))
	}
}
