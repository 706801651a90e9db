// Package quote makes text that somebody else wrote, such as a candidate's name or the value of a
// setting, safe to show: it does nothing in a terminal, a shell or systemd.
package quote

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
)

// maxShown is how many bytes Value shows.
const maxShown = 64

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

// Word shows an argument of a command line as it would be typed: without quotes if a shell needs
// none, otherwise like Value.
func Word(text string) string {
	if text == "" || strings.ContainsFunc(text, IsShellSyntax) || len(text) > maxShown {
		return Value(text)
	}
	return text
}

// IsShellSyntax reports whether r may have a special meaning for a shell or a terminal.
func IsShellSyntax(r rune) bool {
	return r <= ' ' || r > '~' || strings.ContainsRune("\"'`$&|;<>()*?[]{}!#\\", r)
}
