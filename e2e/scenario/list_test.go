//go:build linux

package scenario_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unicode"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/control"
	"leasehold/e2e/harness"
)

// schema is as much of JSON Schema as docs/schema.json uses.
type schema struct {
	Type       any // a name, or that and null
	Properties map[string]*schema
	Required   []string
	Items      *schema
}

// checkJSON checks what a command has printed against docs/schema.json.
func checkJSON(t testing.TB, command, text string) {
	t.Helper()
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(filepath.Join(root, "docs", "schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var all struct {
		Defs map[string]*schema `json:"$defs"`
	}
	var got any
	if err := json.Unmarshal(file, &all); err != nil || all.Defs[command] == nil {
		t.Fatalf("docs/schema.json has no %s: %v", command, err)
	}
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%s: %v in %s", command, err, text)
	}
	if err := all.Defs[command].check(got); err != nil {
		t.Errorf("%s: %v in %s", command, err, text)
	}
}

func (s *schema) check(v any) error {
	kind := ""
	switch v := v.(type) {
	case nil:
		kind = "null"
	case string:
		kind = "string"
	case bool:
		kind = "boolean"
	case float64:
		kind = "number"
		if v == float64(int64(v)) {
			kind = "integer"
		}
	case []any:
		kind = "array"
		for i, item := range v {
			if err := s.Items.check(item); err != nil {
				return fmt.Errorf("[%d]: %w", i, err)
			}
		}
	case map[string]any:
		kind = "object"
		for _, name := range s.Required {
			if _, found := v[name]; !found {
				return fmt.Errorf("%s is missing", name)
			}
		}
		for name, field := range v {
			if s.Properties[name] == nil {
				return fmt.Errorf("%s is not described", name)
			}
			if err := s.Properties[name].check(field); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	types, several := s.Type.([]any)
	if !several {
		types = []any{s.Type}
	}
	integer := kind == "integer" && slices.Contains(types, "number")
	if !slices.Contains(types, any(kind)) && !integer {
		return fmt.Errorf("%s, not %v", kind, s.Type)
	}
	return nil
}

// checkTable checks that a terminal shows the text as lines of its width.
func checkTable(t testing.TB, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if len([]rune(line)) > 80 ||
			strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("the line %q does not fit a terminal", line)
		}
	}
}

// TestList: list shows what elections there are, and history who led. What foreign candidates and
// keys have in them does nothing to a terminal.
func TestList(t *testing.T) {
	tr := ordinary(t)
	etcd := tr.etcdClient()
	first := tr.election
	a := tr.start("a", "")
	job := tr.waitJob(a)
	b := tr.start("b", "")
	tr.election = `jobs/it's"b"` + "/é"
	c := tr.start("c\u202e\"' ü", "")
	other := tr.waitJob(c)
	tr.election = first
	tr.waitRecords(etcd, "a b", `a "" 0`)
	wanted := []string{
		fmt.Sprintf("%s a %d ", first, job.Token), ` $'c\xe2\x80`, fmt.Sprintf(" %d ", other.Token),
		"  2", // candidates
	}
	list := func(wants ...string) string {
		t.Helper()
		var said string
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			said = tr.commands("ELECTION", "list")
			for _, want := range wants {
				words := strings.Join(strings.Fields(said), " ")
				if !strings.Contains(words, strings.TrimSpace(want)) {
					return fmt.Errorf("list shows\n%s\nwithout %s", said, want)
				}
			}
			return nil
		}))
		checkTable(t, said)
		return said
	}
	list(wanted...)
	checkJSON(t, "list", tr.commands(`"elections"`, "list", "--json"))

	// What others write.
	long := strings.Repeat("ü\x1b[2J", 2<<10)
	for i, key := range []string{
		control.Root + "x", control.Root + "//", control.Root + "%zz/candidates/1",
		control.Prefix("foreign\x1b[2J") + "candidates/zz", control.CandidateOf(long[:200], 3),
		control.TermOf(first, 1000), control.CandidateOf(first, 77),
		control.TermOf(first, 999), "foreign/1", long[:200] + "/7",
	} {
		value := control.Encode(&control.Term{Token: int64(i), Identity: long, Why: long})
		if i%3 == 1 {
			value = []byte(long)
		}
		_, err := etcd.Put(tr.ctx, key, string(value))
		tr.must(err)
	}
	list(wanted...)
	checkJSON(t, "list", tr.commands(`"elections"`, "list", "--json"))

	tr.commands("held", "hold")
	tr.must(a.Signal(syscall.SIGTERM))
	tr.waitExit(a, 0)
	tr.waitHeld(b, true)
	list(first + " - - - 1 held")
	tr.commands("held", "hold", "jobs/drained") // nobody is in it
	list("jobs/drained - - - 0 held")
	tr.commands("released", "release", "jobs/drained")
	if said := list(first); strings.Contains(said, "drained") {
		t.Errorf("list shows an election that is no longer held:\n%s", said)
	}
	tr.commands("released", "release")
	next := tr.waitJob(b)
	history := func(want string, args ...string) {
		t.Helper()
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			said := tr.commands("TOKEN", append([]string{"history"}, args...)...)
			checkTable(t, said)
			if !strings.Contains(strings.Join(strings.Fields(said), " "), want) {
				return fmt.Errorf("history shows\n%s\nwithout %s", said, want)
			}
			return nil
		}))
	}
	history(fmt.Sprintf("%d b 20", next.Token))
	history("stopped (SIGTERM) 1")
	said := tr.commands("", "history", "-n", "2")
	if n := strings.Count(said, "\n"); n != 3 { // with the head
		t.Errorf("history -n 2:\n%s", said)
	}
	for _, args := range [][]string{{"--json"}, {"--json", "-n", "1"}, {"no/such", "--json"}} {
		checkJSON(t, "history",
			tr.commands(`"terms"`, append([]string{"history"}, args...)...))
	}
	if code, said := tr.command("history", "-n", "0"); code != 64 {
		t.Errorf("history -n 0: %d, %s", code, said)
	}
	checkJSON(t, "status", tr.commands(`"queue"`, "status", "--json"))
	_, err := etcd.Delete(tr.ctx, control.Root, clientv3.WithPrefix())
	tr.must(err)
	tr.stop()
}
