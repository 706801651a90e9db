//go:build linux

package check

import (
	"fmt"
	"slices"
	"time"

	"leasehold/e2e/harness"
)

// Term is what was seen of the job of one term: each process with the fencing token of the term.
type Term struct {
	Candidate string
	Token     int64
	Start     time.Duration // of the first process
	End       time.Duration // of the last process; 0 while one lives
	Lives     []harness.Life
}

// String names the job in the words that reports use.
func (t *Term) String() string { return fmt.Sprintf("job of %s, token %d", t.Candidate, t.Token) }

// Alive reports whether a process of the job lives.
func (t *Term) Alive() bool { return t.End == 0 }

// Of reports whether a process is one of the term.
func (t *Term) Of(l harness.Life) bool { return t.Token == l.Token && t.Candidate == l.Candidate }

// Intervals returns when at least one process of the job lived, for the living until now.
func (t *Term) Intervals(now time.Duration) Intervals {
	all := make([]Interval, 0, len(t.Lives))
	for _, l := range t.Lives {
		all = append(all, Interval{l.Started, End(l, now)})
	}
	return Merge(all...)
}

// End is when a process ended, or now where it lives.
func End(l harness.Life, now time.Duration) time.Duration {
	if l.Alive() {
		return now
	}
	return l.End
}

// History holds terms in the order in which they were first seen.
type History []*Term

// NewHistory sorts processes into their terms, in the order of the terms' first processes.
func NewHistory(lives []harness.Life) History {
	var h History
	for _, l := range lives {
		h.Add(l)
	}
	slices.SortStableFunc(h, func(a, b *Term) int { return int(a.Start - b.Start) })
	return h
}

// Find returns the term of a process, or nil.
func (h History) Find(of harness.Life) *Term {
	if i := slices.IndexFunc(h, func(t *Term) bool { return t.Of(of) }); i >= 0 {
		return h[i]
	}
	return nil
}

// Add adds a process, or what is new about it. It returns the term of the process, and whether
// the process was not known before.
func (h *History) Add(l harness.Life) (t *Term, isNew bool) {
	if t = h.Find(l); t == nil {
		t = &Term{Candidate: l.Candidate, Token: l.Token, Start: l.Started}
		*h = append(*h, t)
	}
	i := slices.IndexFunc(t.Lives, func(known harness.Life) bool {
		return known.Pid == l.Pid && known.Started == l.Started
	})
	if isNew = i < 0; isNew {
		t.Lives = append(t.Lives, l)
		t.Start = min(t.Start, l.Started)
	} else {
		t.Lives[i] = l
	}
	t.End = 0
	if !slices.ContainsFunc(t.Lives, harness.Life.Alive) {
		for _, l := range t.Lives {
			t.End = max(t.End, l.End)
		}
	}
	return t, isNew
}

// Overlap is the time in which the jobs of two terms lived.
type Overlap struct {
	Earlier, Later *Term // by fencing token
	During         Intervals
}

// String tells whose jobs lived at once, and for how long.
func (o Overlap) String() string {
	return fmt.Sprintf("the %v, and the %v, both lived for %v",
		o.Earlier, o.Later, o.During.Total())
}

// Overlaps lists what was alive at once. alive says when the job of a term could run.
func (h History) Overlaps(alive func(*Term) Intervals) []Overlap {
	var found []Overlap
	for i, later := range h {
		for _, earlier := range h[:i] {
			if o := NewOverlap(earlier, later, alive); len(o.During) > 0 {
				found = append(found, o)
			}
		}
	}
	return found
}

// Overlaps lists the jobs that lived at once, until now.
func Overlaps(lives []harness.Life) []Overlap {
	return NewHistory(lives).Overlaps(Lived(harness.Now()))
}

// NewOverlap compares two terms, in either order.
func NewOverlap(a, b *Term, alive func(*Term) Intervals) Overlap {
	if b.Token < a.Token {
		a, b = b, a
	}
	if !a.Alive() && a.End <= b.Start || !b.Alive() && b.End <= a.Start {
		return Overlap{Earlier: a, Later: b}
	}
	return Overlap{a, b, alive(a).And(alive(b))}
}

// Lived is for the alive of Overlaps: all the time in which a process lived, until now.
func Lived(now time.Duration) func(*Term) Intervals {
	return func(t *Term) Intervals { return t.Intervals(now) }
}

// Downtime returns the part of a time in which the job of no term could run.
func (h History) Downtime(of Interval, alive func(*Term) Intervals) Intervals {
	var all []Interval
	for _, t := range h {
		all = append(all, alive(t)...)
	}
	return Intervals{of}.Without(Merge(all...))
}
