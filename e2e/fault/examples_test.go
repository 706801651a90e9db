//go:build linux

package fault_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var goBlock = regexp.MustCompile("(?s)```go\n(.*?)\n```")

// TestExamples: what the pages on how to add a fault show of the code is in it.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	read := func(path string) string {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	var source strings.Builder
	for _, file := range append(files, "../cmd/faults/scenarios.go") {
		source.WriteString(read(file))
	}
	for page, section := range map[string]string{
		"README.md":             "# How to add a fault\n",
		"../../CONTRIBUTING.md": "## Add a fault\n",
	} {
		_, text, found := strings.Cut(read(page), section)
		if text, _, _ = strings.Cut(text, "\n## Add "); !found {
			t.Errorf("%s has no %q", page, section)
		}
		blocks := goBlock.FindAllStringSubmatch(text, -1)
		if len(blocks) < 2 {
			t.Errorf("%s shows %d pieces of code, want 2", page, len(blocks))
		}
		for _, b := range blocks {
			if !strings.Contains(source.String(), b[1]) {
				t.Errorf("%s shows what is not in the code:\n%s", page, b[1])
			}
		}
	}
}
