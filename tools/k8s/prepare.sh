#!/usr/bin/env bash
# Installs what the tests here need: busybox is what stands for the image of the examples, ip makes the pods' network.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
missing=()
command -v busybox >/dev/null || missing+=(busybox-static)
command -v ip >/dev/null || missing+=(iproute2)
command -v setpriv >/dev/null || missing+=(util-linux)
if ((${#missing[@]})); then
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
fi
