//go:build linux

package cli

import (
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"leasehold/control"
	"leasehold/election"
	"leasehold/internal/quote"
)

// plain reports whether a terminal shows the text as it is. It may have several lines.
func plain(text string) bool {
	return utf8.ValidString(text) &&
		!strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) })
}

// secret is what no hint may show.
const secret = "hunter2secret"

// fuzzArgs makes arguments of lines. Each value, and each word of the job, is a secret, unless it
// is the value of a setting with exactly that name that is none.
func fuzzArgs(text string) (args []string) {
	job := false
	for arg := range strings.SplitSeq(strings.ReplaceAll(text, secret, ""), "\n") {
		name, _, assigned := strings.Cut(arg, "=")
		setting := strings.ToUpper(strings.ReplaceAll(strings.TrimLeft(name, "-"), "-", "_"))
		setting = strings.TrimPrefix(setting, "LEASEHOLD_")
		switch {
		case job:
			arg = secret
		case assigned && (setting == "PASSWORD" || setting == "ENDPOINTS" ||
			!slices.Contains(settings(), setting)):
			arg = name + "=" + secret
		}
		job = job || arg == "--"
		args = append(args, arg)
	}
	return args
}

// again is the command line that makes the call, in its plainest form.
func (c Call) again() []string {
	args := []string{c.Command.Name}
	if c.EnvFile != "" {
		args = append(args, "-f", c.EnvFile)
	}
	args = slices.Concat(args, c.Flags, c.Args)
	for option, value := range c.Options {
		args = append(args, option, value)
	}
	if c.Command.Job {
		args = slices.Concat(args, []string{"--"}, c.Job)
	}
	return args
}

// FuzzParse: a command line is a call that its command can take, and can be written again, or gets
// one short line that says what is wrong and shows no secret.
func FuzzParse(f *testing.F) {
	for _, line := range []string{
		"", "--", "-f FILE -- x -y", "status jobs/a --json", "run -f a status -f b",
		"--password=x -- y",
		"PASWORD=x check", "run PASWORD=x -- y", "check PASWORD=x", "help PASSWORD=x",
		"--ttl=5 status",
		"-f", "status --json=x", "elect --jsn", "install \x1b[2J", "LEASEHOLD_TOKEN=x", "--pass=x",
		"TTL=15",
		"--help=x", "status --version", "-v", "run -h", "statsu \u202e",
		"-listen=" + strings.Repeat("a", 60),
	} {
		f.Add(strings.ReplaceAll(line, " ", "\n"))
	}
	f.Fuzz(func(t *testing.T, text string) {
		args := fuzzArgs(text)
		call, err := newTestProgram(nil).Parse(args)
		c := call.Command
		if err != nil {
			var usage *UsageError
			if !errors.As(err, &usage) {
				t.Fatalf("%q: %v", args, err)
			}
			if hint := usage.Hint; strings.Contains(hint, secret) || len(hint) > 800 ||
				!plain(hint) || strings.Contains(hint, "\n") || hint == "" {
				t.Errorf("%q: %q", args, hint)
			}
			return
		}
		if !slices.Contains(commandNames[:], c.Name) || len(call.Args) < c.Min ||
			len(call.Args) > c.Max || c.Job != (len(call.Job) > 0) ||
			slices.ContainsFunc(call.Flags,
				func(f string) bool { return !slices.Contains(c.Flags, f) }) {
			t.Fatalf("%q: %+v", args, call)
		}
		if len(call.Args) > 0 && c.Words != nil && !slices.Contains(c.Words, call.Args[0]) {
			t.Errorf("%q: %s takes %q", args, c.Name, call.Args)
		}
		twice, err := newTestProgram(nil).Parse(call.again())
		call.Command.Run, twice.Command.Run = nil, nil
		if err != nil || !reflect.DeepEqual(twice, call) {
			t.Errorf("%q: %+v, then %+v, %v", args, call, twice, err)
		}
	})
}

// FuzzReport: whatever strangers have written in etcd, status shows one line for each candidate,
// below a head, and for each blocker, which a terminal can show, and JSON that says the same.
func FuzzReport(f *testing.F) {
	f.Add("jobs/a", "a", "jobs/a/1f", int64(7), int64(0x1f), true,
		"jobs/a/x", "why", "etcdctl del x")
	f.Add("e\u202e", "a\x1b[2J\n\t\xff\u009b", "e\u202e/1", int64(-1), int64(-1), false, "", "", "")
	f.Fuzz(func(t *testing.T, name, identity, key string, token, lease int64, leads bool,
		blocking, why, remedy string,
	) {
		// Package election has made these printable.
		blocker := election.Blocker{
			Key: quote.Printable(blocking), Why: quote.Printable(why),
			Remedy: quote.Printable(remedy),
		}
		entry := election.Entry{Identity: identity, Key: key, Token: token}
		report := election.Report{
			LeaseID: lease, LeaseTTL: time.Duration(token), LeaseLeft: time.Duration(lease),
			Queue: []election.Entry{entry, entry}, Blockers: []election.Blocker{blocker},
			Records: map[string]control.Candidate{
				key: {Leasehold: identity, Priority: int(token), URL: why},
			},
		}
		if leads {
			report.Leader = &entry
		}
		text := reportText(name, report)
		if lines := strings.Count(text, "\n"); lines != 5 || !plain(text) {
			t.Errorf("%d lines: %q", lines, text)
		}
		for line := range strings.Lines(queueTable(report)) {
			if line = strings.TrimSuffix(line, "\n"); columns(line) > tableWidth {
				t.Errorf("%d columns: %q", columns(line), line)
			}
		}

		want := reportJSON(name, "v1", report)
		text, err := quote.JSON(want, "")
		if err != nil || !plain(text) || strings.Count(text, "\n") != 1 {
			t.Errorf("%q, %v", text, err)
		}
		var got statusReport
		if err := json.Unmarshal([]byte(text), &got); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		valid := utf8.ValidString(name + "\n" + identity + "\n" + key + "\n" + why)
		if valid && !reflect.DeepEqual(got, want) {
			t.Errorf("%s says %+v, want %+v", text, got, want)
		}
	})
}
