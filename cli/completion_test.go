//go:build linux

package cli

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"leasehold/health"
)

// completes is what each shell has to complete after leasehold.
var completes = map[string]string{
	"":                      "-- " + strings.Join(commandNames[:], " "),
	"st":                    "status",
	"-f FILE st":            "status",
	"-f FILE status --":     "--json --watch --help",
	"check ":                strings.Join(health.Checks(), " "),
	"check l":               "live leader",
	"status jobs/a --j":     "--json",
	"switchover --to x --t": "--timeout --to",
	"switchover --to ":      "",
	"watch --from 7 --j":    "--json",
	"completion ":           strings.Join(Shells(), " "),
	"version ":              "",
	"check live r":          "",
	"help st":               "status",
	"-- unshar":             "unshare",
	"run -- unshar":         "unshare",
	"-f FILE -- unshar":     "unshare",
}

// TestCompletion has each shell complete command lines.
func TestCompletion(t *testing.T) {
	for shell, complete := range map[string]func(*testing.T, string) map[string][]string{
		"bash": inBash, "zsh": inZsh, "fish": inFish,
	} {
		t.Run(shell, func(t *testing.T) {
			if _, err := exec.LookPath(shell); err != nil {
				if os.Getenv("E2E_NO_SKIP") == "1" {
					t.Fatalf("needs %s, and E2E_NO_SKIP=1 forbids to skip", shell)
				}
				t.Skipf("skipped: needs %s", shell)
			}
			file := filepath.Join(t.TempDir(), "_leasehold")
			text := newTestProgram(nil).Completion(shell)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			got := complete(t, file)
			for line, want := range completes {
				all := strings.Fields(want)
				slices.Sort(all)
				slices.Sort(got[line])
				// A command can be in two folders of PATH.
				if shown := slices.Compact(got[line]); !slices.Equal(shown, all) {
					t.Errorf("leasehold %s<TAB>: %q, want %q", line, shown, all)
				}
			}
		})
	}
}

// script runs a script, and returns what it prints.
func script(t *testing.T, shell string, args ...string) string {
	t.Helper()
	cmd := exec.Command(shell, args...)
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_DATA_HOME="+home)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil || complaint.Len() > 0 {
		t.Fatalf("%s %q: %v %s%s", shell, args, err, out, &complaint)
	}
	return string(out)
}

func inBash(t *testing.T, file string) map[string][]string {
	got := map[string][]string{}
	for line := range completes {
		got[line] = strings.Fields(script(t, "bash", "--norc", "-c", `source "$2"
			compopt() { :; } # it works only while bash completes at a prompt
			read -ra COMP_WORDS <<<"leasehold $1"
			[[ $1 == *' ' || -z $1 ]] && COMP_WORDS+=('')
			COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
			_leasehold
			printf '%s\n' "${COMPREPLY[@]}"`, "bash", line, file))
	}
	return got
}

// inZsh types the lines at a prompt. What matches is noted when the completion adds it.
func inZsh(t *testing.T, file string) map[string][]string {
	got := map[string][]string{}
	for line := range completes {
		out := file + ".out"
		if err := os.WriteFile(out, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		setUp := fmt.Sprintf(`PROMPT=
			autoload -U compinit && compinit -u -D
			source %s
			compadd() {
				local -a hits
				builtin compadd -O hits "$@"
				print -lr -- $hits >>%s
				builtin compadd "$@"
			}
			finish() { print end >>%[2]s; exit }
			comppostfuncs=(finish)
			bindkey '^I' complete-word
			print ready`, file, out)
		if err := os.WriteFile(file+".zsh", []byte(setUp), 0o600); err != nil {
			t.Fatal(err)
		}
		script(t, "zsh", "-f", "-c", `zmodload zsh/zpty
			zpty shell zsh -f -i
			zpty -w shell "source $1"
			until [[ $line == ready* ]]; do zpty -r shell line || exit 1; done
			zpty -w -n shell "leasehold $2"$'\t'
			while zpty -r shell line; do :; done`, "zsh", file+".zsh", line)
		text, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		all := strings.Fields(string(text))
		if len(all) == 0 || all[len(all)-1] != "end" {
			t.Fatalf("zsh did not complete %q: %q", line, text)
		}
		got[line] = all[:len(all)-1]
	}
	return got
}

func inFish(t *testing.T, file string) map[string][]string {
	got := map[string][]string{}
	for line := range completes {
		text := script(t, "fish", "--no-config", "-c",
			"source $argv[1]; complete -C \"leasehold $argv[2]\"", file, line)
		for match := range strings.Lines(text) {
			word, _, _ := strings.Cut(strings.TrimSpace(match), "\t")
			got[line] = append(got[line], word)
		}
	}
	return got
}
