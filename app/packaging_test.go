//go:build linux

package app

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"leasehold/config"
	"leasehold/health"
)

const manPage, bashCompletion = "../packaging/leasehold.1", "../packaging/leasehold.bash"

// TestManual: the man page says what `leasehold help` says. With -update it is written.
func TestManual(t *testing.T) { generated(t, filepath.FromSlash(manPage), manual()) }

// TestCompletion: the shell completes the words that the command line takes. With -update it is written.
func TestCompletion(t *testing.T) { generated(t, filepath.FromSlash(bashCompletion), completion()) }

// manual is the man page, without its date and version: `make dist` puts them between the quotes of the first lines.
func manual() string {
	var b strings.Builder
	b.WriteString(`.\" Written from the code by go test -run TestManual ./app -update
.TH LEASEHOLD 1 "" "leasehold"
.SH NAME
leasehold \- keep a job running on exactly one machine
.SH SYNOPSIS
.nf
`)
	for _, e := range subcommands() {
		b.WriteString(roff(e.name) + "\n")
	}
	b.WriteString(`.fi
.SH DESCRIPTION
Each machine runs leasehold with the same election and the same command.
The leader of the election, in etcd, runs the command as its child, and kills all of it before its lease can pass to another.
.SH COMMANDS
`)
	tagged(&b, subcommands())
	b.WriteString(`.SH ENVIRONMENT
Configuration is the environment.
A variable that is set to nothing counts as unset; an unknown LEASEHOLD_* variable is refused.
Durations have a unit: 15s, 500ms, 1m30s.
`)
	for _, v := range new(config.Config).Variables() {
		name := config.Prefix + "_" + v.Name
		if v.Shown != "" {
			name += " (" + v.Shown + ")"
		}
		tagged(&b, []entry{{name, v.Desc}})
	}
	b.WriteString(".SS The environment of the job\nThe daemon's own, less every LEASEHOLD_*, NOTIFY_SOCKET and WATCHDOG_*, plus:\n")
	tagged(&b, jobVariables())
	b.WriteString(".SH HEALTH ENDPOINT\nAt LEASEHOLD_LISTEN, for GET, HEAD and OPTIONS; 200, or 503 with the reason:\n")
	for _, e := range health.Endpoints() {
		tagged(&b, []entry{{e.Path, e.Meaning}})
	}
	b.WriteString(`.SH SIGNALS
TERM and INT stop the job and hand over; a second one kills the job at once.
HUP, USR1, USR2, WINCH and QUIT go to the job's first process.
A terminal that hangs up stops the daemon as TERM does, unless HUP was ignored (nohup).
HUP, INT and QUIT that were ignored at the start stay ignored, by the job too.
.SH EXIT STATUS
`)
	tagged(&b, exitCodes())
	b.WriteString(`.SH FILES
.TP
.I /etc/leasehold/NAME.env
Variables and command of the systemd unit leasehold@NAME.service.
.SH SEE ALSO
.BR etcdctl (1)
`)
	return b.String()
}

func tagged(b *strings.Builder, entries []entry) {
	for _, e := range entries {
		fmt.Fprintf(b, ".TP\n.B %s\n%s\n", roff(e.name), roff(e.meaning))
	}
}

// roff writes text so that roff takes none of it for an order, and no hyphen for one at which words are broken.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}

// words takes the command line's words from its own description: what can be first, and what can follow; "FILE" stands for a path.
func words() (first []string, next map[string]string) {
	next = map[string]string{}
	for _, e := range subcommands() {
		fields := strings.Fields(e.name)[1:]
		first = append(first, fields[0])
		if also := regexp.MustCompile(`also: leasehold (\w+) --`).FindStringSubmatch(e.meaning); also != nil {
			first = append(first, also[1])
			next[also[1]] = "--"
		}
		switch {
		case len(fields) == 1 || fields[0] == "--":
		case strings.HasPrefix(fields[1], "["):
			next[fields[0]] = strings.ReplaceAll(strings.Trim(fields[1], "[]"), "|", " ")
		default:
			next[fields[0]] = "FILE"
		}
	}
	return first, next
}

// completion is the completion for bash.
func completion() string {
	first, next := words()
	var b strings.Builder
	fmt.Fprintf(&b, `# bash completion for leasehold. Written from the code by: go test -run TestCompletion ./app -update

_leasehold() {
    local word=${COMP_WORDS[COMP_CWORD]} i choices=
    COMPREPLY=()
    # What follows -- is a command line of its own.
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${COMP_WORDS[i]} == -- ]] || continue
        if declare -F _command_offset >/dev/null; then
            _command_offset $((i + 1))
        elif ((COMP_CWORD == i + 1)); then
            mapfile -t COMPREPLY < <(compgen -c -- "$word")
        else
            compopt -o default
        fi
        return
    done
    if ((COMP_CWORD == 1)); then
        choices='%s'
    elif ((COMP_CWORD == 2)); then
        case ${COMP_WORDS[1]} in
`, strings.Join(first, " "))
	for _, name := range first {
		switch next[name] {
		case "":
		case "FILE":
			fmt.Fprintf(&b, "        %s) compopt -o default ;;\n", name)
		default:
			fmt.Fprintf(&b, "        %s) choices='%s' ;;\n", name, next[name])
		}
	}
	b.WriteString(`        esac
    fi
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
}
complete -F _leasehold leasehold
`)
	return b.String()
}

// TestCompletion_Bash asks bash.
func TestCompletion_Bash(t *testing.T) {
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("skipped: needs bash")
	}
	first, _ := words()
	for line, want := range map[string]string{
		"":                 strings.Join(first, " "),
		"st":               "status",
		"-":                "--",
		"check ":           strings.Join(health.Checks(), " "),
		"check l":          "live leader",
		"status -":         "--json",
		"run ":             "--",
		"version ":         "",
		"check live r":     "",
		"-- unshar":        "unshare",
		"run -- unshar":    "unshare",
		"-- unshare check": "",
	} {
		cmd := exec.Command("bash", "--norc", "-c", `source "$1"
			compopt() { :; } # it works only while bash completes at a prompt
			read -ra COMP_WORDS <<<"leasehold $2"
			[[ $2 == *' ' || -z $2 ]] && COMP_WORDS+=('')
			COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
			_leasehold
			printf '%s\n' "${COMPREPLY[@]}"`, "bash", bashCompletion, line)
		var complaint bytes.Buffer
		cmd.Stderr = &complaint
		out, err := cmd.Output()
		if err != nil || complaint.Len() > 0 {
			t.Fatalf("leasehold %s<TAB>: %v %s", line, err, &complaint)
		}
		got, all := strings.Fields(string(out)), strings.Fields(want)
		slices.Sort(got)
		slices.Sort(all)
		if got = slices.Compact(got); !slices.Equal(got, all) { // A command can be in two folders of PATH.
			t.Errorf("leasehold %s<TAB>: %q, want %q", line, got, all)
		}
	}
}
