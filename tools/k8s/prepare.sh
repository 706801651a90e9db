#!/usr/bin/env bash
# Installs what the tests here need: busybox is what stands for the image of the examples, ip makes the pods' network, kubectl is what
# the pages tell to type.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
missing=()
command -v busybox >/dev/null || missing+=(busybox-static)
command -v ip >/dev/null || missing+=(iproute2)
command -v setpriv >/dev/null || missing+=(util-linux)
command -v kubectl >/dev/null || missing+=(kubernetes-client)
if ((${#missing[@]})); then
	apt-get -o DPkg::Lock::Timeout=600 update -q
	DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends "${missing[@]}"
fi
