//go:build linux

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// results is the JSON of a run. All times are in milliseconds.
type results struct {
	About     harness.About `json:"about"`
	Seed      uint64        `json:"seed"`
	Faults    int           `json:"faults"`
	TTL       float64       `json:"ttl_ms"`
	Contender string        `json:"contender"`
	Violation string        `json:"violation,omitempty"`

	Lasted     float64        `json:"lasted_ms"` // from the first fault to the end of the last
	Kinds      []kindCount    `json:"kinds"`
	Counts     counts         `json:"counts"`
	Starts     int            `json:"daemon_starts"`
	Exits      map[string]int `json:"daemon_exits"` // by code
	MostLeases int            `json:"most_leases"`

	Overlaps []overlapCount `json:"overlaps"`
	// These are of all actions, an operator's and etcd's own, that took a term whose job lived: how
	// long that was alive beside the next one.
	Actions   distribution `json:"overlap_after_deed"`
	Starved   distribution `json:"overlap_after_deed_starved"`
	Unreached distribution `json:"overlap_after_deed_unheard"`

	Thawed distribution            `json:"overlap_after_thaw"`
	Late   map[string]distribution `json:"leader_yes_after_end"`
	Stale  map[class]distribution  `json:"status_leading_after_deed"`

	JobShare float64    `json:"job_share"` // of the time, with a living job
	Downtime []downtime `json:"longest_without_job"`
	Recovery float64    `json:"recovery_ms"`
	Bound    float64    `json:"recovery_bound_ms"`
	Stopped  float64    `json:"all_stopped_ms"`
	Cleared  float64    `json:"etcd_empty_ms"`
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
	return distribution{
		len(ms), harness.Percentile(ms, 50), harness.Percentile(ms, 99), slices.Max(ms),
	}
}

func (d distribution) String() string {
	if d.N == 0 {
		return "none"
	}
	span := harness.Span
	return fmt.Sprintf("%d, p50 %s, p99 %s, max %s", d.N, span(d.P50), span(d.P99), span(d.Max))
}

// downtime is a time without a job.
type downtime struct {
	At      float64  `json:"at_ms"` // from the beginning of the run
	For     float64  `json:"for_ms"`
	Silent  float64  `json:"etcd_silent_ms"`    // for so much of it etcd answered no read
	Backoff float64  `json:"leader_backoff_ms"` // a leader waited to start a crashed job again
	During  []string `json:"during"`            // the faults of that time
}

// afterActions are how long the old job lived on beside the next one after each action of a class
// that met a living job: zero where it did not.
func (k *checker) afterActions(of class) []float64 {
	var ms []float64
	for _, a := range k.excuses.actions {
		lasted, found := time.Duration(0), a.hit
		for _, o := range k.overlaps {
			if k.excuses.actionOn(o.Earlier.Token, o.from) == a {
				lasted, found = max(lasted, o.lasted()), true
			}
		}
		if found && a.class() == of {
			ms = append(ms, harness.Milliseconds(lasted))
		}
	}
	return ms
}

const (
	// actionBound is what an overlap after an operator's action may last at p99.
	actionBound = 10 * time.Millisecond
	// actionsJudged is how many there must have been before that is judged: p99 of fewer is the
	// longest of all, one bad moment of the machine. Those may last ten times as long.
	actionsJudged = 100
)

// verdict is passed when all is over.
func (k *checker) verdict() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.judge(harness.Now(), true)
	d, bound := distributionOf(k.afterActions(afterAction)), actionBound
	if d.N < actionsJudged {
		bound *= 10
	}
	for _, o := range k.overlaps {
		longest := o.class == afterAction && harness.Milliseconds(o.lasted()) == d.Max
		if longest && d.P99 > harness.Milliseconds(bound) {
			k.violateAt(o.from+o.lasted(), []string{o.Earlier.Candidate, o.Later.Candidate},
				"%s: two jobs were alive for %s at p99, for %v at most: the %v, and the %v",
				afterAction, harness.Span(d.P99), o.lasted(), o.Earlier, o.Later)
		}
	}
	if v := k.first.Load(); v != nil {
		return v
	}
	return nil
}

func (r *run) results(implementation string) *results {
	k, ms := r.check, harness.Milliseconds
	k.mu.Lock()
	defer k.mu.Unlock()
	if r.faulted.To == 0 {
		r.faulted.To = harness.Now()
	}
	res := &results{
		About: r.about, Seed: r.seed, Faults: r.faults, TTL: ms(r.ttl), Contender: implementation,
		Lasted: ms(r.faulted.Length()), Counts: k.counts, MostLeases: k.leases.most,
		Exits: map[string]int{}, Late: map[string]distribution{}, Stale: map[class]distribution{},
		Actions:   distributionOf(k.afterActions(afterAction)),
		Starved:   distributionOf(k.afterActions(starved)),
		Unreached: distributionOf(k.afterActions(unreached)),
		Recovery:  ms(r.recovered), Bound: ms(r.recoveryBound()),
		Stopped: ms(r.stopped), Cleared: ms(r.cleared),
	}
	for c, late := range k.health.excused {
		res.Stale[c] = distributionOf(late)
	}
	for excuse, late := range k.health.late {
		res.Late[excuse] = distributionOf(late)
	}
	for _, c := range r.candidates {
		c.mu.Lock()
		res.Starts += c.starts
		for code, n := range c.exits {
			res.Exits[fmt.Sprint(code)] += n
		}
		c.mu.Unlock()
	}
	for i := range kinds {
		count := kindCount{Name: kinds[i].name}
		for n, d := range r.done {
			if d.kind == &kinds[i] {
				count.Count++
				count.For += ms(d.Length())
				count.Idle += map[bool]int{true: 1}[k.excuses.idle[n]]
			}
		}
		res.Kinds = append(res.Kinds, count)
	}
	res.countOverlaps(k)
	res.addDowntime(r)
	return res
}

func (r *results) countOverlaps(k *checker) {
	byClass, thawed := map[class][]float64{}, []float64{}
	for _, o := range k.overlaps {
		lasted := harness.Milliseconds(o.lasted())
		byClass[o.class] = append(byClass[o.class], lasted)
		if o.class == afterThaw {
			thawed = append(thawed, lasted)
		}
	}
	for _, c := range slices.Sorted(maps.Keys(byClass)) {
		r.Overlaps = append(r.Overlaps, overlapCount{c, len(byClass[c]), slices.Max(byClass[c])})
	}
	r.Thawed = distributionOf(thawed)
}

// addDowntime adds the longest times without a job, and which faults there were.
func (r *results) addDowntime(of *run) {
	k, ms := of.check, harness.Milliseconds
	lived := k.lived(of.faulted)
	r.JobShare = lived.Total().Seconds() / max(of.faulted.Length().Seconds(), 0.001)
	without := check.Intervals{of.faulted}.Without(lived)
	slices.SortFunc(without, func(a, b check.Interval) int {
		return cmp.Compare(b.Length(), a.Length())
	})
	for _, w := range without[:min(3, len(without))] {
		shared := func(all check.Intervals) float64 {
			return ms(check.Merge(all...).And(check.Intervals{w}).Total())
		}
		d := downtime{
			At: ms(w.From - of.began), For: ms(w.Length()),
			Silent: shared(k.leases.silent), Backoff: shared(k.health.backoffs),
		}
		for _, f := range of.done { // those just before it count too
			if f.From < w.To && f.To > w.From-time.Second {
				d.During = append(d.During, f.name)
			}
		}
		r.Downtime = append(r.Downtime, d)
	}
}

func reportFrom(path, summary string) error {
	r, err := harness.ReadJSON[results](path)
	if err != nil {
		return err
	}
	if summary == "" {
		return writeReport(os.Stdout, r)
	}
	f, err := os.Create(summary)
	if err != nil {
		return err
	}
	return errors.Join(writeSummary(f, r), f.Close())
}

// line is a figure of the report.
type line struct{ name, value string }

func (r *results) lines() []line {
	span, c := harness.Span, r.Counts
	faults := 0
	for _, k := range r.Kinds {
		faults += k.Count
	}
	lines := []line{
		{"faults", fmt.Sprintf("%d in %s, TTL %s, seed %d", faults, span(r.Lasted), span(r.TTL), r.Seed)},
		{"terms", fmt.Sprintf("%d; the job was started %d times in them, as %d processes and more that "+
			"only forked", c.Terms, c.Jobs, c.Processes)},
		{"daemons started", fmt.Sprintf("%d times; ended with %s", r.Starts, exits(r.Exits))},
		{"time with a living job", fmt.Sprintf("%.1f %%", 100*r.JobShare)},
	}
	for i, d := range r.Downtime {
		name := []string{"longest time without", "second longest", "third longest"}[i]
		lines = append(lines, line{name, fmt.Sprintf("%s; for %s of it a leader waited to start a "+
			"crashed job again, for %s etcd answered no read; during: %s",
			span(d.For), span(d.Backoff), span(d.Silent), strings.Join(d.During, ", "))})
	}
	outside, late := "none", []line{}
	for _, o := range r.Overlaps {
		text := fmt.Sprintf("%d, max %s", o.Count, span(o.Max))
		switch o.Class {
		case unexcused:
			outside = text
		case guardLate:
			late = append(late, line{"… " + string(o.Class), text})
		}
	}
	lines = append(append(lines, line{"two jobs alive at once", outside}), late...)
	if r.Contender != harness.Leasehold.Name {
		return lines
	}
	lines = append(lines,
		line{"two alive after an operator's action", r.Actions.String()},
		line{"… with the machine starved", r.Starved.String()},
		line{"… with the old leader out of reach", r.Unreached.String()},
		line{"two alive after a thaw past the TTL", r.Thawed.String()},
		line{"/status checked", fmt.Sprintf("%d times, %d of them leading", c.Status, c.Leading)},
		line{"… still leading after an operator's action", r.Stale[afterAction].String()},
		line{"… the same, the machine starved", r.Stale[starved].String()},
		line{"… the same, the old leader out of reach", r.Stale[unreached].String()},
		line{"/leader checked", fmt.Sprintf("%d times, %d of them 200; %d for a job that was killed "+
			"before the witness knew it", c.Leader, c.Yes, c.Untold)},
	)
	for _, excuse := range slices.Sorted(maps.Keys(r.Late)) {
		after := cmp.Or(excuse, "leasehold had killed the job")
		lines = append(lines, line{"… still 200 after " + after, r.Late[excuse].String()})
	}
	return append(lines,
		line{"leases checked", fmt.Sprintf("%d times; at most %d at once", c.Leases, r.MostLeases)},
		line{"a job after the last fault", fmt.Sprintf("%s (bound: %s; a leader's wait to start a "+
			"crashed job again apart)", span(r.Recovery), span(r.Bound))},
		line{"all stopped, nothing left", fmt.Sprintf("in %s; etcd empty in %s",
			span(r.Stopped), span(r.Cleared))},
	)
}

func exits(byCode map[string]int) string {
	often := func(a, b string) int { return cmp.Or(byCode[b]-byCode[a], cmp.Compare(a, b)) }
	var texts []string
	for _, code := range slices.SortedFunc(maps.Keys(byCode), often) {
		texts = append(texts, fmt.Sprintf("%s: %d", code, byCode[code]))
	}
	return strings.Join(texts, ", ")
}

func (r *results) where() string {
	a := r.About
	return fmt.Sprintf("%s: etcd %s, %s, Linux %s, %d CPUs", a.Date, a.Etcd, a.Go, a.Kernel, a.CPUs)
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
		"Written by `bin/soak -from FILE -summary docs/soak.md` from the figures of "+
		"`make soak SEED=%d FAULTS=%d`. Not by hand.\n\n", r.Seed, r.Faults)
	fmt.Fprintf(&text, `%d candidates in one election, two of them an ordinary user's without a cgroup,
and %d members of etcd, each on a network node of its own. Faults come one after another and
overlapping; jobs ignore SIGTERM, daemonize, are fork bombs, crash. Checked all the time: lives of
jobs, fencing tokens, /status, /leader, leases, processes and cgroups; the first promise broken
would have ended the run. How soon a job comes back is checked after the last fault, and only shown
before. %s.

`, candidateCount, memberCount, r.where())
	if r.Violation != "" {
		fmt.Fprintf(&text, "**A promise was broken, and the run ended with that:** %s.\n\n", r.Violation)
	}
	harness.TableHead(&text, "", "")
	for _, l := range r.lines() {
		harness.TableRow(&text, l.name, l.value)
	}
	text.WriteString("\n")
	harness.TableHead(&text, "fault", "times", "of which hit nothing", "for")
	for _, k := range r.Kinds {
		lasted := ""
		if k.For > 0 {
			lasted = harness.Span(k.For)
		}
		harness.TableRow(&text, k.Name, fmt.Sprint(k.Count), fmt.Sprint(k.Idle), lasted)
	}
	_, err := io.WriteString(w, text.String())
	return err
}
