//go:build linux

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"leasehold/e2e/harness"
)

// results is the JSON of a run. All spans are in milliseconds.
type results struct {
	About     harness.About `json:"about"`
	Seed      uint64        `json:"seed"`
	Faults    int           `json:"faults"`
	TTL       float64       `json:"ttl_ms"`
	Contender string        `json:"contender"`
	Violation string        `json:"violation,omitempty"`

	Lasted     float64        `json:"lasted_ms"` // from the first fault to the last heal
	Kinds      []kindCount    `json:"kinds"`
	Counts     counts         `json:"counts"`
	Starts     int            `json:"daemon_starts"`
	Exits      map[string]int `json:"daemon_exits"` // by code
	MostLeases int            `json:"most_leases"`

	Overlaps []overlapCount `json:"overlaps"`
	// These are of all deeds, an operator's and etcd's own, that took a term whose
	// job lived: how long that was alive beside the next one.
	Deeds   distribution `json:"overlap_after_deed"`
	Starved distribution `json:"overlap_after_deed_starved"`
	Deaf    distribution `json:"overlap_after_deed_unheard"`

	Thawed distribution            `json:"overlap_after_thaw"`
	Late   map[string]distribution `json:"leader_yes_after_end"`
	Stale  map[class]distribution  `json:"status_leading_after_deed"`

	JobShare float64 `json:"job_share"` // of the time, with a living job
	Gaps     []gap   `json:"longest_without_job"`
	Recovery float64 `json:"recovery_ms"`
	Bound    float64 `json:"recovery_bound_ms"`
	Stopped  float64 `json:"all_stopped_ms"`
	Cleared  float64 `json:"etcd_empty_ms"`
}

type kindCount struct {
	Name  string  `json:"name"`
	Count int     `json:"count"`
	Idle  int     `json:"idle"` // hit nothing
	For   float64 `json:"for_ms"`
}

type overlapCount struct {
	Class class   `json:"class"`
	Count int     `json:"count"`
	Max   float64 `json:"max_ms"`
}

type distribution struct {
	N   int     `json:"n"`
	P50 float64 `json:"p50_ms"`
	P99 float64 `json:"p99_ms"`
	Max float64 `json:"max_ms"`
}

func distributionOf(ms []float64) distribution {
	if len(ms) == 0 {
		return distribution{}
	}
	return distribution{len(ms), harness.Percentile(ms, 50), harness.Percentile(ms, 99), slices.Max(ms)}
}

func (d distribution) String() string {
	if d.N == 0 {
		return "none"
	}
	return fmt.Sprintf("%d, p50 %s, p99 %s, max %s", d.N, harness.Span(d.P50), harness.Span(d.P99), harness.Span(d.Max))
}

// gap is a time without a job.
type gap struct {
	At      float64  `json:"at_ms"` // from the beginning of the run
	For     float64  `json:"for_ms"`
	Silent  float64  `json:"etcd_silent_ms"`    // for so much of it etcd answered no read
	Backoff float64  `json:"leader_backoff_ms"` // for so much of it a leader waited to start a crashed job again
	During  []string `json:"during"`            // the faults of that time
}

// afterDeeds are how long the old job lived on beside the next one after each
// deed of a class that met a living job: zero where it did not.
func (k *checker) afterDeeds(of class) []float64 {
	var ms []float64
	for i := range k.deeds {
		d := &k.deeds[i]
		lasted, found := time.Duration(0), d.hit
		for _, o := range k.overlaps {
			if k.deedOn(o.earlier.token, o.from) == d {
				lasted, found = max(lasted, o.lasted), true
			}
		}
		if found && d.class() == of {
			ms = append(ms, harness.Milliseconds(lasted))
		}
	}
	return ms
}

const (
	// deedBound is what an overlap after an operator's deed may last at p99.
	deedBound = 10 * time.Millisecond
	// deedsJudged is how many there must have been before that is judged: p99 of
	// fewer is the longest of all, one bad moment of the machine. Those may last
	// ten times as long.
	deedsJudged = 100
)

// verdict is passed when all is over.
func (k *checker) verdict() error {
	k.mu.Lock()
	k.judge(harness.Now(), true)
	d := distributionOf(k.afterDeeds(afterDeed))
	bound := deedBound
	if d.N < deedsJudged {
		bound *= 10
	}
	if d.P99 > harness.Milliseconds(bound) {
		for _, o := range k.overlaps {
			if o.class == afterDeed && harness.Milliseconds(o.lasted) == d.Max {
				k.violateAt(o.from+o.lasted, []string{o.earlier.candidate, o.later.candidate},
					"%s: two jobs were alive for %s at p99, for %v at most: the %s, and the %s", afterDeed, harness.Span(d.P99), o.lasted, o.earlier, o.later)
			}
		}
	}
	k.mu.Unlock()
	if v := k.first.Load(); v != nil {
		return v
	}
	return nil
}

func (s *stage) results() *results {
	k := s.check
	k.mu.Lock()
	defer k.mu.Unlock()
	now := harness.Now()
	if s.faulted.to == 0 {
		s.faulted.to = now
	}
	r := &results{
		About: s.about, Seed: s.seed, Faults: s.faults, TTL: harness.Milliseconds(s.ttl), Contender: s.contender,
		Lasted: harness.Milliseconds(s.faulted.length()), Counts: k.counts, MostLeases: k.mostLeases, Exits: map[string]int{},
		Deeds: distributionOf(k.afterDeeds(afterDeed)), Starved: distributionOf(k.afterDeeds(starved)),
		Deaf: distributionOf(k.afterDeeds(deafToDeed)),
		Late: map[string]distribution{}, Stale: map[class]distribution{}, Recovery: harness.Milliseconds(s.recover), Bound: harness.Milliseconds(s.recoveryBound()),
		Stopped: harness.Milliseconds(s.stopped), Cleared: harness.Milliseconds(s.cleared),
	}
	for c, ms := range k.excused {
		r.Stale[c] = distributionOf(ms)
	}
	for excuse, ms := range k.late {
		r.Late[excuse] = distributionOf(ms)
	}
	for _, c := range s.candidates {
		c.mu.Lock()
		r.Starts += c.starts
		for code, n := range c.exits {
			r.Exits[fmt.Sprint(code)] += n
		}
		c.mu.Unlock()
	}
	for _, kd := range kinds {
		r.Kinds = append(r.Kinds, kindCount{Name: kd.name})
	}
	for i, d := range s.done {
		c := &r.Kinds[slices.IndexFunc(kinds, func(k kind) bool { return k.name == d.name })]
		c.Count++
		c.For += harness.Milliseconds(d.length())
		if d.idle || k.idles[i] {
			c.Idle++
		}
	}
	thawed := []float64{}
	for _, o := range k.overlaps {
		i := slices.IndexFunc(r.Overlaps, func(c overlapCount) bool { return c.Class == o.class })
		if i < 0 {
			i = len(r.Overlaps)
			r.Overlaps = append(r.Overlaps, overlapCount{Class: o.class})
		}
		r.Overlaps[i].Count++
		r.Overlaps[i].Max = max(r.Overlaps[i].Max, harness.Milliseconds(o.lasted))
		if o.class == afterThaw {
			thawed = append(thawed, harness.Milliseconds(o.lasted))
		}
	}
	r.Thawed = distributionOf(thawed)
	whole := []span{s.faulted}
	lived := slices.Clone(k.past)
	for _, t := range k.terms {
		lived = append(lived, k.awake(t, now)...)
	}
	lived = both(merge(lived), whole)
	r.JobShare = total(lived).Seconds() / max(s.faulted.length().Seconds(), 0.001)
	gaps := without(whole, lived)
	slices.SortFunc(gaps, func(a, b span) int { return cmp.Compare(b.length(), a.length()) })
	for _, g := range gaps[:min(3, len(gaps))] {
		shared := func(spans []span) float64 { return harness.Milliseconds(total(both([]span{g}, merge(spans)))) }
		r.Gaps = append(r.Gaps, gap{harness.Milliseconds(g.from - s.began), harness.Milliseconds(g.length()), shared(k.silent), shared(k.backoffs), s.during(g)})
	}
	return r
}

// during lists the faults that lasted or began in a span, or just before it.
func (s *stage) during(g span) []string {
	var names []string
	for _, d := range s.done {
		if d.from < g.to && d.to > g.from-time.Second {
			names = append(names, d.name)
		}
	}
	return names
}

func reportFrom(path, summary string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var r results
	if err := json.Unmarshal(data, &r); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	if summary == "" {
		return writeReport(os.Stdout, &r)
	}
	f, err := os.Create(summary)
	if err != nil {
		return err
	}
	return errors.Join(writeSummary(f, &r), f.Close())
}

// line is a figure of the report.
type line struct{ name, value string }

func (r *results) lines() []line {
	hundredth := func(f float64) string { return fmt.Sprintf("%.1f %%", 100*f) }
	lines := []line{
		{"faults", fmt.Sprintf("%d in %s, TTL %s, seed %d", r.faultCount(), harness.Span(r.Lasted), harness.Span(r.TTL), r.Seed)},
		{"terms", fmt.Sprintf("%d; the job was started %d times in them, as %d processes and more that only forked", r.Counts.Terms, r.Counts.Jobs, r.Counts.Processes)},
		{"daemons started", fmt.Sprintf("%d times; ended with %s", r.Starts, exits(r.Exits))},
		{"time with a living job", hundredth(r.JobShare)},
	}
	for i, g := range r.Gaps {
		lines = append(lines, line{[]string{"longest time without", "second longest", "third longest"}[i],
			fmt.Sprintf("%s; for %s of it a leader waited to start a crashed job again, for %s etcd answered no read; during: %s",
				harness.Span(g.For), harness.Span(g.Backoff), harness.Span(g.Silent), strings.Join(g.During, ", "))})
	}
	outside := "none"
	for _, o := range r.Overlaps {
		if o.Class == unexcused {
			outside = fmt.Sprintf("%d, max %s", o.Count, harness.Span(o.Max))
		}
	}
	lines = append(lines, line{"two jobs alive at once", outside})
	for _, o := range r.Overlaps {
		if o.Class == guardLate {
			lines = append(lines, line{"… " + string(o.Class), fmt.Sprintf("%d, max %s", o.Count, harness.Span(o.Max))})
		}
	}
	if r.Contender == leasehold {
		lines = append(lines,
			line{"two alive after an operator's deed", r.Deeds.String()},
			line{"… with the machine starved", r.Starved.String()},
			line{"… with the old leader out of reach", r.Deaf.String()},
			line{"two alive after a thaw past the TTL", r.Thawed.String()},
			line{"/status checked", fmt.Sprintf("%d times, %d of them leading", r.Counts.Status, r.Counts.Leading)},
			line{"… still leading after an operator's deed", r.Stale[afterDeed].String()},
			line{"… the same, the machine starved", r.Stale[starved].String()},
			line{"… the same, the old leader out of reach", r.Stale[deafToDeed].String()},
			line{"/leader checked", fmt.Sprintf("%d times, %d of them 200; %d for a job that was killed before it told of itself", r.Counts.Leader, r.Counts.Yes, r.Counts.Untold)},
		)
		for _, excuse := range slices.Sorted(maps.Keys(r.Late)) {
			lines = append(lines, line{"… still 200 after " + cmp.Or(excuse, "leasehold had killed the job"), r.Late[excuse].String()})
		}
		lines = append(lines,
			line{"leases checked", fmt.Sprintf("%d times; at most %d at once", r.Counts.Leases, r.MostLeases)},
			line{"a job after the last heal", fmt.Sprintf("%s (bound: %s; a leader's wait to start a crashed job again apart)", harness.Span(r.Recovery), harness.Span(r.Bound))},
			line{"all stopped, nothing left", fmt.Sprintf("in %s; etcd empty in %s", harness.Span(r.Stopped), harness.Span(r.Cleared))},
		)
	}
	return lines
}

func (r *results) where() string {
	a := r.About
	return fmt.Sprintf("%s: etcd %s, %s, Linux %s, %d CPUs", a.Date, a.Etcd, a.Go, a.Kernel, a.CPUs)
}

func (r *results) faultCount() int {
	n := 0
	for _, k := range r.Kinds {
		n += k.Count
	}
	return n
}

func exits(byCode map[string]int) string {
	var texts []string
	for _, code := range slices.SortedFunc(maps.Keys(byCode), func(a, b string) int { return cmp.Or(byCode[b]-byCode[a], cmp.Compare(a, b)) }) {
		texts = append(texts, fmt.Sprintf("%s: %d", code, byCode[code]))
	}
	return strings.Join(texts, ", ")
}

func writeReport(w io.Writer, r *results) error {
	var text strings.Builder
	fmt.Fprintf(&text, "\n%s under random faults; %s\n", r.Contender, r.where())
	for _, l := range r.lines() {
		fmt.Fprintf(&text, "  %-45s %s\n", l.name, l.value)
	}
	text.WriteString("\n  fault                   times   of which hit nothing   for\n")
	for _, k := range r.Kinds {
		fmt.Fprintf(&text, "  %-24s %4d   %20d   %s\n", k.Name, k.Count, k.Idle, harness.Span(k.For))
	}
	if r.Violation != "" {
		fmt.Fprintf(&text, "\n  VIOLATION: %s\n", r.Violation)
	}
	_, err := io.WriteString(w, text.String())
	return err
}

func writeSummary(w io.Writer, r *results) error {
	var text strings.Builder
	fmt.Fprintf(&text, "# A long run under random faults\n\n"+
		"Written by `bin/soak -from FILE -summary docs/soak.md` from the figures of `make soak SEED=%d FAULTS=%d`. Not by hand.\n\n", r.Seed, r.Faults)
	fmt.Fprintf(&text, "%d candidates in one election, two of them an ordinary user's without a cgroup, and %d members of etcd, each on a\n"+
		"network node of its own. Faults come one after another and overlapping; jobs ignore SIGTERM, daemonize, fork in storms, crash.\n"+
		"Checked all the time: lives of jobs, fencing tokens, /status, /leader, leases, processes and cgroups; the first promise broken would have\n"+
		"ended the run. How soon a job comes back is checked after the last fault, and only shown before. %s.\n\n", candidateCount, memberCount, r.where())
	if r.Violation != "" {
		fmt.Fprintf(&text, "**A promise was broken, and the run ended with that:** %s.\n\n", r.Violation)
	}
	text.WriteString("| | |\n|---|---|\n")
	for _, l := range r.lines() {
		fmt.Fprintf(&text, "| %s | %s |\n", l.name, l.value)
	}
	text.WriteString("\n| fault | times | of which hit nothing | for |\n|---|---|---|---|\n")
	for _, k := range r.Kinds {
		lasted := ""
		if k.For > 0 {
			lasted = harness.Span(k.For)
		}
		fmt.Fprintf(&text, "| %s | %d | %d | %s |\n", k.Name, k.Count, k.Idle, lasted)
	}
	_, err := io.WriteString(w, text.String())
	return err
}
