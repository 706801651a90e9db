//go:build linux

package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"leasehold/e2e/harness"
)

// Results are what a run saw. Tables and pictures are made from them alone.
type Results struct {
	About   harness.About `json:"about"`
	Version string        `json:"version"` // of leasehold, with its commit
	N       int           `json:"n"`
	PeersN  int           `json:"peers_n"`
	Hooks   bool          `json:"hooks,omitzero"` // leasehold has hooks that move an address
	Minutes float64       `json:"minutes"`
	Rows    []RowInfo     `json:"rows"`
	Samples []Sample      `json:"samples"`
	Again   []Rerun       `json:"again,omitempty"`
}

// Rerun is a row whose trials were made later than the others, by themselves: after a repair, or a
// change of the row. Where the commit was not kept, the version is a range: "A to B".
type Rerun struct {
	Row     string `json:"row"`
	Date    string `json:"date"`
	Version string `json:"version"`
}

// Reruns are the rows that were made later with one version.
type Reruns struct {
	Date, Version string
	Rows          []string
}

// Later are the rows that were made later, by version.
func (r *Results) Later() (later []Reruns) {
	for _, a := range r.Again {
		i := slices.IndexFunc(later, func(o Reruns) bool {
			return o.Date == a.Date && o.Version == a.Version
		})
		if i < 0 {
			i, later = len(later), append(later, Reruns{a.Date, a.Version, nil})
		}
		later[i].Rows = append(later[i].Rows, a.Row)
	}
	return later
}

// RowInfo is what a reader must know of a row.
type RowInfo struct {
	Name        string  `json:"name"`
	Group       string  `json:"group"`
	About       string  `json:"about"`
	TTL         float64 `json:"ttl_seconds"`
	Members     int     `json:"etcd_members"`
	Promise     Promise `json:"promise"` // "" is never two
	NoFailover  bool    `json:"untouched"`
	MayFailover bool    `json:"either"`
	Short       bool    `json:"short"` // in the short table too
}

// Note says what must become of the job, where that is not a failover.
func (r RowInfo) Note() string {
	switch {
	case r.NoFailover:
		return "must not move the job"
	case r.MayFailover:
		return "may move the job or not"
	}
	return ""
}

// Sample is one trial. All times are milliseconds from the fault on; null where
// it did not come to that.
type Sample struct {
	Row       string             `json:"row"`
	Candidate string             `json:"candidate"`
	TTL       float64            `json:"ttl_seconds"`
	Dead      *float64           `json:"dead_ms"` // the old job
	Next      *float64           `json:"next_ms"` // first instruction of the next job
	Gap       float64            `json:"gap_ms,omitzero"`
	Overlap   float64            `json:"overlap_ms,omitzero"`
	LivesOn   bool               `json:"lives_on,omitzero"` // the old job, at the end
	Starts    int                `json:"starts"`            // of a job
	Late      float64            `json:"guard_late_ms,omitzero"`
	Outside   bool               `json:"outside,omitzero"` // an overlap, but the guard was too late
	Figures   map[string]float64 `json:"figures_ms,omitempty"`
	Lives     []Life             `json:"lives"`
	Until     float64            `json:"until_ms"` // the end of the observation

	Violations []string `json:"violations,omitempty"` // of what leasehold promises
	Failure    string   `json:"failure,omitempty"`    // the trial came to no end

	evidence string
}

// Life is a time in which the processes of one term of one candidate were alive.
type Life struct {
	Candidate string   `json:"candidate"`
	Token     int64    `json:"token"`
	From      float64  `json:"from_ms"`
	To        *float64 `json:"to_ms"`
}

func (l Life) sameTerm(o Life) bool { return l.Token == o.Token && l.Candidate == o.Candidate }

// Section is the rows of one group, as the pages show them.
type Section struct {
	Title string
	Rows  []Row
}

// Row is a row with its cells, in the order of the variants.
type Row struct {
	RowInfo
	Cells []Cell
}

// Cell is what was seen of one candidate in one row, in milliseconds.
type Cell struct {
	Candidate                        string
	Dead, Next, Gaps, Overlaps, late []float64

	row     RowInfo
	samples []Sample // that came to an end
	figures map[string][]float64
	livesOn int
	outside int
	broken  []string // promises, and trials that came to no end
}

// Sections are in the order of the table. Of a row without trials there is nothing.
func (r *Results) Sections() []Section {
	var sections []Section
	for _, g := range groups {
		s := Section{Title: g.Title}
		for _, row := range r.Rows {
			var cells []Cell
			for _, v := range variants {
				if c := r.cell(row, v.Title); len(c.samples)+len(c.broken) > 0 {
					cells = append(cells, c)
				}
			}
			if row.Group == g.Name && len(cells) > 0 {
				s.Rows = append(s.Rows, Row{row, cells})
			}
		}
		if len(s.Rows) > 0 {
			sections = append(sections, s)
		}
	}
	return sections
}

func (r *Results) cells() []Cell {
	var all []Cell
	for _, s := range r.Sections() {
		for _, row := range s.Rows {
			all = append(all, row.Cells...)
		}
	}
	return all
}

func (r *Results) cell(row RowInfo, candidate string) Cell {
	c := Cell{Candidate: candidate, row: row, figures: map[string][]float64{}}
	for _, s := range r.Samples {
		if s.Row == row.Name && s.Candidate == candidate {
			c.add(s)
		}
	}
	// What is p99 of a few trials is the worst of them, one bad moment of the machine.
	bound := 10.0
	if len(c.samples) < 20 {
		bound *= 10
	}
	untouched := make([]float64, len(c.samples)-len(c.Overlaps))
	p99 := harness.Percentile(append(untouched, c.Overlaps...), 99)
	if row.Promise == Operator && p99 > bound &&
		strings.HasPrefix(candidate, harness.Leasehold.Name) {
		c.breaks("both jobs alive for %s at p99, more than %s",
			harness.Span(p99), harness.Span(bound))
	}
	return c
}

func (c *Cell) breaks(format string, args ...any) {
	c.broken = append(c.broken, c.row.Name+", "+c.Candidate+": "+fmt.Sprintf(format, args...))
}

func (c *Cell) add(s Sample) {
	for _, v := range s.Violations {
		c.breaks("%s", v)
	}
	if s.Failure != "" {
		c.breaks("no outcome: %s", s.Failure)
		return
	}
	c.samples, c.late = append(c.samples, s), append(c.late, s.Late)
	if s.Dead != nil {
		c.Dead = append(c.Dead, *s.Dead)
	}
	if s.Next != nil {
		c.Next = append(c.Next, *s.Next)
	}
	if s.Dead != nil && s.Next != nil {
		c.Gaps = append(c.Gaps, s.Gap)
	}
	if s.Overlap != 0 {
		c.Overlaps = append(c.Overlaps, s.Overlap)
	}
	if s.LivesOn {
		c.livesOn++
	}
	if s.Outside {
		c.outside++
	}
	for name, v := range s.Figures {
		c.figures[name] = append(c.figures[name], v)
	}
}

// middle is the trial whose next job came in the middle of all.
func (c Cell) middle() Sample {
	next := func(s Sample) float64 {
		if s.Next == nil {
			return math.Inf(1)
		}
		return *s.Next
	}
	sorted := slices.SortedFunc(slices.Values(c.samples), func(a, b Sample) int {
		return cmp.Compare(next(a), next(b))
	})
	return sorted[(len(sorted)-1)/2]
}

// Violations are all broken promises and all trials that came to no end.
func (r *Results) Violations() []string {
	var all []string
	for _, c := range r.cells() {
		all = append(all, c.broken...)
	}
	return all
}

// Overlap says how often and for how long at worst both jobs were alive.
func (c Cell) Overlap() string {
	text := fmt.Sprintf("%d of %d", len(c.Overlaps), len(c.samples))
	switch {
	case len(c.Overlaps) == 0:
		return text
	case c.livesOn > 0:
		return text + ", lives on"
	}
	text += ", " + most(c.Overlaps)
	if c.outside > 0 {
		text += fmt.Sprintf(" (%d outside: guard late)", c.outside)
	}
	return text
}

// Figures are the medians and maxima of the row's own figures.
func (c Cell) Figures() string {
	var text []string
	for _, name := range slices.Sorted(maps.Keys(c.figures)) {
		values := c.figures[name]
		text = append(text, fmt.Sprintf("%s %s (max %s)", name, median(values), most(values)))
	}
	return strings.Join(text, "; ")
}

// Starts are the job starts after the fault, at least and at most.
func (c Cell) Starts() string {
	if len(c.samples) == 0 {
		return "-"
	}
	order := func(a, b Sample) int { return a.Starts - b.Starts }
	least, most := slices.MinFunc(c.samples, order).Starts, slices.MaxFunc(c.samples, order).Starts
	if least == most {
		return fmt.Sprint(most)
	}
	return fmt.Sprintf("%d-%d", least, most)
}

// median and most write "-" where there are no values.
func median(values []float64) string { return harness.Span(harness.Median(values)) }

func most(values []float64) string { return harness.Span(harness.Percentile(values, 100)) }

// duration writes milliseconds that there may be none of.
func duration(ms *float64) string {
	if ms == nil {
		return "-"
	}
	return harness.Span(*ms)
}

// Headline says with what the figures were measured.
func (r *Results) Headline() string {
	a, version := r.About, shortVersion(r.Version)
	date := a.Date
	if n := len(r.Again); n > 0 { // the last one is the newest
		last := r.Again[n-1]
		newest := shortVersion(last.Version)
		newest = newest[strings.LastIndexByte(newest, ' ')+1:]
		if last.Date != date {
			date += " to " + last.Date
		}
		if !strings.HasSuffix(version, newest) {
			version += " to " + newest
		}
	}
	return fmt.Sprintf("%s: %s, etcd %s, %s, Linux %s, %d CPUs; "+
		"trials of each fault: %d with leasehold, %d with each of the others",
		date, version, a.Etcd, a.Go, a.Kernel, a.CPUs, r.N, r.PeersN)
}

// shortVersion leaves out the whole commit and its date.
func shortVersion(version string) string {
	short, _, _ := strings.Cut(version, " (")
	return short
}

// replaceIn puts the rows of this run in the place of the same rows of an earlier one of as many
// trials, and those that it did not have where they stand in the table.
func (r *Results) replaceIn(path string) error {
	whole, err := harness.ReadJSON[Results](path)
	if err != nil {
		return err
	}
	if whole.Hooks != r.Hooks {
		return fmt.Errorf("one of this run and that of %s is with hooks, the other without", path)
	}
	if whole.N != r.N || whole.PeersN != r.PeersN {
		return fmt.Errorf("%s has %d and %d trials of each fault, this run %d and %d",
			path, whole.N, whole.PeersN, r.N, r.PeersN)
	}
	for _, row := range r.Rows {
		whole.put(row)
		whole.Samples = slices.DeleteFunc(whole.Samples, func(s Sample) bool {
			return s.Row == row.Name
		})
		whole.Again = append(
			slices.DeleteFunc(whole.Again, func(a Rerun) bool { return a.Row == row.Name }),
			Rerun{row.Name, r.About.Date, shortVersion(r.Version)})
	}
	whole.Samples = append(whole.Samples, r.Samples...)
	return whole.write(path)
}

// put puts a row in the place of the one of its name, or else before the first that comes later.
func (r *Results) put(row RowInfo) {
	place := func(name string) int {
		return slices.IndexFunc(scenarios, func(s Scenario) bool { return s.Name == name })
	}
	i := slices.IndexFunc(r.Rows, func(o RowInfo) bool { return o.Name == row.Name })
	if i >= 0 {
		r.Rows[i] = row
		return
	}
	i = slices.IndexFunc(r.Rows, func(o RowInfo) bool { return place(o.Name) > place(row.Name) })
	if i < 0 {
		i = len(r.Rows)
	}
	r.Rows = slices.Insert(r.Rows, i, row)
}

// writeText writes the table for a terminal.
func (r *Results) writeText(to io.Writer) error {
	w := tabwriter.NewWriter(to, 0, 8, 2, ' ', 0)
	// What it returns Flush returns too.
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }
	p("\n%s; %.0f minutes\n\n", r.Headline(), r.Minutes)
	p("fault\tcandidate\tTTL\tetcd\told job exited\tmax\tnext job\tmax\tgap\tboth alive\tstarts\t" +
		"guard late\t\n")
	for _, c := range r.cells() {
		p("%s\t%s\t%.0fs\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			c.row.Name, c.Candidate, c.row.TTL, c.row.Members, median(c.Dead), most(c.Dead),
			median(c.Next), most(c.Next), median(c.Gaps), c.Overlap(), c.Starts(), most(c.late),
			c.Figures())
	}
	for _, v := range r.Violations() {
		p("\nVIOLATED: %s\n", v)
	}
	return w.Flush()
}

// write writes a row and a sample a line, so that files of two runs can be compared.
func (r *Results) write(path string) error {
	text, err := page("faults.json", r)
	if err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}
