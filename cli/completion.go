//go:build linux

package cli

import (
	"fmt"
	"slices"
	"strings"
)

// Completion is the completion for bash.
func (p *Program) Completion() string {
	var b strings.Builder
	fmt.Fprintf(&b, `_leasehold() {
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
        -f) ((++i)) ;;
        -*) ;;
        *)
            command=${command:-${COMP_WORDS[i]}}
            ((++words))
            ;;
        esac
    done
    if [[ ${COMP_WORDS[COMP_CWORD - 1]} == -f ]]; then
        compopt -o default
        return
    fi
    case $command in
    '')
        choices='%s'
        flags=--version
        ;;
`, strings.Join(append([]string{"--"}, commandNames[:]...), " "))
	for _, c := range p.Commands() {
		choices := c.Words
		if c.Job {
			choices = []string{"--"}
		}
		var sets []string
		if len(choices) > 0 {
			sets = append(sets, "choices='"+strings.Join(choices, " ")+"'")
		}
		if flags := slices.Concat(c.Flags, c.Options); len(flags) > 0 {
			sets = append(sets, "flags='"+strings.Join(flags, " ")+"'")
		}
		if c.Files {
			sets = append(sets, "compopt -o default")
		}
		if len(sets) > 0 {
			fmt.Fprintf(&b, "    %s) %s ;;\n", c.Name, strings.Join(sets, " "))
		}
	}
	b.WriteString(`    esac
    ((words < 2)) || choices=
    [[ $word != -* ]] || choices+=" $flags -f --help"
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
}
complete -F _leasehold leasehold
`)
	return b.String()
}
