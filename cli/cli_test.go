//go:build linux

package cli

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"leasehold/config"
)

func newTestProgram(stdout *bytes.Buffer) *Program {
	return &Program{
		Version: "1.2", Built: "yesterday", Stdout: stdout,
		ExitCodes: []Entry{{"64", "wrong usage"}}, LastWords: "The last words.",
	}
}

func TestCommands_NamesAreListed(t *testing.T) {
	var names []string
	for _, c := range newTestProgram(nil).Commands() {
		names = append(names, c.Name)
		if c.Summary == "" || strings.HasSuffix(c.Summary, ".") || c.Run == nil {
			t.Errorf("%s: summary %q", c.Name, c.Summary)
		}
	}
	if !slices.Equal(names, commandNames[:]) {
		t.Errorf("commandNames are %q, want %q", commandNames, names)
	}
}

func TestParse(t *testing.T) {
	command := func(name string) Command { return Command{Name: name} }
	run, elect, status := command("run"), command("elect"), command("status")
	check, install := command("check"), command("install")
	version, help, reload := command("version"), command("help"), command("reload")
	for args, want := range map[string]Call{
		"-- x -f y --help": {Command: run, Job: []string{"x", "-f", "y", "--help"}},
		"run -- x -- y":    {Command: run, Job: []string{"x", "--", "y"}},
		"-f FILE -- x":     {Command: run, EnvFile: "FILE", Job: []string{"x"}},
		"run -f FILE -- x": {Command: run, EnvFile: "FILE", Job: []string{"x"}},
		"elect":            {Command: elect},
		"elect -f FILE":    {Command: elect, EnvFile: "FILE"},
		"-f FILE status":   {Command: status, EnvFile: "FILE"},
		"status --json jobs/a": {
			Command: status, Flags: []string{"--json"}, Args: []string{"jobs/a"},
		},
		"status jobs/a=b -f X --json": {
			Command: status, EnvFile: "X", Flags: []string{"--json"}, Args: []string{"jobs/a=b"},
		},
		"check":            {Command: check},
		"check leader":     {Command: check, Args: []string{"leader"}},
		"install /dest":    {Command: install, Args: []string{"/dest"}},
		"reload 7":         {Command: reload, Args: []string{"7"}},
		"reload 7 -- x y":  {Command: reload, Args: []string{"7"}, Job: []string{"x", "y"}},
		"version":          {Command: version},
		"--version":        {Command: version},
		"status --version": {Command: version},
		"help":             {Command: help},
		"-h":               {Command: help},
		"--help":           {Command: help},
		"--help status":    {Command: help, Args: []string{"status"}},
		"status --help":    {Command: help, Args: []string{"status"}},
		"run -h -- x":      {Command: help, Args: []string{"run"}},
		"install -h":       {Command: help, Args: []string{"install"}},
		"help check":       {Command: help, Args: []string{"check"}},
	} {
		got, err := newTestProgram(nil).Parse(strings.Fields(args))
		if err != nil || got.Command.Name != want.Command.Name || got.EnvFile != want.EnvFile ||
			!slices.Equal(got.Args, want.Args) || !slices.Equal(got.Flags, want.Flags) ||
			!slices.Equal(got.Job, want.Job) {
			t.Errorf("leasehold %s: %+v, %v", args, got, err)
		}
	}
}

func TestParse_Hints(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", "say what to run: leasehold -- COMMAND"},
		{"--", "there is no command after --"},
		{"run", "say what to run"},
		{"run --", "there is no command after --"},
		{"-f FILE", "say what to run"},
		{"-f FILE --", "there is no command after --"},
		{"-f", "-f needs a file"},
		{"status -f", "-f needs a file"},
		{"-f a status -f b", "-f is given twice"},
		{"run backup.sh -x", "put -- before the command: leasehold run -- backup.sh ..."},
		{"run backup.sh", "put -- before the command: leasehold run -- backup.sh ..."},
		{"backup.sh --ttl 5s", `no such command "backup.sh": the commands are run, elect, `},
		{"backup.sh --ttl 5s", "To run a job of that name: leasehold -- backup.sh ..."},
		{"backup.sh -- x", "leasehold -- backup.sh ..."},
		{"--ttl 5s -- backup.sh", "LEASEHOLD_TTL"},
		{
			"-ttl=5 -- backup.sh",
			"write LEASEHOLD_TTL=5s before the command (5 has no unit: write 5s)",
		},
		{"run --ttl=5s -- backup.sh", "write LEASEHOLD_TTL=5s before the command"},
		{
			"TTL=15 -- backup.sh",
			"write LEASEHOLD_TTL=15s before the command (15 has no unit: write 15s)",
		},
		{"LEASEHOLD_TTL=15 -- backup.sh", "write 15s"},
		{"elect TTL=15", "write 15s"},
		{"--tls-ca-file=/ca -- x", "write LEASEHOLD_TLS_CA_FILE=/ca before"},
		{"--endpoint=http://u:hunter2@a:1 -- x", "write LEASEHOLD_ENDPOINTS=... before"},
		{"--password=hunter2 -- x", "write LEASEHOLD_PASSWORD=... before"},
		{"PASSWORD=hunter2 -- x", "write LEASEHOLD_PASSWORD=... before"},
		{"status PASSWORD=hunter2", "write LEASEHOLD_PASSWORD=... before"},
		{"--password hunter2 -- x", "LEASEHOLD_PASSWORD"},
		{"--wat=hunter2 -- x", "write LEASEHOLD_WAIT=... before"},
		{"run PASWORD=hunter2 -- x", "leasehold run -- PASWORD=... ..."},
		{"check PASWORD=hunter2", "check does not take PASWORD=..., but"},
		{"--passwd=hunter2 -- x", "LEASEHOLD_PASSWORD"},
		{"--token=hunter2 -- x", "leasehold help names all variables"},
		{"FOO=hunter2 -- x", "leasehold help names all variables"},
		{"--token=hunter2 -- x", "no such flag --token, and settings"},
		{
			"--to x -- y",
			"no such flag --to, and settings are environment variables: leasehold help",
		},
		{
			"--watch -- y",
			"no such flag --watch, and settings are environment variables: ",
		},
		{"-f=x -- y", "-f FILE reads an env file"},
		{"--file x -- y", "-f FILE reads an env file"},
		{"--env-file=x -- y", "-f FILE reads an env file"},
		{"--json status", "write --json after status: leasehold status [ELECTION] [--json]"},
		{"--help=x", "--help takes no value"},
		{"status --json=x", "--json takes no value"},
		{"status LEASEHOLD_X=hunter2", "settings are environment variables, not arguments"},
		{"status LEASEHOLD_TTL", "set the variable LEASEHOLD_TTL"},
		{"statsu", `no such command "statsu": did you mean status?` +
			" To run a job of that name: leasehold -- statsu"},
		{"resign", `no such command "resign"`},
		{"status --jsn", "no such flag --jsn: did you mean --json?"},
		{"--vesion", "no such flag --vesion: did you mean --version?"},
		{"-v", "no such flag -v: did you mean --version?"},
		{"elect --json", "no such flag"},
		{"status a b", "status takes one argument: leasehold status [ELECTION] [--json]"},
		{"elect x", "elect takes no argument"},
		{"elect -- x", "elect runs no job: leasehold elect, or leasehold -- COMMAND"},
		{"check lead", "check does not take lead: did you mean leader?"},
		{"check qwertyuiop", "but live, ready, leader, standby"},
		{"check live ready", "check takes one argument"},
		{"install", "an argument is missing: leasehold install DEST"},
		{"reload", "an argument is missing: leasehold reload [--env] PID"},
		{"reload 7 8", "reload takes one argument: leasehold reload [--env] PID"},
		{"reload 7 --", "there is no command after --"},
		{"install a b", "install takes one argument: leasehold install DEST"},
		{"version x", "version takes no argument"},
		{"help statsu", "help does not take statsu: did you mean status?"},
		{"\x1b[2J", `leasehold -- $'\x1b[2J'`},
	} {
		call, err := newTestProgram(nil).Parse(strings.Fields(c.args))
		var usage *UsageError
		if !errors.As(err, &usage) {
			t.Errorf("leasehold %s: %+v, %v", c.args, call, err)
			continue
		}
		got := usage.Error()
		if !strings.Contains(got, c.want) || strings.Contains(got, "hunter2") ||
			strings.Contains(got, "\n") {
			t.Errorf("leasehold %s: %q, want %q", c.args, got, c.want)
		}
	}
}

// TestParse_FaultKeepsCommand: whoever reports the fault must know that a probe runs the command.
func TestParse_FaultKeepsCommand(t *testing.T) {
	for args, want := range map[string]string{
		"--jsn status":         "status",
		"-f a -f b check":      "check",
		"--ttl 5s status":      "status",
		"TTL=5s check":         "check",
		"status --jsn":         "status",
		"-f status -x":         "",
		"backup.sh status":     "",
		"-f a backup.sh check": "",
		"--ttl 5s":             "",
	} {
		call, err := newTestProgram(nil).Parse(strings.Fields(args))
		if err == nil || call.Command.Name != want {
			t.Errorf("leasehold %s: command %q, want %q; %v", args, call.Command.Name, want, err)
		}
	}
}

func TestParse_EmptyArgument(t *testing.T) {
	for _, args := range [][]string{{"install", ""}, {"status", ""}, {"check", ""}, {"help", ""}} {
		_, err := newTestProgram(nil).Parse(args)
		var usage *UsageError
		want := "an argument is empty: leasehold " + args[0]
		if !errors.As(err, &usage) || !strings.HasPrefix(usage.Hint, want) {
			t.Errorf("leasehold %q: %v, want %q", args, err, want)
		}
	}
}

func TestHelp_NamesEverything(t *testing.T) {
	var out bytes.Buffer
	p := newTestProgram(&out)
	call, err := p.Parse([]string{"--help"})
	if err != nil {
		t.Fatal(err)
	}
	if err := call.Command.Run(call); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, v := range new(config.Config).Variables() {
		if !strings.Contains(text, "LEASEHOLD_"+v.Name+" (") &&
			!strings.Contains(text, "LEASEHOLD_"+v.Name+"\n") {
			t.Errorf("LEASEHOLD_%s is missing", v.Name)
		}
		if v.Desc == "" || v.Default != "" && v.Shown != v.Default {
			t.Errorf("%s: description %q, default %q shown as %q",
				v.Name, v.Desc, v.Default, v.Shown)
		}
	}
	for _, e := range slices.Concat(p.usage(), GlobalFlags(), p.ExitCodes, JobVariables()) {
		if !strings.Contains(text, "  "+e.Name) {
			t.Errorf("%s is missing", e.Name)
		}
	}
	for line := range strings.Lines(text) {
		if len(line) > helpWidth+1 {
			t.Errorf("longer than %d letters: %s", helpWidth, line)
		}
	}
}

func TestHelp_OfEachCommand(t *testing.T) {
	for _, name := range commandNames {
		var out bytes.Buffer
		call, err := newTestProgram(&out).Parse([]string{name, "--help"})
		if err != nil {
			t.Fatal(err)
		}
		if err := call.Command.Run(call); err != nil {
			t.Fatal(err)
		}
		if text := out.String(); !strings.HasPrefix(text, "Usage: leasehold ") ||
			!strings.Contains(text, name) {
			t.Errorf("help of %s: %s", name, text)
		}
	}
}
