#!/usr/bin/env bash
# Installs what the cluster needs, and makes the images that its nodes begin with: the cluster asks no
# registry.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PATH:/usr/local/go/bin:/usr/sbin:/sbin

missing=()
command -v containerd >/dev/null || missing+=(containerd)
[[ -x /usr/lib/cni/ptp ]] || missing+=(containernetworking-plugins)
command -v iptables >/dev/null || missing+=(iptables)
command -v conntrack >/dev/null || missing+=(conntrack)
command -v nft >/dev/null || missing+=(nftables)
command -v ip >/dev/null || missing+=(iproute2)
command -v busybox >/dev/null || missing+=(busybox-static)
command -v openssl >/dev/null || missing+=(openssl)
command -v jq >/dev/null || missing+=(jq)
if ((${#missing[@]})); then
	apt-get -o DPkg::Lock::Timeout=600 update -q
	DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends "${missing[@]}"
fi
# The images are made once, and again if what is in them is.
dir=bin/kubernetes${KUBE:+-$KUBE}
images=$dir/images
made=1
for part in bin/etcd $dir/coredns k8s/etcd/base/kustomization.yaml tools/kubernetes/prepare.sh; do
	[[ $images/debian.tar -nt $part ]] || made=
done
[[ ! $made ]] || exit 0
e2e/image/prepare.sh
export CONTAINERS_STORAGE_CONF=$PWD/bin/.image/storage.conf CONTAINERS_CONF=$PWD/bin/.image/containers.conf

mkdir -p $images
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# image NAME FILE [CHANGE]: an image with what is in $work, which is then empty.
image() {
	tar -C "$work" -c . | podman import -q ${3:+--change "$3"} - "$1" >/dev/null
	archive "$1" "$2"
	rm -rf "${work:?}"/*
}
archive() { podman save -q -o "$images/new" "$1" && mv "$images/new" "$images/$2.tar"; }

install -D "$(command -v busybox)" "$work/bin/busybox"
image localhost/pause:1 pause 'ENTRYPOINT ["/bin/busybox", "sleep", "infinity"]'
install -D -t "$work" $dir/coredns
image localhost/coredns:1 coredns 'ENTRYPOINT ["/coredns"]'

# What the manifests and the pages name.
install -D -t "$work/usr/local/bin" bin/etcd bin/etcdctl
image "gcr.io/etcd-development/etcd:$(sed -n 's/^  newTag: \(v[0-9.]*\).*/\1/p' k8s/etcd/base/kustomization.yaml)" etcd
install -D "$(command -v busybox)" "$work/bin/busybox"
for applet in $(busybox --list); do
	[[ $applet == busybox ]] || ln -s busybox "$work/bin/$applet"
done
mkdir "$work/tmp"
image docker.io/library/busybox:1.37 busybox 'CMD ["sh"]'
install -t $dir bin/etcd
podman tag localhost/debian:bookworm-slim docker.io/library/debian:bookworm-slim
archive docker.io/library/debian:bookworm-slim debian
