//go:build linux

package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"leasehold/control"
	"leasehold/election"
	"leasehold/health"
)

// TestReport_AgreesWithStatus: a field of status --json that /status has too has the same type
// there.
func TestReport_AgreesWithStatus(t *testing.T) {
	types := map[string]string{}
	for _, f := range health.StatusFields() {
		types[f.Path] = f.Type
	}
	shared := 0
	for _, f := range ReportFields() {
		if f.Meaning == "" {
			t.Errorf("%s has no meaning", f.Path)
		}
		kind, both := types[f.Path]
		if !both {
			continue
		}
		if shared++; kind != f.Type {
			t.Errorf("%s is %s here and %s in /status", f.Path, f.Type, kind)
		}
	}
	if shared < 14 {
		t.Errorf("only %d fields are in both", shared)
	}
}

func TestReport_JSON(t *testing.T) {
	blocker := election.Blocker{Key: "e/x", Why: "why", Remedy: "remedy"}
	leader := election.Entry{Identity: "a", Key: "e/1f", Token: 7}
	for _, c := range []struct {
		report election.Report
		want   string
	}{
		{
			election.Report{},
			`{"name":"","election":"e","leader":null,"lease":null,"queue":[],"blocker":null,` +
				`"blockers":[],"hold":null,"control_problem":null,"version":"v1"}`,
		},
		{
			election.Report{
				Leader: &leader, LeaseID: 0x1f, LeaseTTL: 15 * time.Second,
				LeaseLeft: 12 * time.Second,
				Queue:     []election.Entry{leader, {Identity: "b", Key: "e/20", Token: 8}},
				Records: map[string]control.Candidate{"e/1f": {
					Identity: "a", Priority: 90, Ready: true, Leasehold: "v2",
					URL: "http://a:4040",
				}},
				Blockers: []election.Blocker{blocker},
			},
			`{"name":"a","election":"e",` +
				`"leader":{"identity":"a","key":"e/1f","token":7,"priority":90,"ready":true,` +
				`"since":null,"url":"http://a:4040","version":"v2"},` +
				`"lease":{"id":"1f","ttl_seconds":15,"valid_for_seconds":12},` +
				`"queue":[{"identity":"a","key":"e/1f","token":7,"priority":90,"ready":true,` +
				`"since":null,"url":"http://a:4040","version":"v2"},` +
				`{"identity":"b","key":"e/20","token":8,"priority":null,"ready":null,` +
				`"since":null,"url":null,"version":null}],` +
				`"blocker":{"key":"e/x","why":"why","remedy":"remedy"},` +
				`"blockers":[{"key":"e/x","why":"why","remedy":"remedy"}],` +
				`"hold":null,"control_problem":null,"version":"v1"}`,
		},
	} {
		got, err := json.Marshal(reportJSON("e", "v1", c.report))
		if err != nil || string(got) != c.want {
			t.Errorf("%s, %v, want %s", got, err, c.want)
		}
	}
	text := reportText("e", election.Report{Blockers: []election.Blocker{blocker}})
	if !strings.HasSuffix(text, "remedy\n") {
		t.Errorf("%q", text)
	}
}

// hostileNames are identities and the like that others may have written, by what they do.
var hostileNames = map[string]string{
	"plain": "a", "empty": "", "long": strings.Repeat("a", 10<<10),
	"wide":     strings.Repeat("漢", 5<<10),
	"lines":    strings.Repeat("\n\r\n", 2<<10),
	"commands": strings.Repeat("ü\x1b[2J\u009b2J\"\u202e\x7f", 1<<10),
	"no UTF-8": strings.Repeat("\xff\xc3", 5<<10),
}

// hostileReport is of an election in which everybody has this name.
func hostileReport(name string) election.Report {
	leader := election.Entry{Identity: name, Key: "e/1f", Token: 1234}
	other := election.Entry{Identity: name, Key: "e/20", Token: 1 << 62}
	return election.Report{
		Leader: &leader, LeaseID: 0x1f, LeaseLeft: 12 * time.Second,
		Queue: []election.Entry{leader, other},
		Records: map[string]control.Candidate{
			"e/1f": {Identity: name, Priority: 1 << 40, Leasehold: name, URL: name},
		},
		Hold: &control.Hold{By: name, Reason: name},
	}
}

func isPrintable(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) })
}

// TestReport_Hostile: whatever others have written, status is as many lines as it should be, and
// does nothing to a terminal. The leader's line is short, and the queue has a terminal's width.
func TestReport_Hostile(t *testing.T) {
	for what, name := range hostileNames {
		text := reportText("jobs/a", hostileReport(name))
		lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
		if len(lines) != 5 {
			t.Fatalf("%s: %d lines:\n%s", what, len(lines), text)
		}
		for i, line := range lines {
			if !isPrintable(line) || i >= 2 && columns(line) > tableWidth {
				t.Errorf("%s: %q has %d columns", what, line, columns(line))
			}
		}
		// At most 64 bytes of the name are shown, and each as four characters.
		const begin, end = `jobs/a: leader is "`, `, token 1234, lease 1f valid for 12s`
		if head := lines[0]; len(head) > len(begin)+4*64+len(`"…`)+len(end) ||
			!strings.HasPrefix(head, begin) || !strings.HasSuffix(head, end) {
			t.Errorf("%s: the head is %q", what, head)
		}
	}
}

// TestStatusWatch_Hostile: on a terminal, status --watch draws as many lines as that has, none of
// them wider, and nothing in them moves the cursor. The same holds for why etcd does not answer.
func TestStatusWatch_Hostile(t *testing.T) {
	const width = 72
	for what, name := range hostileNames {
		// One terminal has too few lines, the other as many as are needed.
		for rows, cause := range map[uint16]error{5: nil, 8: errors.New("etcd: " + name)} {
			said := onTerminal(t, rows, width, func(terminal *os.File) error {
				w := &statusWatch{
					asked: asked{name: "jobs/a"}, terminal: terminal, report: hostileReport(name),
				}
				if cause != nil {
					return w.lost(cause)
				}
				return w.show()
			})
			text, home := strings.CutPrefix(said, "\x1b[H")
			text, rest := strings.CutSuffix(text, "\x1b[J")
			lines := strings.Split(text, "\x1b[K\r\n")
			if !home || !rest || len(lines) != int(rows) {
				t.Fatalf("%s: %d lines: %q", what, len(lines), said)
			}
			for _, line := range lines {
				if !isPrintable(line) || columns(line) > width {
					t.Errorf("%s: %q has %d columns", what, line, columns(line))
				}
			}
		}
	}
}

// onTerminal returns what is written to a terminal of this size.
func onTerminal(
	t *testing.T, rows, width uint16, write func(terminal *os.File) error,
) (written string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	must(err)
	defer func() { _ = master.Close() }()
	fd := int(master.Fd())
	must(unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	must(unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: width}))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	must(err)
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	must(err)
	defer func() { _ = terminal.Close() }()
	read := make(chan string, 1)
	go func() {
		text, _ := io.ReadAll(master) // EIO: the other end is closed
		read <- string(text)
	}()
	must(write(terminal))
	must(terminal.Close())
	return <-read
}
