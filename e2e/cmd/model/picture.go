//go:build linux

package main

import (
	"cmp"
	"embed"
	"fmt"
	"html"
	"regexp"
	"slices"
	"strings"
	"text/template"
)

//go:embed pages
var pageFiles embed.FS

// Measures of the picture, in its own units. Time goes down: each step of the trace is a row, with
// a dot in the lane of the actor and the words on the right.
const (
	pictureWidth = 1064
	margin       = 24
	tickLeft     = margin
	lanesLeft    = 92
	laneWidth    = 68
	laneTop      = 104
	rowHeight    = 16
	barWidth     = 12
)

// lanes are the actors, from left to right. The two jobs are side by side.
var lanes = []string{
	"etcd", "a.next", "a.replaced", "a.elector", "a.guard", "a.spawner", "a.job",
	"b.job", "b.spawner", "b.guard", "b.elector", "operator", "world",
}

// A bar is a time in which a lease is there, or a job that is not frozen.
type bar struct {
	candidate string
	lane      string
	from, to  int // rows
}

// What begins and what ends a bar, in the words of the model.
var (
	jobBegins   = regexp.MustCompile(`^starts\b`)
	jobEnds     = regexp.MustCompile(`^(exits\b|is frozen$)`) // or runs no instruction
	jobThawed   = regexp.MustCompile(`^thaws the job(?: of ([ab]))?$`)
	jobMayEnd   = regexp.MustCompile(`^(kills the job|first process exits|crashes)$`) // or a part
	leaseBegins = regexp.MustCompile(`^(gets|has) a lease\b`)
	leaseEnds   = regexp.MustCompile(`\b(?:revokes|drops) (?:its|the) lease(?: of ([ab])\b)?`)
)

// bars finds when leases and jobs were there. What never ends lasts to the last row.
func bars(events []event) (found []bar) {
	open := map[string]int{}   // by lane and candidate: its index in found
	killed := map[string]int{} // by lane and candidate: the row of a kill
	begin := func(lane, candidate string, row int) {
		key := lane + candidate
		if i, is := open[key]; is && killed[key] > 0 { // that kill was the end
			found[i].to = killed[key]
		} else if is {
			return
		}
		open[key], killed[key] = len(found), 0
		found = append(found, bar{candidate, lane, row, len(events)})
	}
	end := func(lane, candidate string, row int) {
		if i, is := open[lane+candidate]; is {
			found[i].to = row
			delete(open, lane+candidate)
		}
	}
	for i, e := range events {
		candidate, part, _ := strings.Cut(e.actor, ".")
		ends, thawed := leaseEnds.FindStringSubmatch(e.text), jobThawed.FindStringSubmatch(e.text)
		switch {
		case thawed != nil:
			candidate = cmp.Or(thawed[1], candidate)
			begin(candidate+".job", candidate, i)
		case part == "job" && jobBegins.MatchString(e.text):
			begin(e.actor, candidate, i)
		case part == "job" && jobEnds.MatchString(e.text):
			end(e.actor, candidate, i)
		case jobMayEnd.MatchString(e.text):
			killed[candidate+".job"+candidate] = i
		case leaseBegins.MatchString(e.text):
			begin("etcd", candidate, i)
		case ends != nil:
			end("etcd", cmp.Or(ends[1], "a"), i) // machines.pml has one lease, that of a
		}
	}
	return found
}

// broken says what is wrong at the end of a trace.
var broken = map[string]string{
	"two-jobs":     "two jobs run at once",
	"two-machines": "the address is on two machines",
	"hook-unended": "the lease is revoked before the hook is over",
	"token":        "the token of this job is not higher than that of an earlier one",
	"after-stop":   "the job is to run, although the user has asked the daemon to stop",
	"run-again":    "the job runs again, although it had exited for good",
	"early-revoke": "the lease is revoked while the job is alive",
	"no-leader":    "and so on: no job runs any more",
}

// drawing grows from top to bottom.
type drawing struct {
	marks []string
	lanes []string // that the trace has
}

func (d *drawing) add(format string, args ...any) {
	d.marks = append(d.marks, fmt.Sprintf(format+"\n", args...))
}

func (d *drawing) text(x, y int, class, text string) {
	d.add(`<text x="%d" y="%d" class="%s">%s</text>`, x, y, class, html.EscapeString(text))
}

// x is the middle of a lane.
func (d *drawing) x(lane string) int {
	for i, l := range d.lanes {
		if l == lane {
			return lanesLeft + i*laneWidth
		}
	}
	return lanesLeft
}

// y is the middle of a row.
func y(row int) int { return laneTop + rowHeight/2 + row*rowHeight }

// draw makes the picture of a switch's trace.
func draw(row row, events []event) (string, error) {
	d := &drawing{}
	for _, lane := range lanes {
		acts := slices.ContainsFunc(events, func(e event) bool { return e.actor == lane })
		if acts || lane == "etcd" { // that of the leases
			d.lanes = append(d.lanes, lane)
		}
	}
	bottom := y(len(events)) + rowHeight/2
	d.head(row, bottom)
	for i, e := range events {
		d.step(i, e, i == 0 || events[i-1].tick != e.tick)
	}
	d.text(d.textLeft(), y(len(events))+4, "bad", broken[row.get("breaks")])
	d.bars(bars(events))
	for i, e := range events {
		d.add(`<circle cx="%d" cy="%d" r="3.5" class="dot"/>`, d.x(e.actor), y(i))
	}
	t, err := template.New("timeline.svg.tmpl").Funcs(template.FuncMap{"join": strings.Join}).
		ParseFS(pageFiles, "pages/timeline.svg.tmpl")
	if err != nil {
		return "", err
	}
	var b strings.Builder
	err = t.Execute(&b, struct {
		Title                        string
		Width, Height, Right, Bottom int
		Marks                        []string
	}{row.name(), pictureWidth, bottom + margin, pictureWidth - 1, bottom + margin - 1, d.marks})
	return b.String(), err
}

func (d *drawing) head(row row, bottom int) {
	d.text(margin, 38, "title", row.name())
	d.text(margin, 60, "soft", row.get("turns off"))
	for i, sign := range []struct{ class, means string }{
		{"a", "a's job"},
		{"b", "b's job"},
		{"a lease", "a's lease"},
		{"b lease", "b's lease"},
		{"both", "two jobs"},
	} {
		x := pictureWidth - margin + (i-5)*90
		d.add(`<rect x="%d" y="29" width="%d" height="10" rx="2" class="%s"/>`,
			x, barWidth, sign.class)
		d.text(x+barWidth+6, 38, "", sign.means)
	}
	for _, lane := range d.lanes {
		x := d.x(lane)
		d.add(`<text x="%d" y="%d" class="strong" text-anchor="middle">%s</text>`,
			x, laneTop-10, lane)
		d.add(`<line x1="%d" x2="%d" y1="%d" y2="%d" class="lane"/>`, x, x, laneTop, bottom)
	}
}

// step draws the words of a row.
func (d *drawing) step(row int, e event, first bool) {
	if first {
		d.text(tickLeft, y(row)+4, "tick", fmt.Sprintf("tick %d", e.tick))
		d.add(`<line x1="%d" x2="%d" y1="%d" y2="%d" class="rule"/>`,
			margin, pictureWidth-margin, y(row)-rowHeight/2, y(row)-rowHeight/2)
	}
	d.add(`<line x1="%d" x2="%d" y1="%d" y2="%d" class="step"/>`,
		d.x(e.actor), d.textLeft()-4, y(row), y(row))
	d.text(d.textLeft(), y(row)+4, "", e.actor+": "+e.text)
}

func (d *drawing) textLeft() int { return lanesLeft + len(d.lanes)*laneWidth - 24 }

// bars draws leases and jobs, and marks where two jobs are there at once.
func (d *drawing) bars(all []bar) {
	for i, b := range all {
		for _, other := range all[:i] {
			from, to := max(b.from, other.from), min(b.to, other.to)
			if b.lane != other.lane && b.lane != "etcd" && other.lane != "etcd" && from < to {
				left := d.x("a.job") - barWidth
				d.add(`<rect x="%d" y="%d" width="%d" height="%d" rx="2" class="both"/>`,
					left, y(from)-rowHeight/2, d.x("b.job")+barWidth-left, y(to)-y(from)+rowHeight)
			}
		}
	}
	for _, b := range all {
		x, class := d.x(b.lane)-barWidth/2, b.candidate
		if b.lane == "etcd" { // the two leases side by side
			class += " lease"
			x += (barWidth/2 + 1) * map[string]int{"a": -1, "b": 1}[b.candidate]
		}
		d.add(`<rect x="%d" y="%d" width="%d" height="%d" rx="2" class="%s"/>`,
			x, y(b.from), barWidth, y(b.to)-y(b.from), class)
	}
}
