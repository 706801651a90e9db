//go:build linux

package k8s_test

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"leasehold/e2e/harness"
)

var update = flag.Bool("update", false, "write the table into docs/kubernetes-faults.md")

// Results are those of TestCluster_Faults and of the tests of rollouts, as
// docs/kubernetes-faults.json has them.
type results struct {
	About  string  `json:"about"` // the last run: when, of what and on what
	Trials []trial `json:"trials"`
	// Traffic is from TestCluster_Traffic too.
	Traffic []traffic `json:"traffic"`
}

// traffic is what one fault did to the connections to a Service. Times are milliseconds from the
// fault.
type traffic struct {
	Way     string  `json:"way"` // who routes the Service to the leader
	Fault   string  `json:"fault"`
	Next    float64 `json:"next"`    // to the next job's first instruction; 0: the job ran on
	Reached float64 `json:"reached"` // to the first connection that reached that job's pod
}

// A trial is what one fault did. Times are milliseconds, and as the job's own clock has them.
type trial struct {
	Form     string  `json:"form"`
	Fault    string  `json:"fault"`
	Moved    bool    `json:"moved"`             // The job had to move, and did; else the rest is 0
	Ended    float64 `json:"ended"`             // from the fault to the job's last instruction
	Next     float64 `json:"next"`              // from the fault to the next job's first one
	Gap      float64 `json:"gap"`               // the longest time without a job
	Restart  float64 `json:"restart,omitempty"` // from the container's restart to the next job
	Overlaps int     `json:"overlaps"`          // pairs of jobs that lived at once

	traffic []traffic // of a Service that routes to the leader: one, or none
}

// addTo adds the trials to those in a file.
func (r results) addTo(path string) error {
	kept, err := harness.ReadJSON[results](path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	default:
		r.Trials = append(kept.Trials, r.Trials...)
		r.Traffic = append(kept.Traffic, r.Traffic...)
		if r.About == "" {
			r.About = kept.About
		}
	}
	return harness.WriteJSON(path, r)
}

// table has a row for each fault and form, in the order of `faults` and `formNames`. Trials may
// have ended in any order.
func (r results) table() string {
	type row struct{ form, fault string }
	var order []row
	trials := map[row][]trial{}
	for _, t := range r.Trials {
		key := row{t.Form, t.Fault}
		if trials[key] == nil {
			order = append(order, key)
		}
		trials[key] = append(trials[key], t)
	}
	slices.SortStableFunc(order, func(a, b row) int {
		return cmp.Or(cmp.Compare(faultIndex(a.fault), faultIndex(b.fault)),
			cmp.Compare(a.fault, b.fault),
			cmp.Compare(slices.Index(formNames, a.form), slices.Index(formNames, b.form)))
	})
	var b strings.Builder
	harness.TableHead(&b, "fault", "form", "job ended", "next job", "no job for", "both alive")
	for _, key := range order {
		var ended, next, gap, restart []float64
		overlaps := 0
		for _, t := range trials[key] {
			if t.Overlaps > 0 {
				overlaps++
			}
			if t.Moved {
				ended, next, gap = append(ended, t.Ended), append(next, t.Next), append(gap, t.Gap)
			}
			if t.Restart > 0 {
				restart = append(restart, t.Restart)
			}
		}
		both := fmt.Sprintf("%d of %d", overlaps, len(trials[key]))
		follows := figure(next)
		if len(restart) > 0 {
			follows += "; after the container's restart " + figure(restart)
		}
		harness.TableRow(&b, key.fault, key.form, figure(ended), follows, figure(gap), both)
	}
	return b.String()
}

// faultIndex is the place of a fault in the table. Rollouts of other tests come last.
func faultIndex(name string) int {
	i := slices.IndexFunc(faults, func(f fault) bool { return f.name == name })
	if i < 0 {
		i = len(faults)
	}
	return i
}

// trafficTable has a row for each fault and way, in the order of `faults` and `wayNames`.
func (r results) trafficTable() string {
	type row struct{ way, fault string }
	var order []row
	trials := map[row]int{}
	next, reached := map[row][]float64{}, map[row][]float64{}
	for _, t := range r.Traffic {
		key := row{t.Way, t.Fault}
		if trials[key]++; trials[key] == 1 {
			order = append(order, key)
		}
		if t.Next > 0 {
			next[key], reached[key] = append(next[key], t.Next), append(reached[key], t.Reached)
		}
	}
	slices.SortStableFunc(order, func(a, b row) int {
		return cmp.Or(cmp.Compare(faultIndex(a.fault), faultIndex(b.fault)),
			cmp.Compare(slices.Index(wayNames, a.way), slices.Index(wayNames, b.way)))
	})
	var b strings.Builder
	harness.TableHead(&b, "fault", "Service routed", "next job", "connections reach it", "trials")
	for _, key := range order {
		harness.TableRow(&b, key.fault, key.way, figure(next[key]), figure(reached[key]),
			strconv.Itoa(trials[key]))
	}
	return b.String()
}

// figure is a median, and the maximum where there are several.
func figure(ms []float64) string {
	switch median, _, most := harness.Spans(ms); len(ms) {
	case 0:
		return "-"
	case 1:
		return median
	default:
		return median + ", max " + most
	}
}

// The page has the table of the trials that are kept.
func TestFaults_Page(t *testing.T) {
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	kept, err := harness.ReadJSON[results](filepath.Join(root, "docs", "kubernetes-faults.json"))
	if err != nil {
		t.Fatal(err)
	}
	page := filepath.Join(root, "docs", "kubernetes-faults.md")
	sections := map[string]string{
		"faults": kept.About + "\n\n" + kept.table(), "traffic": kept.trafficTable(),
	}
	if *update {
		if err := harness.Refresh(page, sections); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for name, section := range sections {
		want := "<!-- " + name + " -->\n" + section + "<!-- /" + name + " -->"
		if !strings.Contains(string(text), want) {
			t.Errorf("%s has another table %s than the trials: run make generate", page, name)
		}
	}
}

func TestResults_AddTo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kept.json")
	for _, about := range []string{"yesterday", "today"} {
		if err := (results{About: about, Trials: []trial{{Fault: about}}}).addTo(path); err != nil {
			t.Fatal(err)
		}
	}
	got, err := harness.ReadJSON[results](path)
	want := results{About: "today", Trials: []trial{{Fault: "yesterday"}, {Fault: "today"}}}
	if err != nil || !reflect.DeepEqual(*got, want) {
		t.Errorf("%+v (%v), want %+v", got, err, want)
	}
}

func TestResults_Table(t *testing.T) {
	table := results{Trials: []trial{
		{Form: "wrapper", Fault: "deleted", Moved: true, Ended: 20, Next: 30, Gap: 10},
		{Form: "plain", Fault: "deleted", Moved: true, Ended: 1, Next: 2e3, Gap: 2e3, Overlaps: 1},
		{Form: "wrapper", Fault: "deleted", Moved: true, Ended: 40, Next: 50, Gap: 10, Restart: 5},
		{Form: "wrapper", Fault: "rolled"},
	}}.table()
	for _, want := range []string{
		"| deleted | wrapper | 30.0 ms, max 40.0 ms | 40.0 ms, max 50.0 ms; " +
			"after the container's restart 5.0 ms | 10.0 ms, max 10.0 ms | 0 of 2 |\n",
		"| deleted | plain | 1.0 ms | 2.00 s | 2.00 s | 1 of 1 |\n",
		"| rolled | wrapper | - | - | - | 0 of 1 |\n",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("no row %q in\n%s", want, table)
		}
	}
	var reversed, sorted results
	for _, name := range []string{faults[0].name, faults[1].name} {
		for _, form := range formNames {
			result := trial{Form: form, Fault: name}
			sorted.Trials = append(sorted.Trials, result)
			reversed.Trials = slices.Insert(reversed.Trials, 0, result)
		}
	}
	if got, want := reversed.table(), sorted.table(); got != want {
		t.Errorf("the trials ended in another order, and the table is\n%s, want\n%s", got, want)
	}
}

func TestResults_TrafficTable(t *testing.T) {
	first, last := faults[0].name, faults[len(faults)-1].name
	table := results{Traffic: []traffic{
		{Way: "by leasehold", Fault: last},
		{Way: "by leasehold", Fault: first, Next: 20, Reached: 30},
		{Way: "by a Lease", Fault: first, Next: 2e3, Reached: 3e3},
		{Way: "by readiness", Fault: first, Next: 20, Reached: 1e3},
		{Way: "by leasehold", Fault: first, Next: 40, Reached: 50},
	}}.trafficTable()
	want := "| " + first + " | by leasehold | 30.0 ms, max 40.0 ms | 40.0 ms, max 50.0 ms | 2 |\n" +
		"| " + first + " | by readiness | 20.0 ms | 1.00 s | 1 |\n" +
		"| " + first + " | by a Lease | 2.00 s | 3.00 s | 1 |\n" +
		"| " + last + " | by leasehold | - | - | 1 |\n"
	if !strings.HasSuffix(table, want) {
		t.Errorf("the table is\n%s, want at its end\n%s", table, want)
	}
}
