//go:build linux

package app

import (
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"leasehold/config"
)

// slow is a value whose text takes its time.
type slow struct{ release chan struct{} }

func (s slow) LogValue() slog.Value { <-s.release; return slog.StringValue("slow") }

// TestLog_KeepsNobodyWaiting: neither the text of a line nor a reader that does not read makes a
// caller wait. The lines keep their order, and those that are lost are counted.
func TestLog_KeepsNobodyWaiting(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	cfg := config.Config{Election: "e", Identity: "i"}
	l := newLogTo(int(w.Fd()), cfg)
	s := slow{make(chan struct{})}
	l.Info("first", "value", s)
	const more = 1000
	for range more {
		l.Info("more")
	}
	close(s.release)
	l.Info("last") // perhaps lost too
	l.lines.Flush(10 * time.Second)
	l.Info("after")
	l.lines.Flush(10 * time.Second)
	_ = w.Close()
	var text strings.Builder
	b := make([]byte, 1<<20)
	for n := 1; n > 0; {
		n, _ = r.Read(b)
		text.Write(b[:n])
	}
	got := text.String()
	first := strings.Index(got, "value=slow")
	if first < 0 || first > strings.Index(got, "msg=more") {
		t.Errorf("the first line is not the first: %.300q", got)
	}
	if n := strings.Count(got, "msg=more"); n == 0 || n >= more {
		t.Errorf("%d lines of %d were written", n, more)
	}
	if !strings.Contains(got, "dropped=") || !strings.Contains(got, "msg=after") {
		t.Errorf("nothing says that lines are lost: %q", got[max(0, len(got)-300):])
	}
}
