//go:build linux

package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// report is what pan prints at its end.
const report = `
(Spin Version 6.5.2 -- 6 December 2019)
	+ Partial Order Reduction

Full statespace search for:
	never claim         	- (none specified)
	assertion violations	+
	acceptance   cycles 	- (not selected)
	invalid end states	+

State-vector 44 byte, depth reached 34, errors: 0
 12345678 states, stored
       40 states, matched
      134 transitions (= stored+matched)
        0 atomic steps
hash conflicts:         0 (resolved)

Stats on memory usage (in Megabytes):
    0.007	equivalent memory usage for states
  128.730	total actual memory usage


pan: elapsed time 0.01 seconds
transition job NONE RUNNING
transition job RUNNING DYING
transition job NONE RUNNING
`

func TestParse(t *testing.T) {
	const violation = "pan:1: assertion violated  !((job[0]&&job[1])) (at depth 3)\n" +
		"pan: wrote toy.pml.trail\n"
	incomplete := strings.NewReplacer("2019)", "2019)\nWarning: Search not completed")
	failed := strings.NewReplacer("errors: 0", "errors: 1")
	for _, test := range []struct{ name, out, violation, cut string }{
		{"complete", report, "", ""},
		{
			"violation", violation + incomplete.Replace(failed.Replace(report)),
			"assertion violated  !((job[0]&&job[1]))", "",
		},
		{
			"deadlock", "pan:1: invalid end state (at depth 12)\n" + failed.Replace(report),
			"invalid end state", "",
		},
		{
			"depth", "error: max search depth too small\n" + report,
			"", "max search depth too small",
		},
		{
			"memory", "pan: reached -DMEMLIM bound\n" + incomplete.Replace(report),
			"", "reached -DMEMLIM bound",
		},
		{"interrupted", incomplete.Replace(report), "", "search not completed"},
		{
			"bitstate", strings.Replace(report, "Full statespace", "Bit statespace", 1),
			"", "the states are not stored in full",
		},
		{"killed", "Depth= 2346 States= 1e+06\n", "", "pan gave no report"},
		{"unnamed error", failed.Replace(report), "", "does not name it"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := parse(test.out)
			if r.Violation != test.violation {
				t.Errorf("violation %q, want %q", r.Violation, test.violation)
			}
			if (r.Cut == "") != (test.cut == "") || !strings.Contains(r.Cut, test.cut) {
				t.Errorf("cut short by %q, want %q", r.Cut, test.cut)
			}
		})
	}
	r := parse(report)
	if r.States != 12345678 || r.MB != 128.73 {
		t.Errorf("%d states, %f MB", r.States, r.MB)
	}
	want := "transition job NONE RUNNING, transition job RUNNING DYING"
	if got := strings.Join(r.Transitions, ", "); got != want {
		t.Errorf("transitions %s, want %s", got, want)
	}
}

func TestDiffer(t *testing.T) {
	kept := []string{"@ 0 etcd one", "@ 1 etcd two"}
	if err := differ(kept, kept); err != nil {
		t.Error(err)
	}
	for _, found := range [][]string{{"@ 0 etcd one", "@ 1 etcd three"}, kept[:1]} {
		if err := differ(kept, found); err == nil || !strings.Contains(err.Error(), "line 2 ") {
			t.Errorf("found %q: %v, want that line 2 differs", found, err)
		}
	}
}

// TestTransitions: the kept transitions are those that CI's configurations take, no fewer and no
// more.
func TestTransitions(t *testing.T) {
	const one, two = "transition job NONE RUNNING", "transition job RUNNING DYING"
	for _, test := range []struct {
		name string
		seen map[string]bool
		all  bool
		want string
	}{
		{"the same", map[string]bool{one: true, two: true}, true, ""},
		{"a new one", map[string]bool{one: true, two: true, two + "2": true}, true, "is new"},
		{"one too many", map[string]bool{one: true}, true, two + " is taken by no configuration"},
		{"not in CI", map[string]bool{one: true, two: false}, true, two + " is taken by no"},
		{"not all have run", map[string]bool{one: true}, false, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &checker{dir: t.TempDir(), transitions: test.seen}
			path := filepath.Join(c.dir, "transitions.txt")
			if err := os.WriteFile(path, []byte(one+"\n"+two+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			switch err := c.checkTransitions(test.all); {
			case err == nil && test.want != "":
				t.Errorf("passed, want %q", test.want)
			case err != nil && (test.want == "" || !strings.Contains(err.Error(), test.want)):
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// TestBars: a job's and a lease's time are read from the words of the models.
func TestBars(t *testing.T) {
	events, err := parseTrace([]string{
		"@ 0 b.elector gets a lease, and is in the queue",
		"@ 0 a.elector has a lease, and leads",
		"@ 0 a.job starts",
		"@ 1 etcd drops the lease of b: it has expired",
		"@ 1 a.spawner kills the job",
		"@ 1 a.elector revokes its lease",
		"@ 2 a.job starts",
		"@ 2 a.guard kills the job",
		"@ 2 b.job starts",
		"@ 3 b.job exits",
		"@ 4 a.job starts",
		"@ 4 a.job is frozen",
		"@ 5 a.guard thaws the job",
	})
	if err != nil {
		t.Fatal(err)
	}
	if e := events[4]; e.actor != "a.spawner" || e.text != "kills the job" {
		t.Errorf("%+v, want it in the lane of the spawner", e)
	}
	want := []bar{
		{"b", "etcd", 0, 3},
		{"a", "etcd", 1, 5},
		{"a", "a.job", 2, 4}, // killed before the next start
		{"a", "a.job", 6, 7}, // a part of it may have lived on
		{"b", "b.job", 8, 9},
		{"a", "a.job", 10, 11},
		{"a", "a.job", 12, 13},
	}
	if got := bars(events); !slices.Equal(got, want) {
		t.Errorf("bars %v, want %v", got, want)
	}
	if _, err := parseTrace([]string{"@ 0 nobody starts"}); err == nil {
		t.Error("an actor that there is not is taken")
	}
	if _, err := parseTrace(slices.Repeat([]string{"@ 0 a.job starts"}, 101)); err == nil {
		t.Error("a trace of 101 lines is taken")
	}
}

// needsSpin skips a test where spin or gcc is missing. With E2E_NO_SKIP=1, as CI has it, that is a
// failure.
func needsSpin(t *testing.T) {
	t.Helper()
	if err := needPrograms(); err != nil {
		if os.Getenv("E2E_NO_SKIP") == "1" {
			t.Fatalf("%v; and E2E_NO_SKIP=1 forbids to skip", err)
		}
		t.Skip(err)
	}
}

// toy is a checker of the toy model, in a directory of its own.
func toy(t *testing.T, configs, switches string) *checker {
	t.Helper()
	needsSpin(t)
	t.Setenv("TMPDIR", t.TempDir())
	t.Cleanup(func() {
		if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
			t.Errorf("temporary files are left: %v, %v", left, err)
		}
	})
	model, err := os.ReadFile("testdata/toy.pml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "traces"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"toy.pml":     string(model),
		"configs.tsv": "name\tmodel\toptions\tstates\tMB\tseconds\tci\n" + configs,
		"switches.tsv": "switch\tmodel\tstep\tturns off\tbreaks\toptions\tseconds\n" +
			switches,
		"README.md": "<!-- configs -->\n<!-- /configs -->\n<!-- switches -->\n<!-- /switches -->\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c := &checker{
		dir: dir, only: regexp.MustCompile(""), limit: time.Minute, slow: 60, out: t.Output(),
		transitions: map[string]bool{},
	}
	if err := c.load(); err != nil {
		t.Fatal(err)
	}
	return c
}

const (
	toyConfig = "plain\ttoy.pml\t-DTICKS=2 -m1000 -O0 -w16\t0\t0\t0\tyes\n"
	toySwitch = "NO_LOCK\ttoy.pml\t4\tthe lock\ttwo-jobs\t-DBFS -O0 -w16\t0\n"
)

// TestToy_KeptAndFoundAgain: what an update keeps is found again, also in CI's way, and a change of
// it is reported.
func TestToy_KeptAndFoundAgain(t *testing.T) {
	c := toy(t, toyConfig, toySwitch)
	c.update = true
	if err := c.check(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.update = false
	if err := c.load(); err != nil {
		t.Fatal(err)
	}
	if err := c.check(t.Context()); err != nil {
		t.Error(err)
	}
	trace, err := os.ReadFile(filepath.Join(c.dir, "traces", "NO_LOCK.txt"))
	want := "@ 0 etcd grants b a lease\n@ 0 b.job starts\n" +
		"@ 0 etcd grants a a lease\n@ 0 a.job starts\n"
	if err != nil || !bytes.Equal(trace, []byte(want)) {
		t.Errorf("%v, the shortest trace is\n%s, want\n%s", err, trace, want)
	}
	states := c.configs.rows[0].get("states")
	c.configs.rows[0].set("states", "1")
	c.switches.rows[0].set("breaks", "token")
	wantFailure(t, c, "plain: "+states+" states, and 1 are kept", "two-jobs breaks, want token")
	if err := c.load(); err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(want, "b.job starts", "b.job waits", 1)
	if err := os.WriteFile(c.kept(c.switches.rows[0], ".txt"), []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	wantFailure(t, c, "NO_LOCK: line 2 of the kept trace is not found again")
	path := filepath.Join(c.dir, "transitions.txt")
	if err := os.WriteFile(path, []byte("transition job NONE RUNNING\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c.ci, c.only = true, regexp.MustCompile("plain")
	wantFailure(t, c, "transition job NONE RUNNING is taken by no configuration of CI")
}

// TestToy_Slow: where CI has no time for the shortest trace, it still replays the kept one.
func TestToy_Slow(t *testing.T) {
	c := toy(t, toyConfig, toySwitch)
	c.update = true
	c.slow = 0
	if err := c.check(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.update, c.ci = false, true
	if err := c.check(t.Context()); err != nil {
		t.Error(err)
	}
	trail := c.kept(c.switches.rows[0], ".trail")
	if err := os.WriteFile(trail, []byte("-4:-4:-4\n1:0:1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	wantFailure(t, c, "NO_LOCK: the kept trail is no run of the model")
}

// TestToy_Fails: nothing that hides an error passes.
func TestToy_Fails(t *testing.T) {
	for _, test := range []struct{ name, config, switches, want string }{
		{
			"an error in a configuration",
			strings.Replace(toyConfig, "-m1000", "-DNO_LOCK", 1), toySwitch,
			"spin finds an error: assertion violated",
		},
		{
			"a deadlock", strings.Replace(toyConfig, "-m1000", "-DSTUCK", 1), toySwitch,
			"spin finds an error: invalid end state",
		},
		{
			"too little depth", strings.Replace(toyConfig, "-m1000", "-m5", 1), toySwitch,
			"not complete: max search depth too small",
		},
		{
			"a switch that changes nothing", toyConfig,
			strings.Replace(toySwitch, "NO_LOCK", "TICKS=3", 1),
			"superfluous, or not modelled",
		},
		{
			"no error within little depth", toyConfig,
			strings.Replace(toySwitch, "two-jobs\t", "two-jobs\t-m1 ", 1),
			"no violation, but the search is not complete",
		},
		{
			"not Promela", strings.Replace(toyConfig, "-DTICKS=2", "-DTICKS=;", 1), toySwitch,
			"spin -a: ",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := toy(t, test.config, test.switches)
			c.update = true
			wantFailure(t, c, test.want)
		})
	}
}

// TestToy_TimeLimit: a search that takes too long has not passed, and ends.
func TestToy_TimeLimit(t *testing.T) {
	c := toy(t, strings.Replace(toyConfig, "-DTICKS=2", "-DTICKS=250", 1), toySwitch)
	c.limit = time.Nanosecond
	wantFailure(t, c, "plain: the search is not complete: it took longer than 1ns")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.check(ctx); err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("after an interrupt: %v", err)
	}
}

func wantFailure(t *testing.T, c *checker, want ...string) {
	t.Helper()
	err := c.check(t.Context())
	if err == nil {
		t.Errorf("passed, want %q", want)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v\nwant %q", err, w)
		}
	}
}

// TestPages: the pictures, and the tables of README.md, are those of the kept traces and figures.
func TestPages(t *testing.T) {
	c := &checker{dir: "../../../docs/model"}
	if err := c.load(); err != nil {
		t.Fatal(err)
	}
	pages, err := c.pages()
	if err != nil {
		t.Fatal(err)
	}
	files := pages.files
	readme, err := os.ReadFile(filepath.Join(c.dir, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for name, section := range pages.sections {
		if !strings.Contains(string(readme), "<!-- "+name+" -->\n"+section+"<!-- /"+name+" -->") {
			t.Errorf("README.md: the table %s is not that of %[1]s.tsv: run bin/model -docs", name)
		}
	}
	for path, want := range files {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s is not drawn from its trace (%v): run bin/model -docs", path, err)
		}
	}
	// Nothing is left of a switch that was renamed.
	kept, err := filepath.Glob(filepath.Join(c.dir, "traces", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range kept {
		picture := strings.TrimSuffix(path, filepath.Ext(path)) + ".svg"
		if _, ours := files[picture]; !ours {
			t.Errorf("%s belongs to no switch", path)
		}
	}
}

// TestSafetyDocument: docs/safety.md names each switch, that of a step in the row of the step.
func TestSafetyDocument(t *testing.T) {
	c := &checker{dir: "../../../docs/model"}
	if err := c.load(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../../docs/safety.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range c.switches.rows {
		where := string(text)
		if row.number("step") > 0 {
			_, where, _ = strings.Cut(where, "\n| step "+row.get("step")+" |")
			where, _, _ = strings.Cut(where, "\n")
		}
		if !strings.Contains(where, "`"+row.name()+"`") {
			t.Errorf("docs/safety.md does not name %s of %s", row.name(), row.get("step"))
		}
	}
}
