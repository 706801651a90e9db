#!/usr/bin/env bash
# Installs what the tests beside this file need, and makes a clean Debian to install packages in: bin/debian, once.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive

missing=()
for package in cpio debootstrap groff-base iproute2 lintian qemu-user-static rpm rpm2cpio supervisor; do
	dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if ((${#missing[@]})); then
	apt-get -o DPkg::Lock::Timeout=600 update -q
	apt-get -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends "${missing[@]}"
fi

# What debootstrap has mounted is let go of first, whatever happens.
clean() {
	if [[ -d bin/debian.new ]]; then
		umount -q bin/debian.new/proc bin/debian.new/sys || true
		rm -rf --one-file-system bin/debian.new
	fi
}

if [[ ! -d bin/debian ]]; then
	trap clean EXIT
	clean # it may have been killed
	mkdir -p bin
	release=$(. /etc/os-release && echo "$VERSION_CODENAME")
	debootstrap --variant=minbase "$release" bin/debian.new
	mv bin/debian.new bin/debian
fi
