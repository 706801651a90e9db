package main

import (
	"testing"
	"time"
)

// Packages and chart have the version each by its own rules.
func TestVersions(t *testing.T) {
	r := release{date: time.Date(2026, 11, 24, 22, 28, 46, 0, time.UTC)}
	for described, want := range map[string][2]string{
		"v1.2.3":                 {"1.2.3", "1.2.3"},
		"1.2.3":                  {"1.2.3", "1.2.3"},
		"v1.2.3-dirty":           {"1.2.3+dirty", "1.2.3+dirty"},
		"v1.2.3-rc.1":            {"1.2.3~rc.1", "1.2.3-rc.1"},
		"v1.2.3-4-g99721046465a": {"1.2.3+4.g99721046465a", "1.2.3+4.g99721046465a"},
		"v1.2.3-rc.1-4-g99721046465a-dirty": {
			"1.2.3~rc.1+4.g99721046465a+dirty",
			"1.2.3-rc.1+4.g99721046465a.dirty",
		},
		"99721046465a-dirty": {
			"0~git20261124222846.99721046465a+dirty",
			"0.0.0+git20261124222846.99721046465a.dirty",
		},
		"997210464651": {
			"0~git20261124222846.997210464651",
			"0.0.0+git20261124222846.997210464651",
		},
	} {
		r.version = described
		if got := [2]string{r.packageVersion(), r.chartVersion()}; got != want {
			t.Errorf("%s: %s, want %s", described, got, want)
		}
	}
}
