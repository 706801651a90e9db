//go:build linux

package app

import (
	"fmt"
	"slices"
	"strings"

	"leasehold/config"
	"leasehold/health"
	"leasehold/internal/quote"
)

// An entry is a row of a table in help and in docs/reference.md.
type entry struct{ name, meaning string }

func subcommands() []entry {
	return []entry{
		{"leasehold -- COMMAND [ARG...]", "run COMMAND while leading (also: leasehold run -- COMMAND)"},
		{"leasehold elect", "campaign and report, no job (sidecar). An app that asks /leader must have stopped within LEASEHOLD_LOSS_GRACE of its last request that got 200 (poll interval + time to stop <= LEASEHOLD_LOSS_GRACE <= LEASEHOLD_STOP_GRACE)"},
		{"leasehold status [--json]", "the election as etcd has it: leader, token, lease time left, queue"},
		{"leasehold check [live|ready|leader|standby]", "ask the local daemon at LEASEHOLD_LISTEN (live if nothing is named)"},
		{"leasehold install DEST", "copy this binary to DEST, a directory or a file: for an init container, which has no cp"},
		{"leasehold version", "print the version"},
		{"leasehold help", "print this"},
	}
}

// lastWords is what help and docs/reference.md say of the termination message.
const lastWords = "Unless the code is 0, the faults of the configuration or the last error are also written to " + terminationLog +
	", which Kubernetes shows in the pod's status. The file is never made, and what a job wrote there itself is left as it is."

func jobVariables() []entry {
	return []entry{
		{config.Prefix + "_ELECTION", "the election"},
		{config.Prefix + "_IDENTITY", "this candidate's name"},
		{config.Prefix + "_KEY", "this candidate's key in etcd"},
		{config.Prefix + "_FENCING_TOKEN", "the fencing token of this term: that key's create revision. A later term has a greater one"},
		{config.Prefix + "_LEASE_ID", "the lease, in hex"},
	}
}

// help is the text of `leasehold help`.
func help() string {
	var b strings.Builder
	b.WriteString("leasehold keeps a job running on exactly one machine: the leader of an election in etcd.\n\nUsage:\n")
	writeEntries(&b, subcommands())

	b.WriteString("\nConfiguration is the environment. A variable that is set to nothing counts as unset; an unknown LEASEHOLD_*\n" +
		"variable is refused. Durations have a unit: 15s, 500ms, 1m30s.\n\n")
	for _, v := range new(config.Config).Variables() {
		b.WriteString("  " + config.Prefix + "_" + v.Name)
		if v.Shown != "" {
			b.WriteString(" (" + v.Shown + ")")
		}
		b.WriteString("\n" + wrap(v.Desc, "      ", 110))
	}

	b.WriteString("\nThe job's environment is the daemon's, less every LEASEHOLD_*, NOTIFY_SOCKET and WATCHDOG_*, plus:\n")
	writeEntries(&b, jobVariables())

	b.WriteString("\nHealth endpoint, for GET, HEAD and OPTIONS; 200, or 503 with the reason:\n")
	for _, e := range health.Endpoints() {
		writeEntries(&b, []entry{{e.Path, e.Meaning}})
	}

	b.WriteString("\nExit codes:\n")
	writeEntries(&b, exitCodes())
	b.WriteString("\n" + wrap(lastWords, "", 110))
	return b.String()
}

func writeEntries(b *strings.Builder, entries []entry) {
	const width = 22
	for _, e := range entries {
		text := wrap(e.meaning, strings.Repeat(" ", width+2), 110)
		if len(e.name) < width {
			fmt.Fprintf(b, "  %-*s%s", width, e.name, strings.TrimLeft(text, " "))
		} else {
			fmt.Fprintf(b, "  %s\n%s", e.name, text)
		}
	}
}

// wrap breaks text into lines that begin with indent and end before width.
func wrap(text, indent string, width int) string {
	var b strings.Builder
	line := indent
	for _, word := range strings.Fields(text) {
		if len(line) > len(indent) {
			if len(line)+1+len(word) > width {
				b.WriteString(line + "\n")
				line = indent
			} else {
				line += " "
			}
		}
		line += word
	}
	return b.String() + line + "\n"
}

// usageHint is what a user reads whose command line is wrong.
func usageHint(args []string) string {
	return "leasehold: " + likelyMeant(args) + "\n"
}

// likelyMeant says what the user of a wrong command line most likely meant. The words after the first -- are never shown, nor is
// any value of a setting that may be a secret: standard error often ends up in a log.
func likelyMeant(args []string) string {
	if len(args) == 0 {
		return "say what to run: leasehold -- COMMAND [ARG...]"
	}
	own, hasJob := args, false
	if i := slices.Index(args, "--"); i >= 0 {
		own, hasJob = args[:i], true
	}
	all := []string{"run", "elect", "status", "check", "install", "version", "help"}
	for _, arg := range own {
		if hint := settingHint(arg); hint != "" {
			return hint
		}
		if arg != "--json" && !slices.Contains(all, arg) {
			break // What follows belongs to a command.
		}
	}
	first := ""
	if len(own) > 0 {
		first = own[0]
	}
	switch {
	case len(own) == 0, first == "run" && len(own) == 1 && hasJob:
		return "there is no command after --: leasehold -- COMMAND [ARG...]"
	case first == "run" && len(own) == 1:
		return "say what to run: leasehold run -- COMMAND [ARG...]"
	case first == "run":
		return fmt.Sprintf("put -- before the command: leasehold run -- %s ...", quote.Word(own[1]))
	case first == "elect" && hasJob:
		return "elect runs no job: leasehold elect, or leasehold -- COMMAND [ARG...]"
	case first == "check" && len(own) > 1:
		if what := config.Nearest(own[1], health.Checks()); what != "" && what != own[1] {
			return fmt.Sprintf("check can't ask for %s: did you mean %s?", quote.Word(own[1]), what)
		}
		return "check asks for one thing: " + strings.Join(health.Checks(), ", ")
	case first == "status" && len(own) > 1:
		return "status takes --json and nothing else"
	case first == "install":
		return "install takes one thing, a directory or a file to copy leasehold to: leasehold install DEST"
	case slices.Contains(all, first):
		return first + " takes nothing more"
	case len(own) == 1 && config.Nearest(first, all) != "" && !hasJob:
		return fmt.Sprintf("%s is no subcommand: did you mean %s? To run a command of that name: leasehold -- %s",
			quote.Word(first), config.Nearest(first, all), quote.Word(first))
	case hasJob:
		return fmt.Sprintf("%s is no subcommand: to run a job, begin with --: leasehold -- COMMAND [ARG...]", quote.Word(first))
	default:
		return fmt.Sprintf("put -- before the command: leasehold -- %s ...", quote.Word(first))
	}
}

// settingHint says how to write an argument that looks like a setting (--ttl 5s, --ttl=5s, TTL=15), or returns "".
func settingHint(arg string) string {
	flag := strings.HasPrefix(arg, "-")
	name, value, assigned := strings.Cut(strings.TrimLeft(arg, "-"), "=")
	switch {
	case !flag && !assigned, arg == "--json":
		return ""
	case flag && slices.Contains([]string{"h", "help"}, name):
		return "leasehold help prints the help"
	case flag && slices.Contains([]string{"v", "V", "version"}, name):
		return "leasehold version prints the version"
	}
	setting := strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
	setting = strings.TrimPrefix(setting, config.Prefix+"_")
	var known []string
	for _, v := range new(config.Config).Variables() {
		known = append(known, v.Name)
	}
	if !slices.Contains(known, setting) {
		setting = config.Nearest(setting, known)
	}
	what := "there are no flags but status --json"
	if !flag {
		what = "settings are environment variables, not arguments"
	}
	switch {
	case setting == "":
		return what + ": leasehold help names all variables"
	case !assigned:
		return fmt.Sprintf("%s: set the variable %s_%s", what, config.Prefix, setting)
	case setting == "PASSWORD" || setting == "ENDPOINTS" || strings.ContainsFunc(value, quote.IsShellSyntax):
		return fmt.Sprintf("%s: write %s_%s=... before the command", what, config.Prefix, setting)
	}
	hint := ""
	for _, v := range new(config.Config).Variables() {
		if _, timed := v.Field.Addr().Interface().(*config.Duration); v.Name == setting && timed && config.MissesUnit(value) {
			hint = fmt.Sprintf(" (%s has no unit: write %ss)", value, value)
			value += "s"
		}
	}
	return fmt.Sprintf("%s: write %s_%s=%s before the command%s", what, config.Prefix, setting, value, hint)
}
