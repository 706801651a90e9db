# bash completion for leasehold. Written from the code by: go test -run TestCompletion ./app -update

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
        choices='-- run elect status check install version help'
    elif ((COMP_CWORD == 2)); then
        case ${COMP_WORDS[1]} in
        run) choices='--' ;;
        status) choices='--json' ;;
        check) choices='live ready leader standby' ;;
        install) compopt -o default ;;
        esac
    fi
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
}
complete -F _leasehold leasehold
