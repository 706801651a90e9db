//go:build linux

package check_test

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"leasehold/e2e/check"
)

// trace makes a daemon's log of lines like "3 guard idle forking", the first of which is the
// millisecond. What is no such line stays as it is.
func trace(lines string) string {
	var log strings.Builder
	for line := range strings.Lines(lines) {
		line = strings.TrimSpace(line)
		fields := strings.Fields(line)
		switch {
		case line == "":
		case len(fields) != 4:
			log.WriteString(line + "\n")
		case fields[1] == "candidate":
			fmt.Fprintf(&log, "time=2026-01-02T03:04:05.%03sZ level=INFO msg=\"state changed\" "+
				"election=jobs/a identity=a from=%s to=%s reason=\"a=b c=d\"\n",
				fields[0], fields[2], fields[3])
		default:
			fmt.Fprintf(&log, "time=2026-01-02T03:04:05.%03sZ level=DEBUG msg=\"job state\" "+
				"election=jobs/a identity=a machine=%s from=%s to=%s reason=\"start asked\"\n",
				fields[0], fields[1], fields[2], fields[3])
		}
	}
	return log.String()
}

// blocked is what a daemon writes at a second when it had to drop a line.
func blocked(at string) string {
	return "time=2026-01-02T03:04:" + at + "Z level=WARN msg=\"standard error was blocked: " +
		"log lines are lost\" dropped=1\n"
}

// term is a term from its beginning to its end.
const term = `
	099 elector starting running
	100 candidate connecting standby
	101 candidate standby leading
	102 handle none starting
	103 guard idle forking
	104 guard forking running
	105 handle starting running
	200 candidate leading stopping
	201 handle running stopping
	202 guard running stopping
	203 guard stopping killing
	204 guard killing idle
	205 handle stopping exited
	206 candidate stopping connecting
`

// tookOver is what an elector logs that takes the place of another one.
const tookOver = `time=2026-01-02T03:04:05.110Z level=INFO ` +
	`msg="elector takes the place of another one" election=jobs/a identity=a lease=2a ` +
	`job=running pid=7`

// replacedWhile is a term in which that happens: the elector is killed before it writes that it has
// asked for the job, and that this runs.
const replacedWhile = `
	099 elector starting running
	100 candidate connecting leading
	101 guard idle forking
	102 guard forking running
	103 elector running starting
	104 elector starting running
	` + tookOver + `
	120 candidate connecting leading
	200 candidate leading stopping
	201 handle running stopping
	202 guard running stopping
	203 guard stopping killing
	204 guard killing idle
	205 handle stopping exited
	206 candidate stopping connecting
`

func TestTrace(t *testing.T) {
	relation, err := check.ReadRelation()
	if err != nil {
		t.Fatal(err)
	}
	const cut = `time=2026-01-02T03:04:05.104Z level=DEBUG msg="job state" machine=guard from=for`
	without := func(line string) string { return strings.Replace(term, line, "", 1) }
	for _, c := range []struct {
		name, log string
		guilty    string // what is said; "": innocent
	}{
		{"a term", trace(term), ""},
		{"and another one", trace(term + `
			300 candidate connecting leading
			301 handle exited starting
			302 guard idle forking
		`), ""},
		{"another elector", trace(replacedWhile), ""},
		{
			"and no word of it", trace(strings.Replace(replacedWhile, tookOver, "", 1)),
			"connecting -> leading at 03:04:05.120: it was leading",
		},
		{
			"and it takes the job for another state",
			trace(strings.Replace(replacedWhile, "job=running", "job=exited", 1)),
			"running -> stopping at 03:04:05.201: it was exited",
		},
		{
			"and it knows of no job", trace(strings.Replace(strings.Replace(replacedWhile,
				"job=running", "job=none", 1), "201 handle running stopping", "", 1)),
			"the job was alive for the guard, and the handle knew of none",
		},
		{
			"and the guard has started none",
			trace(strings.Replace(replacedWhile, "104 elector starting running", "", 1)),
			"an elector takes the place of another one at 03:04:05.110, " +
				"and the guard has started none",
		},
		{
			"another elector, which takes no place",
			trace(strings.Replace(replacedWhile, tookOver, "108 handle none starting", 1)),
			"connecting -> leading at 03:04:05.120: it was leading",
		},
		{"nothing", "", ""},
		{
			"a transition that the model does not know", trace(term + "300 guard idle running"),
			"idle -> running at 03:04:05.300: the model has no such transition",
		},
		{
			"a state that the model does not know", trace(term + "300 guard idle frozen"),
			"idle -> frozen at 03:04:05.300: the model has no such transition",
		},
		{
			"a lost line", trace(without("104 guard forking running")),
			"running -> stopping at 03:04:05.202: it was forking",
		},
		{
			"the first line lost", trace(without("102 handle none starting")),
			"starting -> running at 03:04:05.105: it was none",
		},
		{
			"the same state with another reason",
			trace("100 candidate connecting connecting\n" + term), "",
		},
		{
			"from a state in which it was not", trace(term + "300 candidate standby standby"),
			"it was connecting",
		},
		{"lines that the daemon dropped", trace(without("104 guard forking running")) +
			blocked("05.105"), ""},
		{
			"lines that the daemon dropped long before",
			trace(without("104 guard forking running")) + blocked("05.050"),
			"running -> stopping at 03:04:05.202: it was forking",
		},
		{
			"lines that the daemon dropped long after",
			trace(without("104 guard forking running")) + blocked("07.250"),
			"running -> stopping at 03:04:05.202: it was forking",
		},
		{
			"a machine that the model does not know", trace(term + "300 spawner idle forking"),
			"spawner: idle -> forking at 03:04:05.300: the model has no such machine",
		},
		{"killed in mid-line", trace(term) + strings.Replace(cut, "for", "idle", 1), ""},
		{
			"killed in mid-line, and others go on", trace(`
				100 candidate connecting standby
				101 candidate standby leading
				102 handle none starting
				103 guard idle forking
			`) + cut + trace(`
				105 candidate leading stopping
				106 handle starting stopping
			`), "",
		},
		{
			"a line that was cut and should not be", strings.Replace(trace(term), `from=forking to`,
				`from=for`+"\n", 1), "it was forking",
		},
		{"behind what the job left unfinished", "3 of 5 done" + trace(term), ""},
		{
			"the job lives on without its handle", trace(strings.Replace(term,
				"204 guard killing idle", "", 1) + `
				250 candidate connecting standby
				300 guard killing idle
			`),
			"the job was alive for the guard, and the handle knew of none",
		},
		{
			"a handle without a term", trace(strings.Replace(term,
				"205 handle stopping exited", "", 1) + `
				300 candidate connecting standby
				301 handle stopping exited
			`),
			"the job was alive for the handle, and the candidate knew of none",
		},
		{"a guard that was killed", trace(without("204 guard killing idle")), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, err := relation.Trace(c.log)
			switch said := fmt.Sprint(err); {
			case (err != nil) != (c.guilty != ""), !strings.Contains(said, c.guilty):
				t.Errorf("%v transitions, %v; want %q; the log:\n%s", n, err, c.guilty, c.log)
			case c.name == "a term" && !maps.Equal(n, check.Counts{
				check.CandidateMachine: 4, check.HandleMachine: 4, check.GuardMachine: 5,
				check.ElectorMachine: 1,
			}):
				t.Errorf("%v transitions", n)
			}
		})
	}
}

// A daemon may log JSON.
func TestTrace_JSON(t *testing.T) {
	relation, err := check.ReadRelation()
	if err != nil {
		t.Fatal(err)
	}
	const line = `{"time":"2026-01-02T03:04:05.103456Z","level":"DEBUG","msg":"job state",` +
		`"machine":"guard","from":"idle","to":"%s","reason":"start asked"}` + "\n"
	for to, guilty := range map[string]bool{"forking": false, "killing": true} {
		n, err := relation.Trace(fmt.Sprintf(line, to))
		if n[check.GuardMachine] != 1 || (err != nil) != guilty {
			t.Errorf("to %s: %v transitions, %v", to, n, err)
		}
	}
}

// So does an elector that takes the place of another one.
func TestTrace_JSONOfAnother(t *testing.T) {
	relation, err := check.ReadRelation()
	if err != nil {
		t.Fatal(err)
	}
	const transition = `{"time":"2026-01-02T03:04:05.%sZ","level":"DEBUG","msg":"elector state",` +
		`"machine":"%s","from":"%s","to":"%s","reason":"forked"}` + "\n"
	log := fmt.Sprintf(transition, "101", "elector", "starting", "running") +
		fmt.Sprintf(transition, "102", "elector", "running", "starting") +
		fmt.Sprintf(transition, "103", "elector", "starting", "running") +
		`{"time":"2026-01-02T03:04:05.110Z","level":"INFO",` +
		`"msg":"elector takes the place of another one","election":"jobs/a","lease":"2a",` +
		`"job":"running","pid":7}` + "\n" +
		fmt.Sprintf(transition, "120", "handle", "running", "stopping")
	if n, err := relation.Trace(log); err != nil || n[check.ElectorMachine] != 3 {
		t.Errorf("%v transitions, %v", n, err)
	}
}

// What logged nothing was not checked. Each machine has to log something, not all of them together.
func TestCounts_Complete(t *testing.T) {
	relation, err := check.ReadRelation()
	if err != nil {
		t.Fatal(err)
	}
	count := func(log string) check.Counts {
		n, err := relation.Trace(trace(log))
		if err != nil {
			t.Error(err)
		}
		return n
	}
	n := count("099 elector starting running\n100 candidate connecting standby")
	n.Add(count("100 candidate connecting leading\n101 handle none starting"))
	if err := n.Complete(); err == nil ||
		err.Error() != "the guard has logged no transition" {
		t.Errorf("%v: %v", n, err)
	}
	n.Add(count(term))
	if err := n.Complete(); err != nil || n[check.CandidateMachine] != 6 {
		t.Errorf("%v: %v", n, err)
	}
}
