//go:build linux

package config

import (
	"io"
	"log/slog"
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
		return slog.NewJSONHandler(w, options)
	}
	return slog.NewTextHandler(w, options)
}
