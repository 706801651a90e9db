#!/usr/bin/env bash
# The first process of the cluster's pid namespace: makes network, keys and the nodes, and starts the
# control plane in its own network namespace. `cluster up` runs it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
address=10.98.0.100

# A first process gets no signal that it has no handler for.
trap 'exit 0' TERM INT

# All that the cluster writes is in run, beside the programs. That is here /run/kubernetes/run: paths
# of sockets must be short. Everything else of this machine's /run is out of sight.
mount --bind "$dir" /mnt
mount -t tmpfs tmpfs /run
mkdir /run/kubernetes /run/netns /run/containerd
mount --move /mnt /run/kubernetes
cd /run/kubernetes/run
export PATH=/run/kubernetes:$PATH

# The kubelet sets these for the whole machine, unless they have the values that it wants. So it is
# shown files that have them.
: >resolv.conf
mkdir sysctl
show() {
	echo "$2" >"sysctl/${1##*/}"
	mount --bind "sysctl/${1##*/}" "/proc/sys/$1"
}
show vm/overcommit_memory 1
show vm/panic_on_oom 0
show kernel/panic 10
show kernel/panic_on_oops 1
show kernel/keys/root_maxkeys 1000000
show kernel/keys/root_maxbytes 25000000

ip link set lo up
ip netns add switch
ip -n switch link set lo up
ip -n switch link add bridge type bridge
ip -n switch link set bridge up
# plug NAME ADDRESS [NETNS]: a cable from the switch to eth0, here or in a namespace.
plug() {
	ip -n switch link add "$1" type veth peer name eth0 netns "${3:-1}"
	ip -n switch link set "$1" master bridge up
	ip ${3:+-n "$3"} address add "$2/24" dev eth0
	ip ${3:+-n "$3"} link set eth0 up
	# Addresses of Services need a route, though packets to them are rewritten.
	ip ${3:+-n "$3"} route add default via 10.98.0.254
}
plug control $address
for node in $nodes; do
	ip netns add "$node"
	ip -n "$node" link set lo up
	plug "$node" "10.98.0.${node#node}" "$node"
done
for node in $nodes; do
	pods=10.97.${node#node}.0/24
	ip route add "$pods" via "10.98.0.${node#node}"
	for other in $nodes; do
		[[ $node == "$other" ]] || ip -n "$other" route add "$pods" via "10.98.0.${node#node}"
	done
done
# In /run/netns there is the switch too.
mkdir nodes
for node in $nodes; do
	touch "nodes/$node"
	mount --bind "/run/netns/$node" "nodes/$node"
done

mkdir keys
cd keys
key() { openssl genpkey -algorithm "$1" -pkeyopt "$2" -out "$3.key" 2>/dev/null; }
# certificate NAME SUBJECT [EXTENSION]
certificate() {
	key EC ec_paramgen_curve:P-256 "$1"
	openssl req -new -key "$1.key" -subj "$2" |
		openssl x509 -req -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out "$1.crt" \
			-extfile <(echo "${3:-}") 2>/dev/null
}
key EC ec_paramgen_curve:P-256 ca
openssl req -x509 -new -key ca.key -subj /CN=cluster -days 30 -out ca.crt
certificate server /CN=kube-apiserver "subjectAltName=DNS:kubernetes.default.svc,DNS:kubernetes.default,\
DNS:kubernetes,IP:$address,IP:10.96.0.1,IP:127.0.0.1"
certificate client /O=system:masters/CN=kube-apiserver
key RSA rsa_keygen_bits:2048 accounts
openssl rsa -in accounts.key -pubout -out accounts.pub 2>/dev/null
cd ..

# user FILE NAME [GROUP]: a user with a token, in a kubeconfig.
user() {
	local token
	token=$(openssl rand -hex 16)
	echo "$token,$2,$2,\"${3:-}\"" >>keys/tokens.csv
	(umask 077 && cat >"$1.kubeconfig") <<END
apiVersion: v1
kind: Config
clusters:
- name: cluster
  cluster:
    server: https://$address:6443
    certificate-authority-data: $(base64 -w 0 keys/ca.crt)
users: [{name: $1, user: {token: $token}}]
contexts: [{name: cluster, context: {cluster: cluster, user: $1}}]
current-context: cluster
END
}
user admin admin system:masters
user controller-manager system:kube-controller-manager
user scheduler system:kube-scheduler
user proxy system:kube-proxy
user policies policies system:masters
for node in $nodes; do
	user "$node" "system:node:$node" system:nodes
done

# Local volumes. None is used twice. A run of the tests needs one or two of each node, and the faults
# six more for each N, if all members that lose their volume are on one node.
for node in $nodes; do
	for v in $(seq 50); do
		mkdir -p "$node/volumes/$v"
		cat <<END
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: $node-$v}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: local
  local: {path: /run/kubernetes/run/$node/volumes/$v}
  nodeAffinity:
    required:
      nodeSelectorTerms:
      - matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [$node]}]
END
	done
done >volumes.yaml

# The kubelets make the pods' cgroups in those of their nodes. All else is in "programs", so that one
# cgroup holds the whole cluster.
for controller in /sys/fs/cgroup/*/; do
	for group in "" programs $nodes; do
		group=$controller$cgroup/$group
		mkdir "$group"
		# A new cpuset has no processors and no memory, and takes no process.
		for file in cpuset.cpus cpuset.mems; do
			[[ $controller != */cpuset/ ]] || cat "$controller$file" >"$group/$file"
		done
	done
	echo $$ >"$controller$cgroup/programs/cgroup.procs"
done

start() {
	local name=$1
	shift
	"$@" >"log/$name.log" 2>&1 &
}
for node in $nodes; do
	start "$node" nsenter --net="nodes/$node" unshare --mount "$here/node.sh" "$node"
done
start etcd etcd --name cluster --data-dir etcd --unsafe-no-fsync \
	--listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
	--listen-peer-urls http://127.0.0.1:2380
start apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 --secure-port=6443 \
	--bind-address=$address --advertise-address=$address --cert-dir=keys \
	--tls-cert-file=keys/server.crt --tls-private-key-file=keys/server.key \
	--client-ca-file=keys/ca.crt --token-auth-file=keys/tokens.csv \
	--authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
	--service-account-issuer=https://kubernetes.default.svc \
	--service-account-key-file=keys/accounts.pub \
	--service-account-signing-key-file=keys/accounts.key \
	--service-cluster-ip-range=10.96.0.0/16 --kubelet-preferred-address-types=InternalIP \
	--kubelet-client-certificate=keys/client.crt --kubelet-client-key=keys/client.key
# The others give up if it does not answer soon.
until kubectl --kubeconfig=admin.kubeconfig get --raw /readyz >/dev/null 2>&1; do
	sleep 0.2
done
start controller-manager kube-controller-manager --kubeconfig=controller-manager.kubeconfig \
	--authentication-kubeconfig=controller-manager.kubeconfig \
	--authorization-kubeconfig=controller-manager.kubeconfig --bind-address=127.0.0.1 \
	--service-account-private-key-file=keys/accounts.key --root-ca-file=keys/ca.crt \
	--use-service-account-credentials --leader-elect=false --cert-dir=keys \
	--flex-volume-plugin-dir=/run/kubernetes/run/plugins
start scheduler kube-scheduler --kubeconfig=scheduler.kubeconfig \
	--authentication-kubeconfig=scheduler.kubeconfig --bind-address=127.0.0.1 \
	--authorization-kubeconfig=scheduler.kubeconfig --leader-elect=false --cert-dir=keys
start policies policies policies.kubeconfig nodes
wait
