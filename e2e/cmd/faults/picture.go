//go:build linux

package main

import (
	"cmp"
	"fmt"
	"html"
	"math"
	"slices"
	"strings"

	"leasehold/e2e/harness"
)

// Measures of the picture, in its own units. What is the same in each picture is in
// pages/faults.svg.tmpl.
const (
	pictureWidth = 1064
	headHeight   = 90
	margin       = 24
	aboutWidth   = 286
	nameLeft     = margin + aboutWidth + 6
	axisLeft     = nameLeft + 98
	axisFault    = axisLeft + 26 // where the fault is; before it no time is told
	axisRight    = 772
	figuresLeft  = axisRight + 12
	laneHeight   = 15
	barHeight    = 9
	lineWidth    = 46 // letters
)

// picture is drawn from top to bottom.
type picture struct {
	marks []string
	y     float64
	last  float64 // milliseconds at the right end
}

// picture shows for each fault and candidate the trial in the middle of all, on a time line.
func (r *Results) picture(shown func(RowInfo) bool) (string, error) {
	p := &picture{y: headHeight, last: 14_000}
	sections := r.Sections()
	for i := range sections {
		s := &sections[i]
		s.Rows = slices.DeleteFunc(s.Rows, func(row Row) bool { return !shown(row.RowInfo) })
		for _, row := range s.Rows {
			for _, c := range row.Cells {
				p.last = max(p.last, 1.3*slices.Max(slices.Concat([]float64{0}, c.Dead, c.Next)))
			}
		}
	}
	for _, s := range sections {
		if len(s.Rows) > 0 {
			p.section(s)
		}
	}
	p.y += margin
	return page("faults.svg", struct {
		Headline                     string
		Width, Height, Right, Bottom int
		Marks                        []string
	}{r.Headline(), pictureWidth, int(p.y), pictureWidth - 1, int(p.y) - 1, p.marks})
}

func (p *picture) add(format string, args ...any) {
	p.marks = append(p.marks, fmt.Sprintf(format+"\n", args...))
}

func (p *picture) text(x, y float64, class, text string) {
	p.add(`<text x="%.1f" y="%.1f" class="%s">%s</text>`, x, y, class, html.EscapeString(text))
}

// x is where a moment is, in milliseconds from the fault on. What follows a fault takes between
// some milliseconds and some seconds, so that the axis is logarithmic, but begins at zero.
func (p *picture) x(ms float64) float64 {
	if ms < 0 {
		return axisLeft
	}
	const linear = 2 // about so many milliseconds are
	share := math.Log10(1+ms/linear) / math.Log10(1+p.last/linear)
	return axisFault + (axisRight-axisFault)*min(1, share)
}

var ticks = []struct {
	ms    float64
	label string
}{{10, "10 ms"}, {100, "100 ms"}, {1000, "1 s"}, {3000, "3 s"}, {10_000, "10 s"}, {30_000, "30 s"}}

// section draws a group: its title and axis, its rows, and the grid below them.
func (p *picture) section(s Section) {
	p.y += 40
	p.text(margin, p.y, "group", strings.ToUpper(s.Title[:1])+s.Title[1:])
	var labels, grid picture
	mark := func(x, label, class string) {
		labels.add(`<text x="%s" y="%.1f" class="tick" text-anchor="middle">%s</text>`,
			x, p.y, label)
		grid.add(`<line x1="%s" x2="%[1]s" y1="%.1f" y2="%%.1f" class="%s"/>`, x, p.y+8, class)
	}
	mark(fmt.Sprint(axisFault), "fault", "fault")
	for _, tick := range ticks {
		if tick.ms < p.last {
			mark(fmt.Sprintf("%.1f", p.x(tick.ms)), tick.label, "grid")
		}
	}
	p.marks = append(p.marks, labels.marks...)
	below := len(p.marks) // the bars, which come later, cover the grid
	p.y += 8
	for i, row := range s.Rows {
		p.row(row, i == 0)
	}
	for i := range grid.marks {
		grid.marks[i] = fmt.Sprintf(grid.marks[i], p.y)
	}
	p.marks = slices.Insert(p.marks, below, grid.marks...)
}

// row draws a fault's words, and its candidates beside them.
func (p *picture) row(row Row, first bool) {
	if !first {
		p.y += 3
		p.add(`<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" class="rule"/>`,
			margin, pictureWidth-margin, p.y, p.y)
	}
	p.y += 4
	below := p.y
	write := func(class, text string) {
		p.text(margin, below+11, class, text)
		below += laneHeight
	}
	for _, line := range wrap(row.About, lineWidth) {
		write("", line)
	}
	if note := row.Note(); note != "" {
		write("soft", note)
	}
	for _, c := range row.Cells {
		p.lane(c)
	}
	p.y = max(p.y, below+2)
}

// lane draws one candidate.
func (p *picture) lane(c Cell) {
	class := ""
	if c.Candidate == harness.Leasehold.Name {
		class = "ours"
	}
	_, variety, _ := strings.Cut(c.Candidate, ", ")
	p.text(nameLeft, p.y+11, class, cmp.Or(variety, c.Candidate))
	if len(c.samples) > 0 {
		p.lives(c.middle().Lives)
	}
	words, bad := c.words()
	if bad {
		class = "bad"
	}
	p.text(figuresLeft, p.y+11, class, words)
	p.y += laneHeight
}

// lives draws when the jobs of a trial were alive.
func (p *picture) lives(lives []Life) {
	p.bar(-1, p.last, 0, "none")
	for _, l := range lives {
		class := "next"
		if l.sameTerm(lives[0]) {
			class = "old"
		}
		p.bar(l.From, p.end(l), 1.5, class)
	}
	for i, later := range lives {
		for _, earlier := range lives[:i] {
			from, to := max(earlier.From, later.From), min(p.end(earlier), p.end(later))
			if !earlier.sameTerm(later) && to > from {
				p.bar(from, to, 2.5, "both")
			}
		}
	}
}

// bar draws a time, at least so wide.
func (p *picture) bar(from, to float64, least float64, class string) {
	left, width := p.x(from), max(least, p.x(to)-p.x(from))
	if width > 0 {
		p.add(`<rect x="%.1f" y="%.1f" width="%.1f" height="%d" class="%s"/>`,
			left, p.y+(laneHeight-barHeight)/2, width, barHeight, class)
	}
}

// end is where a life ends in the picture: that of one that nobody saw end at its right edge.
func (p *picture) end(l Life) float64 {
	if l.To == nil {
		return p.last
	}
	return *l.To
}

// words sum a candidate's trials up in a few words.
func (c Cell) words() (words string, bad bool) {
	if len(c.samples) == 0 {
		return "no outcome", true
	}
	moved := fmt.Sprintf("moved in %d of %d", len(c.Next), len(c.samples))
	all, next := len(c.Next) == len(c.samples), "next "+median(c.Next)
	switch {
	case len(c.Overlaps) > 0:
		words = next
		if !all {
			words = moved // there is no room for more
		}
		words += ", both alive "
		switch {
		case c.livesOn > 0:
			words += "for good"
		case len(c.Overlaps) < len(c.samples):
			words += fmt.Sprintf("%d of %d, ≤ %s",
				len(c.Overlaps), len(c.samples), most(c.Overlaps))
		default:
			words += "≤ " + most(c.Overlaps)
		}
		bad = c.row.Promise == Never || c.livesOn > 0
	case len(c.Next) == 0 && len(c.Dead) == 0:
		if c.row.Note() == "" {
			return "the old job lives on, no next job", false
		}
		return "not moved", false
	case len(c.Next) == 0:
		words, bad = "exited "+median(c.Dead)+", no next job", true
	case !all:
		words = moved + ": " + next
	default:
		words = "exited " + median(c.Dead) + ", " + next
	}
	if c.row.NoFailover && all {
		words = "moved: " + words
	}
	return words, bad
}

// wrap breaks a text into lines of at most so many letters.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(line)+1+len(word) > width {
			lines = append(lines, line)
			line = ""
		}
		line = strings.TrimPrefix(line+" "+word, " ")
	}
	return append(lines, line)
}
