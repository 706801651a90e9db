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

	"leasehold/cli"
	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/supervisor"
)

var update = flag.Bool("update", false,
	"write what is generated from the code anew: docs/reference.md, packaging/")

// TestReference: docs/reference.md says what the code does. With -update it is written.
func TestReference(t *testing.T) {
	generated(t, filepath.Join("..", "docs", "reference.md"), reference(t))
}

// TestManual: the man page has what `leasehold help` has. With -update it is written.
func TestManual(t *testing.T) {
	generated(t, filepath.Join("..", "packaging", "leasehold.1"),
		`.\" Written from the code by go test -run TestManual ./app -update`+"\n"+
			newProgram(Build{}).Manual())
}

// TestCompletion: the shell completes the words that the command line takes. With -update it is
// written.
func TestCompletion(t *testing.T) {
	generated(t, filepath.Join("..", "packaging", "leasehold.bash"),
		"# bash completion for leasehold. Written from the code by: "+
			"go test -run TestCompletion ./app -update\n\n"+
			newProgram(Build{}).Completion("bash"))
}

// TestReferenceSchema: docs/schema.json describes what commands print with --json, and the event
// terms. With -update it is written.
func TestReferenceSchema(t *testing.T) {
	schema, err := cli.Schema()
	if err != nil {
		t.Fatal(err)
	}
	generated(t, filepath.Join("..", "docs", "schema.json"), string(schema))
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
		t.Errorf("%s is not what the code says; write it with: go test -run %s ./app -update",
			path, t.Name())
	}
}

// reference is the text of docs/reference.md.
func reference(t *testing.T) string {
	var b strings.Builder
	// A raw string can't hold a backtick.
	md := func(text string) { b.WriteString(strings.ReplaceAll(text, "~", "`")) }
	md(`# Reference

~go test -run TestReference ./app -update~ writes this page from the code. A test checks that it is
up to date.

## Command line

| command | meaning |
|---|---|
`)
	for _, c := range newProgram(Build{}).Commands() {
		row(&b, c.Usage(), c.About())
	}
	md(`
Every command takes, before a ~--~:

`)
	table(&b, "flag", "meaning", cli.GlobalFlags())
	md(`
Anything else is wrong usage (exit code 64), with a hint.

The file of ~-f~ has the format that systemd reads by ~EnvironmentFile=~: one variable a line, ~#~
or ~;~ before a comment, quotes, and a backslash before a newline to continue a line. leasehold sets
all variables of the file, also those that are not its own. The environment overrules the file:
~LEASEHOLD_TTL=30s leasehold -f /etc/leasehold/backup.env -- backup.sh~. What systemd would ignore
is an error, reported with file and line: a line without ~=~, an invalid name, a quote without an
end. So is a comment that ends with a backslash, because versions of systemd read it differently.
The file has at most 1 MiB, and each value is shorter than 128 KiB.

## Variables

Environment variables configure leasehold. A variable that is set to nothing counts as unset. An
unknown ~LEASEHOLD_*~ variable is refused, except what Kubernetes makes for Services, and the job's
variables below. leasehold reports all errors at once, one a line, and starts nothing. ~status~
checks only the variables that it needs to reach etcd, and refuses unknown ones. ~check~ looks only
at ~LEASEHOLD_LISTEN~.
Durations have a unit (~15s~, ~500ms~, ~1m30s~) and are at most a year.

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
	md(`
leasehold refuses loss grace + margin + 3 × renewal interval > TTL, and shows the numbers. (With
a hook after the job its timeout is part of that sum.) The
renewal interval is a fifth of the TTL.

## The job's environment

The job gets the daemon's environment, without ~NOTIFY_SOCKET~, ~WATCHDOG_*~ and ~LEASEHOLD_*~, but
with ~LEASEHOLD_ENDPOINTS~, ~LEASEHOLD_LISTEN~ and ~LEASEHOLD_TLS_*~. So ~leasehold status~ and
~leasehold check~ work in it. (If etcd requires a password, the job needs one of its own for
~status~.) It also gets:

`)
	table(&b, "variable", "meaning", cli.JobVariables())
	md(`
## Health endpoint

The endpoint listens on ~LEASEHOLD_LISTEN~. GET, HEAD and OPTIONS get the same status, because load
balancers check with any of them. Other methods get 405. Answers come from memory. Probes get ~ok~,
or 503 with the reason. At most 256 connections are open at once, or fewer if the limit of open
files is low. A new connection replaces the one that was idle longest. Those of ~/events~ are
counted apart: at most 1,024. [events.md](events.md) is about them.

| path | answer |
|---|---|
`)
	for _, e := range health.Endpoints() {
		row(&b, e.Path, e.Meaning)
	}
	md(`
### The JSON of /status

What this daemon knows, from memory. Every field is always present. Times are RFC 3339 in UTC.
Fields may be added, and are never renamed.

`)
	fields(&b, health.StatusFields())
	md(`
### The JSON of status --json

What etcd has. Fields that are also in ~/status~ have the same name and form there. But the lease is
the leader's here, and the candidate's own there.

`)
	fields(&b, cli.ReportFields())
	md(`
### The JSON of list, history, watch

~list~ and ~history~ print one object, ~watch~ one for each event, on a line of its own.
[schema.json](schema.json) is the JSON Schema of what these commands and ~status~ print with
~--json~.

~list --json~:

`)
	fields(&b, cli.ListFields())
	md(`
~history --json~:

`)
	fields(&b, cli.HistoryFields())
	md(`
~watch --json~:

`)
	fields(&b, cli.WatchFields())
	md(`
| ~event~ | ~what~ |
|---|---|
| ~leader~ | ~leads~, ~nobody~ |
| ~candidates~ | ~joined~, ~left~ |
| ~hold~ | ~held~, ~released~ |
| ~switchover~ | ~asked~, ~accepted~, ~refused~, ~gone~ |
| ~compacted~ | ~resumed~: etcd has no older changes, and it goes on here |
`)
	b.WriteString("\n## Exit codes\n\n")
	table(&b, "code", "when", exitEntries())
	b.WriteString("\n" + lastWords + "\n")
	md(`
## Metrics

Each metric also has the label ~election~. ~elect~ has no ~leasehold_job_*~, no ~leasehold_guard_*~
and no ~leasehold_elector_*~ metrics. The usual ~go_*~ and ~process_*~ metrics are those of the
elector's process.

| metric | type | labels | meaning |
|---|---|---|---|
`)
	for _, m := range listMetrics(t) {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.name, m.kind, m.labels, m.help)
	}
	return b.String()
}

func table(b *strings.Builder, name, meaning string, entries []cli.Entry) {
	fmt.Fprintf(b, "| %s | %s |\n|---|---|\n", name, meaning)
	for _, e := range entries {
		row(b, e.Name, e.Meaning)
	}
}

func row(b *strings.Builder, name, meaning string) {
	if !strings.Contains(name, " or ") {
		name = "`" + strings.ReplaceAll(name, "|", `\|`) + "`"
	}
	fmt.Fprintf(b, "| %s | %s |\n", name, meaning)
}

func fields(b *strings.Builder, list []health.Field) {
	b.WriteString("| field | type | meaning |\n|---|---|---|\n")
	for _, f := range list {
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", f.Path, f.Type, f.Meaning)
	}
}

type metric struct{ name, kind, labels, help string }

// listMetrics gathers what every package registers.
func listMetrics(t *testing.T) []metric {
	t.Helper()
	registry := prometheus.NewRegistry()
	now := func() time.Duration { return 0 }
	logger := slog.New(slog.DiscardHandler)
	health.New(health.Config{
		Logger: logger, Registerer: registry, Gatherer: registry, Now: now, Version: "VERSION",
		Snapshot: func() health.Snapshot { return health.Snapshot{} },
	})
	if _, err := election.New(election.Config{
		Endpoints: []string{"http://127.0.0.1:1"}, Election: "e", Identity: "i",
		TTL: 15 * time.Second, LossGrace: -1, Margin: -1, Wait: -1,
		DialTimeout: time.Second, Now: now, Logger: logger, Registerer: registry,
	}); err != nil {
		t.Fatal(err)
	}
	// The supervisor registers its metrics before it looks for a guard, which this process is not.
	_, err := supervisor.Connect(supervisor.Config{Guard: os.Getpid(), Registerer: registry})
	if !errors.Is(err, supervisor.ErrGuardLost) {
		t.Fatal(err)
	}
	// Connect takes that from us.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}

	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var list []metric
	for _, family := range families {
		m := metric{
			name: family.GetName(), kind: strings.ToLower(family.GetType().String()),
			help: family.GetHelp(),
		}
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
	for _, m := range listMetrics(t) {
		got[m.name] = true
		if m.help == "" {
			t.Errorf("%s has no help", m.name)
		}
	}
	for _, name := range []string{
		"leader", "lease_valid_seconds", "lease_renewals_total", "lease_renewal_duration_seconds",
		"terms_total", "losses_total", "job_up", "job_starts_total", "job_exits_total",
		"job_kills_total", "job_stop_duration_seconds", "guard_lateness_seconds", "build_info",
		"elector_replacements_total", "ready", "blocked", "held", "lease_ttl_seconds",
		"fencing_token", "candidates",
		"last_transition_timestamp_seconds",
	} {
		if !got["leasehold_"+name] {
			t.Errorf("leasehold_%s is not registered", name)
		}
	}
}
