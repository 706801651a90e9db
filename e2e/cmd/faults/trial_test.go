//go:build linux

package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// TestAlive: two jobs overlap only where both could run.
func TestAlive(t *testing.T) {
	const s = time.Second
	life := func(candidate string, token int64, from, to time.Duration) harness.Life {
		hello := harness.Hello{Candidate: candidate, Token: token, Started: from}
		return harness.Life{Hello: hello, End: to}
	}
	for _, c := range []struct {
		name   string
		frozen check.Intervals
		killed time.Duration
		want   time.Duration
	}{
		{"both run", nil, 0, 8 * s},
		{
			"the old one is frozen until after its successor's start",
			check.Intervals{{From: 10 * s, To: 15 * s}},
			0, 5 * s,
		},
		{"to its end", check.Intervals{{From: 10 * s, To: check.Forever}}, 0, 0},
		{
			"twice",
			check.Intervals{{From: 11 * s, To: 13 * s}, {From: 14 * s, To: 16 * s}},
			0, 5 * s,
		},
		{"before it mattered", check.Intervals{{From: 2 * s, To: 3 * s}}, 0, 8 * s},
		{"it was killed before its connection closed", nil, 13 * s, 1 * s},
	} {
		target := &fault.Target{Machine: &harness.Machine{Name: "a"}, Frozen: c.frozen}
		tr := &Trial{Target: target, killed: c.killed}
		tr.Job = life("a", 1, 1*s, 20*s)
		h := check.NewHistory([]harness.Life{tr.Job, life("b", 2, 12*s, 0)})
		got := time.Duration(0)
		for _, o := range h.Overlaps(tr.alive(30 * s)) {
			got += o.During.Total()
		}
		if got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestResults: what is written can be read again, and every report and picture
// is made of it; a broken promise is told.
func TestResults(t *testing.T) {
	at := func(ms float64) *float64 { return &ms }
	written := &Results{
		N: 1, PeersN: 1,
		Rows: []RowInfo{
			{Name: "stop", Group: "daemon", About: "planned <stop>", TTL: 5, Short: true},
			{Name: "quiet", Group: "etcd", About: "nothing", NoFailover: true},
		},
		Samples: []Sample{
			{
				Row: "stop", Candidate: "leasehold", Dead: at(1), Next: at(9), Gap: 8,
				Starts: 1, Until: 12,
				Lives: []Life{{"a", 1, -500, at(1)}, {"b", 2, 9, nil}},
			},
			{
				Row: "stop", Candidate: "naive client", Dead: at(70), Next: at(9), Overlap: 61,
				Starts: 1, Until: 80,
				Lives: []Life{{"a", 1, -500, at(70)}, {"b", 2, 9, nil}},
			},
			{
				Row: "quiet", Candidate: "leasehold", Lives: []Life{{"a", 1, -500, nil}},
				Violations: []string{"a lease is left"},
			},
		},
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "faults.json")
	if err := written.write(path); err != nil {
		t.Fatal(err)
	}
	r, err := harness.ReadJSON[Results](path)
	if err != nil {
		t.Fatal(err)
	}
	readme := filepath.Join(dir, "README.md")
	before := "before\n<!-- faults -->\nold\n<!-- /faults -->\nafter\n"
	var text bytes.Buffer
	if err := errors.Join(
		os.WriteFile(readme, []byte(before), 0o644), os.Mkdir(filepath.Join(dir, "docs"), 0o755),
		r.writeText(&text), r.publish(dir),
	); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"1 of 1, 61.0 ms", "VIOLATED: quiet, leasehold: a lease is left",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the report does not say %q:\n%s", want, &text)
		}
	}
	read := func(path string) string {
		data, err := os.ReadFile(filepath.Join(dir, path))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	if table := read("docs/faults.md"); !strings.Contains(table, "**1 of 1, 61.0 ms**") {
		t.Errorf("the table does not tell of the overlap:\n%s", table)
	}
	svg := read("docs/faults.svg")
	if n := strings.Count(svg, `class="both"`); n != 2 { // the legend's, and the naive client's
		t.Errorf("%d bars of overlap, want 2:\n%s", n, svg)
	}
	for x := xml.NewDecoder(strings.NewReader(svg)); ; {
		if _, err := x.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the picture is no XML: %v", err)
		}
	}
	got := read("README.md")
	for _, want := range []string{
		"before\n<!-- faults -->\n", "<!-- /faults -->\nafter\n",
		"| 9.0 ms | 9.0 ms, **both ran for up to 61.0 ms** | - |",
	} {
		if !strings.Contains(got, want) || strings.Contains(got, "old\n") {
			t.Errorf("the README does not hold %q, or what was there:\n%s", want, got)
		}
	}
}

// TestResults_Hooks: trials with hooks are not published, and not mixed with those without.
func TestResults_Hooks(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "faults.json")
	readme := filepath.Join(dir, "README.md")
	const before = "<!-- faults -->\nold\n<!-- /faults -->\n"
	if err := errors.Join(
		(&Results{N: 1, Hooks: true}).write(path),
		os.WriteFile(readme, []byte(before), 0o644), os.Mkdir(filepath.Join(dir, "docs"), 0o755),
	); err != nil {
		t.Fatal(err)
	}
	with, err := harness.ReadJSON[Results](path)
	if err != nil {
		t.Fatal(err)
	}
	if err := with.publish(dir); err == nil || !strings.Contains(err.Error(), "-hooks") {
		t.Errorf("publish: %v", err)
	}
	pages, err := os.ReadDir(filepath.Join(dir, "docs"))
	if text, _ := os.ReadFile(readme); err != nil || len(pages) > 0 || string(text) != before {
		t.Errorf("%d pages are written, %v; the README is %q", len(pages), err, text)
	}
	if err := (&Results{N: 1}).replaceIn(path); err == nil {
		t.Error("rows without hooks were put among those with")
	}
	if err := with.replaceIn(path); err != nil {
		t.Error(err)
	}
}

func TestResults_ReplaceIn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "faults.json")
	whole := Results{
		N:       2,
		Rows:    []RowInfo{{Name: "stop"}, {Name: "suspend", NoFailover: true}},
		Samples: []Sample{{Row: "stop", Starts: 1}, {Row: "suspend", Starts: 1}},
	}
	if err := whole.write(path); err != nil {
		t.Fatal(err)
	}
	again := Results{
		About: harness.About{Date: "2026-11-30"}, Version: "leasehold abc (commit abcdef)",
		N: 2, Rows: []RowInfo{{Name: "suspend", MayFailover: true}, {Name: "elector-killed"}},
		Samples: []Sample{{Row: "suspend"}, {Row: "elector-killed", Starts: 3}},
	}
	if err := again.replaceIn(path); err != nil {
		t.Fatal(err)
	}
	got, err := harness.ReadJSON[Results](path)
	if err != nil {
		t.Fatal(err)
	}
	// A row that is new stands where the table has it.
	if len(got.Rows) != 3 || got.Rows[1].Name != "elector-killed" || !got.Rows[2].MayFailover ||
		len(got.Samples) != 3 || got.Samples[0].Starts != 1 || got.Samples[1].Starts != 0 ||
		!slices.Equal(got.Again, []Rerun{
			{"suspend", "2026-11-30", "leasehold abc"},
			{"elector-killed", "2026-11-30", "leasehold abc"},
		}) {
		t.Errorf("results are now %+v", got)
	}
	// Run once more, a row is of the newest version, and the pages say of which ones all rows are.
	again.Version, again.About.Date = "leasehold def (commit defabc)", "2026-12-01"
	again.Rows, again.Samples = again.Rows[:1], again.Samples[:1]
	if err := again.replaceIn(path); err != nil {
		t.Fatal(err)
	}
	if got, err = harness.ReadJSON[Results](path); err != nil {
		t.Fatal(err)
	}
	if later := got.Later(); !reflect.DeepEqual(later, []Reruns{
		{"2026-11-30", "leasehold abc", []string{"elector-killed"}},
		{"2026-12-01", "leasehold def", []string{"suspend"}},
	}) {
		t.Errorf("run later are %v", later)
	}
	got.Version, got.About.Date = "leasehold aaa (commit aaabbb)", "2026-11-29"
	if line := got.Headline(); !strings.HasPrefix(line,
		"2026-11-29 to 2026-12-01: leasehold aaa to def,") {
		t.Errorf("the pages say %q", line)
	}
	again.N = 3
	if err := again.replaceIn(path); err == nil {
		t.Error("rows of another number of trials were put in")
	}
}
