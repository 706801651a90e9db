//go:build linux

package cli

import (
	"fmt"
	"strings"

	"leasehold/config"
	"leasehold/health"
)

// Manual is the man page, without its date and version: `make dist` puts them between the quotes of
// the first lines.
func (p *Program) Manual() string {
	var b strings.Builder
	b.WriteString(`.TH LEASEHOLD 1 "" "leasehold"
.SH NAME
leasehold \- keep a job running on exactly one machine
.SH SYNOPSIS
.nf
`)
	for _, c := range p.Commands() {
		b.WriteString(roff(c.Usage()) + "\n")
	}
	b.WriteString(`.fi
.SH DESCRIPTION
Each machine runs leasehold with the same election and the same command.
They campaign for the election in etcd.
The leader runs the command, and kills all of it before its lease can pass to another machine.
.SH COMMANDS
`)
	for _, c := range p.Commands() {
		tagged(&b, []Entry{{c.Usage(), c.About()}})
	}
	b.WriteString(".SH OPTIONS\nEvery command takes:\n")
	tagged(&b, GlobalFlags())
	b.WriteString(`.SH ENVIRONMENT
Environment variables configure leasehold.
A variable that is set to nothing counts as unset.
An unknown LEASEHOLD_* variable is refused.
Durations have a unit: 15s, 500ms, 1m30s.
`)
	for _, v := range new(config.Config).Variables() {
		name := config.Prefix + "_" + v.Name
		if v.Shown != "" {
			name += " (" + v.Shown + ")"
		}
		tagged(&b, []Entry{{name, v.Desc}})
	}
	b.WriteString(".SS The environment of the job\n" + roff(jobEnvironment) + "\n")
	tagged(&b, JobVariables())
	b.WriteString(`.SH HEALTH ENDPOINT
At LEASEHOLD_LISTEN, for GET, HEAD and OPTIONS; 200, or 503 with the reason:
`)
	for _, e := range health.Endpoints() {
		tagged(&b, []Entry{{e.Path, e.Meaning}})
	}
	b.WriteString(`.SH SIGNALS
TERM and INT stop the job and hand over; a second one kills the job at once.
HUP, USR1, USR2, WINCH and QUIT go to the job's first process.
RTMIN+1 is what leasehold reload sends.
A terminal that hangs up stops the daemon as TERM does, unless HUP was ignored (nohup).
HUP, INT and QUIT that were ignored at the start stay ignored, by the job too.
.SH EXIT STATUS
`)
	tagged(&b, p.ExitCodes)
	b.WriteString(`.SH FILES
.TP
.I /etc/leasehold/NAME.env
Variables and command of the systemd unit leasehold@NAME.service.
.SH SEE ALSO
.BR etcdctl (1)
`)
	return b.String()
}

func tagged(b *strings.Builder, entries []Entry) {
	for _, e := range entries {
		fmt.Fprintf(b, ".TP\n.B %s\n%s\n", roff(e.Name), roff(e.Meaning))
	}
}

// roff quotes text for roff: nothing in it is a request, and lines do not break at its hyphens.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}
