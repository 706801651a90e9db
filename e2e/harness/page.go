package harness

import (
	"fmt"
	"regexp"
	"strings"
)

// Page is the commands that a page of the documentation shows, and what they say.
type Page struct {
	blocks []string // each is typed at once
	said   []string // after each block
}

// fenced are the blocks of a page: commands are sh, and the text after them is what they say. A
// block in a comment is typed too, and not shown to readers: it makes the case that the page is
// about.
var fenced = regexp.MustCompile("(?ms)^(?:```|<!-- )(sh|text)\n(.*?)^(?:```|-->)$")

// ReadPage reads a page.
func ReadPage(text string) (p Page) {
	for _, block := range fenced.FindAllStringSubmatch(text, -1) {
		if block[1] == "text" && len(p.said) > 0 {
			p.said[len(p.said)-1] += block[2]
			continue
		}
		p.blocks, p.said = append(p.blocks, block[2]), append(p.said, "")
	}
	return p
}

// Len is how many blocks of commands the page has.
func (p Page) Len() int { return len(p.blocks) }

// Script is a script of bash that does what the page says, after a prelude. Each command must
// succeed.
func (p Page) Script(prelude string) string {
	var b strings.Builder
	b.WriteString("set -euo pipefail\n" + prelude + "\n")
	for i, block := range p.blocks {
		fmt.Fprintf(&b, "echo '== %d'\n%s", i, block)
	}
	b.WriteString("echo '== end'\n")
	return b.String()
}

// Check checks what the script has printed. Each line of the text that follows a block, where …
// stands for anything, must come out, in this order, of the block or later: jobs speak when they
// run.
func (p Page) Check(out string) error {
	if !strings.HasSuffix(out, "== end\n") {
		return fmt.Errorf("it did not come to its end:\n%s", out)
	}
	for i, lines := range p.said {
		_, rest, found := strings.Cut(out, fmt.Sprintf("== %d\n", i))
		if !found {
			return fmt.Errorf("block %d did not run:\n%s", i, out)
		}
		for line := range strings.Lines(lines) {
			pattern := regexp.QuoteMeta(strings.TrimSuffix(line, "\n"))
			pattern = strings.ReplaceAll(pattern, "…", ".*")
			at := regexp.MustCompile("(?m)^" + pattern + "$").FindStringIndex(rest)
			if at == nil {
				return fmt.Errorf("after block %d there is no line %q in:\n%s", i, line, rest)
			}
			rest = rest[at[1]:]
		}
	}
	return nil
}
