//go:build linux

package app

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/supervisor"
)

var update = flag.Bool("update", false, "write what is generated from the code anew: docs/reference.md, packaging/")

// TestReference: docs/reference.md says what the code does. With -update it is written.
func TestReference(t *testing.T) {
	generated(t, filepath.Join("..", "docs", "reference.md"), reference(t))
}

// generated compares a file with what the code says; with -update it writes it.
func generated(t *testing.T, path, want string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what the code says; write it with: go test -run %s ./app -update", path, t.Name())
	}
}

// reference is the text of docs/reference.md.
func reference(t *testing.T) string {
	var b strings.Builder
	b.WriteString(`# Reference

Written from the code by ` + "`go test -run TestReference ./app -update`" + `; a test checks that it is up to date.

## Command line

`)
	table(&b, "command", "meaning", subcommands())
	b.WriteString(`
Anything else is wrong usage (exit code 64), with a hint.

## Variables

Configuration is the environment. Only these names count. A variable that is set to nothing counts as unset. An unknown
` + "`LEASEHOLD_*`" + ` variable is refused, except what Kubernetes makes for Services, and the job's variables below. All faults are told at
once, one a line, and nothing is started. ` + "`status`" + ` looks only at what reaching etcd takes, ` + "`check`" + ` only at ` + "`LEASEHOLD_LISTEN`" + `.
Durations have a unit (` + "`15s`, `500ms`, `1m30s`" + `) and are a year at most.

| variable | default | meaning |
|---|---|---|
`)
	for _, v := range new(config.Config).Variables() {
		shown := v.Shown
		if v.Default != "" {
			shown = "`" + v.Default + "`"
		}
		fmt.Fprintf(&b, "| `%s_%s` | %s | %s |\n", config.Prefix, v.Name, shown, v.Desc)
	}
	b.WriteString(`
Refused, with the numbers: loss grace + margin + 3 × renewal interval > TTL. The renewal interval is a fifth of the TTL.

## The job's environment

The daemon's own, less every ` + "`LEASEHOLD_*`, `NOTIFY_SOCKET` and `WATCHDOG_*`" + `, plus:

`)
	table(&b, "variable", "meaning", jobVariables())

	b.WriteString(`
## Health endpoint

At ` + "`LEASEHOLD_LISTEN`" + `, for GET, HEAD and OPTIONS, which all get the same status (load balancers check with any of them); other methods get
405. Answers come from memory. Probes say ` + "`ok`" + `, or 503 with the reason. At most 256 connections are open at once, fewer where few files
may be open; a new one takes the place of the one that rested longest.

`)
	var endpoints []entry
	for _, e := range health.Endpoints() {
		endpoints = append(endpoints, entry{e.Path, e.Meaning})
	}
	table(&b, "path", "answer", endpoints)

	b.WriteString(`
### The JSON of /status

Every field is always present. Times are RFC 3339 in UTC. Fields may be added, and are never renamed.

| field | type | meaning |
|---|---|---|
`)
	for _, f := range health.StatusFields() {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.Path, f.Type, f.Meaning)
	}

	b.WriteString("\n## Exit codes\n\n")
	table(&b, "code", "when", exitCodes())
	b.WriteString("\n" + lastWords + "\n")

	b.WriteString("\n## Metrics\n\nOf the job and the guard only where there is a job.\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, m := range metrics(t) {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.name, m.kind, m.labels, m.help)
	}
	return b.String()
}

func table(b *strings.Builder, name, meaning string, entries []entry) {
	fmt.Fprintf(b, "| %s | %s |\n|---|---|\n", name, meaning)
	for _, e := range entries {
		text := e.name
		if !strings.Contains(text, " or ") {
			text = "`" + strings.ReplaceAll(text, "|", `\|`) + "`"
		}
		fmt.Fprintf(b, "| %s | %s |\n", text, e.meaning)
	}
}

type metric struct{ name, kind, labels, help string }

// metrics gathers what every package registers.
func metrics(t *testing.T) []metric {
	t.Helper()
	registry := prometheus.NewRegistry()
	now := func() time.Duration { return 0 }
	health.New(health.Config{Logger: slog.New(slog.DiscardHandler), Registry: registry, Snapshot: func() health.Snapshot { return health.Snapshot{} }, Now: now, Version: "VERSION"})
	if _, err := election.New(election.Config{
		Endpoints: []string{"http://127.0.0.1:1"}, Election: "e", Identity: "i", TTL: 15 * time.Second, LossGrace: -1, Margin: -1, Wait: -1,
		DialTimeout: time.Second, Now: now, Logger: slog.New(slog.DiscardHandler), Registerer: registry,
	}); err != nil {
		t.Fatal(err)
	}
	// The handle registers its metrics before it looks for a guard, which this process is not.
	if _, err := supervisor.Connect(supervisor.HandleConfig{Guard: os.Getpid(), Registerer: registry}); !errors.Is(err, supervisor.ErrGuardGone) {
		t.Fatal(err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil { // Which Connect takes from us.
		t.Fatal(err)
	}

	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var list []metric
	for _, family := range families {
		m := metric{name: family.GetName(), kind: strings.ToLower(family.GetType().String()), help: family.GetHelp()}
		values := map[string][]string{}
		for _, child := range family.GetMetric() {
			for _, label := range child.GetLabel() {
				values[label.GetName()] = append(values[label.GetName()], "`"+label.GetValue()+"`")
			}
		}
		var labels []string
		for name, of := range values {
			if m.name == "leasehold_build_info" {
				labels = append(labels, "`"+name+"`")
				continue
			}
			slices.Sort(of)
			labels = append(labels, "`"+name+"`: "+strings.Join(slices.Compact(of), ", "))
		}
		slices.Sort(labels)
		m.labels = strings.Join(labels, ", ")
		list = append(list, m)
	}
	return list
}

// TestMetrics: the names are a contract.
func TestMetrics(t *testing.T) {
	got := map[string]bool{}
	for _, m := range metrics(t) {
		got[m.name] = true
		if m.help == "" {
			t.Errorf("%s has no help", m.name)
		}
	}
	for _, name := range []string{
		"leader", "lease_valid_seconds", "lease_renewals_total", "lease_renewal_duration_seconds", "terms_total", "losses_total", "job_up",
		"job_starts_total", "job_exits_total", "job_kills_total", "job_stop_duration_seconds", "guard_lateness_seconds", "build_info",
	} {
		if !got["leasehold_"+name] {
			t.Errorf("leasehold_%s is not registered", name)
		}
	}
}

func TestHelp_NamesEverything(t *testing.T) {
	text := help()
	for _, v := range new(config.Config).Variables() {
		if !strings.Contains(text, "LEASEHOLD_"+v.Name+" (") && !strings.Contains(text, "LEASEHOLD_"+v.Name+"\n") {
			t.Errorf("LEASEHOLD_%s is missing", v.Name)
		}
		if v.Desc == "" || v.Default != "" && v.Shown != v.Default {
			t.Errorf("%s: description %q, default %q shown as %q", v.Name, v.Desc, v.Default, v.Shown)
		}
	}
	for _, e := range slices.Concat(subcommands(), exitCodes(), jobVariables()) {
		if !strings.Contains(text, "  "+e.name) {
			t.Errorf("%s is missing", e.name)
		}
	}
	for line := range strings.Lines(text) {
		if len(line) > 111 {
			t.Errorf("longer than 110 letters: %s", line)
		}
	}
}

func TestUsageHint(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", "say what to run: leasehold -- COMMAND"},
		{"--", "there is no command after --"},
		{"run", "say what to run"},
		{"run --", "there is no command after --"},
		{"run backup.sh -x", "put -- before the command: leasehold run -- backup.sh ..."},
		{"backup.sh --ttl 5s", "put -- before the command: leasehold -- backup.sh ..."},
		{"backup.sh -- x", "begin with --: leasehold -- COMMAND"},
		{"--ttl 5s -- backup.sh", "LEASEHOLD_TTL"},
		{"-ttl=5 -- backup.sh", "write LEASEHOLD_TTL=5s before the command (5 has no unit: write 5s)"},
		{"run --ttl=5s -- backup.sh", "write LEASEHOLD_TTL=5s before the command"},
		{"TTL=15 -- backup.sh", "write LEASEHOLD_TTL=15s before the command (15 has no unit: write 15s)"},
		{"LEASEHOLD_TTL=15 -- backup.sh", "write 15s"},
		{"elect TTL=15", "write 15s"},
		{"--tls-ca-file=/ca -- x", "write LEASEHOLD_TLS_CA_FILE=/ca before"},
		{"--endpoint=http://u:hunter2@a:1 -- x", "write LEASEHOLD_ENDPOINTS=... before"},
		{"--password=hunter2 -- x", "write LEASEHOLD_PASSWORD=... before"},
		{"PASSWORD=hunter2 -- x", "write LEASEHOLD_PASSWORD=... before"},
		{"--password hunter2 -- x", "LEASEHOLD_PASSWORD"},
		{"--passwd=hunter2 -- x", "LEASEHOLD_PASSWORD"},
		{"--token=hunter2 -- x", "leasehold help names all variables"},
		{"FOO=hunter2 -- x", "leasehold help names all variables"},
		{"statsu", "did you mean status? To run a command of that name: leasehold -- statsu"},
		{"status --jsn", "there are no flags but status --json"},
		{"status x", "status takes --json and nothing else"},
		{"elect x", "elect takes nothing more"},
		{"elect -- x", "elect runs no job"},
		{"check lead", "did you mean leader?"},
		{"check qwertyuiop", "check asks for one thing: live, ready, leader, standby"},
		{"check live ready", "check asks for one thing"},
		{"install", "leasehold install DEST"},
		{"install a b", "leasehold install DEST"},
		{"install --help", "leasehold help prints the help"},
		{"version x", "version takes nothing more"},
		{"run -h", "leasehold help prints the help"},
		{"--version", "leasehold version prints the version"},
		{"-- x hunter2", ""},
		{"\x1b[2J", `leasehold -- "\x1b[2J"`},
	} {
		got := usageHint(strings.Fields(c.args))
		if !strings.Contains(got, c.want) || strings.Contains(got, "hunter2") {
			t.Errorf("leasehold %s: %q, want %q", c.args, got, c.want)
		}
		if strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "leasehold: ") {
			t.Errorf("leasehold %s: not one line: %q", c.args, got)
		}
	}
}
