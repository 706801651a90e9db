//go:build linux

package app

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestLeaveMessage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "termination-log")
	leaveMessage(path, "nobody asked", false)
	if _, err := os.Stat(path); err == nil {
		t.Fatal("the file was made")
	}
	for _, c := range []struct {
		before, text string
		yield        bool
		want         string
	}{
		{"", "one\ntwo", false, "one\ntwo\n"},
		{"an older and longer one", "one\n", false, "one\n"},
		{"", "last", true, "last\n"},
		{"the job's own", "last", true, "the job's own"},
	} {
		if err := os.WriteFile(path, []byte(c.before), 0o644); err != nil {
			t.Fatal(err)
		}
		leaveMessage(path, c.text, c.yield)
		if got, err := os.ReadFile(path); err != nil || string(got) != c.want {
			t.Errorf("%q over %q: %q, %v, want %q", c.text, c.before, got, err, c.want)
		}
	}
	for _, text := range []string{
		strings.Repeat("x", maxTerminationMessage-1), strings.Repeat("x", maxTerminationMessage),
		strings.Repeat("ü", maxTerminationMessage),
	} {
		leaveMessage(path, text, false)
		got, err := os.ReadFile(path)
		if err != nil || len(got) > maxTerminationMessage || len(got) < maxTerminationMessage-3 ||
			!utf8.Valid(got) {
			t.Errorf("%d bytes became %d, %v", len(text), len(got), err)
		}
	}
	link := path + "-link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	leaveMessage(link, "through a link", false)
	if got, _ := os.ReadFile(path); strings.Contains(string(got), "link") {
		t.Error("it was written through a link")
	}
}
