#!/bin/sh
# A job for leasehold that counts in etcd, as fast as it can. etcd refuses its writes once its term is
# over:
#
#   leasehold -- ./fencing.sh COUNTER
#
# etcdctl finds etcd by ETCDCTL_ENDPOINTS and its other variables. See docs/fencing.md.
set -eu
counter=$1

# put writes if the leader's key is still the one that our token belongs to. etcd checks and writes in
# one step. An empty line ends the conditions, the requests if they hold, and those if not: none.
put() {
    etcdctl txn <<EOT
c("$LEASEHOLD_KEY") = "$LEASEHOLD_FENCING_TOKEN"

put "$1" "$2"


EOT
}

while :; do
    value=$(etcdctl get --print-value-only "$counter")
    count=$((${value%% *} + 1))
    # A process can be frozen here for any time. Then what it has read is old, and it does not know.
    answer=$(put "$counter" "$count $LEASEHOLD_FENCING_TOKEN")
    if [ "${answer%%[!A-Z]*}" != SUCCESS ]; then
        echo "fencing.sh: refused: the term is over: count $count with token $LEASEHOLD_FENCING_TOKEN is not written" >&2
        exit 1
    fi
done
