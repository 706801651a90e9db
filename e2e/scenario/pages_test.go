//go:build linux

package scenario_test

import (
	"context"
	"errors"
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
mount -t tmpfs none /etc/leasehold
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
	[[ $2 == leasehold@backup ]]
	case $1 in
	start) machine 1 ;;
	stop) kill ${pid[1]}; wait ${pid[1]} ;;
	reload) leasehold reload ${pid[1]} ;;
	*) false ;;
	esac
}
for i in 1 2 3; do
	machine $i
	LEASEHOLD_LISTEN=127.0.0.1:$((4039 + i)) leasehold wait ready --timeout 60s >/dev/null
	# Records come within two seconds.
	until etcdctl get --prefix leasehold/v1/ | grep '"node'$i; do sleep 0.1; done >/dev/null
done
`

// etcdRuns is a prelude: etcd runs. The shell is process 1 of a namespace, so with it everything
// ends.
const etcdRuns = `
ip link set lo up
etcd --data-dir "$HOME"/etcd --unsafe-no-fsync --log-level error 2>"$HOME"/etcd.log &
until etcdctl endpoint health >/dev/null 2>&1; do sleep 0.1; done
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

// TestPage_Operations types docs/operations.md.
func TestPage_Operations(t *testing.T) { typePage(t, "operations.md", 14, machines) }

// TestPage_Steering types docs/steering.md. There "watch" goes on until Ctrl-C.
func TestPage_Steering(t *testing.T) {
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
	needsProgram(t, "systemd-notify")
	typePage(t, "health.md", 4, oneDaemon+"LEASEHOLD_STOP_GRACE=1s\nexport LEASEHOLD_STOP_GRACE\n")
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
	const place = "/etc/leasehold" // to mount at
	switch err := os.Mkdir(place, 0o755); {
	case err == nil:
		t.Cleanup(func() { _ = os.Remove(place) })
	case !errors.Is(err, os.ErrExist):
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--net", "--mount", "--pid", "--fork",
		"--kill-child", "--mount-proc", "bash", "-c", page.Script(prelude))
	home := t.TempDir()
	cmd.Dir = home
	cmd.Env = []string{"HOME=" + home, "TMPDIR=" + home, "PATH=" + path}
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
