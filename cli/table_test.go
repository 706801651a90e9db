//go:build linux

package cli

import (
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"leasehold/control"
	"leasehold/internal/quote"
)

func TestTable(t *testing.T) {
	got := table([][]string{
		{"TOKEN", "LEADER", "HELD"}, {"7", "a", ""}, {"123", "ü\x1b[2J", "held"},
	})
	want := "TOKEN  LEADER  HELD\n7      a\n123    ü�[2J   held\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	got = table([][]string{{"A", "B"}, {strings.Repeat("a", 60), strings.Repeat("b", 60)}})
	want = "A" + strings.Repeat(" ", 40) + "B\n" +
		strings.Repeat("a", 38) + "…  " + strings.Repeat("b", 38) + "…\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestTable_CutsNames(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	got := table([][]string{historyRow(control.Term{
		Token: 1234, Identity: strings.Repeat("a", 100), Started: at, Ended: at.Add(time.Hour),
		Why: "stopped", Starts: 1, LastExit: &control.Exit{Signal: "SIGTERM"},
	})}, 1, 4)
	want := "1234  " + `'` + strings.Repeat("a", 21) + "…  2026-01-02 03:04:05  1h0m0s  " +
		"stopped (SIGTERM)  1\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// FuzzTable: whatever is in a table, it is lines of a terminal's width, and does nothing to it.
func FuzzTable(f *testing.F) {
	f.Add("jobs/a", "a", "stopped", int64(7))
	f.Add(strings.Repeat("x", 10<<10), "it's \"a\"\x1b[2J\r\n", "\u009b2J\u202e", int64(1)<<62)
	f.Add(strings.Repeat("漢", 90), strings.Repeat("é", 200), "\xff", int64(-1))
	f.Fuzz(func(t *testing.T, election, identity, why string, token int64) {
		term := control.Term{
			Token: token, Identity: identity, Why: why, Started: time.Unix(1, 0),
			Ended: time.Unix(token, 0), LastExit: &control.Exit{Signal: identity},
		}
		rows := [][]string{historyRow(term), {quote.Word(election), identity, why, "", "", ""}}
		text := table(rows, 1, 4)
		if n := strings.Count(text, "\n"); n != len(rows) {
			t.Errorf("%d lines", n)
		}
		for line := range strings.Lines(text) {
			line = strings.TrimSuffix(line, "\n")
			if columns(line) > tableWidth || !utf8.ValidString(line) ||
				strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("%q has %d columns", line, columns(line))
			}
		}
	})
}
