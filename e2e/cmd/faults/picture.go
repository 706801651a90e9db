//go:build linux

package main

import (
	"cmp"
	"errors"
	"fmt"
	"html"
	"math"
	"os"
	"slices"
	"strings"

	"leasehold/e2e/harness"
)

// Measures of the picture, in its own units.
const (
	pictureWidth = 1064
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

// style suits both a light and a dark page: the picture has a ground of its own
// and follows the reader's colours where the reader's program tells them.
const style = `
text { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #24292f }
.ground { fill: #fdfdfc; stroke: #d5d9de }
.title { font-size: 19px; font-weight: 600 }
.group { font-size: 14px; font-weight: 600 }
.soft { fill: #656d76 }
.ours { font-weight: 600 }
.bad { fill: #cf222e; font-weight: 600 }
.tick { font-size: 10px; fill: #656d76 }
.grid { stroke: #d5d9de; stroke-width: 1 }
.fault { stroke: #24292f; stroke-width: 1.2 }
.rule { stroke: #e7eaee; stroke-width: 1 }
.old { fill: #4f7fd9 }
.next { fill: #2da06a }
.both { fill: #e5252f }
.none { fill: #cfd4da }
@media (prefers-color-scheme: dark) {
text { fill: #e6e8eb }
.ground { fill: #15191f; stroke: #363c45 }
.soft, .tick { fill: #9aa4af }
.bad { fill: #ff7b72 }
.grid { stroke: #333a43 }
.fault { stroke: #e6e8eb }
.rule { stroke: #262c34 }
.old { fill: #6c9bf2 }
.next { fill: #3fb97f }
.both { fill: #ff4d4f }
.none { fill: #3d454f }
}
`

// draw writes two pictures: one of all faults, and beside it one of those in
// the short table, which a page has room for.
func (r *Results) draw(path string) error {
	all := r.cells()
	short := slices.DeleteFunc(slices.Clone(all), func(c cell) bool { return !c.row.Short })
	return errors.Join(
		os.WriteFile(path, []byte(r.picture(all)), 0o644),
		os.WriteFile(strings.TrimSuffix(path, ".svg")+"-short.svg", []byte(r.picture(short)), 0o644),
	)
}

// picture shows for each fault and candidate the trial in the middle of all, on
// a time line.
func (r *Results) picture(cells []cell) string {
	p := &picture{last: 14_000}
	for _, c := range cells {
		for _, s := range c.samples {
			for _, at := range []*float64{s.Dead, s.Next} {
				if at != nil {
					p.last = max(p.last, *at*1.3)
				}
			}
		}
	}
	p.heading(r)
	var about, group string
	for _, c := range cells {
		if c.row.Group != group {
			group = c.row.Group
			p.group(c.title())
			about = ""
		}
		if c.row.Name != about {
			about = c.row.Name
			p.fault(c.row)
		}
		p.lane(c)
	}
	p.endGroup()
	p.y += margin
	return p.svg()
}

// picture is drawn from top to bottom.
type picture struct {
	body   strings.Builder
	y      float64
	last   float64 // milliseconds at the right end
	top    float64 // where the group's lanes begin
	floor  float64 // below the words of the current fault
	inside bool    // of a group
}

func (p *picture) add(format string, args ...any) { fmt.Fprintf(&p.body, format+"\n", args...) }

func (p *picture) text(x, y float64, class, text string) {
	p.add(`<text x="%.1f" y="%.1f" class="%s">%s</text>`, x, y, class, html.EscapeString(text))
}

// x is where a moment is, in milliseconds from the fault on. What follows a
// fault takes between some milliseconds and some seconds, so that the axis is
// logarithmic, but begins at zero.
func (p *picture) x(ms float64) float64 {
	if ms < 0 {
		return axisLeft
	}
	const linear = 2 // about so many milliseconds are
	share := math.Log10(1+ms/linear) / math.Log10(1+p.last/linear)
	return axisFault + (axisRight-axisFault)*min(1, share)
}

func (p *picture) heading(r *Results) {
	p.y = 44
	p.text(margin, p.y, "title", "Which jobs are alive when the leader has a fault")
	p.y += 20
	p.text(margin, p.y, "soft", r.headline()+". Of each fault: the trial in the middle.")
	p.y += 26
	x := float64(margin)
	for _, entry := range []struct{ class, text string }{
		{"old", "the old job is alive"},
		{"next", "the next job is alive"},
		{"both", "both are alive: must never be"},
		{"none", "no job is alive"},
	} {
		p.add(`<rect x="%.1f" y="%.1f" width="22" height="%d" rx="2" class="%s"/>`,
			x, p.y-barHeight, barHeight, entry.class)
		p.text(x+28, p.y, "", entry.text)
		x += 58 + 6.4*float64(len(entry.text))
	}
}

func (p *picture) group(title string) {
	p.endGroup()
	p.y += 40
	p.text(margin, p.y, "group", strings.ToUpper(title[:1])+title[1:])
	p.add(`<text x="%d" y="%.1f" class="tick" text-anchor="middle">fault</text>`, axisFault, p.y)
	for _, tick := range ticks {
		if tick.ms < p.last {
			p.add(`<text x="%.1f" y="%.1f" class="tick" text-anchor="middle">%s</text>`,
				p.x(tick.ms), p.y, tick.label)
		}
	}
	p.y += 8
	p.top, p.floor, p.inside = p.y, p.y, true
	p.body.WriteString(gridMark) // lines are drawn when it is known how far down, and below all bars
}

var ticks = []struct {
	ms    float64
	label string
}{{10, "10 ms"}, {100, "100 ms"}, {1000, "1 s"}, {3000, "3 s"}, {10_000, "10 s"}, {30_000, "30 s"}}

const gridMark = "<!-- grid -->\n"

func (p *picture) endGroup() {
	if !p.inside {
		return
	}
	p.y = max(p.y, p.floor)
	var grid strings.Builder
	fmt.Fprintf(&grid, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" class="fault"/>`+"\n",
		axisFault, axisFault, p.top, p.y)
	for _, tick := range ticks {
		if tick.ms < p.last {
			x := p.x(tick.ms)
			fmt.Fprintf(&grid, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" class="grid"/>`+"\n",
				x, x, p.top, p.y)
		}
	}
	body := strings.Replace(p.body.String(), gridMark, grid.String(), 1)
	p.body.Reset()
	p.body.WriteString(body)
}

// fault begins the lanes of a row with its words.
func (p *picture) fault(row RowInfo) {
	p.y = max(p.y, p.floor)
	if p.y > p.top {
		p.y += 3
		p.add(`<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" class="rule"/>`,
			margin, pictureWidth-margin, p.y, p.y)
	}
	p.y += 4
	lines := wrap(row.About, lineWidth)
	for i, line := range lines {
		p.text(margin, p.y+11+float64(i)*laneHeight, "", line)
	}
	if row.NoFailover {
		p.text(margin, p.y+11+float64(len(lines))*laneHeight, "soft", "must not move the job")
		lines = append(lines, "")
	}
	if row.MayFailover {
		p.text(margin, p.y+11+float64(len(lines))*laneHeight, "soft", "may move the job or not")
		lines = append(lines, "")
	}
	p.floor = p.y + float64(len(lines))*laneHeight + 2
}

// lane draws one candidate.
func (p *picture) lane(c cell) {
	class := ""
	if c.candidate == harness.Leasehold.Name {
		class = "ours"
	}
	_, variety, _ := strings.Cut(c.candidate, ", ")
	p.text(nameLeft, p.y+11, class, cmp.Or(variety, c.candidate))
	top := p.y + (laneHeight-barHeight)/2
	bar := func(from, to float64, least float64, class string) {
		left, right := p.x(from), p.x(to)
		if right-left < least {
			right = left + least
		}
		if right > left {
			p.add(`<rect x="%.1f" y="%.1f" width="%.1f" height="%d" class="%s"/>`,
				left, top, right-left, barHeight, class)
		}
	}
	if len(c.samples) > 0 {
		s := c.middle()
		bar(-1, p.last, 0, "none")
		for _, l := range s.Lives {
			class := "next"
			if l.Token == s.Lives[0].Token && l.Candidate == s.Lives[0].Candidate {
				class = "old"
			}
			bar(l.From, p.end(l), 1.5, class)
		}
		for i, later := range s.Lives {
			for _, earlier := range s.Lives[:i] {
				if earlier.Token == later.Token && earlier.Candidate == later.Candidate {
					continue
				}
				from, to := max(earlier.From, later.From), min(p.end(earlier), p.end(later))
				if to > from {
					bar(from, to, 2.5, "both")
				}
			}
		}
	}
	words, class := c.words()
	if class == "" && c.candidate == harness.Leasehold.Name {
		class = "ours"
	}
	p.text(figuresLeft, p.y+11, class, words)
	p.y += laneHeight
}

// end is where a life ends in the picture: that of one that nobody saw end at
// its right edge.
func (p *picture) end(l Life) float64 {
	if l.To == nil {
		return p.last
	}
	return *l.To
}

// words sum a candidate's trials up in a few words.
func (c cell) words() (words, class string) {
	if len(c.samples) == 0 {
		return "no outcome", "bad"
	}
	next, overlaps := c.next(), c.overlaps()
	nextAt := harness.Span(harness.Median(next))
	switch {
	case len(overlaps) > 0:
		words = "next " + nextAt + ", both alive "
		if len(next) < len(c.samples) {
			// There is no room for more.
			words = fmt.Sprintf("moved in %d of %d, both alive ", len(next), len(c.samples))
		}
		switch {
		case c.livesOn() > 0:
			words += "for good"
		case len(overlaps) < len(c.samples):
			words += fmt.Sprintf("%d of %d, ≤ %s",
				len(overlaps), len(c.samples), harness.Span(slices.Max(overlaps)))
		default:
			words += "≤ " + harness.Span(slices.Max(overlaps))
		}
		class = "bad"
		if c.row.Promise != Never && c.livesOn() == 0 {
			class = ""
		}
	case len(next) == 0 && len(c.dead()) == 0:
		words = "not moved"
		if !c.row.NoFailover && !c.row.MayFailover {
			words = "the old job lives on, no next job"
		}
	case len(next) == 0:
		words, class = "exited "+harness.Span(harness.Median(c.dead()))+", no next job", "bad"
	case len(next) < len(c.samples):
		words = fmt.Sprintf("moved in %d of %d: next %s", len(next), len(c.samples), nextAt)
	default:
		words = "exited " + harness.Span(harness.Median(c.dead())) + ", next " + nextAt
	}
	if c.row.NoFailover && words != "not moved" && len(next) == len(c.samples) {
		words = "moved: " + words
	}
	return words, class
}

func (p *picture) svg() string {
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %.0f" width="%d" height="%.0f" role="img" aria-label="For each fault and each program: when the old job and the next one were alive">
<style>%s</style>
<rect x="0.5" y="0.5" width="%d" height="%.0f" rx="8" class="ground"/>
%s</svg>
`, pictureWidth, p.y, pictureWidth, p.y, style, pictureWidth-1, p.y-1, p.body.String())
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

// refresh puts the picture and a short table into the README.
func (r *Results) refresh(readme string) error {
	var b strings.Builder
	b.WriteString("[![For some faults: when the old job and the next one were alive]" +
		"(docs/faults-short.svg)](docs/faults.svg)\n\n")
	b.WriteString("| what happens | leasehold | naive client | `etcdctl lock` |\n" +
		"|---|---|---|---|\n")
	cells := r.cells()
	for _, row := range r.Rows {
		if !row.Short {
			continue
		}
		fmt.Fprintf(&b, "| %s ", row.About)
		for _, e := range harness.Implementations {
			text := "-"
			for _, c := range cells {
				if c.row.Name == row.Name && c.candidate == e.Name {
					text = c.short()
				}
			}
			fmt.Fprintf(&b, "| %s ", text)
		}
		b.WriteString("|\n")
	}
	fmt.Fprintf(&b, "\nHow long after the fault does the next job start (median)? "+
		"**Bold**: the old job still ran then. "+
		"%s, TTL 5 s. [All faults](docs/faults.md) are in this picture:\n\n"+
		"<details><summary>every fault</summary>\n\n"+
		"![For each fault: when the old job and the next one were alive](docs/faults.svg)\n\n"+
		"</details>\n", r.headline())
	return harness.Refresh(readme, map[string]string{"faults": b.String()})
}

// short is when the next job came, and for how long the old one still ran then.
func (c cell) short() string {
	next, overlaps := c.next(), c.overlaps()
	switch {
	case len(c.samples) == 0:
		return "-"
	case len(next) == 0 && len(c.dead()) == 0:
		return "not moved"
	case len(next) == 0:
		return "no next job"
	}
	text := harness.Span(harness.Median(next))
	if n := len(c.samples) - len(next); n > 0 {
		text = fmt.Sprintf("not moved in %d of %d; else %s", n, len(c.samples), text)
	}
	switch {
	case c.livesOn() > 0:
		text += ", **the old job runs on**"
	case len(overlaps) > 0:
		text += ", **both ran for up to " + harness.Span(slices.Max(overlaps)) + "**"
		if len(overlaps) < len(next) {
			text += fmt.Sprintf(" in %d of %d", len(overlaps), len(next))
		}
	}
	return text
}
