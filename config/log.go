//go:build linux

package config

import (
	"bytes"
	"io"
	"log/slog"
	"unicode"

	"leasehold/internal/quote"
)

// Handler makes a handler for lines that are at least as severe as level. It writes a line at a
// time to w, in the configured format, with durations as people write them.
func (l Log) Handler(w io.Writer, level slog.Leveler) slog.Handler {
	readable := func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration { // JSON would show nanoseconds.
			a.Value = slog.StringValue(a.Value.Duration().String())
		}
		return a
	}
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: readable}
	if l.Format == "json" {
		return slog.NewJSONHandler(printableLines{w, quote.PrintableJSON}, options)
	}
	return slog.NewTextHandler(printableLines{w, quote.Printable}, options)
}

// printableLines makes lines printable where the handlers of log/slog do not: both leave U+007F as
// it is, and that of JSON much more.
type printableLines struct {
	w    io.Writer
	make func(line string) string
}

// Write takes one line. It does not allocate if that is printable.
func (p printableLines) Write(line []byte) (int, error) {
	text := bytes.TrimSuffix(line, []byte("\n"))
	if !bytes.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return p.w.Write(line)
	}
	if _, err := io.WriteString(p.w, p.make(string(text))+"\n"); err != nil {
		return 0, err
	}
	return len(line), nil
}
