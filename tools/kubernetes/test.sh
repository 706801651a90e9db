#!/usr/bin/env bash
# `make test-cluster`: the cluster starts, does what a cluster does, and leaves nothing, whether it is
# ended by `cluster down` or by the kill of its one process.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PATH:/usr/sbin:/sbin
cluster=tools/kubernetes/cluster
dir=bin/kubernetes${KUBE:+-$KUBE}
cgroup=leasehold-kubernetes-$(cksum <<<"$PWD/$dir" | cut -d ' ' -f 1)
before=$(mktemp) after=$(mktemp)
trap 'rm -f "$before" "$after"; $cluster down' EXIT

# What a cluster might leave on the machine, or change. What other tests and clusters do meanwhile does
# not count.
machine() {
	ip netns list | grep -E '^(switch|node[0-9])' || :
	ip -o link | cut -d ' ' -f 2 | grep -v '^veth' || :
	nft list ruleset
	grep -E 'kubernetes|netns/(switch|node[0-9])' /proc/mounts || :
	ls -d "/sys/fs/cgroup/"*"/$cgroup" 2>/dev/null || :
	grep -ls "$cgroup" /proc/[0-9]*/cgroup || :
	sysctl vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops kernel.keys \
		net.ipv4.ip_forward net.ipv4.conf.all.route_localnet
	ls -d $dir/run /etc/cni/net.d/* /var/lib/kubelet /var/lib/containerd /run/containerd \
		/opt/containerd /usr/libexec/kubernetes 2>/dev/null || :
}
# The last processes have been killed, and may not have exited yet.
same() {
	for _ in $(seq 50); do
		machine >"$after"
		! cmp -s "$before" "$after" || return 0
		sleep 0.1
	done
	diff "$before" "$after" || echo "$1 leaves what there was not before" >&2
	exit 1
}
$cluster down
machine >"$before"

$cluster up
pod=$($cluster in kubectl -n kube-system get pods -o 'jsonpath={.items[0].metadata.name}')
node=$($cluster in kubectl -n kube-system get pod "$pod" -o 'jsonpath={.spec.nodeName}')
$cluster node "$node" nsenter --version >/dev/null
$cluster cut "$node"
! $cluster in kubectl -n kube-system logs "$pod" --request-timeout=3s >/dev/null 2>&1 ||
	{ echo 'a node that is cut off answers' >&2; exit 1; }
$cluster mend "$node"
$cluster in kubectl -n kube-system logs "$pod" >/dev/null
# It is a cluster in which Helm installs, upgrades and rolls back.
$cluster in make e2e-k8s RUN=TestCluster_Helm
$cluster down
same 'cluster down'

$cluster up
kill -KILL "$(cat $dir/run/pid)"
$cluster down
same 'the kill of its process'
echo 'the cluster leaves nothing'
