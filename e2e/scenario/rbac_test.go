//go:build linux

package scenario_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/control"
	"leasehold/e2e/harness"
)

// permission is one of an etcd role.
type permission struct{ kind, prefix string }

// missing is what a command says without it.
func (p permission) missing(user string) string {
	return fmt.Sprintf("the user %q needs a role with %s permission on the prefix %q",
		user, p.kind, p.prefix)
}

// etcdPage is docs/etcd.md.
func (tr *trial) etcdPage() string {
	tr.Helper()
	root, err := harness.ModuleRoot()
	tr.must(err)
	text, err := os.ReadFile(filepath.Join(root, "docs", "etcd.md"))
	tr.must(err)
	return string(text)
}

var quoted = regexp.MustCompile("`([^`]+)`")

// documented is what each command needs, as the table of docs/etcd.md has it.
func (tr *trial) documented() map[string][]permission {
	tr.Helper()
	names := strings.NewReplacer(
		"ELECTION/", tr.election+"/", "leasehold/v1/ESCAPED/", control.Prefix(tr.election))
	needs := map[string][]permission{}
	for line := range strings.Lines(tr.etcdPage()) {
		cells := strings.Split(line, "|")
		if len(cells) != 4 {
			continue
		}
		var all []permission
		kind := ""
		for _, word := range quoted.FindAllStringSubmatch(cells[2], -1) {
			if strings.HasSuffix(word[1], "/") {
				all = append(all, permission{kind, names.Replace(word[1])})
			} else {
				kind = word[1]
			}
		}
		for _, word := range quoted.FindAllStringSubmatch(cells[1], -1) {
			needs[strings.TrimPrefix(word[1], "leasehold ")] = all
		}
	}
	return needs
}

// as has the commands that follow run as that user of etcd.
func (tr *trial) as(user string) {
	tr.asking = []string{"LEASEHOLD_USERNAME=" + user, "LEASEHOLD_PASSWORD=secret"}
}

// addUser adds a user of etcd with exactly these permissions.
func (tr *trial) addUser(etcd *clientv3.Client, name string, may ...permission) {
	tr.Helper()
	_, err := etcd.RoleAdd(tr.ctx, name)
	tr.must(err)
	for _, p := range may {
		kind, err := clientv3.StrToPermissionType(p.kind)
		tr.must(err)
		_, err = etcd.RoleGrantPermission(tr.ctx, name, p.prefix,
			clientv3.GetPrefixRangeEnd(p.prefix), kind)
		tr.must(err)
	}
	_, err = etcd.UserAdd(tr.ctx, name, "secret")
	tr.must(err)
	_, err = etcd.UserGrantRole(tr.ctx, name, name)
	tr.must(err)
}

// controlProblem is that of /status; "": null.
func (tr *trial) controlProblem(c *candidate) string {
	tr.Helper()
	var s heldStatus
	_, body, err := c.Get(tr.ctx, "/status")
	tr.must(err)
	tr.must(json.Unmarshal([]byte(body), &s))
	if s.Problem == nil {
		return ""
	}
	return *s.Problem
}

// TestRBAC_Documented: the permissions that docs/etcd.md names are enough for each command, and
// each of them is needed: without it the command names it.
func TestRBAC_Documented(t *testing.T) {
	tr := ordinary(t)
	tr.election = "jobs/backup"
	_, script, _ := strings.Cut(tr.etcdPage(), "```sh\netcdctl role add")
	script, _, found := strings.Cut("etcdctl role add"+script, "```\n")
	if !found {
		t.Fatal("docs/etcd.md does not show how to make a role")
	}
	for line := range strings.Lines(script) {
		_, err := tr.etcd.Etcdctl(tr.ctx, strings.Fields(line)[1:]...)
		tr.must(err)
	}

	// A user for each command, and others without one of its permissions, or with a lesser one.
	commands := []struct{ name, says string }{
		{"status", `leader is "a"`},
		{"list", "jobs/backup"},
		{"history", " a "},
		{"watch", "leader a leads"},
		{"hold", `held; "a" leads`},
		{"release", "released"},
		{"switchover", `"b" leads`},
	}
	needs := tr.documented()
	without := map[string]map[string]permission{} // by command and user
	etcd := tr.etcdClient()
	for _, c := range commands {
		if len(needs[c.name]) == 0 {
			t.Fatalf("docs/etcd.md does not say what %s needs", c.name)
		}
		tr.addUser(etcd, c.name, needs[c.name]...)
		without[c.name] = map[string]permission{}
		for i, p := range needs[c.name] {
			var others []permission
			for j, other := range needs[c.name] {
				if i != j {
					others = append(others, other)
				}
			}
			user := fmt.Sprint(c.name, i)
			without[c.name][user] = p
			tr.addUser(etcd, user, others...)
			if p.kind == "readwrite" {
				without[c.name][user+"r"] = p
				tr.addUser(etcd, user+"r", append(others, permission{"read", p.prefix})...)
			}
		}
	}
	tr.must(tr.etcd.EnableAuth(tr.ctx, "another", "secret", "another/"))
	etcd = tr.etcdClient()

	tr.as("backup")
	a := tr.start("a", "", variables(tr.asking...))
	job := tr.waitJob(a)
	b := tr.start("b", "", variables(tr.asking...))
	tr.waitRecords(etcd, "a b", `a "" 0`)
	for _, c := range commands {
		for user, p := range without[c.name] {
			tr.as(user)
			code := 69
			if c.name == "status" && p.prefix == control.Prefix(tr.election) {
				code = 0 // it shows the queue
			}
			tr.expectCommand(code, p.missing(user), c.name)
		}
		tr.as(c.name)
		var said string
		if c.name == "watch" { // it goes on until it is interrupted
			watch := tr.watch(nil)
			tr.said(watch, c.says)
			tr.interrupted(watch)
			said = watch.Output() + watch.Log()
		} else {
			said = tr.commands(c.says, c.name)
		}
		if strings.Contains(said, "permission") {
			t.Errorf("%s says %s", c.name, said)
		}
	}
	if next := tr.waitNext(job, waitTimeout); next.Candidate != "b" {
		t.Errorf("%s leads next, want b", next.Candidate)
	}
	tr.waitRecords(etcd, "a b", `a "switchover" 1`, `b "" 0`)
	for _, c := range []*candidate{a, b} {
		if problem := tr.controlProblem(c); problem != "" {
			t.Errorf("%s: %s", c.Identity, problem)
		}
	}
	tr.noOverlap()
	tr.finish()
}

// TestRBAC_OnlyTheElection: with the election's prefix alone the election runs, and says what it
// can't do.
func TestRBAC_OnlyTheElection(t *testing.T) {
	tr := ordinary(t)
	tr.election = "jobs/backup"
	tr.must(tr.etcd.EnableAuth(tr.ctx, "less", "secret", "jobs/backup/"))
	tr.as("less")
	a := tr.start("a", "", variables(tr.asking...))
	job := tr.waitJob(a)
	b := tr.start("b", "", variables(tr.asking...))
	const warning = `level=WARN msg="the records beside the election can't be written`
	for _, c := range []*candidate{a, b} {
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if !strings.Contains(c.Log(), warning) {
				return errors.New("no warning")
			}
			return nil
		}))
		want := permission{"readwrite", "leasehold/v1/jobs%2Fbackup/"}.missing("less")
		if problem := tr.controlProblem(c); !strings.Contains(problem, want) {
			t.Errorf("%s: the control problem is %q", c.Identity, problem)
		}
	}
	for _, row := range []struct {
		command string
		code    int
		needs   permission
	}{
		{"hold", 69, permission{"readwrite", "leasehold/v1/jobs%2Fbackup/"}},
		{"release", 69, permission{"readwrite", "leasehold/v1/jobs%2Fbackup/"}},
		{"switchover", 69, permission{"readwrite", "leasehold/v1/jobs%2Fbackup/"}},
		{"history", 69, permission{"read", "leasehold/v1/jobs%2Fbackup/"}},
		{"watch", 69, permission{"read", "leasehold/v1/jobs%2Fbackup/"}},
		{"list", 69, permission{"read", "leasehold/v1/"}},
		{"status", 0, permission{"read", "leasehold/v1/jobs%2Fbackup/"}},
	} {
		tr.expectCommand(row.code, row.needs.missing("less"), row.command)
	}
	tr.must(a.Signal(syscall.SIGTERM))
	tr.waitExit(a, 0)
	if next := tr.waitNext(job, waitTimeout); next.Candidate != "b" {
		t.Errorf("%s leads next, want b", next.Candidate)
	}
	tr.waitRenewals(b, 2)
	tr.noOverlap()
	tr.finish()
	for _, c := range []*candidate{a, b} {
		n := 0
		for line := range strings.Lines(c.Log()) {
			if strings.Contains(line, "level=WARN") && strings.Contains(line, "permission") {
				n++
			}
		}
		if n != 2 { // of the records, and that no hold is obeyed
			t.Errorf("%s has warned %d times", c.Identity, n)
		}
	}
}
