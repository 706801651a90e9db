package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	fence   = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
)

// TestLinks: every link of a page to a file or heading of this tree leads there.
func TestLinks(t *testing.T) {
	for _, page := range markdown(t) {
		text := read(t, page)
		for _, found := range link.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			if strings.Contains(found[1], "://") {
				continue
			}
			path, anchor, _ := strings.Cut(found[1], "#")
			target := page
			if path != "" {
				target = filepath.Join(filepath.Dir(page), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: the link %s leads nowhere: %v", page, found[1], err)
			} else if anchor != "" && !strings.Contains(anchors(read(t, target)), " "+anchor+" ") {
				t.Errorf("%s: the link %s names no heading", page, found[1])
			}
		}
	}
}

// anchors returns the names that GitHub gives the headings of a page, with spaces around each.
func anchors(text string) string {
	dropped := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	all := " "
	for _, h := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		name := dropped.ReplaceAllString(strings.ToLower(h[1]), "")
		all += strings.ReplaceAll(name, " ", "-") + " "
	}
	return all
}

// TestWhereToLook: the files and functions that architecture.md sends a newcomer to are there.
func TestWhereToLook(t *testing.T) {
	_, table, found := strings.Cut(read(t, "architecture.md"), "## Where to look")
	if !found {
		t.Fatal("architecture.md has no section Where to look")
	}
	quoted := regexp.MustCompile("`([^`]+)`")
	rows := 0
	for line := range strings.Lines(table) {
		columns := strings.Split(line, "|")
		if len(columns) < 4 || !strings.Contains(columns[2], "`") {
			continue
		}
		rows++
		names := quoted.FindAllStringSubmatch(columns[2], -1)
		source := ""
		for _, name := range names {
			if strings.Contains(name[1], "/") || len(source) == 0 { // a file, or a package
				source += sources(t, filepath.Join("..", name[1]))
				continue
			}
			declared := regexp.MustCompile(`(?m)^(func (\([^)]*\) )?|type |var )` + name[1] + `\b`)
			if !declared.MatchString(source) {
				t.Errorf("%s has no %s: %s", names[0][1], name[1], line)
			}
		}
	}
	if rows < 10 {
		t.Errorf("the table has %d rows", rows)
	}
}

// TestContributing_Examples: the Go code that CONTRIBUTING.md shows is in the code.
func TestContributing_Examples(t *testing.T) {
	source := sources(t, "../e2e/fault") + sources(t, "../e2e/cmd/faults")
	code := regexp.MustCompile("(?ms)^```go\n(.*?)^```$")
	shown := code.FindAllStringSubmatch(read(t, "../CONTRIBUTING.md"), -1)
	if len(shown) < 2 {
		t.Errorf("CONTRIBUTING.md shows %d pieces of code, want 2", len(shown))
	}
	for _, code := range shown {
		if !strings.Contains(source, code[1]) {
			t.Errorf("CONTRIBUTING.md shows what is not in the code:\n%s", code[1])
		}
	}
}

// sources returns the text of a Go file, or of those in a directory.
func sources(t *testing.T, path string) string {
	t.Helper()
	files := []string{path}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		files, _ = filepath.Glob(filepath.Join(path, "*.go"))
	}
	if len(files) == 0 {
		t.Errorf("there is no Go file in %s", path)
	}
	all := ""
	for _, file := range files {
		all += read(t, file)
	}
	return all
}

// markdown returns the pages of the tree.
func markdown(t *testing.T) []string {
	t.Helper()
	var pages []string
	for _, pattern := range []string{"*.md", "*/*.md", "../*.md", "../e2e/*/*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, found...)
	}
	return pages
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return string(text)
}
