//go:build linux

package main

import (
	"fmt"
	"slices"
	"strings"

	"leasehold/e2e/harness"
)

// Results are what the runs saw.
type Results struct {
	Versions []*Version `json:"versions"` // in order
}

// Version are the results with one version of etcd.
type Version struct {
	Name    string                       `json:"name"` // 3.5
	About   harness.About                `json:"about"`
	Tests   map[string]map[string]string `json:"tests"` // PASS, FAIL or SKIP, by part and name
	Samples []Sample                     `json:"samples"`

	server string
}

// Sample is a trial of a fault, as bin/faults writes it. Times are milliseconds from the fault on.
type Sample struct {
	Row        string   `json:"row"`
	Candidate  string   `json:"candidate"`
	Dead       *float64 `json:"dead_ms"`
	Next       *float64 `json:"next_ms"`
	Overlap    float64  `json:"overlap_ms,omitzero"`
	Violations []string `json:"violations,omitempty"`
	Failure    string   `json:"failure,omitempty"`
}

// table has a column for each version.
func (r *Results) table() string {
	var b strings.Builder
	row := func(name string, cell func(*Version) string) {
		cells := []string{name}
		for _, v := range r.Versions {
			cells = append(cells, cell(v))
		}
		harness.TableRow(&b, cells...)
	}
	if len(r.Versions) == 0 {
		return "Nothing was run.\n"
	}
	about := r.Versions[len(r.Versions)-1].About
	fmt.Fprintf(&b, "%s: %s, Linux %s, %d CPUs.\n\n",
		about.Date, about.Go, about.Kernel, about.CPUs)
	head := []string{""}
	for _, v := range r.Versions {
		head = append(head, "etcd "+v.About.Etcd)
	}
	harness.TableHead(&b, head...)
	row("tests of `election` passed", func(v *Version) string { return v.passed("election") })
	row("tests of `e2e/scenario` passed", func(v *Version) string { return v.passed("scenario") })
	row("trials of faults, promises kept", (*Version).kept)
	for _, name := range rows {
		row("`"+name+"`", func(v *Version) string { return v.outcome(name) })
	}
	return b.String()
}

// passed counts the tests of a package that passed, of those that could run.
func (v *Version) passed(part string) string {
	var passed, skipped int
	var failed []string
	for test, verdict := range v.Tests[part] {
		switch verdict {
		case "PASS":
			passed++
		case "SKIP":
			skipped++
		default:
			failed = append(failed, test)
		}
	}
	if len(v.Tests[part]) == 0 {
		return "-"
	}
	text := fmt.Sprintf("%d of %d", passed, passed+len(failed))
	if skipped > 0 {
		text += fmt.Sprintf(" (%d skipped)", skipped)
	}
	slices.Sort(failed)
	for _, test := range failed {
		text += ", **" + test + " failed**"
	}
	return text
}

// kept counts the trials in which leasehold kept its promises.
func (v *Version) kept() string {
	if len(v.Samples) == 0 {
		return "-"
	}
	kept := 0
	for _, s := range v.Samples {
		if len(s.Violations) == 0 && s.Failure == "" {
			kept++
		}
	}
	return fmt.Sprintf("%d of %d", kept, len(v.Samples))
}

// outcome says what became of the job: when the next one started, as a median.
func (v *Version) outcome(row string) string {
	var next []float64
	var trials, moved int
	var overlap float64
	broken := false
	for _, s := range v.Samples {
		if s.Row != row {
			continue
		}
		trials++
		if s.Next != nil {
			next = append(next, *s.Next)
		}
		if s.Dead != nil || s.Next != nil {
			moved++
		}
		overlap = max(overlap, s.Overlap)
		broken = broken || len(s.Violations) > 0 || s.Failure != ""
	}
	text := "not moved"
	switch {
	case trials == 0:
		return "-"
	case len(next) > 0:
		text = harness.Span(harness.Median(next))
		if moved < trials {
			text += fmt.Sprintf("; not moved in %d of %d", trials-moved, trials)
		}
	case moved > 0:
		text = "no next job"
	}
	if overlap > 0 {
		text += ", both ran for " + harness.Span(overlap)
	}
	if broken {
		text += ", **a promise was broken**"
	}
	return text
}
