//go:build linux

package scenario_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// machines is a prelude: etcd, and a daemon for each of node1 to node3. systemctl and /etc are
// those of node1.
const machines = etcdRuns + `
mkdir "$HOME"/bin
for i in 1 2 3; do
	cat >/etc/leasehold/node$i.env <<END
LEASEHOLD_ENDPOINTS=http://127.0.0.1:2379
LEASEHOLD_ELECTION=jobs/backup
LEASEHOLD_IDENTITY=node$i
LEASEHOLD_LISTEN=127.0.0.1:$((4039 + i))
LEASEHOLD_TTL=5s
END
done
ln -s node1.env /etc/leasehold/backup.env
machine() { # node number
	leasehold -f /etc/leasehold/node$1.env -- sleep 1000 2>"$HOME"/node$1.log &
	pid[$1]=$!
	until LEASEHOLD_LISTEN=127.0.0.1:$((4039 + $1)) leasehold check; do
		sleep 0.1
	done >/dev/null 2>&1
}
systemctl() {
	case "$*" in
	'start leasehold@backup') machine 1 ;;
	'stop leasehold@backup') kill ${pid[1]}; wait ${pid[1]} ;;
	'reload leasehold@backup') leasehold reload ${pid[1]} ;;
	'start leasehold@job'*) fiveMachines ${2#leasehold@job} ;;
	'stop leasehold@*') stopNode1 ;;
	'stop etcd') stopEtcd ;;
	'start etcd') startEtcd ;;
	*) false ;;
	esac
}
jobs=${JOBS:-50}
seq() { command seq $(($1 < jobs ? $1 : jobs)); }
fiveMachines() { # job number: its daemons on node1 to node5; later only the one on node1
	local i last=5
	((!${otherMachines[$1]-0})) || last=1
	for i in $(command seq $last); do
		env -u LEASEHOLD_ELECTION LEASEHOLD_IDENTITY=node$i \
			LEASEHOLD_LISTEN=127.0.0.$i:$((4060 + $1)) leasehold -f /etc/leasehold/job$1.env \
			-- sleep 1000 2>"$HOME"/job$1-node$i.log &
		((i > 1)) || onNode1[$1]=$!
	done
	# Type=notify: systemctl returns when the endpoint listens. The first time a later block waits.
	((last > 1)) || until curl -s http://127.0.0.1:$((4060 + $1))/livez; do
		sleep 0.1
	done >/dev/null
	otherMachines[$1]=1
}
stopNode1() {
	local p from=${EPOCHREALTIME/./}
	kill ${pid[1]} ${onNode1[@]}
	for p in ${pid[1]} ${onNode1[@]}; do wait $p; done
	echo "all of node1 stopped after $(((${EPOCHREALTIME/./} - from) / 1000)) ms"
}
allHaveRecords() { # those of jobs/backup, too
	local n
	until n=$(etcdctl get --prefix --keys-only leasehold/v1/ | grep -c /candidates/)
		((n == 3 + 5 * jobs)); do
		sleep 0.1
	done
}
nodeLeadsNothing() { # node number; list knows an election when one of its candidates has a record
	local n
	until leasehold list >"$HOME"/list
		n=$(grep -c '^jobs/.* node[1-5] ' "$HOME"/list)
		((n == 1 + jobs)); do
		sleep 0.1
	done
	! grep "node$1 " "$HOME"/list
}
cost() { # what the daemons and etcd take
	[[ $COST ]] || return 0
	local before after
	awk '/^Pss:/ { sum += $2 } /^Pss_File:/ { file += $2 }
		END { printf "memory of one machine: %.0f MiB\n", ((sum - file) / 5 + file) / 1024 }' \
		$(pgrep '^leasehold' | sed 's,.*,/proc/&/smaps_rollup,')
	before=$(used)
	sleep 20
	after=$(used)
	awk -v "before=$before" -v "after=$after" 'BEGIN {
		split(before, b); split(after, a); seconds = a[1] - b[1]
		printf "CPU of one machine: %.1f %% of a core\n", (a[2] - b[2]) / 5 / seconds
		printf "CPU of etcd: %.1f %% of a core\n", (a[3] - b[3]) / seconds
		printf "requests to etcd: %.0f/s\n", (a[4] - b[4]) / seconds
	}'
}
used() { # seconds; CPU of all daemons and of etcd, in clock ticks (of 1/100 s); requests to etcd
	local p
	awk '{ printf "%s ", $1 }' /proc/uptime
	for p in '^leasehold' '^etcd$'; do
		awk '{ sub(/.*\) /, ""); sum += $12 + $13 } END { printf "%d ", sum }' \
			$(pgrep "$p" | sed 's,.*,/proc/&/stat,')
	done
	curl -s http://127.0.0.1:2379/metrics |
		awk '/^grpc_server_msg_received_total/ { sum += $2 } END { printf "%d\n", sum }'
}
stopEtcd() {
	kill $etcd
	wait $etcd || true
	until curl -s http://127.0.0.1:4040/status | grep '"state": "connecting"'; do
		sleep 0.1
	done >/dev/null
}
for i in 1 2 3; do
	machine $i
	LEASEHOLD_LISTEN=127.0.0.1:$((4039 + i)) leasehold wait ready --timeout 60s >/dev/null
	# Records come within two seconds.
	until etcdctl get --prefix leasehold/v1/ | grep '"node'$i; do sleep 0.1; done >/dev/null
done
`

// etcdRuns is a prelude: etcd runs, and /etc is a copy. The shell is process 1 of a namespace, so
// with it everything ends.
const etcdRuns = `
cp -a /etc "$HOME"/etc
mount --bind "$HOME"/etc /etc
mkdir -p /etc/leasehold
ip link set lo up
startEtcd() {
	etcd --data-dir "$HOME"/etcd --unsafe-no-fsync --log-level error 2>>"$HOME"/etcd.log &
	etcd=$!
	until etcdctl endpoint health >/dev/null 2>&1; do sleep 0.1; done
}
startEtcd
`

// oneDaemon is a prelude: what a page starts runs until it starts the next one, and the page goes
// on when the daemon is ready.
const oneDaemon = etcdRuns + `
mount -t tmpfs none /run
mount -t tmpfs none /srv
mkdir /srv/data "$HOME"/bin
mount -t tmpfs none /srv/data
PATH=$HOME/bin:$PATH
printf '#!/bin/sh\nexec sleep 1000\n' >"$HOME"/bin/backup.sh
printf '#!/bin/sh\nsystemd-notify --ready\nwhile systemd-notify WATCHDOG=1; do sleep 1; done\n' \
	>"$HOME"/bin/haproxy
chmod +x "$HOME"/bin/*
leasehold() {
	if [[ $1 != -- ]]; then
		command leasehold "$@"
		return
	fi
	if [[ ${daemon-} ]]; then
		kill $daemon
		wait $daemon
	fi
	command leasehold "$@" 2>"$HOME"/daemon.log &
	daemon=$!
	until command leasehold check; do sleep 0.1; done >/dev/null 2>&1
	command leasehold wait ready --timeout 60s >/dev/null
}
`

// TestPage_Operations types docs/operations.md. It runs alone: 250 daemons would disturb others.
// With JOBS=5 there are only five jobs where the page has fifty. With COST=1 it measures what they
// cost.
func TestPage_Operations(t *testing.T) { typePage(t, "operations.md", 24, machines) }

// TestPage_Steering types docs/steering.md. There "watch" goes on until Ctrl-C.
func TestPage_Steering(t *testing.T) {
	t.Parallel()
	typePage(t, "steering.md", 5, machines+`
etcdctl role add leasehold-backup
leasehold() {
	if [[ $1 == watch ]]; then
		timeout --preserve-status --signal INT 2 leasehold "$@"
	else
		command leasehold "$@"
	fi
}
`)
}

// TestPage_Health types docs/health.md, with programs in place of the jobs.
func TestPage_Health(t *testing.T) {
	t.Parallel()
	needsProgram(t, "systemd-notify")
	typePage(t, "health.md", 4, oneDaemon+"LEASEHOLD_STOP_GRACE=1s\nexport LEASEHOLD_STOP_GRACE\n")
}

// TestPage_Hooks types docs/hooks.md.
func TestPage_Hooks(t *testing.T) {
	t.Parallel()
	typePage(t, "hooks.md", 4, oneDaemon+`
ip link add virtual type bridge
systemctl() { [[ $* == daemon-reload ]]; }
`)
}

// typePage types a page of docs/ that has so many blocks of commands, after a prelude.
func typePage(t *testing.T, name string, blocks int, prelude string) {
	t.Helper()
	harness.NeedsRoot(t)
	programs := allPrograms(t)
	etcd, err := harness.FindEtcd(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	page := harness.ReadPage(string(text))
	if page.Len() < blocks {
		t.Fatalf("docs/%s has %d blocks of commands, want %d", name, page.Len(), blocks)
	}
	path := os.Getenv("PATH")
	// The last one comes first in PATH.
	for _, program := range []string{etcd.Server, etcd.Ctl, programs.Leasehold} {
		dir, err := filepath.Abs(filepath.Dir(program))
		if err != nil {
			t.Fatal(err)
		}
		path = dir + ":" + path
	}
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--net", "--mount", "--pid", "--fork",
		"--kill-child", "--mount-proc", "bash", "-c", page.Script(prelude))
	home := t.TempDir()
	cmd.Dir = home
	cmd.Env = []string{
		"HOME=" + home, "TMPDIR=" + home, "PATH=" + path,
		"JOBS=" + os.Getenv("JOBS"), "COST=" + os.Getenv("COST"),
	}
	out, err := cmd.CombinedOutput()
	if err == nil {
		err = page.Check(string(out))
	}
	if err != nil {
		logs, _ := filepath.Glob(filepath.Join(home, "*.log"))
		for _, log := range logs {
			text, _ := os.ReadFile(log)
			t.Logf("%s:\n%s", filepath.Base(log), harness.LastLines(string(text), 30))
		}
		t.Fatalf("%v\n%s", err, strings.TrimSpace(string(out)))
	}
	t.Logf("%s", out)
}
