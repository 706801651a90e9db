#!/bin/sh
# Installs what the tests here need and this machine, a Debian, has not. No
# service is started by it.
set -eu
PATH=$PATH:/usr/sbin:/sbin
missing=
need() { # PACKAGE PROGRAM...
	package=$1
	shift
	for program; do
		command -v "$program" >/dev/null || missing="$missing $package"
	done
}
need systemd /lib/systemd/systemd systemctl systemd-analyze journalctl
need dbus dbus-daemon
need util-linux nsenter unshare pivot_root
need iproute2 ip
need nftables nft
if [ -n "$missing" ]; then
	apt-get update -q
	# shellcheck disable=SC2086 # these are words
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
fi
