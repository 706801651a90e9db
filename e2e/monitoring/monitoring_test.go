//go:build linux

// Package monitoring tests the files of monitoring/: the rules by promtool, and all queries by a
// real Prometheus that scrapes three real candidates.
package monitoring

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

const waitTimeout = time.Minute

// needs returns the path of a program of Debian's package prometheus.
func needs(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if os.Getenv("E2E_NO_SKIP") == "1" {
			t.Fatalf("needs %s, and E2E_NO_SKIP=1 forbids to skip", program)
		}
		t.Skipf("skipped: needs %s", program)
	}
	return path
}

// file returns the path of a file of the repository.
func file(t *testing.T, elements ...string) string {
	t.Helper()
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(append([]string{root}, elements...)...)
}

func read(t *testing.T, elements ...string) string {
	t.Helper()
	text, err := os.ReadFile(file(t, elements...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// alerts are the names of all alerts.
func alerts(t *testing.T) (names []string) {
	t.Helper()
	for _, m := range regexp.MustCompile(`(?m)- alert: (\w+)$`).
		FindAllStringSubmatch(read(t, "monitoring", "rules.yml"), -1) {
		names = append(names, m[1])
	}
	if len(names) < 7 {
		t.Fatalf("there are %d alerts", len(names))
	}
	return names
}

// TestRules: each alert fires when it should, and does not when it should not.
func TestRules(t *testing.T) {
	promtool := needs(t, "promtool")
	for _, args := range [][]string{
		{"check", "rules", file(t, "monitoring", "rules.yml")},
		{"test", "rules", file(t, "monitoring", "rules_test.yml")},
	} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", args, err, out)
		}
	}
	// The configuration on the page, beside the rules.
	dir := t.TempDir()
	page := read(t, "docs", "monitoring.md")
	config := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindStringSubmatch(page)
	if config == nil {
		t.Fatal("docs/monitoring.md shows no configuration")
	}
	for name, text := range map[string]string{
		"prometheus.yml": config[1], "rules.yml": read(t, "monitoring", "rules.yml"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(promtool, "check", "config",
		filepath.Join(dir, "prometheus.yml")).CombinedOutput(); err != nil {
		t.Errorf("the configuration in docs/monitoring.md: %v\n%s", err, out)
	}
	tests := read(t, "monitoring", "rules_test.yml")
	for _, alert := range alerts(t) {
		fires := regexp.MustCompile(`alertname: ` + alert + `\n\s+exp_alerts:\n\s+- exp_labels`)
		quiet := "alertname: " + alert + ", exp_alerts: []"
		if !fires.MatchString(tests) || !strings.Contains(tests, quiet) {
			t.Errorf("rules_test.yml does not test both that %s fires and that it does not", alert)
		}
	}
}

// TestRunbooks: each alert names its section of docs/monitoring.md, and that is there.
func TestRunbooks(t *testing.T) {
	rules, page := read(t, "monitoring", "rules.yml"), read(t, "docs", "monitoring.md")
	sections := regexp.MustCompile(`(?m)^## (\w+)\n\n\w`).FindAllStringSubmatch(page, -1)
	var have []string
	for _, s := range sections {
		have = append(have, s[1])
	}
	if want := alerts(t); !slices.Equal(have, want) {
		t.Errorf("docs/monitoring.md has sections for %q, want %q", have, want)
	}
	for _, alert := range have {
		if !strings.Contains(rules, "docs/monitoring.md#"+strings.ToLower(alert)+"\n") {
			t.Errorf("%s does not name its section", alert)
		}
	}
}

// prometheus is a Prometheus that has the rules, and scrapes and evaluates every half second.
type prometheus struct {
	t   *testing.T
	ctx context.Context
	url string
}

func newPrometheus(ctx context.Context, t *testing.T, targets []string) *prometheus {
	t.Helper()
	path := needs(t, "prometheus")
	dir := t.TempDir()
	rules, err := json.Marshal(file(t, "monitoring", "rules.yml"))
	if err != nil {
		t.Fatal(err)
	}
	list, err := json.Marshal(targets)
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf("global: {scrape_interval: 500ms, evaluation_interval: 500ms}\n"+
		"rule_files: [%s]\n"+
		"scrape_configs: [{job_name: leasehold, static_configs: [{targets: %s}]}]\n",
		rules, list)
	err = os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	addr, err := harness.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	child, err := harness.StartChild("prometheus", nil, exec.Command(path,
		"--config.file="+filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		child.Kill()
		if t.Failed() {
			t.Logf("log of prometheus:\n%s", harness.LastLines(child.Log(), 30))
		}
	})
	return &prometheus{t, ctx, "http://" + addr}
}

// get asks the HTTP API.
func (p *prometheus) get(path string, result any) error {
	code, body, err := harness.Get(p.ctx, 10*time.Second, p.url+path)
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("%s: %d %s", path, code, body)
	}
	return json.Unmarshal([]byte(body), result)
}

// query returns how many series the query has.
func (p *prometheus) query(expr string) (int, error) {
	var got struct {
		Data struct{ Result []json.RawMessage }
	}
	err := p.get("/api/v1/query?query="+url.QueryEscape(expr), &got)
	return len(got.Data.Result), err
}

type rule struct {
	Name, Type, Health, State, LastError string
}

func (p *prometheus) rules() ([]rule, error) {
	var got struct {
		Data struct{ Groups []struct{ Rules []rule } }
	}
	err := p.get("/api/v1/rules", &got)
	var all []rule
	for _, g := range got.Data.Groups {
		all = append(all, g.Rules...)
	}
	return all, err
}

// until waits until f returns nil.
func (p *prometheus) until(f func() error) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, waitTimeout)
	defer cancel()
	if err := harness.Until(ctx, f); err != nil {
		p.t.Fatal(err)
	}
}

// queries are those of the dashboard, with Grafana's variables replaced.
func queries(t *testing.T, election string) map[string]string {
	t.Helper()
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	text := read(t, "monitoring", "dashboard.json")
	if err := json.Unmarshal([]byte(text), &dashboard); err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, panel := range dashboard.Panels {
		for i, target := range panel.Targets {
			expr := strings.NewReplacer("$election", election, "$__rate_interval", "10s").
				Replace(target.Expr)
			if strings.Contains(expr, "$") {
				t.Errorf("%s has an unknown variable: %s", panel.Title, expr)
			}
			found[fmt.Sprintf("%s %d", panel.Title, i)] = expr
		}
	}
	if len(found) < 15 {
		t.Fatalf("the dashboard has %d queries", len(found))
	}
	return found
}

// TestPrometheus: a real Prometheus scrapes three real candidates. Each query of the dashboard and
// each recording rule has data, and no alert fires. When the candidates lose etcd, the alert comes.
func TestPrometheus(t *testing.T) {
	needs(t, "prometheus")
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	cluster := harness.NewTestCluster(t, harness.ClusterConfig{})
	programs, err := harness.Build(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(programs.Remove)
	const election = "jobs/monitored"
	member := strings.TrimPrefix(cluster.Endpoints()[0], "http://")
	link, err := harness.StartProxy("127.0.0.1:0", member)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(link.Close)
	var targets []string
	for _, identity := range []string{"a", "b", "c"} {
		// One renewal that is a fifth of the TTL late brings an alert that stays for five minutes.
		c, err := harness.StartCandidate(harness.CandidateConfig{
			Binary: programs.Leasehold, Election: election, Identity: identity,
			Endpoints: []string{link.Addr()}, TTL: 15 * time.Second,
			Job: []string{"sleep", "1000"},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		if err := c.WaitStatus(ctx, "/readyz", http.StatusOK); err != nil {
			t.Fatal(err)
		}
		targets = append(targets, c.Listen)
	}
	p := newPrometheus(ctx, t, targets)
	all := queries(t, election)
	p.until(func() error {
		rules, err := p.rules()
		if err != nil {
			return err
		}
		for _, r := range rules {
			if r.Type == "recording" {
				all[r.Name] = r.Name
			}
		}
		for title, expr := range all {
			if n, err := p.query(expr); err != nil || n == 0 {
				return errors.Join(fmt.Errorf("%s has no data: %s", title, expr), err)
			}
		}
		return nil
	})
	for expr, want := range map[string]int{
		"election:leasehold_leader:sum == 1": 1, "election:leasehold_ready:count == 3": 1,
		"election:leasehold_ready:sum == 3":         1,
		"election:leasehold_candidates:max == 3":    1,
		"instance:leasehold_lease_valid:ratio > .7": 3,
		"leasehold_job_healthy == 1":                1,
	} {
		p.until(func() error {
			if n, err := p.query(expr); err != nil || n != want {
				return errors.Join(fmt.Errorf("%s: %d series, want %d", expr, n, want), err)
			}
			return nil
		})
	}
	want := len(alerts(t))
	p.until(func() error { // at first nobody leads
		rules, err := p.rules()
		seen := 0
		for _, r := range rules {
			if r.Health != "ok" || r.Type == "alerting" && r.State != "inactive" {
				return fmt.Errorf("in a healthy election: %+v", r)
			}
			if r.Type == "alerting" {
				seen++
			}
		}
		if seen != want {
			return errors.Join(fmt.Errorf("there are %d alerts, want %d", seen, want), err)
		}
		return nil
	})

	link.Cut(harness.BothWays)
	for _, alert := range []string{
		"LeaseholdLeaseRunningOut", "LeaseholdNoLeader", "LeaseholdNotReady",
	} {
		p.until(func() error {
			rules, err := p.rules()
			for _, r := range rules {
				if r.Name == alert && (r.State == "pending" || r.State == "firing") {
					return nil
				}
			}
			return fmt.Errorf("%s does not come: %w", alert, err)
		})
	}
}
