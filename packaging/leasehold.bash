# bash completion for leasehold. Written from the code by: go test -run TestCompletion ./app -update

_leasehold() {
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
        --for|--from|--reason|--timeout|--to|-f|-n) ((++i)) ;;
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
        choices='-- run elect status list history watch hold release switchover check wait reload install completion version help'
        flags=--version
        ;;
    run) choices='--' ;;
    status) flags='--json --watch' ;;
    list) flags='--json' ;;
    history) flags='--json -n' ;;
    watch) flags='--json --from' ;;
    hold) flags='--stop --for --reason' ;;
    switchover) flags='--to --timeout' ;;
    check) choices='live ready leader standby' ;;
    wait) choices='leader standby ready'; flags='--timeout' ;;
    reload) flags='--env' ;;
    install) compopt -o default ;;
    completion) choices='bash zsh fish' ;;
    help) choices='run elect status list history watch hold release switchover check wait reload install completion version help' ;;
    esac
    ((words < 2)) || choices=
    [[ $word != -* ]] || choices+=" $flags -f --help"
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
}
complete -F _leasehold leasehold
