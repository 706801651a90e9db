//go:build linux

package main

import (
	"cmp"
	"encoding/json"
	"errors"
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
	N       int           `json:"n"`
	PeersN  int           `json:"peers_n"`
	Minutes float64       `json:"minutes"`
	Rows    []RowInfo     `json:"rows"`
	Samples []Sample      `json:"samples"`
	// Again are the rows whose trials were made later than the others, by themselves:
	// after a repair, or a change of the row.
	Again []string `json:"again,omitempty"`
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
	LivesOn   bool               `json:"lives_on,omitzero"` // the old job, when nobody looked any more
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

// Life is a time in which the processes of one term of one candidate were
// alive.
type Life struct {
	Candidate string   `json:"candidate"`
	Token     int64    `json:"token"`
	From      float64  `json:"from_ms"`
	To        *float64 `json:"to_ms"`
}

// duration writes milliseconds that there may be none of.
func duration(ms *float64) string {
	if ms == nil {
		return "-"
	}
	return harness.Span(*ms)
}

// cell is one row of the table for one candidate.
type cell struct {
	row       RowInfo
	candidate string
	samples   []Sample // that came to an end
	failed    []Sample
}

func (c cell) ours() bool { return strings.HasPrefix(c.candidate, harness.Leasehold.Name) }

func (c cell) values(f func(Sample) *float64) []float64 {
	var values []float64
	for _, s := range c.samples {
		if v := f(s); v != nil {
			values = append(values, *v)
		}
	}
	return values
}

func (c cell) dead() []float64 { return c.values(func(s Sample) *float64 { return s.Dead }) }
func (c cell) next() []float64 { return c.values(func(s Sample) *float64 { return s.Next }) }
func (c cell) overlaps() []float64 {
	return c.values(func(s Sample) *float64 {
		if s.Overlap == 0 {
			return nil
		}
		return &s.Overlap
	})
}

// gaps are the times without a job, of trials without an overlap.
func (c cell) gaps() []float64 {
	return c.values(func(s Sample) *float64 {
		if s.Dead == nil || s.Next == nil {
			return nil
		}
		return &s.Gap
	})
}

func (c cell) count(f func(Sample) bool) int {
	n := 0
	for _, s := range c.samples {
		if f(s) {
			n++
		}
	}
	return n
}

func (c cell) livesOn() int { return c.count(func(s Sample) bool { return s.LivesOn }) }
func (c cell) outside() int { return c.count(func(s Sample) bool { return s.Outside }) }

// middle is the trial whose next job came in the middle of all.
func (c cell) middle() Sample {
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

// cells are in the order of the table.
func (r *Results) cells() []cell {
	var cells []cell
	for _, g := range groups {
		for _, row := range r.Rows {
			if row.Group != g.Name {
				continue
			}
			for _, e := range variants {
				c := cell{row: row, candidate: e.Title}
				for _, s := range r.Samples {
					switch {
					case s.Row != row.Name || s.Candidate != e.Title:
					case s.Failure != "":
						c.failed = append(c.failed, s)
					default:
						c.samples = append(c.samples, s)
					}
				}
				if len(c.samples)+len(c.failed) > 0 {
					cells = append(cells, c)
				}
			}
		}
	}
	return cells
}

// violations are all broken promises and all trials that came to no end.
func (r *Results) violations() []string {
	var all []string
	for _, c := range r.cells() {
		for _, s := range append(c.samples, c.failed...) {
			for _, v := range s.Violations {
				all = append(all, fmt.Sprintf("%s, %s: %s", s.Row, s.Candidate, v))
			}
			if s.Failure != "" {
				all = append(all, fmt.Sprintf("%s, %s: no outcome: %s", s.Row, s.Candidate, s.Failure))
			}
		}
		// What is p99 of a few trials is the worst of them, one bad moment of the machine.
		bound := 10.0
		if len(c.samples) < 20 {
			bound *= 10
		}
		p99 := harness.Percentile(c.values(func(s Sample) *float64 { return &s.Overlap }), 99)
		if c.ours() && c.row.Promise == Operator && p99 > bound {
			all = append(all, fmt.Sprintf("%s, %s: both jobs alive for %s at p99, more than %s",
				c.row.Name, c.candidate, harness.Span(p99), harness.Span(bound)))
		}
	}
	return all
}

// overlap says how often and for how long at worst both jobs were alive.
func (c cell) overlap() string {
	found := c.overlaps()
	switch {
	case len(found) == 0:
		return fmt.Sprintf("0 of %d", len(c.samples))
	case c.livesOn() > 0:
		return fmt.Sprintf("%d of %d, lives on", len(found), len(c.samples))
	}
	text := fmt.Sprintf("%d of %d, %s", len(found), len(c.samples), harness.Span(slices.Max(found)))
	if n := c.outside(); n > 0 {
		text += fmt.Sprintf(" (%d outside: guard late)", n)
	}
	return text
}

// pair is median and maximum.
func pair(values []float64) (string, string) {
	if len(values) == 0 {
		return "-", "-"
	}
	return harness.Span(harness.Median(values)), harness.Span(slices.Max(values))
}

// figures are the medians and maxima of the row's own figures.
func (c cell) figures() string {
	names := map[string]bool{}
	for _, s := range c.samples {
		for name := range s.Figures {
			names[name] = true
		}
	}
	var text []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		middle, most := pair(c.values(func(s Sample) *float64 {
			if v, ok := s.Figures[name]; ok {
				return &v
			}
			return nil
		}))
		text = append(text, fmt.Sprintf("%s %s (max %s)", name, middle, most))
	}
	return strings.Join(text, "; ")
}

// starts are the job starts after the fault, at least and at most.
func (c cell) starts() string {
	if len(c.samples) == 0 {
		return "-"
	}
	least, most := math.MaxInt, 0
	for _, s := range c.samples {
		least, most = min(least, s.Starts), max(most, s.Starts)
	}
	if least == most {
		return fmt.Sprint(most)
	}
	return fmt.Sprintf("%d-%d", least, most)
}

// headline says with what the figures were measured.
func (r *Results) headline() string {
	a := r.About
	return fmt.Sprintf("%s: etcd %s, %s, Linux %s, %d CPUs; "+
		"trials of each fault: %d with leasehold, %d with each of the others",
		a.Date, a.Etcd, a.Go, a.Kernel, a.CPUs, r.N, r.PeersN)
}

// replaceIn puts the rows of this run in the place of the same rows of an
// earlier one of as many trials.
func (r *Results) replaceIn(path string) error {
	whole, err := harness.ReadJSON[Results](path)
	if err != nil {
		return err
	}
	if whole.N != r.N || whole.PeersN != r.PeersN {
		return fmt.Errorf("%s has %d and %d trials of each fault, this run %d and %d",
			path, whole.N, whole.PeersN, r.N, r.PeersN)
	}
	for _, row := range r.Rows {
		i := slices.IndexFunc(whole.Rows, func(o RowInfo) bool { return o.Name == row.Name })
		if i < 0 {
			return fmt.Errorf("%s has no row %s", path, row.Name)
		}
		whole.Rows[i] = row
		whole.Samples = slices.DeleteFunc(whole.Samples, func(s Sample) bool { return s.Row == row.Name })
		if !slices.Contains(whole.Again, row.Name) {
			whole.Again = append(whole.Again, row.Name)
		}
	}
	whole.Samples = append(whole.Samples, r.Samples...)
	return whole.write(path)
}

// writeText writes the table for a terminal.
func (r *Results) writeText(to io.Writer) error {
	w := tabwriter.NewWriter(to, 0, 8, 2, ' ', 0)
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) } // Flush reports
	p("\n%s; %.0f minutes\n\n", r.headline(), r.Minutes)
	p("fault\tcandidate\tTTL\tetcd\told job exited\tmax\tnext job\tmax\tgap\tboth alive\tstarts\t" +
		"guard late\t\n")
	for _, c := range r.cells() {
		dead, deadMax := pair(c.dead())
		next, nextMax := pair(c.next())
		gap, _ := pair(c.gaps())
		late := c.values(func(s Sample) *float64 { return &s.Late })
		_, lateMax := pair(late)
		p("%s\t%s\t%.0fs\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			c.row.Name, c.candidate, c.row.TTL, c.row.Members, dead, deadMax, next, nextMax, gap,
			c.overlap(), c.starts(), lateMax, c.figures())
	}
	for _, v := range r.violations() {
		p("\nVIOLATED: %s\n", v)
	}
	return w.Flush()
}

// writeTable writes the table in Markdown.
func (r *Results) writeTable(to io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# Every fault, every candidate\n\n"+
		"Made by `make faults` and `make faults-docs`: %s. Figures are medians and maxima, from the "+
		"fault on, as the jobs' own connections to a witness tell (gigabytes and suspend: as the "+
		"kernel tells that SIGKILL has reached each thread); [the same as a picture](faults.svg), "+
		"[each trial](faults.json).\n", r.headline())
	if len(r.Again) > 0 {
		fmt.Fprintf(&b, "\nRun again later, after a repair or with another promise: %s.\n",
			strings.Join(r.Again, ", "))
	}
	group := ""
	for _, c := range r.cells() {
		if c.row.Group != group {
			group = c.row.Group
			fmt.Fprintf(&b, "\n## %s\n\n| fault | candidate | old job exited | next job | gap | "+
				"both alive | job starts |\n|---|---|---|---|---|---|---|\n", c.title())
		}
		about := c.row.About
		if c.row.NoFailover {
			about += " (must not move the job)"
		}
		if c.row.MayFailover {
			about += " (may move the job or not)"
		}
		gap, _ := pair(c.gaps())
		overlap := c.overlap()
		if len(c.overlaps()) > 0 {
			overlap = "**" + overlap + "**"
		}
		if figures := c.figures(); figures != "" {
			overlap += "; " + figures
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s |\n", about, c.candidate,
			both(c.dead()), both(c.next()), gap, overlap, c.starts())
	}
	if broken := r.violations(); len(broken) > 0 {
		b.WriteString("\n## Promises that leasehold broke in this run\n\n")
		for _, v := range broken {
			fmt.Fprintf(&b, "- %s\n", v)
		}
	}
	_, err := io.WriteString(to, b.String())
	return err
}

func (c cell) title() string {
	for _, g := range groups {
		if g.Name == c.row.Group {
			return g.Title
		}
	}
	return c.row.Group
}

func both(values []float64) string {
	middle, most := pair(values)
	if len(values) < 2 {
		return middle
	}
	return middle + ", max " + most
}

// write writes a row and a sample a line, so that files of two runs can be
// compared.
func (r *Results) write(path string) error {
	var b strings.Builder
	head, err := json.Marshal(r.About)
	if err != nil {
		return err
	}
	fmt.Fprintf(&b, `{"about": %s, "n": %d, "peers_n": %d, "minutes": %.1f`,
		head, r.N, r.PeersN, r.Minutes)
	err = errors.Join(lines(&b, "again", r.Again), lines(&b, "rows", r.Rows),
		lines(&b, "samples", r.Samples))
	if err != nil {
		return err
	}
	return os.WriteFile(path, []byte(b.String()+"}\n"), 0o644)
}

func lines[T any](b *strings.Builder, name string, values []T) error {
	fmt.Fprintf(b, ",\n%q: [", name)
	for i, v := range values {
		text, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(b, "\n%s", text)
	}
	b.WriteString("\n]")
	return nil
}
