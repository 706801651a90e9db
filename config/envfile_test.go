//go:build linux

package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEnvFile: the format is that of systemd's EnvironmentFile=. What is wanted here is what
// systemd 252 makes of the same text.
func TestEnvFile(t *testing.T) {
	for text, want := range map[string]string{
		"A=1":                                "1",
		"\n\n  A = 1 \t\r\n":                 "1",
		"# A=2\n; A=3\nA=1\n#A=4":            "1",
		"A=1\nA=2\n":                         "2",
		"A=":                                 "",
		"A=a  b # c":                         "a  b # c",
		"A=a=b":                              "a=b",
		"A='a b '  ":                         "a b ",
		"A='it is' \"two words\"":            "it istwo words",
		"A=it's":                             "it's",
		"A=a 'b c'":                          "a 'b c'",
		"A='a\nb'":                           "a\nb",
		"A='a\\b'":                           "a\\b",
		`A="a \"b\" \\ \$c \` + "`" + ` \d"`: "a \"b\" \\ $c ` \\d",
		"A=\"a\\\nb\"":                       "ab",
		"A=a\\\n  b":                         "a  b",
		`A=a\ `:                              "a ",
		`A=\"a\"`:                            `"a"`,
		"A=a\\":                              "a",
		`A='"/srv/my job" "two words"' `:     `"/srv/my job" "two words"`,
		"A=/bin/sh -c 'exec x | y'":          "/bin/sh -c 'exec x | y'",
	} {
		f := envFile{path: "file", text: text, line: 1, values: map[string]string{}}
		f.parse()
		if got, ok := f.values["A"]; got != want || !ok || len(f.problems) > 0 {
			t.Errorf("%q: A is %q (%v), want %q; problems %v", text, got, ok, want, f.problems)
		}
	}
}

func TestEnvFile_Problems(t *testing.T) {
	path := filepath.Join(t.TempDir(), "backup.env")
	for text, want := range map[string][]string{
		"A=1\nB\nC=3\nhunter2\n": {":2: there is no =", ":4: there is no ="},
		"export A=1":             {":1: there is an export"},
		"hunter2+/==\n9=1\n=x": {
			":1: what is before the =", ":2: what is before the =", ":3: there is no name",
		},
		"A='1\nB=2\nC=hunter2":      {":1: the quote that begins in line 1 has no end"},
		"\nB=1 \\\n x\nA=\"hunter2": {":4: the quote that begins in line 4 has no end"},
		"A=\xff":                    {":1: the value is not UTF-8"},
		"# a comment \\\nA=1\n;\\": {
			":1: a comment ends with a backslash", ":3: a comment ends with a backslash",
		},
		"B=1\nA=" + strings.Repeat("x", maxEntry): {":2: the value is too long"},
		strings.Repeat("A=1\n", maxEnvFile/4+1):   {": the file is longer than 1 MiB"},
		"A=a\x00b":                                {":1: the value is not UTF-8, or holds a NUL"},
	} {
		writeFile(t, path, text)
		err := LoadFile(path)
		if err == nil {
			t.Errorf("%q is accepted", text)
			continue
		}
		lines := strings.Split(err.Error(), "\n")
		if len(lines) != len(want) {
			t.Errorf("%q: %v, want %q", text, err, want)
			continue
		}
		for i := range want {
			if !strings.HasPrefix(lines[i], path+want[i]) || strings.Contains(lines[i], "hunter2") {
				t.Errorf("%q: %q, want %q", text, lines[i], path+want[i])
			}
		}
	}
	writeFile(t, path, strings.Repeat("no env file\n", 1000))
	lines := strings.Split(LoadFile(path).Error(), "\n")
	last := path + ":20: the rest of the file was not read"
	if len(lines) != maxEnvFileProblems+1 || !strings.HasPrefix(lines[len(lines)-1], last) {
		t.Errorf("of a file that is no env file: %q", lines)
	}
	if err := LoadFile(path + "-missing"); err == nil ||
		!strings.Contains(err.Error(), path+"-missing: no such file") {
		t.Errorf("a file that is missing: %v", err)
	}
}

func TestLoadFile_TakesNoEndlessFile(t *testing.T) {
	if err := LoadFile("/dev/zero"); err == nil ||
		!strings.Contains(err.Error(), "longer than 1 MiB") {
		t.Errorf("/dev/zero: %v", err)
	}
	if err := LoadFile(""); err != nil {
		t.Errorf("no file: %v", err)
	}
}

func TestLoadFile_EnvironmentOverrules(t *testing.T) {
	if _, err := load(t, ForRun, "TTL=30s", "WAIT="); err == nil {
		t.Fatal("no problem without an election")
	}
	path := filepath.Join(t.TempDir(), "backup.env")
	writeFile(t, path, "LEASEHOLD_ELECTION=jobs/backup\nLEASEHOLD_TTL=20s\n"+
		"LEASEHOLD_WAIT=5s\nOTHER_OF_THE_FILE=kept\n")
	for _, name := range []string{"LEASEHOLD_ELECTION", "OTHER_OF_THE_FILE"} {
		t.Setenv(name, "") // restored at the end of the test
		if err := os.Unsetenv(name); err != nil {
			t.Fatal(err)
		}
	}
	if err := LoadFile(path); err != nil {
		t.Fatal(err)
	}
	cfg, err := Load(ForRun)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Election != "jobs/backup" || cfg.TTL.String() != "30s" || cfg.Wait.Or(-1) != -1 ||
		os.Getenv("OTHER_OF_THE_FILE") != "kept" {
		t.Errorf("election %q, TTL %v, wait %v", cfg.Election, cfg.TTL, cfg.Wait)
	}
}

// TestEnvFile_Example: the example that is installed is sound.
func TestEnvFile_Example(t *testing.T) {
	path := filepath.Join("..", "systemd", "example.env")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f := envFile{path: path, text: string(text), line: 1, values: map[string]string{}}
	f.parse()
	if len(f.problems) > 0 || f.values["JOB"] != "/usr/local/bin/backup --verbose" ||
		len(f.values) != 4 {
		t.Errorf("%q, problems %v", f.values, f.problems)
	}
}
