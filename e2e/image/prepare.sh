#!/usr/bin/env bash
# Installs what `make test-image` needs, and makes the images that the builds begin with, for it asks no registry:
# debian:bookworm-slim by debootstrap (with make and the certificates, which golang's has), and golang, which is that with this
# machine's Go. All images are in bin/.image, a storage that nobody else uses; the dot is for Go, which would take its own sources
# in there for packages of this module.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PATH:/usr/local/go/bin:/usr/sbin:/sbin"

if (($(id -u) != 0)); then
	echo 'make test-image needs root' >&2
	exit 1
fi
missing=()
for tool in buildah podman runc debootstrap; do
	command -v "$tool" >/dev/null || missing+=("$tool")
done
if ((${#missing[@]})); then
	apt-get -o DPkg::Lock::Timeout=600 update -q
	DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends "${missing[@]}"
fi

mkdir -p bin/.image
# Not in bin/: where the path of its sockets is too long, podman waits for 20 s at the end of each container.
runroot=/run/leasehold-image-$(cksum <<<"$PWD" | cut -d ' ' -f 1)
cat >bin/.image/storage.conf <<END
[storage]
driver = "overlay"
graphroot = "$PWD/bin/.image/storage"
runroot = "$runroot"
END
# No systemd is needed. The limits are such that no container asks for more than a root without CAP_SYS_RESOURCE has.
cat >bin/.image/containers.conf <<END
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
END
export CONTAINERS_STORAGE_CONF=$PWD/bin/.image/storage.conf CONTAINERS_CONF=$PWD/bin/.image/containers.conf

# What a run that was cut short has left. Nobody else has containers in this storage.
podman rm --all --force --time 0 >/dev/null

root=''
# What debootstrap has mounted is let go of first, whatever happens.
clean() {
	if [[ $root ]]; then
		umount -q "$root/proc" "$root/sys" || true
		rm -rf --one-file-system "$root"
	fi
}
trap clean EXIT

if ! podman image exists localhost/debian:bookworm-slim; then
	echo 'making localhost/debian:bookworm-slim, once; it takes about a minute'
	root=$(mktemp -d "$PWD/bin/.image/root.XXXXXX")
	debootstrap --variant=minbase --include=ca-certificates,make bookworm "$root" >bin/.image/debootstrap.log ||
		{ tail -n 20 bin/.image/debootstrap.log >&2 && exit 1; }
	tar -C "$root" -c --exclude ./var/cache/apt --exclude ./var/lib/apt/lists . |
		podman import -q --change 'CMD ["bash"]' - localhost/debian:bookworm-slim >/dev/null
fi

golang=$(sed -n 's/^FROM .*\(golang:[^ ]*\).*/\1/p' Dockerfile)
if ! podman image exists "localhost/$golang"; then
	echo "making localhost/$golang, once"
	container=$(buildah from --pull-never localhost/debian:bookworm-slim)
	buildah copy -q "$container" "$(go env GOROOT)" /usr/local/go >/dev/null
	buildah config --env GOPATH=/go --env PATH=/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
	buildah commit -q --rm "$container" "localhost/$golang" >/dev/null
fi

# The build inside takes the modules from this machine's cache.
go mod download
