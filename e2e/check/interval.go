//go:build linux

package check

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// Forever is the end of an interval that has no end yet.
const Forever = time.Duration(math.MaxInt64)

// Interval is the time from one reading of harness.Now to another.
type Interval struct{ From, To time.Duration }

// Length is 0 where the interval ends before it begins.
func (i Interval) Length() time.Duration { return max(0, i.To-i.From) }

// Intervals are in order and apart from each other, as Merge returns them.
type Intervals []Interval

// Merge puts intervals in order, joins those that touch, and drops empty ones.
func Merge(all ...Interval) Intervals {
	var merged Intervals
	sorted := slices.SortedFunc(slices.Values(all), func(a, b Interval) int {
		return cmp.Compare(a.From, b.From)
	})
	for _, i := range sorted {
		last := len(merged) - 1
		switch {
		case i.Length() == 0:
		case last >= 0 && i.From <= merged[last].To:
			merged[last].To = max(merged[last].To, i.To)
		default:
			merged = append(merged, i)
		}
	}
	return merged
}

// And returns the time that is in both.
func (a Intervals) And(b Intervals) Intervals {
	var shared []Interval
	for _, x := range a {
		for _, y := range b {
			shared = append(shared, Interval{max(x.From, y.From), min(x.To, y.To)})
		}
	}
	return Merge(shared...)
}

// Without returns the time that is in a and not in b.
func (a Intervals) Without(b Intervals) Intervals {
	for _, y := range b {
		var left []Interval
		for _, x := range a {
			left = append(left,
				Interval{x.From, min(x.To, y.From)}, Interval{max(x.From, y.To), x.To})
		}
		a = Merge(left...)
	}
	return a
}

// Total is the sum of all lengths.
func (a Intervals) Total() time.Duration {
	var sum time.Duration
	for _, i := range a {
		sum += i.Length()
	}
	return sum
}
