//go:build linux

package config

import (
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/quote"
)

// The types below take any text and keep what is wrong with it, since envconfig stops at the first
// error of a decoder.

// Duration is a length of time with a unit, such as 15s.
type Duration struct {
	time.Duration
	given bool
	err   error
}

// Or returns the duration, or the other one where none is given.
func (d Duration) Or(unset time.Duration) time.Duration {
	if !d.given {
		return unset
	}
	return d.Duration
}

// Decode implements envconfig.Decoder.
func (d *Duration) Decode(text string) error {
	parsed, err := time.ParseDuration(text)
	switch {
	case err != nil && MissesUnit(text):
		err = fmt.Errorf("%s has no unit: write %ss", quote.Value(text), text)
	case err != nil:
		err = fmt.Errorf("%s is not a duration: write for example 15s, 500ms or 1m30s",
			quote.Value(text))
	case parsed < 0:
		err = fmt.Errorf("%s is negative: write a duration from 0s up", quote.Value(text))
	case parsed > maxDuration:
		err = fmt.Errorf("%s is too long: write %s (a year) or less", quote.Value(text), "8760h")
	}
	*d = Duration{Duration: parsed, given: true, err: err}
	return nil
}

func (d *Duration) problem() error { return d.err }

// Failback is a Duration, or never.
type Failback struct{ Duration }

// Decode implements envconfig.Decoder.
func (f *Failback) Decode(text string) error {
	if text == "never" {
		*f = Failback{}
		return nil
	}
	return f.Duration.Decode(text)
}

// MissesUnit reports whether text, where a Duration is wanted, is a number alone, such as 15 or
// 0.5. It is short enough to be shown.
func MissesUnit(text string) bool {
	_, err := strconv.ParseFloat(text, 64)
	return err == nil && strings.Trim(text, "0123456789.") == "" && len(text) <= 20
}

// Count is a whole number from 0 up.
type Count struct {
	N   int
	err error
}

// Decode implements envconfig.Decoder.
func (c *Count) Decode(text string) error {
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		err = fmt.Errorf("%s is not a whole number from 0 to 2147483647: write for example 5",
			quote.Value(text))
	}
	*c = Count{N: int(n), err: err}
	return nil
}

func (c *Count) problem() error { return c.err }

// Signal is a signal by its name, with or without SIG.
type Signal struct {
	unix.Signal
	err error
}

// Decode implements envconfig.Decoder.
func (s *Signal) Decode(text string) error {
	*s = Signal{}
	name := "SIG" + strings.TrimPrefix(strings.ToUpper(text), "SIG")
	number, err := strconv.Atoi(text)
	switch s.Signal = unix.SignalNum(name); {
	case err == nil && unix.SignalName(unix.Signal(number)) != "":
		known := unix.SignalName(unix.Signal(number))
		s.err = fmt.Errorf("%s is a number: write %s",
			quote.Value(text), strings.TrimPrefix(known, "SIG"))
	case s.Signal == 0:
		s.err = fmt.Errorf("%s is not the name of a signal:"+
			" write for example TERM, INT, QUIT or USR1", quote.Value(text))
	case s.Signal == unix.SIGKILL:
		s.err = fmt.Errorf("%s leaves the job no time to stop:"+
			" for that write LEASEHOLD_STOP_GRACE=0s, and here for example TERM", quote.Value(text))
	case s.Signal == unix.SIGSTOP, s.Signal == unix.SIGTSTP,
		s.Signal == unix.SIGTTIN, s.Signal == unix.SIGTTOU:
		s.err = fmt.Errorf("%s freezes a job instead of stopping it: write for example TERM",
			quote.Value(text))
	}
	return nil
}

func (s *Signal) problem() error { return s.err }

// Command is a command line, split into words as by a shell. No shell runs it. So what only a shell
// could do is refused.
type Command struct {
	Argv []string
	err  error
}

// Decode implements envconfig.Decoder.
func (c *Command) Decode(text string) error {
	argv, err := splitCommand(text)
	if err == nil && (len(argv) == 0 || argv[0] == "") {
		err = errors.New("has no command: write for example pg_isready -q")
	}
	*c = Command{Argv: argv}
	if err != nil {
		*c = Command{err: fmt.Errorf("%s %w", quote.Value(text), err)}
	}
	return nil
}

var (
	errNeedsShell = errors.New("is for a shell: write sh -c '...'")
	errNoEnd      = errors.New("is no command line: a quote or a backslash has no end")
)

// splitCommand splits a command line into words. Quotes and backslashes mean what they mean in sh.
func splitCommand(text string) (words []string, err error) {
	var word []byte
	begun := false // a word, which may be empty
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case strings.IndexByte(" \t\r\n", c) >= 0:
			if begun {
				words, word, begun = append(words, string(word)), word[:0], false
			}
			continue
		case c == '\'':
			end := strings.IndexByte(text[i+1:], c)
			if end < 0 {
				return nil, errNoEnd
			}
			word = append(word, text[i+1:i+1+end]...)
			i += 1 + end
		case c == '"':
			for i++; i < len(text) && text[i] != c; i++ {
				switch {
				case text[i] == '$' || text[i] == '`':
					return nil, errNeedsShell
				case text[i] == '\\' && i+1 < len(text) &&
					strings.IndexByte("\\\"$`", text[i+1]) >= 0:
					i++
				}
				word = append(word, text[i])
			}
			if i == len(text) {
				return nil, errNoEnd
			}
		case c == '\\':
			if i++; i == len(text) {
				return nil, errNoEnd
			}
			word = append(word, text[i])
		case strings.IndexByte("|&;<>()$`*?[", c) >= 0, !begun && (c == '#' || c == '~'):
			return nil, errNeedsShell
		default:
			word = append(word, c)
		}
		begun = true
	}
	if begun {
		words = append(words, string(word))
	}
	return words, nil
}

func (c *Command) problem() error { return c.err }

// Level is the level from which on lines are logged.
type Level struct {
	slog.Level
	err error
}

// Decode implements envconfig.Decoder.
func (l *Level) Decode(text string) error {
	*l = Level{}
	switch strings.ToLower(text) {
	case "debug":
		l.Level = slog.LevelDebug
	case "info":
		l.Level = slog.LevelInfo
	case "warn":
		l.Level = slog.LevelWarn
	case "error":
		l.Level = slog.LevelError
	default:
		l.err = fmt.Errorf("%s is unknown: write debug, info, warn or error", quote.Value(text))
	}
	return nil
}

func (l *Level) problem() error { return l.err }

// Secret is a text that no verb of fmt and no logger prints.
type Secret string

// Format implements fmt.Formatter.
func (s Secret) Format(out fmt.State, _ rune) { _, _ = out.Write([]byte(s.hidden())) }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.hidden()) }

// MarshalText keeps it out of JSON.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.hidden()), nil }

func (s Secret) hidden() string {
	if s == "" {
		return ""
	}
	return "[hidden]"
}
