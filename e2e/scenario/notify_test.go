//go:build linux

package scenario_test

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// needsProgram returns where a program of Debian is. Without it the test is skipped, or fails with
// E2E_NO_SKIP=1, as CI has it.
func needsProgram(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range []string{"/usr/sbin", "/usr/bin"} {
		if path := filepath.Join(dir, name); exec.Command("test", "-x", path).Run() == nil {
			return path
		}
	}
	if os.Getenv("E2E_NO_SKIP") == "1" {
		t.Fatalf("needs %s, and E2E_NO_SKIP=1 forbids to skip", name)
	}
	t.Skipf("skipped: needs %s", name)
	return ""
}

// notifySocket is where the job of a candidate sends its notifications.
func (tr *trial) notifySocket(c *candidate) string {
	tr.Helper()
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", *tr.status(c).Job.PID))
	tr.must(err)
	for entry := range strings.SplitSeq(string(environ), "\x00") {
		if socket, ok := strings.CutPrefix(entry, "NOTIFY_SOCKET="); ok {
			return socket
		}
	}
	tr.Fatal("the job has no NOTIFY_SOCKET")
	return ""
}

// waitJobHealth waits until the job of a candidate is in that state of health.
func (tr *trial) waitJobHealth(c *candidate, want string) {
	tr.Helper()
	tr.waitStatus(c, "/livez", http.StatusOK)
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if is := tr.status(c).Job; is.PID == nil || is.Health == nil || *is.Health != want {
			return fmt.Errorf("the job of %s is %+v, not %s", c.Identity, is, want)
		}
		return nil
	}))
}

// notifies is a job that sends each line of a pipe with systemd-notify.
func (tr *trial) notifies(t *testing.T) (job change, say func(text string)) {
	t.Helper()
	program := needsProgram(t, "systemd-notify")
	dir, err := harness.TempDir("leasehold-notify-")
	tr.must(err)
	tr.Cleanup(func() { _ = os.RemoveAll(dir) })
	pipe := filepath.Join(dir, "pipe")
	tr.must(syscall.Mkfifo(pipe, 0o666))
	tr.must(os.Chmod(pipe, 0o666))
	tr.must(os.Chmod(dir, 0o777))
	file, err := os.OpenFile(pipe, os.O_RDWR, 0)
	tr.must(err)
	tr.Cleanup(func() { _ = file.Close() })
	script := fmt.Sprintf(`while read -r text; do %s "$text"; done < %s`, program, pipe)
	return command("/bin/sh", "-c", script), func(text string) {
		t.Helper()
		_, err := fmt.Fprintln(file, text)
		tr.must(err)
	}
}

// The job is ready when one of its processes says so, and nobody else. The next elector knows it.
func TestNotify_Ready(t *testing.T) {
	t.Parallel()
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			tr := newTrial(t, u, harness.ClusterConfig{})
			job, say := tr.notifies(t)
			a := tr.start("a", "", job, variables("LEASEHOLD_NOTIFY=ready",
				"LEASEHOLD_HEALTH_START_PERIOD=1h"))
			tr.waitJobHealth(a, "starting")
			socket := tr.notifySocket(a)
			stranger, err := net.DialUnix("unixgram", nil,
				&net.UnixAddr{Name: socket, Net: "unixgram"})
			tr.must(err)
			defer func() { _ = stranger.Close() }()
			for _, text := range []string{"READY=1", "", "\x00", strings.Repeat("x", 20000)} {
				_, err := stranger.Write([]byte(text))
				tr.must(err)
			}
			// What comes later is read later.
			say("STATUS=up")
			say("READY=0")
			tr.waitRenewals(a, 2)
			if s := tr.status(a); *s.Job.Health != "starting" || s.Job.Ready {
				t.Errorf("a stranger has made the job ready: %+v", s.Job)
			}
			tr.waitStatus(a, "/leader", http.StatusServiceUnavailable)
			pid := *tr.status(a).Job.PID
			say("READY=1")
			tr.waitStatus(a, "/leader", http.StatusOK)
			tr.must(a.signalElector(syscall.SIGKILL))
			tr.waitReplaced(a, 1)
			if s := tr.status(a); *s.Job.Health != "healthy" || *s.Job.PID != pid {
				t.Errorf("after the elector was replaced: %+v", s.Job)
			}
			tr.finish()
		})
	}
}

// A job that misses the watchdog is killed. An elector that hangs does not count against it.
func TestNotify_Watchdog(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	tr.ttl = 15 * time.Second
	job, say := tr.notifies(t)
	a := tr.start("a", "", job, variables("LEASEHOLD_NOTIFY=ready", "LEASEHOLD_WATCHDOG=2s"))
	tr.waitJobHealth(a, "starting")
	pid := *tr.status(a).Job.PID
	say("READY=1")
	tr.waitStatus(a, "/leader", http.StatusOK)
	fed := time.Now()
	for stopped := false; time.Since(fed) < 6*time.Second; {
		switch since := time.Since(fed); {
		case since > time.Second && since < 4*time.Second && !stopped:
			stopped = true
			tr.must(a.signalElector(syscall.SIGSTOP))
		case since >= 4*time.Second && stopped:
			stopped = false
			tr.must(a.signalElector(syscall.SIGCONT))
		}
		say("WATCHDOG=1")
		time.Sleep(200 * time.Millisecond)
	}
	if s := tr.status(a); *s.Job.PID != pid || !s.Job.Ready {
		t.Errorf("a job that sends WATCHDOG=1 was restarted: %+v", s.Job)
	}
	tr.waitLog(a, "no WATCHDOG=1 within 2s")
	tr.waitJobHealth(a, "starting")
	say("READY=1")
	tr.waitStatus(a, "/leader", http.StatusOK)
	say("WATCHDOG=trigger")
	tr.waitLog(a, "it has sent WATCHDOG=trigger")
	tr.finish()
}

// A job that never says that it is ready does not keep the lead for ever.
func TestNotify_NeverReady(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	job, _ := tr.notifies(t)
	changes := variables("LEASEHOLD_NOTIFY=ready", "LEASEHOLD_HEALTH_INTERVAL=100ms",
		"LEASEHOLD_RESTART_LIMIT=2")
	a := tr.start("a", "", job, changes)
	tr.waitJobHealth(a, "starting")
	well, say := tr.notifies(t)
	b := tr.start("b", "", well, changes)
	say("READY=1")
	tr.waitStatus(b, "/leader", http.StatusOK)
	if !strings.Contains(a.Log(), "not ready within 300ms: it has not sent READY=1") {
		t.Error("the log of a does not say why its job was stopped")
	}
	tr.finish()
}

// A service of Debian that speaks sd_notify, in a mount namespace of its own.
func TestNotify_HAProxy(t *testing.T) {
	t.Parallel()
	program := needsProgram(t, "haproxy")
	tr := newTrial(t, root(), harness.ClusterConfig{})
	dir, err := harness.TempDir("leasehold-haproxy-")
	tr.must(err)
	tr.Cleanup(func() { _ = os.RemoveAll(dir) })
	file := filepath.Join(dir, "haproxy.cfg")
	tr.must(os.WriteFile(file, fmt.Appendf(nil, `defaults
  mode http
  timeout connect 1s
  timeout client 1s
  timeout server 1s
frontend health
  bind unix@%s/socket
  monitor-uri /healthz
`, dir), 0o644))
	a := tr.start("a", "", variables("LEASEHOLD_NOTIFY=ready",
		"LEASEHOLD_HEALTH_CMD=curl -sf --unix-socket "+dir+"/socket http://localhost/healthz",
		"LEASEHOLD_HEALTH_INTERVAL=100ms"),
		command("unshare", "--mount", program, "-Ws", "-f", file))
	tr.waitStatus(a, "/leader", http.StatusOK)
	pid := *tr.status(a).Job.PID
	tr.must(syscall.Kill(pid, syscall.SIGUSR2)) // its own reload: not ready for a moment
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	tr.must(err)
	if len(strings.Fields(string(children))) == 0 {
		t.Error("haproxy has no worker")
	}
	tr.waitStatus(a, "/leader", http.StatusOK)
	tr.finish()
}
