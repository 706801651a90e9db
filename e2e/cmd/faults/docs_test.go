//go:build linux

package main

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"leasehold/e2e/harness"
)

var (
	stepLine = regexp.MustCompile(`^\| \d+ \|.*\|([^|]*)\|$`)
	quoted   = regexp.MustCompile("`([^`]+)`")
)

// TestSafetyDocument: the argument in docs/safety.md names, in the last column
// of its steps, the rows that attack each step. There must be such rows, and
// none of the table may be without a step.
func TestSafetyDocument(t *testing.T) {
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", "safety.md"))
	if err != nil {
		t.Fatal(err)
	}
	steps, used := 0, map[string]bool{}
	for line := range strings.Lines(string(text)) {
		step := stepLine.FindStringSubmatch(strings.TrimSpace(line))
		if step == nil {
			continue
		}
		steps++
		faults := quoted.FindAllStringSubmatch(step[1], -1)
		if len(faults) == 0 {
			t.Errorf("no fault attacks the step: %s", line)
		}
		for _, fault := range faults {
			found := false
			for _, r := range scenarios {
				if ok, err := path.Match(fault[1], r.Name); err != nil {
					t.Fatal(err)
				} else if ok {
					found, used[r.Name] = true, true
				}
			}
			if !found {
				t.Errorf("docs/safety.md names the fault %s, and there is no such row", fault[1])
			}
		}
	}
	if steps == 0 {
		t.Error("docs/safety.md shows no steps")
	}
	for _, r := range scenarios {
		if !used[r.Name] {
			t.Errorf("docs/safety.md does not say what the row %s attacks", r.Name)
		}
	}
}

// TestHooksDocument: docs/hooks.md has the figures of docs/faults-hooks.json.
func TestHooksDocument(t *testing.T) {
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	tried, err := harness.ReadJSON[struct {
		Rows []struct {
			Row, Commit string
			Trials      int
			NoOutcome   int       `json:"no_outcome"`
			Twice       []float64 `json:"on_two_machines_ms"`
			Failed      int       `json:"hook_failed"`
		}
	}](filepath.Join(root, "docs", "faults-hooks.json"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", "hooks.md"))
	if err != nil {
		t.Fatal(err)
	}
	page := strings.Join(strings.Fields(string(text)), " ")
	trials, unended, rows := 0, 0, map[string]bool{}
	says := map[string]bool{}
	for _, r := range tried.Rows {
		trials, unended, says[r.Commit] = trials+r.Trials, unended+r.NoOutcome, true
		if r.Trials > 0 {
			rows[r.Row] = true
		}
		if len(r.Twice) > 0 {
			says["`"+r.Row+"`"] = true
		}
		for _, s := range scenarios {
			if s.Name == r.Row && s.Promise == Never && len(r.Twice) > r.Failed {
				t.Errorf("%s with %s: on two machines for %v ms", r.Row, r.Commit, r.Twice)
			}
		}
	}
	says[fmt.Sprintf("%d trials of all %d rows", trials, len(rows))] = true
	says[fmt.Sprintf("%d more", unended)] = true
	for what := range says {
		if !strings.Contains(page, what) {
			t.Errorf("docs/hooks.md does not say %s", what)
		}
	}
}
