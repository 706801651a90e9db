#!/usr/bin/env bash
# Runs every fuzz target for $FUZZTIME, one after the other. A target is what begins with
# `func Fuzz`; $RUN is a pattern of targets. Stops at the first failure, which names its input.
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}
cache=$("$go" env GOCACHE)/fuzz/$("$go" list -m)
mkdir -p bin/fuzz

for dir in $(grep -rl --include='*_test.go' --exclude-dir=tools '^func Fuzz' . | xargs -n1 dirname | sort -u); do
	targets=$(grep -ho '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | sed 's/func //' | grep -E "${RUN:-.}") || continue
	test=$PWD/bin/fuzz/${dir##*/}.test
	"$go" test -c -fuzz=. -o "$test" "$dir"
	for target in $targets; do
		log=bin/fuzz/$target.log
		if ! (cd "$dir" && "$test" -test.run='^$' -test.fuzz="^$target\$" -test.fuzztime="${FUZZTIME:-20s}" \
			-test.fuzzminimizetime=2s -test.fuzzcachedir="$cache/${dir#./}") >"$log" 2>&1; then
			cat "$log" # its last lines say where in $dir the input is, and how to run it again
			exit 1
		fi
		echo "${dir#./} $target: $(grep '^fuzz: elapsed' "$log" | tail -1 | sed 's/^fuzz: //')"
	done
done
