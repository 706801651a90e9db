//go:build linux

package app

import (
	"strings"
	"testing"
	"unicode/utf8"
)

// TestNewMetrics_Label: the name of the election is a label that Prometheus takes, whatever it is.
func TestNewMetrics_Label(t *testing.T) {
	for _, name := range []string{"jobs/a", "\xff\x00\"\n", strings.Repeat("ü", 5000)} {
		families, err := newMetrics(name).registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			for _, label := range family.GetMetric()[0].GetLabel() {
				value := label.GetValue()
				if label.GetName() == "election" && (len(value) > maxLabel+2 ||
					!utf8.ValidString(value) || name == "jobs/a" && value != name) {
					t.Fatalf("%.40q: the label is %q", name, value)
				}
			}
		}
	}
}
