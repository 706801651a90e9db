//go:build linux

package cli

import (
	"fmt"
	"io"
	"strings"

	"leasehold/config"
	"leasehold/health"
)

// An Entry is a row of a table in help, the man page and docs/reference.md.
type Entry struct{ Name, Meaning string }

// usage lists the commands.
func (p *Program) usage() []Entry {
	var list []Entry
	for _, c := range p.Commands() {
		list = append(list, Entry{c.Usage(), c.Summary})
	}
	return list
}

// JobVariables are the variables that the daemon adds to a job's environment.
func JobVariables() []Entry {
	return []Entry{
		{config.Prefix + "_ELECTION", "the election"},
		{config.Prefix + "_IDENTITY", "this candidate's name"},
		{config.Prefix + "_KEY", "this candidate's key in etcd"},
		{
			config.Prefix + "_FENCING_TOKEN",
			"the fencing token of this term: that key's create revision." +
				" A later term has a greater one",
		},
		{config.Prefix + "_LEASE_ID", "the lease, in hex"},
		{config.Prefix + "_REASON", "in hooks alone, why they run: start, stop or startup"},
		{"NOTIFY_SOCKET", "with LEASEHOLD_NOTIFY or LEASEHOLD_WATCHDOG: see sd_notify(3)"},
		{
			"WATCHDOG_USEC, WATCHDOG_PID",
			"with LEASEHOLD_WATCHDOG: that time in microseconds, and the pid of the job's first" +
				" process; see sd_watchdog_enabled(3)",
		},
	}
}

// jobEnvironment says what else a job finds in its environment.
const jobEnvironment = "The job gets the daemon's environment, without NOTIFY_SOCKET, WATCHDOG_*" +
	" and LEASEHOLD_*, but with LEASEHOLD_ENDPOINTS, LEASEHOLD_LISTEN and LEASEHOLD_TLS_*. So" +
	" leasehold status and leasehold check work in it. It also gets:"

// help runs the command help: it prints all help, or that of one command.
func (p *Program) help(c Call) error {
	text := p.helpText()
	if len(c.Args) == 1 {
		text = p.commandHelp(c.Args[0])
	}
	_, _ = io.WriteString(p.Stdout, text)
	return nil
}

// commandHelp is the text of `leasehold COMMAND --help`.
func (p *Program) commandHelp(name string) string {
	l := line{commands: p.Commands()}
	c, _ := l.find(name)
	var b strings.Builder
	b.WriteString("Usage: " + c.Usage() + "\n\n")
	b.WriteString(wrap(c.About(), "", helpWidth))
	b.WriteString("\nEvery command takes:\n")
	writeEntries(&b, GlobalFlags())
	b.WriteString("\nleasehold help names all variables and exit codes.\n")
	return b.String()
}

const helpWidth = 110

// helpText is the text of `leasehold help`.
func (p *Program) helpText() string {
	var b strings.Builder
	b.WriteString("leasehold keeps a job running on exactly one machine:" +
		" the leader of an election in etcd.\n\nUsage:\n")
	writeEntries(&b, p.usage())
	b.WriteString("\nEvery command takes:\n")
	writeEntries(&b, GlobalFlags())

	b.WriteString(`
Environment variables configure leasehold. A variable that is set to nothing counts as unset. An
unknown LEASEHOLD_* variable is refused. Durations have a unit: 15s, 500ms, 1m30s.

`)
	for _, v := range new(config.Config).Variables() {
		b.WriteString("  " + config.Prefix + "_" + v.Name)
		if v.Shown != "" {
			b.WriteString(" (" + v.Shown + ")")
		}
		b.WriteString("\n" + wrap(v.Desc, "      ", helpWidth))
	}

	b.WriteString("\n" + wrap(jobEnvironment, "", helpWidth))
	writeEntries(&b, JobVariables())

	b.WriteString("\nHealth endpoint, for GET, HEAD and OPTIONS; 200, or 503 with the reason:\n")
	for _, e := range health.Endpoints() {
		writeEntries(&b, []Entry{{e.Path, e.Meaning}})
	}

	b.WriteString("\nExit codes:\n")
	writeEntries(&b, p.ExitCodes)
	b.WriteString("\n" + wrap(p.LastWords, "", helpWidth))
	return b.String()
}

func writeEntries(b *strings.Builder, entries []Entry) {
	const width = 22
	for _, e := range entries {
		text := wrap(e.Meaning, strings.Repeat(" ", width+2), helpWidth)
		if len(e.Name) < width {
			fmt.Fprintf(b, "  %-*s%s", width, e.Name, strings.TrimLeft(text, " "))
		} else {
			fmt.Fprintf(b, "  %s\n%s", e.Name, text)
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
