//go:build linux

package cli

import (
	"fmt"
	"slices"
	"strings"

	"leasehold/config"
	"leasehold/internal/quote"
	"leasehold/internal/suggest"
)

// Parse finds the command that args call. --help and --version, which may stand anywhere before a
// --, are calls of help and version. The error is a *UsageError; the call has its Command then,
// where one was named.
func (p *Program) Parse(args []string) (Call, error) {
	line := line{commands: p.Commands()}
	if line.own = args; slices.Contains(args, "--") {
		i := slices.Index(args, "--")
		line.own, line.job, line.hasJob = args[:i], args[i+1:], true
	}
	call, hint := line.parse()
	if hint == "" {
		return call, nil
	}
	if call.Command.Name == "" {
		call.Command = line.named()
	}
	return call, &UsageError{Hint: hint}
}

// A line is a command line that is being parsed. Hints never show the job, or the value of a
// setting that may be a secret: standard error often ends up in a log.
type line struct {
	commands []Command
	own, job []string // before and after the first --
	hasJob   bool
}

func (l *line) find(name string) (Command, bool) {
	i := slices.IndexFunc(l.commands, func(c Command) bool { return c.Name == name })
	if i < 0 {
		return Command{}, false
	}
	return l.commands[i], true
}

// named is the command that the line names, also if a wrong flag or a setting stands before it.
func (l *line) named() Command {
	for i := 0; i < len(l.own); i++ {
		arg := l.own[i]
		c, found := l.find(arg)
		switch {
		case found:
			return c
		case arg == "-f":
			i++
		case strings.HasPrefix(arg, "-"), strings.Contains(arg, "="):
		case i > 0 && strings.HasPrefix(l.own[i-1], "-"): // the value of a wrong flag
		default:
			return Command{}
		}
	}
	return Command{}
}

// parse returns the call, or what is wrong with the line and, where it is known, its command.
func (l *line) parse() (call Call, hint string) {
	found, help := false, false
	for i := 0; i < len(l.own); i++ {
		switch arg := l.own[i]; {
		case call.Command.Job && len(call.Args) > 0:
			// What follows a command that stands before -- is that command's.
		case arg == "-f":
			if i++; i == len(l.own) || l.own[i] == "" {
				return call, "-f needs a file: leasehold -f FILE ..."
			}
			if call.EnvFile != "" {
				return call, "-f is given twice, but takes one file"
			}
			call.EnvFile = l.own[i]
		case arg == "-h" || arg == "--help":
			help = true
		case arg == "--version":
			version, _ := l.find("version")
			return Call{Command: version}, ""
		case slices.Contains(call.Command.Flags, arg):
			call.Flags = append(call.Flags, arg)
		case call.Command.takes(arg):
			option, value, assigned := strings.Cut(arg, "=")
			if !assigned {
				if i++; i < len(l.own) {
					value = l.own[i]
				}
			}
			if hint := call.set(option, value); hint != "" {
				return call, hint
			}
		case strings.HasPrefix(arg, "-"):
			return call, l.unknownFlag(call.Command, arg)
		case !found:
			if call.Command, found = l.find(arg); !found {
				return call, l.unknownCommand(arg)
			}
		case isSetting(arg):
			return call, settingHint(arg)
		default:
			call.Args = append(call.Args, arg)
		}
	}
	if help {
		name := call.Command.Name
		call = Call{}
		if call.Command, _ = l.find("help"); name != "" {
			call.Args = []string{name}
		}
		return call, ""
	}
	if !found {
		if len(l.own) == 0 && !l.hasJob {
			return call, "say what to run: leasehold -- COMMAND [ARG...]"
		}
		call.Command, _ = l.find("run")
	}
	call.Job, call.HasJob = l.job, l.hasJob
	return call, l.arguments(call)
}

// takes reports whether the argument is an option of the command, perhaps with its value.
func (c Command) takes(arg string) bool {
	option, _, _ := strings.Cut(arg, "=")
	return slices.Contains(c.Options, option)
}

// set keeps the value of an option, or says what is wrong with it.
func (c *Call) set(option, value string) string {
	if _, given := c.Options[option]; given {
		return option + " is given twice"
	}
	if value == "" {
		return option + " needs a value: " + c.Command.Usage()
	}
	if c.Options == nil {
		c.Options = map[string]string{}
	}
	c.Options[option] = value
	return ""
}

// arguments says what is wrong with the number and the kind of a call's arguments, or "".
func (l *line) arguments(call Call) string {
	c := call.Command
	switch {
	case c.Job && len(call.Args) > 0:
		return fmt.Sprintf("put -- before the command: leasehold run -- %s ...",
			shown(call.Args[0]))
	case c.Job && !l.hasJob:
		return "say what to run: leasehold run -- COMMAND [ARG...]"
	case (c.Job || c.MayJob && l.hasJob) && len(l.job) == 0:
		return "there is no command after --: leasehold -- COMMAND [ARG...]"
	case !c.Job && !c.MayJob && l.hasJob:
		return fmt.Sprintf("%s runs no job: %s, or leasehold -- COMMAND [ARG...]",
			c.Name, c.Usage())
	case slices.Contains(call.Args, ""):
		return "an argument is empty: " + c.Usage()
	case len(call.Args) < c.Min:
		return "an argument is missing: " + c.Usage()
	case len(call.Args) > c.Max && c.Max == 0:
		return c.Name + " takes no argument"
	case len(call.Args) > c.Max:
		return c.Name + " takes one argument: " + c.Usage()
	}
	if c.Words == nil || len(call.Args) == 0 || slices.Contains(c.Words, call.Args[0]) {
		return ""
	}
	hint := fmt.Sprintf("%s does not take %s", c.Name, shown(call.Args[0]))
	if near := suggest.Nearest(call.Args[0], c.Words); near != "" {
		return hint + ": did you mean " + near + "?"
	}
	return hint + ", but " + strings.Join(c.Words, ", ")
}

// shown is an argument as a hint shows it: what follows a = may be a secret.
func shown(arg string) string {
	name, _, assigned := strings.Cut(arg, "=")
	if assigned {
		return quote.Word(name) + "=..."
	}
	return quote.Word(arg)
}

// unknownCommand is the hint for a line whose first word is no command.
func (l *line) unknownCommand(word string) string {
	if hint := settingHint(word); hint != "" {
		return hint
	}
	hint := "no such command " + quote.Value(word)
	if near := suggest.Nearest(word, commandNames[:]); near != "" {
		hint += ": did you mean " + near + "?"
	} else {
		hint += ": the commands are " + strings.Join(commandNames[:], ", ") + "."
	}
	return hint + " To run a job of that name: leasehold -- " + quote.Word(word) + " ..."
}

// unknownFlag is the hint for a flag that c does not take, or that no command takes if c is none.
func (l *line) unknownFlag(c Command, flag string) string {
	name, _, assigned := strings.Cut(flag, "=")
	valueless := append([]string{"-h", "--help", "--version"}, c.Flags...)
	named := l.named()
	switch {
	case name == "-v" || name == "-V":
		return "no such flag " + name + ": did you mean --version?"
	case name == "-f" || name == "--file" || name == "--env-file":
		return "-f FILE reads an env file: leasehold -f FILE ..."
	case assigned && slices.Contains(valueless, name):
		return name + " takes no value"
	case c.Name == "" && (slices.Contains(named.Flags, flag) || named.takes(flag)):
		return fmt.Sprintf("write %s after %s: %s", name, named.Name, named.Usage())
	}
	near := suggest.Nearest(name,
		slices.Concat([]string{"--help", "--version"}, c.Flags, c.Options))
	if near != "" {
		return fmt.Sprintf("no such flag %s: did you mean %s?", quote.Word(name), near)
	}
	return settingHint(flag)
}

// isSetting reports whether an argument is NAME=value with the name of a variable, or begins as a
// variable does.
func isSetting(arg string) bool {
	name, _, assigned := strings.Cut(arg, "=")
	return strings.HasPrefix(arg, config.Prefix+"_") ||
		assigned && slices.Contains(settings(), name)
}

func settings() []string {
	var names []string
	for _, v := range new(config.Config).Variables() {
		names = append(names, v.Name)
	}
	return names
}

// settingHint says how to write an argument that looks like a setting (--ttl 5s, --ttl=5s, TTL=15),
// or returns "". It shows a value only if the name is right, and the value is short and no secret.
func settingHint(arg string) string {
	flag := strings.HasPrefix(arg, "-")
	name, value, assigned := strings.Cut(strings.TrimLeft(arg, "-"), "=")
	if !flag && !assigned && !isSetting(arg) {
		return ""
	}
	setting := strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
	setting = strings.TrimPrefix(setting, config.Prefix+"_")
	known := settings()
	guessed := !slices.Contains(known, setting)
	if guessed {
		setting = suggest.Nearest(setting, known)
	}
	what := fmt.Sprintf("no such flag %s, and settings are environment variables",
		quote.Word(strings.TrimSuffix(arg, "="+value)))
	if !flag {
		what = "settings are environment variables, not arguments"
	}
	switch {
	case setting == "":
		return what + ": leasehold help names all variables"
	case !assigned:
		return fmt.Sprintf("%s: set the variable %s_%s", what, config.Prefix, setting)
	case guessed, setting == "PASSWORD", setting == "ENDPOINTS", value != quote.Word(value):
		return fmt.Sprintf("%s: write %s_%s=... before the command", what, config.Prefix, setting)
	}
	hint := ""
	for _, v := range new(config.Config).Variables() {
		_, timed := v.Field.Addr().Interface().(*config.Duration)
		if v.Name == setting && timed && config.MissesUnit(value) {
			hint = fmt.Sprintf(" (%s has no unit: write %ss)", value, value)
			value += "s"
		}
	}
	return fmt.Sprintf("%s: write %s_%s=%s before the command%s",
		what, config.Prefix, setting, value, hint)
}
