//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e"
)

// results are what a run measured. Reports and tables are made from them alone.
type results struct {
	About    About            `json:"about"`
	Exec     []float64        `json:"exec_ms"` // a process' start to its first instruction, without any daemon
	Samples  []Sample         `json:"samples"`
	Memory   []Memory         `json:"memory"`
	CPU      []CPU            `json:"cpu"`
	Binaries map[string]int64 `json:"binary_bytes"`
	Failures []string         `json:"failures"` // trials that came to no end
}

// About says where and with what a run was made.
type About struct {
	Date   string `json:"date"`
	Etcd   string `json:"etcd"`
	Go     string `json:"go"`
	Kernel string `json:"kernel"`
	CPUs   int    `json:"cpus"`
	Root   bool   `json:"root"`
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

func aboutThisRun(ctx context.Context, etcd e2e.Etcd) (*results, error) {
	version, err := exec.CommandContext(ctx, etcd.Server, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("ask %s for its version: %w", etcd.Server, err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, err
	}
	first, _, _ := strings.Cut(string(version), "\n")
	return &results{
		About: About{
			Date: time.Now().UTC().Format(time.DateOnly), Etcd: strings.TrimPrefix(first, "etcd Version: "), Go: runtime.Version(),
			Kernel: unix.ByteSliceToString(name.Release[:]), CPUs: runtime.NumCPU(), Root: os.Geteuid() == 0,
		},
		Binaries: map[string]int64{},
	}, nil
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

// percentile is the value that p percent of the values do not exceed.
func percentile(values []float64, p float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[max(0, int(math.Ceil(p/100*float64(len(sorted))))-1)]
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// span writes milliseconds as one would say them.
func span(ms float64) string {
	switch {
	case math.IsNaN(ms):
		return "-"
	case math.IsInf(ms, 1):
		return "did not end"
	case ms < 100:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 1000:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.2f s", ms/1000)
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
	p("a process' start to its first instruction, which all pay: %s (p99 %s)\n", span(median(r.Exec)), span(percentile(r.Exec, 99)))

	p("\nfault\tcontender\tvia\tTTL\ttrials\tnext job, median\tp99\tmax\tboth alive\tp50\tp99\tguard late, max\n")
	for _, road := range []string{"plain", "tls", "auth"} {
		for _, f := range faults {
			for _, c := range contenders {
				samples := r.of(c.Name, road, f.Name)
				if len(samples) == 0 {
					continue
				}
				times, overlaps := column(samples, next), column(samples, Sample.overlap)
				p("%s\t%s\t%s\t%.0fs\t%d\t%s\t%s\t%s\t%d of %d\t%s\t%s\t%s\n", f.Name, c.Name, road, samples[0].TTL, len(samples),
					span(median(times)), span(percentile(times, 99)), span(slices.Max(times)),
					overlapping(samples), len(samples), span(percentile(overlaps, 50)), span(percentile(overlaps, 99)),
					span(slices.Max(column(samples, func(s Sample) float64 { return s.Late }))))
			}
		}
	}

	p("\nwhere the time goes (medians)\tcontender\tvia\tfault to old job dead\tto its key deleted\tto next job's first instruction\n")
	for _, road := range []string{"plain", "tls", "auth"} {
		for _, f := range []string{"stop", "kill", "kill-elector", "key-deleted", "lease-revoked"} {
			for _, c := range contenders {
				samples := r.of(c.Name, road, f)
				if len(samples) == 0 || overlapping(samples) > 0 {
					continue
				}
				p("%s\t%s\t%s\t%s\t%s\t%s\n", f, c.Name, road,
					span(median(column(samples, func(s Sample) float64 { return s.Dead }))),
					span(median(column(samples, func(s Sample) float64 { return s.Freed - s.Dead }))),
					span(median(column(samples, func(s Sample) float64 { return s.Next - s.Freed }))))
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
		for _, c := range contenders {
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
	ours := func(f ...string) []Sample { return r.of(leasehold.Name, "plain", f...) }
	goal("planned hand-over, 1.5 × the stock loop's", median(column(ours("stop"), next)),
		1.5*median(column(r.of(stockloop.Name, "plain", "stop"), next)), span)
	goal("guard killed", median(column(ours("kill"), next)), 25, span)
	goal("elector killed", median(column(ours("kill-elector"), next)), 25, span)
	if cut := ours("cut"); len(cut) > 0 {
		goal("cut off, TTL + 0.7 s", median(column(cut, next)), cut[0].TTL*1000+700, span)
		goal("cut off, both jobs alive", percentile(column(cut, Sample.overlap), 100), 0, span)
	}
	operator := column(ours("key-deleted", "lease-revoked"), Sample.overlap)
	goal("key or lease taken away, both jobs alive, p50", percentile(operator, 50), 10, span)
	goal("key or lease taken away, both jobs alive, p99", percentile(operator, 99), 10, span)
	worst := func(contender string) float64 {
		most := math.NaN()
		for _, m := range r.Memory {
			if m.Contender == contender {
				most = mebibytes(m)
			}
		}
		return most
	}
	goal("a standby's memory, etcdctl lock's", worst(leasehold.Name), worst(etcdctl.Name), func(m float64) string { return fmt.Sprintf("%.1f MiB", m) })
	for _, c := range r.CPU {
		if c.Contender == leasehold.Name {
			goal("idle CPU of a "+c.Role, percent(c), 0.2, func(x float64) string { return fmt.Sprintf("%.3f %%", x) })
		}
	}
	if size := r.Binaries[leasehold.Name]; size > 0 {
		goal("binary", float64(size)/1e6, 18, func(x float64) string { return fmt.Sprintf("%.1f MB", x) })
	}
}

// writeTable writes the README's table.
func writeTable(to io.Writer, r *results) error {
	rows := []struct {
		title  string
		faults []string
	}{
		{"stopped with SIGTERM", []string{"stop"}},
		{"killed with SIGKILL", []string{"kill", "kill-elector"}},
		{"hung (SIGSTOP)", []string{"hang", "hang-elector"}},
		{"cut off from etcd, connections stay", []string{"cut"}},
		{"its key or lease deleted by hand", []string{"key-deleted", "lease-revoked"}},
	}
	var b bytes.Buffer
	b.WriteString("| what happens to the leader's daemon | leasehold | stock loop | `etcdctl lock` |\n|---|---|---|---|\n")
	for _, row := range rows {
		fmt.Fprintf(&b, "| %s ", row.title)
		for _, c := range contenders {
			fmt.Fprintf(&b, "| %s ", cell(r.of(c.Name, "plain", row.faults...)))
		}
		b.WriteString("|\n")
	}
	fmt.Fprintf(&b, "\nIs the old job dead when the next one starts, and how long after the fault is that? Medians of `make bench`: etcd %s on loopback, %d CPUs. "+
		"The TTL is 3 s, but 15 s for leasehold and in the first row wherever it makes no difference. "+
		"On SIGTERM `etcdctl lock` does nothing to its command: here the command got one too.\n", r.About.Etcd, r.About.CPUs)
	_, err := to.Write(b.Bytes())
	return err
}

// cell says if the old job was dead before the next one started, for how long
// both lived where not, and how long the next one took: the median of the
// slower fault where there are two.
func cell(samples []Sample) string {
	if len(samples) == 0 {
		return "-"
	}
	byFault := map[string][]float64{}
	for _, s := range samples {
		byFault[s.Fault] = append(byFault[s.Fault], s.Next)
	}
	took := 0.0
	for _, times := range byFault {
		took = max(took, median(times))
	}
	worst := slices.MaxFunc(samples, func(a, b Sample) int { return cmp.Compare(a.overlap(), b.overlap()) })
	alive := "dead"
	switch n := overlapping(samples); {
	case n == 0:
	case !worst.Died:
		alive = "**alive**, and stays so"
	case 2*n < len(samples):
		alive = fmt.Sprintf("dead in %d of %d, else **alive** for up to %s", len(samples)-n, len(samples), span(worst.overlap()))
	default:
		alive = "**alive** for up to " + span(worst.overlap())
	}
	return alive + "; " + span(took)
}

// refresh replaces what is between the markers in a file: the table, and the
// demo's output.
func refresh(readme, table, demo string) error {
	data, err := os.ReadFile(readme)
	if err != nil {
		return err
	}
	text := string(data)
	if table != "" {
		var b bytes.Buffer
		if err := withResults(table, func(r *results) error { return writeTable(&b, r) }); err != nil {
			return err
		}
		if text, err = between(text, "faults", b.String()); err != nil {
			return fmt.Errorf("%s: %w", readme, err)
		}
	}
	if demo != "" {
		output, err := os.ReadFile(demo)
		if err != nil {
			return err
		}
		if text, err = between(text, "demo", "```\n"+string(output)+"```\n"); err != nil {
			return fmt.Errorf("%s: %w", readme, err)
		}
	}
	return os.WriteFile(readme, []byte(text), 0o644)
}

// between replaces what stands between <!-- name --> and <!-- /name -->.
func between(text, name, with string) (string, error) {
	begin, end := "<!-- "+name+" -->\n", "<!-- /"+name+" -->"
	before, rest, found := strings.Cut(text, begin)
	_, after, foundEnd := strings.Cut(rest, end)
	if !found || !foundEnd {
		return "", fmt.Errorf("no %s…%s", strings.TrimSpace(begin), end)
	}
	return before + begin + with + end + after, nil
}
