#!/usr/bin/env bash
# Is HEAD a release? It has a tag vX.Y.Z, which is the newest version in CHANGELOG.md; the tree is
# clean; and what is generated into the docs is up to date. `make release-check` runs this.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() {
	echo "release-check: $*" >&2
	exit 1
}

[[ -z $(git status --porcelain) ]] || fail 'the tree is not clean (git status)'
tag=$(git describe --tags --exact-match --match 'v[0-9]*.[0-9]*.[0-9]*' HEAD 2>/dev/null) ||
	fail 'HEAD has no tag vX.Y.Z'
version=$(sed -n 's/^## \[\([0-9][^]]*\)\] - [0-9-]*$/\1/p' CHANGELOG.md | head -n 1)
[[ $tag == "v$version" ]] || fail "the tag is $tag, and the newest version in CHANGELOG.md is $version"
waiting=$(sed -n '/^## \[Unreleased\]/,/^## \[[0-9]/{/^- /p}' CHANGELOG.md)
[[ -z $waiting ]] || fail 'CHANGELOG.md has changes under [Unreleased]'

make generate
[[ -z $(git status --porcelain) ]] ||
	fail "generated files were out of date: $(git status --porcelain | tr '\n' ' ')"
echo "release-check: $tag is ready for make dist"
