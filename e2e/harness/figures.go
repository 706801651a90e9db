//go:build linux

package harness

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"time"
)

// Milliseconds is the unit of all figures.
func Milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Percentile is the value that p percent of the values do not exceed.
func Percentile(values []float64, p float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[max(0, int(math.Ceil(p/100*float64(len(sorted))))-1)]
}

// Median is the value in the middle, or between the two there.
func Median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// Span writes milliseconds as one would say them.
func Span(ms float64) string {
	switch {
	case math.IsNaN(ms):
		return "-"
	case math.IsInf(ms, 1):
		return "did not end"
	case ms < 100:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 1000:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.2f s", ms/1000)
}

// Spans are median, p99 and maximum of some milliseconds, as Span writes them.
func Spans(ms []float64) (median, p99, most string) {
	return Span(Median(ms)), Span(Percentile(ms, 99)), Span(Percentile(ms, 100))
}

// Refresh replaces what stands in a file between <!-- name --> and
// <!-- /name -->, for each name.
func Refresh(path string, sections map[string]string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text := string(data)
	for name, with := range sections {
		begin, end := "<!-- "+name+" -->\n", "<!-- /"+name+" -->"
		before, rest, found := strings.Cut(text, begin)
		_, after, foundEnd := strings.Cut(rest, end)
		if !found || !foundEnd {
			return fmt.Errorf("%s: no %s…%s", path, strings.TrimSpace(begin), end)
		}
		text = before + begin + with + end + after
	}
	return os.WriteFile(path, []byte(text), 0o644)
}
