//go:build linux

package scenario_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// etcdClient can write what no command line can.
func (tr *trial) etcdClient() *clientv3.Client {
	tr.Helper()
	user, password, _ := strings.Cut(tr.etcd.Auth, ":")
	client, err := clientv3.New(clientv3.Config{
		Endpoints: tr.etcd.Endpoints(), DialTimeout: 5 * time.Second,
		Username: user, Password: password,
	})
	tr.must(err)
	tr.Cleanup(func() { _ = client.Close() })
	return client
}

// leasehold runs a subcommand that asks etcd.
func (tr *trial) leasehold(args ...string) (code int, stdout string) {
	tr.Helper()
	env := []string{
		"LEASEHOLD_ELECTION=" + tr.election,
		"LEASEHOLD_ENDPOINTS=" + strings.Join(tr.etcd.Endpoints(), ","),
	}
	code, stdout, stderr, err := harness.RunOnce(tr.ctx, env, tr.programs.Leasehold, args...)
	tr.must(err)
	if stderr != "" {
		tr.Errorf("leasehold %s says on standard error: %s", strings.Join(args, " "), stderr)
	}
	return code, stdout
}

// remedy runs the command that the daemon gives to end the wait, as it stands,
// in the shell of whoever copies it.
func (tr *trial) remedy(command string) {
	tr.Helper()
	if !strings.HasPrefix(command, "etcdctl del ") {
		tr.Fatalf("the remedy is %q", command)
	}
	bash, err := exec.LookPath("bash")
	tr.must(err)
	ctl := tr.etcd.EtcdctlCommand(tr.etcd.Endpoints())
	dir := tr.TempDir()
	tr.must(os.Symlink(ctl.Path, filepath.Join(dir, "etcdctl")))
	env := []string{"PATH=" + dir, "ETCDCTL_ENDPOINTS=" + strings.Join(tr.etcd.Endpoints(), ",")}
	code, out, stderr, err := harness.RunOnce(tr.ctx, env, bash, "-c", command)
	tr.must(err)
	if code != 0 || strings.TrimSpace(out) != "1" {
		tr.Fatalf("%s: exit code %d, %s%s; want one deleted key", command, code, out, stderr)
	}
}

// plain reports whether a terminal shows the text as it is.
func plain(text string) bool {
	return utf8.ValidString(text) &&
		!strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) })
}

// junk is what somebody may write under an election's prefix, by the end of
// its key.
func junk() map[string]string {
	return map[string]string{
		"":                   "",
		"zzz":                "not a lease id",
		"7fffffffffffffff":   "a lease id, and no lease",
		"binary":             "\x00\x01\xff\xfe\x1b[2J",
		"\xff\x1b[31m'\n\\":  "a key that no terminal should see",
		"it's $HOME `id`; #": "a key that no shell should run",
		"-r":                 "a key that no option parser should take",
		"huge":               strings.Repeat("x", 1<<20),
		"deeper/1234abcd":    "as of a nested election, without a lease",
	}
}

// TestJunk_AheadOfUs: each key that is first in the queue and will not go is
// named with the command that removes it, by the daemon and by status.
func TestJunk_AheadOfUs(t *testing.T) {
	tr := ordinary(t)
	client := tr.etcdClient()
	keys := junk()
	for key, value := range keys {
		_, err := client.Put(tr.ctx, tr.election+"/"+key, value)
		tr.must(err)
	}
	// Not below the prefix: none of our business.
	_, err := client.Put(tr.ctx, tr.election+"x/1", "another election")
	tr.must(err)
	_, err = client.Put(tr.ctx, tr.election, "the election's name itself")
	tr.must(err)

	c := tr.start("a", "")
	tr.waitStatus(c, "/standby", http.StatusOK)
	for left := len(keys); left > 0; left-- {
		var s status
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if s = tr.status(c); s.State != "standby" || s.Blocker == nil {
				return fmt.Errorf("no blocker, and %d are left: %+v", left, s)
			}
			got, err := client.Get(tr.ctx, tr.election+"/",
				clientv3.WithPrefix(), clientv3.WithKeysOnly(),
				clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
			key := strings.TrimPrefix(s.Blocker.Remedy, "etcdctl del ")
			if err == nil && !strings.Contains(tr.status(c).Blocker.Remedy, key) {
				err = fmt.Errorf("the blocker has changed")
			}
			if err == nil && (len(got.Kvs) != left+1) {
				err = fmt.Errorf("%d keys, want %d", len(got.Kvs), left+1)
			}
			return err
		}))
		if s.Name != "" || s.Leader != nil {
			t.Errorf("%q leads according to /status", s.Name)
		}
		if !plain(s.Blocker.Key) || !plain(s.Blocker.Remedy) || !plain(s.Blocker.Why) ||
			s.Blocker.Why == "" {
			t.Errorf("not for a terminal: %+q", *s.Blocker)
		}
		code, text := tr.leasehold("status")
		if code != 1 || !strings.Contains(text, s.Blocker.Remedy) || !plain(text) {
			t.Errorf("status: %d, %q, want 1 and %s", code, text, s.Blocker.Remedy)
		}
		code, text = tr.leasehold("status", "--json")
		var report struct {
			Leader   *struct{}
			Queue    []struct{ Identity string }
			Blockers []struct{ Key, Why, Remedy string }
		}
		if err := json.Unmarshal([]byte(text), &report); err != nil || code != 1 {
			t.Fatalf("status --json: %d, %v, %s", code, err, text)
		}
		if len(report.Blockers) != left || report.Blockers[0] != *s.Blocker ||
			report.Leader != nil || len(report.Queue) != 1 || report.Queue[0].Identity != "a" {
			t.Errorf("status --json: %s, want %d blockers, %+v first", text, left, *s.Blocker)
		}
		if !strings.Contains(c.Log(), "will not go by itself") {
			t.Errorf("no warning in the log")
		}
		tr.remedy(s.Blocker.Remedy)
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if now := tr.status(c).Blocker; now != nil && *now == *s.Blocker {
				return fmt.Errorf("%+v is still said to block", *now)
			}
			return nil
		}))
	}
	tr.waitJob(c)
	if s := tr.status(c); s.Blocker != nil || s.Name != "a" {
		t.Errorf("/status of the leader: %+v", s)
	}
	if code, text := tr.leasehold("status"); code != 0 || !strings.Contains(text, `leader is "a"`) {
		t.Errorf("status: %d, %s", code, text)
	}
	tr.stop()
	if log := strings.ReplaceAll(c.Log(), "\n", ""); !plain(log) {
		t.Errorf("not for a terminal: %q", log)
	}
}

// TestJunk_BehindUs: what comes after a leader and its standby is nothing to
// them, nor to the hand-over.
func TestJunk_BehindUs(t *testing.T) {
	tr := ordinary(t)
	client := tr.etcdClient()
	leader, standby, job := tr.pair("")
	keys := junk()
	keys["\x00"] = "a key that no command line can hold"
	for key, value := range keys {
		_, err := client.Put(tr.ctx, tr.election+"/"+key, value)
		tr.must(err)
	}
	tr.waitRenewals(leader, 3)
	for _, c := range []*candidate{leader, standby} {
		if s := tr.status(c); s.Blocker != nil || s.Name != "a" {
			t.Errorf("/status of %s: %+v", c.Identity, s)
		}
	}
	if code, text := tr.leasehold("status"); code != 0 || !plain(text) {
		t.Errorf("status: %d, %q", code, text)
	}
	tr.must(leader.Signal(syscall.SIGTERM))
	tr.waitNext(job, soon)
	// A prefix full of junk can be cleared while somebody leads.
	for key := range keys {
		_, err := client.Delete(tr.ctx, tr.election+"/"+key)
		tr.must(err)
	}
	tr.waitStatus(standby, "/leader", http.StatusOK)
	tr.stop()
	if lives := tr.witness.Lives(); len(lives) != 2 {
		t.Errorf("%d lives of jobs, want one each: %+v", len(lives), lives)
	}
}

// TestJunk_InOurPlace: a key of ours that somebody writes to. It stays ours,
// for its create revision stays; without its lease it would outlive us, and
// whoever waits behind it is told.
func TestJunk_InOurPlace(t *testing.T) {
	tr := ordinary(t)
	client := tr.etcdClient()
	leader, standby, job := tr.pair("")
	key := tr.status(leader).Leader.Key
	for _, value := range []string{"", "\xff\xfe\x1b[2J", strings.Repeat("x", 1<<20)} {
		_, err := client.Put(tr.ctx, key, value, clientv3.WithIgnoreLease())
		tr.must(err)
		tr.waitRenewals(leader, 1)
		var s status
		for _, c := range []*candidate{leader, standby} {
			if s = tr.status(c); s.Leader == nil || s.Leader.Token != job.Token {
				t.Errorf("/status of %s: %+v", c.Identity, s)
			}
			if len(s.Name) > 1024 {
				t.Errorf("/status of %s holds a name of %d bytes", c.Identity, len(s.Name))
			}
		}
		if code, text := tr.leasehold("status"); code != 0 || !plain(text) {
			t.Errorf("status: %d, %.200q", code, text)
		}
	}
	_, err := client.Put(tr.ctx, key, "somebody else") // takes the lease off it
	tr.must(err)
	tr.waitRenewals(leader, 3)
	tr.must(leader.Signal(syscall.SIGTERM))
	tr.waitExit(leader, 0)
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		s := tr.status(standby)
		code, _ := tr.leasehold("status")
		switch {
		case s.Job.State == "running": // fine too: the leader took its key away
			return nil
		case s.Blocker == nil || s.Blocker.Key != key || code != 1:
			return fmt.Errorf("nobody is told what b waits for: %+v, status: %d", s, code)
		}
		return nil
	}))
	if s := tr.status(standby); s.Blocker != nil {
		tr.remedy(s.Blocker.Remedy)
	}
	tr.waitNext(job, waitTimeout)
	for _, o := range check.Overlaps(tr.witness.Lives()) {
		t.Error(o)
	}
	tr.finish()
}

// TestJunk_OtherCandidates: candidates that are no leasehold may have any name,
// and elections may be nested.
func TestJunk_OtherCandidates(t *testing.T) {
	tr := ordinary(t)
	elect := func(election, name string) *exec.Cmd {
		ctx, cancel := context.WithCancel(tr.ctx)
		t.Cleanup(cancel)
		whole := tr.etcd.EtcdctlCommand(tr.etcd.Endpoints(), "elect", election, name)
		cmd := exec.CommandContext(ctx, whole.Path, whole.Args[1:]...)
		var out strings.Builder
		cmd.Stdout = &out
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		tr.must(cmd.Start())
		t.Cleanup(func() { cancel(); _ = cmd.Wait() })
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			got, err := tr.etcd.Etcdctl(tr.ctx, "get", "--prefix", "--keys-only", election+"/")
			if err == nil && strings.TrimSpace(got) == "" {
				err = fmt.Errorf("etcdctl has no key in %s", election)
			}
			return err
		}))
		return cmd
	}
	first := elect(tr.election, "\xff\x1b[2J \"quoted\"\nSTOPPING=1\n")
	name := fmt.Sprintf("@leasehold-junk-%d", os.Getpid())
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	tr.must(err)
	t.Cleanup(func() { _ = notify.Close() })
	c := tr.start("a", "", variables("NOTIFY_SOCKET="+notify.LocalAddr().String()))
	tr.waitStatus(c, "/standby", http.StatusOK)
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if s := tr.status(c); s.Leader == nil || s.Name == "" || s.Name == "a" ||
			!utf8.ValidString(s.Name) || s.Blocker != nil {
			return fmt.Errorf("/status behind a candidate of a strange name: %+v", s)
		}
		return nil
	}))
	if code, text := tr.leasehold("status"); code != 0 || !plain(text) {
		t.Errorf("status: %d, %q", code, text)
	}
	if _, body, err := c.Get(tr.ctx, "/standby"); err != nil || strings.TrimSpace(body) != "ok" {
		t.Errorf("/standby: %q, %v", body, err)
	}
	if _, body, err := c.Get(tr.ctx, "/leader"); err != nil || !plain(body) {
		t.Errorf("/leader: %q, %v", body, err)
	}
	// Systemd must not take a name for a notification.
	tr.must(notify.SetReadDeadline(time.Now().Add(waitTimeout)))
	for buf := make([]byte, 4096); ; {
		n, err := notify.Read(buf)
		tr.must(err)
		if text := string(buf[:n]); strings.HasPrefix(text, "STATUS=standby, leader is ") {
			if !plain(text) || strings.Contains(text, "\n") {
				t.Errorf("systemd is told %q", text)
			}
			break
		}
	}
	tr.must(first.Process.Signal(os.Interrupt))
	job := tr.waitJob(c)
	_ = first.Wait()

	// Behind a leader a nested election is harmless. Once its key is older than ours it blocks us.
	nested := elect(tr.election+"/nested", "x")
	if s := tr.status(c); s.Blocker != nil || s.Name != "a" {
		t.Errorf("/status: %+v", s)
	}
	_, err = tr.etcd.Etcdctl(tr.ctx, "del", tr.status(c).Leader.Key)
	tr.must(err)
	tr.waitDead(job)
	var s status
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		s = tr.status(c)
		if b := s.Blocker; b == nil || !strings.HasPrefix(b.Key, tr.election+"/nested/") ||
			!strings.Contains(b.Why, "nested") {
			return fmt.Errorf("the nested election is not named: %+v", s)
		}
		return nil
	}))
	// Nobody is advised to delete a key whose lease is alive.
	if code, text := tr.leasehold("status"); code != 1 || !strings.Contains(text, s.Blocker.Why) ||
		strings.Contains(text, "etcdctl del") || s.Blocker.Remedy != "" {
		t.Errorf("status: %d, %s, %+v", code, text, s.Blocker)
	}
	_ = nested.Process.Signal(os.Interrupt) // it resigns
	tr.waitNext(job, waitTimeout)
	tr.stop()
	if log := strings.ReplaceAll(c.Log(), "\n", ""); !plain(log) {
		t.Errorf("not for a terminal: %q", log)
	}
}

// TestHealthEndpoint_HandOverUnderFire: a thousand slow clients neither delay
// the hand-over nor keep a probe from its answer.
func TestHealthEndpoint_HandOverUnderFire(t *testing.T) {
	tr := ordinary(t)
	leader, standby, job := tr.pair("")
	for i := range 1000 {
		c := []*candidate{leader, standby}[i%2]
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(tr.ctx, "tcp", c.Listen)
		if err != nil {
			break // the backlog is full
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = conn.Write([]byte("GET /leader HT")) // it may be closed already
	}
	for _, c := range []*candidate{leader, standby} {
		tr.waitStatus(c, "/livez", http.StatusOK)
	}
	tr.must(leader.Signal(syscall.SIGTERM))
	next := tr.waitNext(job, soon)
	tr.waitExit(leader, 0)
	tr.waitStatus(standby, "/leader", http.StatusOK)
	tr.waitRenewals(standby, 3)
	lives := tr.witness.Lives()
	runs := func(l harness.Life) bool { return l.Pid == next.Pid && l.Alive() }
	if len(lives) != 2 || !slices.ContainsFunc(lives, runs) {
		t.Errorf("lives: %+v", lives)
	}
	tr.finish()
}
