//go:build linux

package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// Shells are those for which there is a completion.
func Shells() []string { return []string{"bash", "zsh", "fish"} }

// completion prints the completion for a shell.
func (p *Program) completion(c Call) error {
	_, err := io.WriteString(p.Stdout, p.Completion(c.Args[0]))
	if err != nil {
		err = &printError{err}
	}
	return err
}

// Completion is the completion for one of Shells.
func (p *Program) Completion(shell string) string {
	switch shell {
	case "zsh":
		return p.zshCompletion()
	case "fish":
		return p.fishCompletion()
	}
	return p.bashCompletion()
}

// choices are the words that may follow the command.
func (c Command) choices() []string {
	if c.Job {
		return []string{"--"}
	}
	return c.Words
}

// valued lists the flags that take a value, those of every command too.
func (p *Program) valued() []string {
	all := []string{"-f"}
	for _, c := range p.Commands() {
		all = append(all, c.Options...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// cases are those of a case statement of bash and zsh: they set choices and flags of each command.
// files is what completes a path.
func (p *Program) cases(files string) string {
	var b strings.Builder
	for _, c := range p.Commands() {
		var sets []string
		if choices := c.choices(); len(choices) > 0 {
			sets = append(sets, "choices='"+strings.Join(choices, " ")+"'")
		}
		if flags := slices.Concat(c.Flags, c.Options); len(flags) > 0 {
			sets = append(sets, "flags='"+strings.Join(flags, " ")+"'")
		}
		if c.Files {
			sets = append(sets, files)
		}
		if len(sets) > 0 {
			fmt.Fprintf(&b, "    %s) %s ;;\n", c.Name, strings.Join(sets, "; "))
		}
	}
	return b.String()
}

func (p *Program) bashCompletion() string {
	return strings.NewReplacer(
		"VALUED", strings.Join(p.valued(), "|"), "COMMANDS", strings.Join(commandNames[:], " "),
		"CASES\n", p.cases("compopt -o default"),
	).Replace(`_leasehold() {
    local word=${COMP_WORDS[COMP_CWORD]} command= words=0 i choices= flags=
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
        --) # What follows is a command line of its own.
            if declare -F _command_offset >/dev/null; then
                _command_offset $((i + 1))
            elif ((COMP_CWORD == i + 1)); then
                mapfile -t COMPREPLY < <(compgen -c -- "$word")
            else
                compopt -o default
            fi
            return
            ;;
        VALUED) ((++i)) ;;
        -*) ;;
        *)
            command=${command:-${COMP_WORDS[i]}}
            ((++words))
            ;;
        esac
    done
    if ((i > COMP_CWORD)); then # a value
        [[ ${COMP_WORDS[COMP_CWORD - 1]} != -f ]] || compopt -o default
        return
    fi
    case $command in
    '')
        choices='-- COMMANDS'
        flags=--version
        ;;
CASES
    esac
    ((words < 2)) || choices=
    [[ $word != -* ]] || choices+=" $flags -f --help"
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
}
complete -F _leasehold leasehold
`)
}

func (p *Program) zshCompletion() string {
	var described strings.Builder
	for _, c := range p.Commands() {
		fmt.Fprintf(&described, "        %s\n", zshWord(c.Name+":"+strings.ReplaceAll(
			c.Summary, ":", `\:`)))
	}
	return strings.NewReplacer(
		"VALUED", strings.Join(p.valued(), "|"), "DESCRIBED\n", described.String(),
		"CASES\n", p.cases("_files"),
	).Replace(`#compdef leasehold
_leasehold() {
    local command= choices= flags= i
    local -i count=0
    for ((i = 2; i < CURRENT; i++)); do
        case ${words[i]} in
        --) # What follows is a command line of its own.
            shift $i words
            ((CURRENT -= i))
            _normal
            return
            ;;
        VALUED) ((++i)) ;;
        -*) ;;
        *)
            command=${command:-${words[i]}}
            ((++count))
            ;;
        esac
    done
    if ((i > CURRENT)); then # a value
        [[ ${words[CURRENT - 1]} != -f ]] || _files
        return
    fi
    case $command in
    '')
        local -a commands=(
DESCRIBED
        )
        _describe command commands
        choices=--
        flags=--version
        ;;
CASES
    esac
    ((count < 2)) || choices=
    [[ ${words[CURRENT]} != -* ]] || choices+=" $flags -f --help"
    compadd -- ${=choices}
}
if [[ $funcstack[1] == _leasehold ]]; then # loaded by its file's name
    _leasehold "$@"
else
    compdef _leasehold leasehold
fi
`)
}

// zshWord quotes text as one word, as sh does.
func zshWord(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

func (p *Program) fishCompletion() string {
	var b strings.Builder
	b.WriteString(strings.ReplaceAll(
		`# at COMMAND [flags]: whether the next word is its argument, or a flag; '' before any.
function __leasehold_at
    set -l skip no
    set -l named
    for word in (commandline -opc)[2..-1]
        switch $skip$word
            case 'yes*'
                set skip no
            case 'no--'
                return 1
            case VALUED
                set skip yes
            case 'no-*'
            case '*'
                set -a named $word
        end
    end
    test $skip = no; and test "$named[1]" = "$argv[1]"
    and begin
        test (count $named) -le 1; or set -q argv[2]
    end
end

# The command line that follows --.
function __leasehold_job
    set -l words (commandline -opc)
    set -l i (contains -i -- -- $words); or return 1
    set -e words[1..$i]
    set -q argv[1]; and return
    complete -C (string join ' ' -- (string escape -- $words) (commandline -ct))
end

complete -c leasehold -f
complete -c leasehold -n '__leasehold_job test' -a '(__leasehold_job)'
`, "VALUED", "'no"+strings.Join(p.valued(), "' 'no")+"'"))
	line := func(format string, args ...any) {
		fmt.Fprintf(&b, "complete -c leasehold "+format+"\n", args...)
	}
	const outside = "not __leasehold_job test"
	line("-n '%s' -s f -rF -d 'read variables from a file'", outside)
	line("-n '%s' -s h -l help -d 'print the help'", outside)
	line(`-n '__leasehold_at ""' -l version -d 'print the version'`)
	line(`-n '__leasehold_at ""' -a -- -d 'the job follows'`)
	for _, c := range p.Commands() {
		line(`-n '__leasehold_at ""' -a %s -d %s`, c.Name, fishWord(c.Summary))
		at := "'__leasehold_at " + c.Name + "'"
		for _, word := range c.choices() {
			line("-n %s -a %s", at, word)
		}
		flags := "'__leasehold_at " + c.Name + " flags'"
		for _, flag := range c.Flags {
			line("-n %s %s", flags, fishFlag(flag))
		}
		for _, flag := range c.Options {
			line("-n %s %s -x", flags, fishFlag(flag))
		}
		if c.Files {
			line("-n %s -F", at)
		}
	}
	return b.String()
}

// fishFlag is a flag as complete takes it.
func fishFlag(flag string) string {
	if name, long := strings.CutPrefix(flag, "--"); long {
		return "-l " + name
	}
	return "-s " + strings.TrimPrefix(flag, "-")
}

// fishWord quotes text as one word.
func fishWord(text string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, "'", `\'`).Replace(text) + "'"
}
