package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// A retired word is one that we no longer use in what users read: another word has taken its place,
// usually that of etcd, systemd or Kubernetes. A phrase is allowed where the word has the meaning
// that a dictionary gives first. Words that are mostly plain English (place, row, turn) are not
// here, except in the phrases in which they meant something of ours.
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
	{"late", "delayed, timer latency", "too late"},
	{"strikes?|struck", "inject, kill", ""},
	{"heal(s|ed|ing)?", "recover", ""},
	{"stages?", "testbed", ""},
	{"deeds?", "operator action", ""},
	{"contenders?|entrants?|contestants?", "implementation, variant, node", ""},
	{"spans?", "interval", ""},
	{"patience|patient", "wait timeout", ""},
	{"beats?", "heartbeat", ""},
	{"legs?", "watch connection", ""},
	{
		"loops? turns?|still turns?|(each|every|its|their) turns?",
		"heartbeat, runs, queue entry", "",
	},
	{"turn(s|ed)? 503", "answer 503", ""},
	{"untouched", "not moved", ""},
	{"aveng(e|es|ing)|buried|hurr(y|ies|ied)", "kill in the guard's place; exited; force", ""},
	{"breathes?|watchrouters?", "yield; watch connection", ""},
	// Words with two meanings: one of them has a name of its own.
	{"etcd leaders?", "etcd's leader", ""},
	{"internal faults?", "internal error", ""},
	{"masters?|slaves?|primar(y|ies)|passive|workers?", "leader, standby", "PRIMARY KEY"},
	// systemd's states, and a sentence's voice.
	{"active", "leader", "short active sentences|ActiveState"},
}

// TestRetiredWords: the words that we have given up do not come back in what users read: the pages,
// the man page, manifests and units, and every text in the code: log messages, errors, help.
func TestRetiredWords(t *testing.T) {
	texts := pages(t)
	for _, dir := range []string{
		"app", "cli", "config", "election", "health", "kubernetes", "supervisor",
		"internal",
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
		"../packaging/leasehold*", "../packaging/*.sh", "../systemd/*", "../examples/*/*",
		"../k8s/*/*.yaml", "../k8s/*/*/*.yaml", "../charts/*/*.*", "../charts/*/*/*",
		"../Makefile", "../Dockerfile",
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

// messages returns the texts of the Go files under dir, by place: every string with a space in it.
func messages(t *testing.T, dir string) map[string]string {
	t.Helper()
	texts := map[string]string{}
	files := token.NewFileSet()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		isTest := strings.HasSuffix(path, "_test.go")
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || isTest {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			lit, ok := n.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING {
				return true
			}
			text, err := strconv.Unquote(lit.Value)
			if err == nil && strings.Contains(text, " ") {
				texts[files.Position(lit.Pos()).String()] = text
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return texts
}
