// Package quote makes text that somebody else wrote, such as a candidate's name or the value of a
// setting, safe to show: it does nothing in a terminal, a shell or systemd.
package quote

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// maxShown is how many bytes Value, Name and Word show.
	maxShown = 64
	// maxLine is how many bytes Line shows.
	maxLine = 2048
)

// Printable replaces each rune that is not printable, a newline too, and each byte that is not
// UTF-8 by U+FFFD. The result is one line.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

// Line makes one printable line of text that says what is wrong, such as an error of etcd. It cuts
// text that is longer than 2,048 bytes.
func Line(text string) string { return cut(Printable(text), maxLine) }

// Name makes a name printable. It cuts a name that is longer than 64 bytes.
func Name(text string) string { return cut(Printable(text), maxShown) }

// cut keeps a limited number of bytes, and no part of a rune.
func cut(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	for limit > 0 && !utf8.RuneStart(text[limit]) {
		limit--
	}
	return text[:limit] + "…"
}

// JSON encodes v, with a newline at the end. Each rune that is not printable is escaped.
func JSON(v any, indent string) (string, error) {
	var text strings.Builder
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", indent)
	if err := e.Encode(v); err != nil {
		return "", err
	}
	return PrintableJSON(text.String()), nil
}

// PrintableJSON escapes each rune of a JSON text that is not printable, except newlines. The
// library leaves those above U+007E as they are, and U+009B begins a command to a terminal.
func PrintableJSON(text string) string {
	printable := func(r rune) bool { return r == '\n' || unicode.IsPrint(r) }
	if !strings.ContainsFunc(text, func(r rune) bool { return !printable(r) }) {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		switch {
		case printable(r):
			b.WriteRune(r)
		case r <= 0xffff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		}
	}
	return b.String()
}

// Value quotes text as a Go string. It cuts text that is longer than 64 bytes.
func Value(text string) string {
	if len(text) > maxShown {
		return strconv.Quote(text[:maxShown]) + "…"
	}
	return strconv.Quote(text)
}

// Shell makes text one word of bash. The word itself is printable.
func Shell(text string) string {
	if text == Printable(text) {
		return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
	}
	var b strings.Builder
	b.WriteString("$'")
	for _, c := range []byte(text) {
		if c < ' ' || c > '~' || c == '\'' || c == '\\' {
			fmt.Fprintf(&b, `\x%02x`, c)
		} else {
			b.WriteByte(c)
		}
	}
	b.WriteString("'")
	return b.String()
}

// Word shows an argument of a command line so that it can be pasted into bash: without quotes if a
// shell needs none, otherwise like Shell. It cuts text that is longer than 64 bytes.
func Word(text string) string {
	switch {
	case len(text) > maxShown:
		short := cut(text, maxShown)
		return Shell(strings.TrimSuffix(short, "…")) + "…"
	case text == "" || strings.ContainsFunc(text, IsShellSyntax):
		return Shell(text)
	}
	return text
}

// IsShellSyntax reports whether r may have a special meaning for a shell or a terminal.
func IsShellSyntax(r rune) bool {
	return r <= ' ' || r > '~' || strings.ContainsRune("\"'`$&|;<>()*?[]{}!#~\\", r)
}
