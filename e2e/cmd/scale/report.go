//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"leasehold/e2e/harness"
)

// results are what a run measured. Reports are made from them alone.
type results struct {
	About   harness.About `json:"about"`
	Seconds float64       `json:"seconds"` // that the run took
	Trials  []*Trial      `json:"trials"`
}

func load(path string) (*results, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var r results
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return &r, nil
}

func size(bytes float64) string {
	if bytes < 1<<20 {
		return fmt.Sprintf("%.0f KiB", bytes/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", bytes/(1<<20))
}

// small writes a number with as many digits as it is worth.
func small(x float64) string {
	if math.Abs(x) < 10 {
		return strings.TrimSuffix(fmt.Sprintf("%.1f", x), ".0")
	}
	return fmt.Sprintf("%.0f", x)
}

// total adds up all requests.
func (c count) total() float64 {
	sum := 0.0
	for _, n := range c.Requests {
		sum += n
	}
	return sum
}

// caused is total without those that a candidate makes at its own times,
// whatever happens in the election.
func (c count) caused() float64 {
	return c.total() - c.Requests["LeaseKeepAlive"] - c.Requests["Progress"]
}

// others is how many CPUs programs took that have no part in this, in the trial
// in which that was worst: the times of a busy machine say little.
func (r *results) others() float64 {
	most := 0.0
	for _, t := range r.Trials {
		var c count
		for _, d := range []count{t.Join.Count, t.Steady.Count, t.Change.All} {
			c.add(d)
		}
		most = max(most, (c.Machine-c.EtcdCPU-c.CPU)/c.At)
	}
	return most
}

// rate is the number of requests of a method in a second.
func (c count) rate(method string) float64 { return c.Requests[method] / c.At }

// writeReport writes all that was measured, as it stands in the document.
func writeReport(to io.Writer, r *results) error {
	var b bytes.Buffer
	p := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	p("etcd %s, one member on loopback that does not wait for its disk; %s, Linux %s; etcd and all candidates share %d CPUs, of which other programs took up to %.0f %% of one; TTL %s; %s; the run took %s.\n",
		r.About.Etcd, r.About.Go, r.About.Kernel, r.About.CPUs, 100*r.others(), seconds(r), r.About.Date, harness.Span(r.Seconds*1000))

	p("\nWhile nobody comes or goes:\n\n")
	p("| | requests/s | renewals | watch still served? | reads | most renewals in 0.1 s (evenly spread) | etcd's CPU | etcd's memory per candidate |\n|---|---|---|---|---|---|---|---|\n")
	steady := func(name string, t *Trial, s Steady) {
		c := s.Count
		p("| %s | %.1f | %.1f | %.1f | %.1f | %d (%.1f) | %.1f %% of a core | %s |\n", name, c.total()/c.At, c.rate("LeaseKeepAlive"), c.rate("Progress"),
			c.rate("Range")+c.rate("Txn"), s.Peak, c.rate("LeaseKeepAlive")/10, 100*c.EtcdCPU/c.At, size(t.Memory.EtcdResident))
	}
	for _, t := range r.Trials {
		steady(t.Shape.String(), t, t.Steady)
		if t.After != nil {
			steady("the same after a restart of etcd", t, *t.After)
		}
	}

	p("\nOne leader after the other is stopped (%d times), and a new candidate takes its place at the end of the queue:\n\n", changes)
	p("| | hand-over p50 | p99 | requests for the change | for the return | both, by etcd's count of the whole time | watch events per change |\n|---|---|---|---|---|---|---|\n")
	for _, t := range r.Trials {
		ch, n := t.Change, float64(len(t.Change.Times))
		stop, back := small(ch.Stops.caused()/n), small(ch.Returns.caused()/n)
		if t.Shape.Elections > 1 { // the other leaders' reads are among them
			stop, back = "-", "-"
		}
		besides, whole := t.Steady.Count.caused()*ch.All.At/t.Steady.Count.At, "-"
		if besides/n < 5 { // else the difference says little
			whole = small((ch.All.caused() - besides) / n)
		}
		p("| %s | %s | %s | %s | %s | %s | %s |\n", t.Shape, harness.Span(harness.Percentile(ch.Times, 50)), harness.Span(harness.Percentile(ch.Times, 99)), stop, back,
			whole, small(ch.Stops.Events/n))
	}

	p("\nAll at once, per candidate:\n\n| | took | requests | watch events | received | etcd's CPU in all | besides |\n|---|---|---|---|---|---|---|\n")
	burst := func(what string, b *Burst, n int, besides string) {
		if b == nil {
			return
		}
		per := float64(n)
		p("| %s | %s | %s | %s | %s | %.1f s | %s |\n", what, harness.Span(b.Seconds*1000), small(b.Count.caused()/per), small(b.Count.Events/per),
			size(b.Count.BytesSent/per), b.Count.EtcdCPU, besides)
	}
	for _, t := range r.Trials {
		all, e := t.Shape.candidates(), t.Shape.Elections
		burst(t.Shape.String()+" join", &t.Join, all, "")
		if b := t.AllLeaders; b != nil {
			burst(fmt.Sprintf("%d leaders stop", e), b, e, fmt.Sprintf("hand-over p50 %s, p99 %s", harness.Span(harness.Percentile(b.Times, 50)), harness.Span(harness.Percentile(b.Times, 99))))
		}
		if b := t.Restart; b != nil {
			burst(fmt.Sprintf("%d come back after a restart of etcd", all), b, all, fmt.Sprintf("etcd was down for %s; %d terms began", harness.Span(b.Outage*1000), b.Terms))
		}
		left := ""
		if t.Leave.Left > 0 {
			left = fmt.Sprintf("%.0f leases not revoked in time", t.Leave.Left)
		}
		burst(fmt.Sprintf("%d leave", all), &t.Leave, all, left)
	}

	p("\nA candidate's own memory here (without its processes, its guard and its HTTP; those are in `make bench`):\n\n")
	p("| | resident | heap | stacks | goroutines |\n|---|---|---|---|---|\n")
	for _, t := range r.Trials {
		p("| %s | %s | %s | %s | %.0f |\n", t.Shape, size(t.Memory.Resident), size(t.Memory.Heap), size(t.Memory.Stack), t.Memory.Goroutines)
	}

	p("\nTerms lost against the candidate's will, and warnings, over each whole trial:\n\n")
	for _, t := range r.Trials {
		p("- %s: %s; %s\n", t.Shape, tally(t.Lost, "no term lost"), tally(t.Warnings, "no warning"))
	}
	_, err := to.Write(b.Bytes())
	return err
}

func seconds(r *results) string {
	return (time.Duration(r.Trials[0].TTL*1000) * time.Millisecond).String()
}

func tally(m map[string]int, none string) string {
	if len(m) == 0 {
		return none
	}
	var parts []string
	for _, what := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%d × %s", m[what], what))
	}
	return strings.Join(parts, ", ")
}

// writeCapacity writes what follows from the figures.
func writeCapacity(to io.Writer, r *results) error {
	var crowds []*Trial
	var pairs *Trial
	for _, t := range r.Trials {
		if t.Shape.Elections > 1 {
			pairs = t
		} else {
			crowds = append(crowds, t)
		}
	}
	if len(crowds) == 0 || pairs == nil {
		return errors.New("a run with both kinds of trials is needed")
	}
	var b bytes.Buffer
	p := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	n, leaders, c := float64(pairs.Shape.candidates()), float64(pairs.Shape.Elections), pairs.Steady.Count
	formula := 5.5*n/pairs.TTL + max(5*n/pairs.TTL, n/2.5) + 5.5*leaders/pairs.TTL + n/pairs.TTL
	p("- **Requests while nothing happens**: by the formula %.0f/s for %v; measured %.0f/s.\n", formula, pairs.Shape, c.total()/c.At)
	share := c.EtcdCPU / c.At / n
	p("- **etcd's CPU**: %.0f %% of a core for %.0f candidates in pairs. In proportion, which was not tried, half a core carries %.0f.\n",
		100*share*n, n, math.Floor(0.5/share/100)*100)
	p("- **etcd's memory**: %s for each candidate: its connection, two watches, a lease. 4 GiB carry %.0f, in the same proportion.\n",
		size(pairs.Memory.EtcdResident), math.Floor(4*(1<<30)/pairs.Memory.EtcdResident/1000)*1000)
	p("- **A crowd in one election**: all joining at once costs etcd ")
	for i, t := range crowds {
		if i > 0 {
			p(", ")
		}
		p("%.2f s of CPU for %d", t.Join.Count.EtcdCPU, t.Shape.Size)
	}
	p(".\n")
	_, err := to.Write(b.Bytes())
	return err
}

// refresh puts the figures into the document.
func refresh(doc, from string) error {
	r, err := load(from)
	if err != nil {
		return err
	}
	sections := map[string]string{}
	for name, write := range map[string]func(io.Writer, *results) error{"scale": writeReport, "capacity": writeCapacity} {
		var b bytes.Buffer
		if err := write(&b, r); err != nil {
			return err
		}
		sections[name] = b.String()
	}
	return harness.Refresh(doc, sections)
}
