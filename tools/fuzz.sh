#!/usr/bin/env bash
# Runs every fuzz target for $FUZZTIME, as many at a time as there are processors. A target is what
# begins with `func Fuzz`; $RUN is a pattern of targets. Stops at the first failure, which names its
# input.
set -euo pipefail
set -m # each target is a process group, with the worker that it starts
cd "$(dirname "$0")/.."
go=${GO:-go}
cache=$("$go" env GOCACHE)/fuzz/$("$go" list -m)
mkdir -p bin/fuzz

trap 'exec 2>/dev/null; for group in $(jobs -pr); do kill -- -"$group" || true; done; wait' EXIT
trap 'exit 130' INT TERM

targets=()
for dir in $(grep -rl --include='*_test.go' --exclude-dir=tools '^func Fuzz' . | xargs -n1 dirname | sort -u); do
	found=$(grep -ho '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | sed 's/func //' | grep -E "${RUN:-.}") || continue
	"$go" test -c -fuzz=. -o "bin/fuzz/${dir##*/}.test" "$dir"
	for target in $found; do targets+=("${dir#./} $target"); done
done

fuzz() { # DIR TARGET
	local log=$PWD/bin/fuzz/$2.log test=$PWD/bin/fuzz/${1##*/}.test
	(cd "$1" && "$test" -test.run='^$' -test.fuzz="^$2\$" -test.fuzztime="${FUZZTIME:-20s}" -test.parallel=1 \
		-test.fuzzminimizetime=2s -test.fuzzcachedir="$cache/$1") >"$log" 2>&1 && return
	# At the end of its time Go may report the deadline as a failure: a race of its own. A failure of
	# the target has a line of its own there.
	[[ $(grep -A1 '^--- FAIL: ' "$log" | sed 1d) == '    context deadline exceeded' ]]
}

declare -A running=()
reap() { # waits for the next target that ends
	local pid='' code=0
	wait -n -p pid || code=$?
	local dir=${running[$pid]% *} target=${running[$pid]#* }
	unset "running[$pid]"
	if ((code)); then
		cat "bin/fuzz/$target.log" # its last lines say where in $dir the input is, and how to run it again
		echo "$dir $target failed"
		exit 1
	fi
	echo "$dir $target: $(grep '^fuzz: elapsed' "bin/fuzz/$target.log" | tail -1 | sed 's/^fuzz: //')"
}

((${#targets[@]})) || { echo "no target matches ${RUN:-.}" >&2; exit 1; }
for target in "${targets[@]}"; do
	((${#running[@]} < $(nproc))) || reap
	# shellcheck disable=SC2086 # two words
	fuzz $target &
	running[$!]=$target
done
while ((${#running[@]})); do reap; done
