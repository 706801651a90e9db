//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
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

func tenths(x float64) string { return fmt.Sprintf("%.1f", x) }

// total adds up all requests.
func (c count) total() float64 {
	sum := 0.0
	for _, n := range c.Requests {
		sum += n
	}
	return sum
}

// caused is total without those that a candidate makes at its own times, whatever happens in the
// election.
func (c count) caused() float64 {
	return c.total() - c.Requests["LeaseKeepAlive"] - c.Requests["Progress"]
}

// rate is the number of requests of a method in a second.
func (c count) rate(method string) float64 { return c.Requests[method] / c.At }

// others is how many CPUs programs took that have no part in this, in the trial in which that was
// worst: the times of a busy machine say little.
func (r *results) others() float64 {
	most := 0.0
	for _, t := range r.Trials {
		var c count
		for _, d := range []count{t.Join.Count, t.Steady.Count, t.Change.All} {
			c.add(d, 1)
		}
		most = max(most, (c.Machine-c.EtcdCPU-c.CPU)/c.At)
	}
	return most
}

// report is all that was measured, as it stands in the document.
func (r *results) report() string {
	var b bytes.Buffer
	a, ttl := r.About, time.Duration(r.Trials[0].TTL*1000)*time.Millisecond
	fmt.Fprintf(&b, "etcd %s, one member on loopback that does not wait for its disk; %s, "+
		"Linux %s; etcd and all candidates share %d CPUs, of which other programs took up to "+
		"%.0f %% of one; TTL %s; %s; the run took %s.\n",
		a.Etcd, a.Go, a.Kernel, a.CPUs, 100*r.others(), ttl, a.Date, harness.Span(r.Seconds*1000))
	reportSteady(&b, r)
	reportChanges(&b, r)
	reportBursts(&b, r)
	b.WriteString("\nA candidate's own memory here (without its processes, its guard and its " +
		"HTTP; those are in `make bench`):\n\n")
	harness.TableHead(&b, "", "resident", "heap", "stacks", "goroutines")
	for _, t := range r.Trials {
		m := t.Memory
		harness.TableRow(&b, t.Shape.String(), size(m.Resident), size(m.Heap), size(m.Stack),
			fmt.Sprintf("%.0f", m.Goroutines))
	}
	b.WriteString("\nTerms lost against the candidate's will, and warnings, over each " +
		"whole trial:\n\n")
	for _, t := range r.Trials {
		fmt.Fprintf(&b, "- %s: %s; %s\n",
			t.Shape, tally(t.Lost, "no term lost"), tally(t.Warnings, "no warning"))
	}
	return b.String()
}

func reportSteady(b *bytes.Buffer, r *results) {
	fmt.Fprintf(b, "\nWhile nobody comes or goes:\n\n")
	harness.TableHead(b, "", "requests/s", "renewals", "watch still served?", "reads",
		"most renewals in 0.1 s (evenly spread)", "etcd's CPU", "etcd's memory per candidate")
	row := func(name string, t *Trial, s *Burst) {
		c := s.Count
		renewals := c.rate("LeaseKeepAlive")
		harness.TableRow(b, name, tenths(c.total()/c.At), tenths(renewals),
			tenths(c.rate("Progress")), tenths(c.rate("Range")+c.rate("Txn")),
			fmt.Sprintf("%d (%.1f)", s.Peak, renewals/10),
			fmt.Sprintf("%.1f %% of a core", 100*c.EtcdCPU/c.At), size(t.Memory.EtcdResident))
	}
	for _, t := range r.Trials {
		row(t.Shape.String(), t, t.Steady)
		if t.After != nil {
			row("the same after a restart of etcd", t, t.After)
		}
	}
}

func reportChanges(b *bytes.Buffer, r *results) {
	fmt.Fprintf(b, "\nOne leader after the other is stopped (%d times), and a new candidate takes "+
		"its place at the end of the queue:\n\n", changes)
	harness.TableHead(b, "", "hand-over p50", "p99", "requests for the change", "for the return",
		"both, by etcd's count of the whole time", "watch events per change")
	for _, t := range r.Trials {
		ch, n := t.Change, float64(len(t.Change.Times))
		more := func(c count) string { // requests for each change
			besides := t.Steady.Count.caused() * c.At / t.Steady.Count.At
			if besides/n > 5 { // the difference says little
				return "-"
			}
			return small((c.caused() - besides) / n)
		}
		p50, p99, _ := harness.Spans(ch.Times)
		harness.TableRow(b, t.Shape.String(), p50, p99, more(ch.Stops), more(ch.Returns),
			more(ch.All), small(ch.Stops.Events/n))
		if len(t.Naive) > 0 {
			p50, p99, _ := harness.Spans(t.Naive)
			harness.TableRow(b, fmt.Sprintf("the same, %d naive clients", t.Shape.Size), p50, p99,
				"", "", "", "")
		}
	}
}

func reportBursts(b *bytes.Buffer, r *results) {
	fmt.Fprintf(b, "\nAll at once, per candidate:\n\n")
	harness.TableHead(b, "", "took", "requests", "watch events", "received", "etcd's CPU in all",
		"besides")
	row := func(what string, of *Burst, n int, besides string) {
		c, per := of.Count, float64(n)
		harness.TableRow(b, what, harness.Span(of.Seconds*1000), small(c.caused()/per),
			small(c.Events/per), size(c.BytesSent/per), fmt.Sprintf("%.1f s", c.EtcdCPU), besides)
	}
	for _, t := range r.Trials {
		n, e := t.Shape.candidates(), t.Shape.Elections
		join := ""
		if t.Shape.AtATime > 0 {
			join = fmt.Sprintf("%d at a time", t.Shape.AtATime)
		}
		row(t.Shape.String()+" join", t.Join, n, join)
		if a := t.AllLeaders; a != nil {
			p50, p99, _ := harness.Spans(a.Times)
			row(fmt.Sprintf("%d leaders stop", e), a, e, "hand-over p50 "+p50+", p99 "+p99)
		}
		if a := t.Restart; a != nil {
			row(fmt.Sprintf("%d come back after a restart of etcd", n), a, n, fmt.Sprintf(
				"etcd was down for %s; %d terms began", harness.Span(a.Outage*1000), a.Terms))
		}
		left := ""
		if t.Leave.Left > 0 {
			left = fmt.Sprintf("%.0f leases not revoked in time", t.Leave.Left)
		}
		row(fmt.Sprintf("%d leave", n), t.Leave, n, left)
	}
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

// capacity is what follows from the figures.
func (r *results) capacity() (string, error) {
	var joins []string
	var pairs *Trial
	for _, t := range r.Trials {
		if t.Shape.Elections > 1 {
			pairs = t
			continue
		}
		joins = append(joins,
			fmt.Sprintf("%.2f s of CPU for %d", t.Join.Count.EtcdCPU, t.Shape.Size))
	}
	if len(joins) == 0 || pairs == nil {
		return "", errors.New("a run with both kinds of trials is needed")
	}
	n := float64(pairs.Shape.candidates()) // each leads, or is next in line
	c := pairs.Steady.Count
	ttl, share, memory := pairs.TTL, c.EtcdCPU/c.At/n, pairs.Memory.EtcdResident
	return fmt.Sprintf("- **Requests while nothing happens**: by the formula %.0f/s for %v; "+
		"measured %.0f/s.\n"+
		"- **etcd's CPU**: %.0f %% of a core for %.0f candidates in pairs. In proportion, which "+
		"was not tried, half a core carries %.0f.\n"+
		"- **etcd's memory**: %s for each candidate: its connection, a watch, a lease. 4 GiB "+
		"carry %.0f, in the same proportion.\n"+
		"- **A crowd in one election**: all joining at once costs etcd %s.\n",
		5.5*n/ttl+max(5*n/ttl, n/2.5)+5.5*n/ttl+n/ttl, pairs.Shape, c.total()/c.At,
		100*share*n, n, math.Floor(0.5/share/100)*100,
		size(memory), math.Floor(4*(1<<30)/memory/1000)*1000,
		strings.Join(joins, ", ")), nil
}

// refresh puts the figures into the document.
func refresh(doc string) error {
	r, err := harness.ReadJSON[results](file)
	if err != nil {
		return err
	}
	capacity, err := r.capacity()
	if err != nil {
		return err
	}
	sections := map[string]string{"scale": r.report(), "capacity": capacity}
	switch large, err := harness.ReadJSON[results](largeFile); {
	case err == nil:
		sections["large"] = large.report()
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	return harness.Refresh(doc, sections)
}
