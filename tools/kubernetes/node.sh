#!/usr/bin/env bash
# One node: containerd, the kubelet and kube-proxy, in a network and a mount namespace of their own.
#	node.sh NODE
set -euo pipefail
node=$1
i=${node#node}
run=/run/kubernetes/run
cd $run
echo $$ >"$node/pid"

# What the programs write, by the paths that they have everywhere. Images and volumes are on the disk.
mount --make-rshared /
for dir in /run/netns /run/containerd /var/lib /var/log; do
	mount -t tmpfs tmpfs $dir
done
for dir in kubelet containerd; do
	mkdir -p "$node/$dir" /var/lib/$dir
	mount --bind "$node/$dir" /var/lib/$dir
done

# Without the rlimits that runc would set: not every root may raise them.
ctr oci spec | jq 'del(.process.rlimits)' >"$node/container.json"
mkdir "$node/cni"
cat >"$node/containerd.toml" <<END
version = 2
oom_score = 0
disabled_plugins = ["io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$run/$node/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    base_runtime_spec = "$run/$node/container.json"
END
# Not the plugin "bridge": a pod would get no answer from a Service whose pod is on the same bridge.
cat >"$node/cni/cluster.conflist" <<END
{"cniVersion": "0.4.0", "name": "cluster", "plugins": [
  {"type": "ptp", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.97.$i.0/24"}]],
    "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}
]}
END
cat >"$node/kubelet.yaml" <<END
kind: KubeletConfiguration
apiVersion: kubelet.config.k8s.io/v1beta1
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /$cgroup/$node
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
address: 10.98.0.$i
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $run/keys/ca.crt}
authorization: {mode: Webhook}
# Nobody can pull an image that was removed.
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi}
volumePluginDir: /var/lib/kubelet/plugins
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
resolvConf: $run/resolv.conf
END

# An older kubelet does not know these settings. Its runtime is on the command line.
old=()
if [[ ${KUBE:-} ]]; then
	sed -i '/^containerRuntimeEndpoint:/d; /^failCgroupV1:/d' "$node/kubelet.yaml"
	old=(--container-runtime-endpoint=unix:///run/containerd/containerd.sock)
fi

start() {
	local name=$1
	shift
	"$@" >"log/$name-$node.log" 2>&1 &
}
start containerd containerd --config "$node/containerd.toml"
until ctr version >/dev/null 2>&1; do
	sleep 0.1
done
for archive in /run/kubernetes/images/*.tar; do
	ctr -n k8s.io images import "$archive"
done
start kubelet kubelet --config="$node/kubelet.yaml" --kubeconfig="$node.kubeconfig" \
	--hostname-override="$node" --node-ip="10.98.0.$i" "${old[@]}"
start kube-proxy kube-proxy --kubeconfig=proxy.kubeconfig --hostname-override="$node" \
	--proxy-mode=iptables --cluster-cidr=10.97.0.0/16 --bind-address="10.98.0.$i" \
	--conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 \
	--conntrack-tcp-timeout-close-wait=0
wait
