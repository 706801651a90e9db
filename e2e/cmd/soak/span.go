//go:build linux

package main

import (
	"cmp"
	"slices"
	"time"
)

// span is the time from one reading of harness.Now to another.
type span struct{ from, to time.Duration }

func (s span) length() time.Duration { return max(0, s.to-s.from) }

// merge returns the spans in order and without overlaps.
func merge(spans []span) []span {
	sorted := slices.SortedFunc(slices.Values(spans), func(a, b span) int { return cmp.Compare(a.from, b.from) })
	var merged []span
	for _, s := range sorted {
		last := len(merged) - 1
		switch {
		case s.length() == 0:
		case last >= 0 && s.from <= merged[last].to:
			merged[last].to = max(merged[last].to, s.to)
		default:
			merged = append(merged, s)
		}
	}
	return merged
}

// both returns where merged spans a and b are at the same time.
func both(a, b []span) []span {
	var in []span
	for _, x := range a {
		for _, y := range b {
			in = append(in, span{max(x.from, y.from), min(x.to, y.to)})
		}
	}
	return merge(in)
}

// without returns merged spans less others.
func without(spans, less []span) []span {
	for _, l := range less {
		var left []span
		for _, s := range spans {
			left = append(left, span{s.from, min(s.to, l.from)}, span{max(s.from, l.to), s.to})
		}
		spans = merge(left)
	}
	return spans
}

func total(spans []span) time.Duration {
	var sum time.Duration
	for _, s := range spans {
		sum += s.length()
	}
	return sum
}
