//go:build linux

package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"
)

// LoadFile reads an env file and adds all of its variables to the environment of the process, as
// systemd's EnvironmentFile= does. A variable that the environment has already stays as it is, also
// when it is set to nothing. The error is an *Error with every problem of the file. Each begins
// with the file's name and the line. An empty path names no file.
//
// The format is that of systemd.exec(5). What systemd ignores, with or without a warning, is a
// problem here: a line without an =, an invalid name, a quote without an end. So is a comment that
// ends with a backslash, because versions of systemd read it differently.
func LoadFile(path string) error {
	if path == "" {
		return nil
	}
	text, err := readEnvFile(path)
	if err != nil {
		return &Error{Problems: []error{err}}
	}
	f := envFile{path: path, text: string(text), line: 1, values: map[string]string{}}
	f.parse()
	if len(f.problems) > 0 {
		return &Error{Problems: f.problems}
	}
	for name, value := range f.values {
		if _, set := os.LookupEnv(name); set {
			continue
		}
		if err := os.Setenv(name, value); err != nil {
			// Not the user's mistake: name and value were checked.
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// Bounds of an env file.
const (
	maxEnvFile = 1 << 20
	// maxEntry is MAX_ARG_STRLEN of Linux: exec refuses a longer NAME=value with its NUL.
	maxEntry = 128 << 10
	// maxEnvFileProblems bounds how many problems are reported: the file may be no env file at all.
	maxEnvFileProblems = 20
)

func readEnvFile(path string) (text []byte, err error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	text, err = io.ReadAll(io.LimitReader(file, maxEnvFile+1))
	if err == nil && len(text) > maxEnvFile {
		err = fmt.Errorf("%s: the file is longer than 1 MiB", path)
	}
	return text, err
}

// An envFile is a file that is being read.
type envFile struct {
	path     string
	text     string // what is still to be read
	line     int
	values   map[string]string // by name: the last one counts
	problems []error
}

func (f *envFile) problem(line int, format string, args ...any) {
	problem := fmt.Errorf(format, args...)
	f.problems = append(f.problems, fmt.Errorf("%s:%d: %w", f.path, line, problem))
}

// next takes a byte from the text, which must not be empty.
func (f *envFile) next() byte {
	c := f.text[0]
	f.text = f.text[1:]
	if c == '\n' {
		f.line++
	}
	return c
}

const envSpace = " \t\r\n"

func isEnvSpace(c byte) bool { return strings.IndexByte(envSpace, c) >= 0 }

func (f *envFile) parse() {
	for len(f.text) > 0 {
		if len(f.problems) >= maxEnvFileProblems {
			f.problem(f.line, "the rest of the file was not read: it has too many problems")
			return
		}
		if isEnvSpace(f.text[0]) {
			f.next()
			continue
		}
		line, rest := f.line, f.text
		if i := strings.IndexAny(rest, "\r\n"); i >= 0 {
			rest = rest[:i]
		}
		name, _, assigned := strings.Cut(rest, "=")
		switch {
		case rest[0] == '#', rest[0] == ';':
			f.text = f.text[len(rest):]
			if strings.HasSuffix(rest, "\\") {
				f.problem(line, "a comment ends with a backslash:"+
					" systemd before 254 takes the next line for part of it")
			}
			continue
		case !assigned:
			f.text = f.text[len(rest):]
			f.problem(line, "there is no =: write NAME=value, or # before a comment")
			continue
		}
		f.text = f.text[len(name)+1:]
		name = strings.TrimRight(name, envSpace)
		value, err := f.value()
		if err != nil {
			f.problem(line, "%w", err)
		}
		if err := envNameProblem(name); err != nil {
			f.problem(line, "%w", err)
		}
		if len(name)+len("=")+len(value)+len("\x00") > maxEntry {
			f.problem(line, "the value is too long: with its name it must be shorter than 128 KiB")
		}
		f.values[name] = value
	}
}

// envNameProblem returns what is wrong with the name of a variable, or nil. It does not show the
// name, which may be part of a secret that has several lines.
func envNameProblem(name string) error {
	if strings.HasPrefix(name, "export ") {
		return errors.New("there is an export before the name: write NAME=value")
	}
	for i, c := range []byte(name) {
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return errors.New("what is before the = is no name:" +
				" use letters, digits and _, and begin with no digit")
		}
	}
	if name == "" {
		return errors.New("there is no name before the =")
	}
	return nil
}

// value takes a value, up to the end of its line. Quotes count only up to the first character
// outside of quotes. White space around the value is dropped, unless it is quoted or escaped.
func (f *envFile) value() (string, error) {
	var b strings.Builder
	begin, keep := true, 0 // keep: how much of b stays, whatever white space follows it
	for len(f.text) > 0 {
		line := f.line
		switch c := f.next(); {
		case c == '\n', c == '\r':
			return envValue(b.String()[:keep])
		case begin && (c == '\'' || c == '"'):
			if !f.quoted(&b, c) {
				return "", fmt.Errorf("the quote that begins in line %d has no end", line)
			}
			keep = b.Len()
		case c == '\\':
			begin = false
			if len(f.text) > 0 {
				if c := f.next(); c != '\n' && c != '\r' { // An escaped newline continues the line.
					b.WriteByte(c)
				}
			}
			keep = b.Len()
		case isEnvSpace(c):
			if !begin {
				b.WriteByte(c)
			}
		default:
			begin = false
			b.WriteByte(c)
			keep = b.Len()
		}
	}
	return envValue(b.String()[:keep])
}

// quoted takes the rest of a quoted text into b and reports whether it has an end. A backslash
// means something only in double quotes, and there only before one of "\`$ and at the end of a
// line.
func (f *envFile) quoted(b *strings.Builder, quote byte) bool {
	for len(f.text) > 0 {
		c := f.next()
		if c == quote {
			return true
		}
		if c == '\\' && quote == '"' && len(f.text) > 0 {
			switch c = f.next(); c {
			case '\n':
				continue
			case '"', '\\', '`', '$':
			default:
				b.WriteByte('\\')
			}
		}
		b.WriteByte(c)
	}
	return false
}

func envValue(value string) (string, error) {
	if !utf8.ValidString(value) || strings.ContainsRune(value, 0) {
		return "", errors.New("the value is not UTF-8, or holds a NUL")
	}
	return value, nil
}
