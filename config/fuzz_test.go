//go:build linux

package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// plain reports whether a terminal shows the text as one line.
func plain(text string) bool {
	return utf8.ValidString(text) &&
		!strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) })
}

// envProblem is every message about an env file. None has room for a part of the file.
var envProblem = regexp.MustCompile(`^name:(\d+): (there is no =: write NAME=value, or # before` +
	` a comment|a comment ends with a backslash: systemd before 254 takes the next line for part` +
	` of it|there is an export before the name: write NAME=value|what is before the = is no name:` +
	` use letters, digits and _, and begin with no digit|there is no name before the =|the quote` +
	` that begins in line \d+ has no end|the value is not UTF-8, or holds a NUL|the value is too` +
	` long: with its name it must be shorter than 128 KiB|the rest of the file was not read: it` +
	` has too many problems)$`)

func parseEnv(text string) envFile {
	f := envFile{path: "name", text: text, line: 1, values: map[string]string{}}
	f.parse()
	return f
}

// writeEnv is an env file with these values. Within double quotes everything can be written.
func writeEnv(values map[string]string) string {
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "`", "\\`", "$", `\$`)
	var b strings.Builder
	for name, value := range values {
		b.WriteString(name + `="` + escape.Replace(value) + "\"\n")
	}
	return b.String()
}

// FuzzEnvFile: what is accepted can be written again, and counts up to the end of its line. What is
// refused is named by file and line, and no message shows a part of the file.
func FuzzEnvFile(f *testing.F) {
	for _, text := range []string{
		"A=1\n# a comment\n; another\nB = 'two words' \t\r\n", "A=\"a \\\"b\\\" \\\\ \\$c\"\n",
		"A=a\\\n b",
		"A='a\nb'\nexport B=1\n9=2\n=x\nC", "A=\"no end", "# x \\\nA=\xff\nB=\x00", "A=a\\",
		"\xef\xbb\xbfA=1",
		strings.Repeat("no assignment\n", 30),
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got := parseEnv(text)
		lines := 1 + strings.Count(text, "\n")
		for i, problem := range got.problems {
			match := envProblem.FindStringSubmatch(problem.Error())
			var line int
			if match != nil {
				_, _ = fmt.Sscan(match[1], &line)
			}
			if line < 1 || line > lines || i > maxEnvFileProblems+3 {
				t.Errorf("problem %d of %d lines: %v", i, lines, problem)
			}
		}
		if len(got.problems) > 0 {
			return
		}
		for name, value := range got.values {
			if envNameProblem(name) != nil || !utf8.ValidString(value) ||
				strings.Contains(value, "\x00") || len(name)+len(value) > maxEntry {
				t.Errorf("%q=%q is accepted", name, value)
			}
		}
		again := parseEnv(writeEnv(got.values))
		if len(again.problems) > 0 || !maps.Equal(again.values, got.values) {
			t.Errorf("%q, then %q; %v", got.values, again.values, again.problems)
		}
		if strings.HasSuffix(text, `\`) {
			return // the next line would be part of this one
		}
		got.values["NEXT_LINE"] = "x"
		next := parseEnv(text + "\nNEXT_LINE=x")
		if len(next.problems) > 0 || !maps.Equal(next.values, got.values) {
			t.Errorf("with another line %q, want %q; %v", next.values, got.values, next.problems)
		}
	})
}

// secret is what no message may show.
const secret = "hunter2secret"

// fuzzSettings makes settings of lines NAME=value. Whatever may be a secret has a known value: the
// password, what stands before an @, and a variable that does not exist.
func fuzzSettings(lines, file string) (settings []string) {
	known := settingNames()
	hide := strings.NewReplacer("\x00", "", secret, "")
	for line := range strings.SplitSeq(lines, "\n") {
		name, value, _ := strings.Cut(line, "=")
		switch name = hide.Replace(name); {
		case name == "PASSWORD" || !slices.Contains(known, name):
			value = secret
		case strings.HasSuffix(name, "_FILE"):
			// No other file: the fuzzer could find one that never ends.
			value = file
		case name == "ENDPOINTS" && strings.Contains(value, "@"):
			value = strings.ReplaceAll(hide.Replace(value), "@", secret+"@")
		default:
			value = hide.Replace(value)
		}
		settings = append(settings, name+"="+value)
	}
	return settings
}

func settingNames() (names []string) {
	for _, v := range new(Config).Variables() {
		names = append(names, v.Name)
	}
	return names
}

// written are the settings that make this configuration again.
func written(c Config, given []string) (settings []string) {
	set := map[string]bool{}
	for _, setting := range given {
		name, value, _ := strings.Cut(setting, "=")
		set[name] = value != ""
	}
	for _, v := range c.Variables() {
		if !set[v.Name] {
			continue
		}
		value := fmt.Sprint(v.Field.Interface())
		switch kind := v.Field.Interface().(type) {
		case Secret:
			value = string(kind)
		case []string:
			value = strings.Join(kind, ",")
		case Count:
			value = fmt.Sprint(kind.N)
		case Signal:
			value = strings.TrimPrefix(unix.SignalName(kind.Signal), "SIG")
		}
		settings = append(settings, v.Name+"="+value)
	}
	return settings
}

// FuzzVariables: what is accepted keeps every promise that the daemon relies on, and is accepted
// again as it was understood. What is refused is named by its variable, in a short line without
// secrets.
func FuzzVariables(f *testing.F) {
	for _, lines := range []string{
		"ELECTION=jobs/a", "ELECTION=e\nTTL=15\nMARGIN=3s\nLOSS_GRACE=1m",
		"ELECTION=/a//b /\nIDENTITY=a\u009b",
		"ELECTION=e\nENDPOINTS=a:1,https://[::1]:2/,http://u:hunter2secret@b:3,,c:d,[::1]",
		"ELECTION=e\nENDPOINTS=a:1,https://[fe80::1%eth0]:2\nTLS_CA_FILE=FILE\nTLS_SERVER_NAME=x",
		"ELECTION=e\nUSERNAME=u\nPASSWORD=x\nPASSWORD_FILE=FILE\nPASWORD=x\nSERVICE_HOST=1",
		"ELECTION=e\nSTOP_SIGNAL=sigusr1\nRESTART_LIMIT=4294967296\nRESTART=No\nNO_NEW_PRIVS=OFF",
		"ELECTION=e\nLISTEN=[::]:0\nLOG_LEVEL=Debug\nLOG_FORMAT=JSON\nWAIT=0s\nDIAL_TIMEOUT=1ms",
		"STOP_SIGNAL=9\nLISTEN=:99999\nTTL=1e9h\nWAIT=000000000000000000000",
		"LOG_LEVEL=x\nTLS_KEY_FILE=F",
	} {
		f.Add(lines, secret, uint8(0))
	}
	file := filepath.Join(f.TempDir(), "file")
	uses := []Use{ForRun, ForElect, ForStatus, ForCheck}
	f.Fuzz(func(t *testing.T, lines, content string, use uint8) {
		if strings.Contains(lines, "_FILE") {
			writeFile(t, file, content)
		}
		settings := fuzzSettings(lines, file)
		cfg, err := load(t, uses[use%4], settings...)
		if err != nil {
			var wrong *Error
			if !errors.As(err, &wrong) {
				t.Fatalf("%q: %v", settings, err)
			}
			checkProblems(t, wrong)
			return
		}
		if use := uses[use%4]; use == ForStatus || use == ForCheck {
			return // they accept what they do not need
		}
		checkConfig(t, cfg)
		again, err := load(t, uses[use%4], written(cfg, settings)...)
		if err != nil || !reflect.DeepEqual(again, cfg) {
			t.Errorf("%+v\nis then %+v, %v", cfg, again, err)
		}
	})
}

func checkProblems(t *testing.T, wrong *Error) {
	t.Helper()
	lines := strings.Split(wrong.Error(), "\n")
	if len(lines) != len(wrong.Problems) {
		t.Errorf("%d problems in %q", len(wrong.Problems), lines)
	}
	for _, line := range lines {
		name, _, _ := strings.Cut(line, ": ")
		if !strings.HasPrefix(line, Prefix+"_") || strings.Contains(line, secret) || !plain(line) ||
			len(line) > 400 || name == Prefix+"_ENDPOINTS" && strings.Contains(line, "@") {
			t.Errorf("%q", line)
		}
	}
}

// checkConfig checks what the rest of the daemon takes for granted.
func checkConfig(t *testing.T, c Config) {
	t.Helper()
	timing := c.Timing()
	if err := timing.Validate(); err != nil || timing.TTL != c.TTL.Duration ||
		timing.TTL < 2*time.Second || timing.TTL > maxTTL || timing.TTL%time.Second != 0 ||
		timing.Margin <= 0 || timing.LossGrace < 0 ||
		timing.LossGrace+timing.Margin >= timing.TTL {
		t.Errorf("timing %+v, %v", timing, err)
	}
	for _, d := range []Duration{c.StopGrace, c.Wait, c.DialTimeout} {
		if d.Duration < 0 || d.Duration > maxDuration {
			t.Errorf("duration %v", d)
		}
	}
	for _, name := range []string{c.Election, c.Identity} {
		if name == "" || len(name) > maxNameBytes || !utf8.ValidString(name) ||
			strings.ContainsFunc(name, unicode.IsControl) {
			t.Errorf("name %q", name)
		}
	}
	for i, endpoint := range c.Endpoints {
		u, err := url.Parse(endpoint)
		if err != nil || u.String() != endpoint || u.Hostname() == "" || u.Port() == "" ||
			u.User != nil || u.Path != "" || strings.HasPrefix(c.Endpoints[0], "https:") !=
			(u.Scheme == "https") || slices.Contains(c.Endpoints[:i], endpoint) {
			t.Errorf("endpoint %q, %v", endpoint, err)
		}
	}
	if len(c.Endpoints) == 0 || c.RestartLimit.N < 0 || c.StopSignal.Signal == 0 {
		t.Errorf("%+v", c)
	}
}

// FuzzLog: whatever a line shows, it stays one line that a terminal can show, and JSON that says
// the same.
func FuzzLog(f *testing.F) {
	f.Add("job exited", "a\x1b[2J\n\u009b\u202e\xff")
	f.Add("\u2028", "\U000e0001 \u00ad\"\\")
	f.Fuzz(func(t *testing.T, message, value string) {
		for _, format := range []string{"text", "json"} {
			var out bytes.Buffer
			slog.New(Log{Format: format}.Handler(&out, slog.LevelInfo)).
				Info(message, "value", value, "err", errors.New(value))
			line, whole := strings.CutSuffix(out.String(), "\n")
			if !whole || !plain(line) {
				t.Errorf("%q", out.String())
			}
			if format == "text" {
				continue
			}
			var got struct{ Msg, Value, Err string }
			if err := json.Unmarshal(out.Bytes(), &got); err != nil {
				t.Errorf("%s: %v", line, err)
			} else if utf8.ValidString(message+"\n"+value) &&
				(got.Msg != message || got.Value != value || got.Err != value) {
				t.Errorf("%s says %+v", line, got)
			}
		}
	})
}
