package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// A retired word is one that we no longer use in what users read: another word has taken its place,
// usually that of etcd, systemd or Kubernetes. Plain English keeps its meanings: allowed are the
// phrases in which the word says what a dictionary says. Words that are mostly plain English (late,
// place, row, turn) are not here.
type retired struct {
	word    string // a regular expression; whole words, in any case
	instead string
	allowed string // a regular expression for phrases; "": none
}

var retiredWords = []retired{
	{"roads?", "network link", ""},
	{"dark", "partitioned, unreachable", ""},
	{"deaf", "unreachable", ""},
	// A machine is dead in everybody's words. The message "dead" is a name in the code.
	{"dead", "exited, killed", "dead machine|dead-man's"},
	{"told", "sent, asked, reported", ""},
	{"tells? (him|us|them|if)|says? if", "reports whether", ""},
	{"moods?", "behaviour", ""},
	{"storms?", "fork bomb", ""},
	{"burdens?", "stress, memory pressure", ""},
	// No metric is renamed.
	{"lateness", "timer latency", "leasehold_guard_lateness_seconds"},
	{"strikes?|struck", "inject, kill", ""},
	{"heal(s|ed|ing)?", "recover", ""},
	{"stages?", "testbed", ""},
	{"deeds?", "operator action", ""},
	{"contenders?|entrants?|contestants?", "implementation, variant, node", ""},
	{"spans?", "interval", ""},
	{"patience|patient", "wait timeout", ""},
	{"beats?", "heartbeat", ""},
	{"legs?", "watch connection", ""},
	{"loops? turns?|still turns?|each turn", "heartbeat, runs", ""},
	{"untouched", "not moved", ""},
	{"aveng(e|es|ing)|buried|hurr(y|ies|ied)", "kill in the guard's place; exited; force", ""},
	{"masters?|slaves?|primar(y|ies)|passive|workers?", "leader, standby", "PRIMARY KEY"},
	// systemd's states, and a sentence's voice.
	{"active", "leader", "short active sentences|ActiveState"},
}

// TestRetiredWords: the words that we have given up do not come back in what users read: the pages,
// the man page, log messages, errors and the help of metrics. Help and reference are made from the
// same strings as the pages docs/reference.md and packaging/leasehold.1.
func TestRetiredWords(t *testing.T) {
	texts := pages(t)
	for _, dir := range []string{
		"app", "cli", "config", "election", "health", "supervisor", "internal",
	} {
		for at, text := range messages(t, filepath.Join("..", dir)) {
			texts[at] = text
		}
	}
	for _, r := range retiredWords {
		word := regexp.MustCompile(`(?i)\b(` + r.word + `)\b`)
		for at, text := range texts {
			if r.allowed != "" {
				text = regexp.MustCompile(`(?i)`+r.allowed).ReplaceAllString(text, "")
			}
			if found := word.FindString(text); found != "" {
				t.Errorf("%s: %q is retired, write %s: %s",
					at, found, r.instead, strings.TrimSpace(text))
			}
		}
	}
}

// pages returns the lines of what users read, by place.
func pages(t *testing.T) map[string]string {
	t.Helper()
	lines := map[string]string{}
	files := markdown(t)
	for _, pattern := range []string{
		"../packaging/leasehold.1", "../systemd/*", "../k8s/*/*.yaml", "../k8s/*/*/*.yaml",
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	for _, file := range files {
		for i, line := range strings.Split(read(t, file), "\n") {
			lines[file+":"+strconv.Itoa(i+1)] = line
		}
	}
	return lines
}

// messages returns the texts that the Go files under dir write for users, by place: what is passed
// to a logger or made an error, and the help of metrics.
func messages(t *testing.T, dir string) map[string]string {
	t.Helper()
	texts := map[string]string{}
	files := token.NewFileSet()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") ||
			strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			for _, user := range written(n) {
				ast.Inspect(user, func(n ast.Node) bool {
					if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
						if text, err := strconv.Unquote(lit.Value); err == nil {
							texts[files.Position(lit.Pos()).String()] = text
						}
					}
					return true
				})
			}
			return true
		})
		return nil
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return texts
}

// written returns what n writes for users, if it does.
func written(n ast.Node) []ast.Expr {
	switch n := n.(type) {
	case *ast.CallExpr:
		f, ok := n.Fun.(*ast.SelectorExpr)
		if !ok {
			return nil
		}
		switch f.Sel.Name {
		case "Debug", "Info", "Warn", "Error", "Log", "LogAttrs",
			"Errorf", "Fprintf", "Fprintln", "Fprint":
			return n.Args
		case "New":
			if pkg, ok := f.X.(*ast.Ident); ok && pkg.Name == "errors" {
				return n.Args
			}
		}
	case *ast.KeyValueExpr:
		if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Help" {
			return []ast.Expr{n.Value}
		}
	}
	return nil
}
