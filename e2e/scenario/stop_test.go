//go:build linux

package scenario_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// A stop is as quick when the job is between two runs, and when the candidate
// waits before it campaigns again.
func TestStop_BetweenTwoRuns(t *testing.T) {
	for limit, state := range map[string]string{"0": "leading", "1": "connecting"} {
		t.Run(state, func(t *testing.T) {
			tr := ordinary(t)
			tr.ttl = 5 * time.Minute
			c := tr.start("a", "exit=1",
				variables("LEASEHOLD_RESTART_LIMIT="+limit, "LEASEHOLD_STOP_GRACE=5m"))
			// The fifth pause is 6.4 s at least, so that it is met.
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				if n := len(tr.witness.Lives()); n < 5 {
					return fmt.Errorf("%d lives", n)
				}
				s := tr.status(c)
				alive := slices.Contains([]string{"starting", "running", "stopping"}, s.Job.State)
				if s.State != state || alive {
					return fmt.Errorf("state %s, job %s", s.State, s.Job.State)
				}
				return nil
			}))
			began := harness.Now()
			tr.must(c.Signal(syscall.SIGTERM))
			tr.waitExit(c, 0)
			if took := harness.Now() - began; took > 6*time.Second {
				t.Errorf("the stop took %v", took)
			}
			tr.leasesAre()
			tr.noProcesses()
		})
	}
}

// Whoever is started in a lost daemon's place finds the endpoint's address free,
// though the lease can't be revoked yet.
func TestGuardKilled_EndpointIsFreeBeforeTheLeaseIs(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 5 * time.Minute
	c := tr.start("a", "")
	job := tr.waitJob(c)
	elector, err := c.Elector()
	tr.must(err)
	c.SetReachable(false)
	tr.must(c.Signal(syscall.SIGKILL))
	tr.waitDead(job)
	tr.waitFree(c.Listen)
	if err := syscall.Kill(elector, 0); err != nil {
		t.Errorf("the elector has ended before it could revoke: %v", err)
	}
	c.SetReachable(true)
	tr.nothingLeft()
}

// The guard holds the endpoint's socket, and the elector serves on it. When no other elector
// follows, the address is free although the lease can't be revoked yet.
func TestElectorsKilled_EndpointIsFreeBeforeTheLeaseIs(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 5 * time.Minute
	c := tr.start("a", "")
	job := tr.waitJob(c)
	elector, err := c.Elector()
	tr.must(err)
	spawner, err := c.Spawner()
	tr.must(err)
	inode := listenerAt(tr, c.Listen)
	for pid, want := range map[int]bool{
		c.Guard(): true, elector: true, spawner: false, job.Pid: false,
	} {
		if got := holdsSocket(tr, pid, inode); got != want {
			t.Errorf("process %d of guard %d, elector %d, spawner %d, job %d holds the socket: %v",
				pid, c.Guard(), elector, spawner, job.Pid, got)
		}
	}
	tr.waitStatus(c, "/leader", http.StatusOK)

	c.SetReachable(false)
	tr.loseElectors(c)
	tr.waitDead(job)
	tr.waitFree(c.Listen)
	if c.ended() {
		t.Error("the guard has ended before it could revoke")
	}
	c.SetReachable(true)
	tr.waitExit(c, 70)
	tr.nothingLeft()
}

// waitFree waits until nothing listens at an address.
func (tr *trial) waitFree(address string) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		l, err := net.Listen("tcp", address)
		if err == nil {
			err = l.Close()
		}
		return err
	}))
}

// listenerAt is the inode of the socket that listens at an IPv4 address.
func listenerAt(tr *trial, address string) (inode string) {
	tr.Helper()
	at, err := netip.ParseAddrPort(address)
	tr.must(err)
	ip := at.Addr().As4()
	const listening = "0A"
	local := fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(ip[:]), at.Port())
	table, err := os.ReadFile("/proc/net/tcp")
	tr.must(err)
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 9 && f[1] == local && f[3] == listening {
			return f[9]
		}
	}
	tr.Fatalf("nothing listens at %s", address)
	return ""
}

func holdsSocket(tr *trial, pid int, inode string) bool {
	tr.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	open, err := os.ReadDir(dir)
	tr.must(err)
	return slices.ContainsFunc(open, func(e os.DirEntry) bool {
		target, err := os.Readlink(dir + e.Name())
		return err == nil && target == "socket:["+inode+"]"
	})
}

// TestStop_ASecondSignalWaitsForNobody: neither for an elector that hangs,
// nor for an etcd that does not answer it.
func TestStop_ASecondSignalWaitsForNobody(t *testing.T) {
	t.Parallel()
	stopped := func(c *candidate) error { return c.signalElector(syscall.SIGSTOP) }
	for _, delay := range []struct {
		name string
		do   func(c *candidate) error
	}{
		{"the elector hangs", stopped},
		{"etcd is cut off", func(c *candidate) error { c.SetReachable(false); return nil }},
		{"both", func(c *candidate) error { c.SetReachable(false); return stopped(c) }},
	} {
		t.Run(delay.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, users()[1], harness.ClusterConfig{})
			tr.ttl = 5 * time.Minute
			leader, standby, job := tr.pair("ignore-term", variables("LEASEHOLD_STOP_GRACE=1m"))
			for _, c := range []*candidate{standby, leader} {
				tr.must(delay.do(c))
				began := harness.Now()
				tr.must(c.Signal(syscall.SIGTERM))
				tr.must(c.Signal(syscall.SIGINT))
				tr.waitExit(c, 0)
				if took := harness.Now() - began; took > 8*time.Second { // docker stop waits 10 s
					t.Errorf("the stop of %s took %v", c.Identity, took)
				} else {
					t.Logf("the stop of %s took %v", c.Identity, took)
				}
			}
			tr.waitDead(job)
			if delay.name == "the elector hangs" {
				tr.nothingLeft()
			}
		})
	}
}

// That the job's end is seen where nobody is left to tell of it.
// A guard is known to hang only after seconds.
func TestLeader_JobEndsWhileTheGuardHangs(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 5 * time.Minute
	c := tr.start("a", "")
	job := tr.waitJob(c)
	tr.waitStatus(c, "/leader", http.StatusOK)
	tr.must(c.Signal(syscall.SIGSTOP))
	tr.must(syscall.Kill(job.Pid, syscall.SIGKILL))
	dead := tr.waitDead(job)
	tr.waitStatus(c, "/leader", http.StatusServiceUnavailable)
	if took := harness.Now() - dead; took > time.Second {
		t.Errorf("/leader said 200 for %v after the job had ended", took)
	}
	tr.waitExit(c, 128+9)
	tr.nothingLeft()
}

// An elector that hung while the job ended has yet to be told of that when it goes on, and
// finds questions waiting.
func TestLeader_JobEndsWhileTheElectorHangs(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 5 * time.Minute
	c := tr.start("a", "", variables("LEASEHOLD_RESTART=never"))
	job := tr.waitJob(c)
	tr.waitStatus(c, "/leader", http.StatusOK)
	elector, err := c.Elector()
	tr.must(err)
	tr.must(syscall.Kill(elector, syscall.SIGSTOP))
	tr.must(syscall.Kill(job.Pid, syscall.SIGKILL))
	tr.waitDead(job)
	var questions []net.Conn
	for range 30 {
		conn, err := net.Dial("tcp", c.Listen)
		tr.must(err)
		defer func() { _ = conn.Close() }()
		const request = "GET /leader HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
		_, err = io.WriteString(conn, request)
		tr.must(err)
		questions = append(questions, conn)
	}
	tr.must(syscall.Kill(elector, syscall.SIGCONT))
	for _, conn := range questions {
		tr.must(conn.SetReadDeadline(time.Now().Add(waitTimeout)))
		answer, _ := io.ReadAll(conn) // it may end before it answers
		if strings.Contains(string(answer), "200 OK") {
			t.Errorf("the job has exited, and /leader says %q", answer)
		}
	}
	tr.waitExit(c, 128+9)
	tr.nothingLeft()
}

// Whoever asks gets an answer, or learns soon that there is none.
func TestStatusAndCheck_OfTheHung(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 5 * time.Minute
	c := tr.start("a", "")
	tr.waitStatus(c, "/leader", http.StatusOK)
	ask := func(code int, args ...string) {
		t.Helper()
		began := harness.Now()
		env := []string{
			"LEASEHOLD_ELECTION=" + tr.election, "LEASEHOLD_LISTEN=" + c.Listen,
			"LEASEHOLD_ENDPOINTS=" + strings.Join(tr.etcd.Endpoints(), ","),
		}
		got, stdout, stderr, err := harness.RunOnce(tr.ctx, env, tr.programs.Leasehold, args...)
		tr.must(err)
		if got != code {
			t.Errorf("leasehold %s: %d, want %d: %s%s",
				strings.Join(args, " "), got, code, stdout, stderr)
		}
		if took := harness.Now() - began; took > 6*time.Second {
			t.Errorf("leasehold %s took %v", strings.Join(args, " "), took)
		}
	}
	ask(0, "check")
	ask(0, "status")

	m := tr.etcd.Members[0]
	tr.must(m.Pause())
	ask(69, "status")
	ask(69, "status", "--json")
	ask(0, "check", "leader") // it asks nobody but the daemon
	tr.must(m.Continue())

	elector, err := c.Elector()
	tr.must(err)
	for _, args := range [][]string{{"check"}, {"check", "leader"}} {
		tr.must(syscall.Kill(elector, syscall.SIGSTOP))
		tr.must(harness.WaitStopped(elector))
		ask(69, args...)
		ask(0, "status")
		tr.must(syscall.Kill(elector, syscall.SIGCONT)) // before it is replaced
		ask(0, args...)
	}
	tr.finish()
	ask(69, "check")
	ask(1, "status")
}

// A daemon without an endpoint is a daemon all the same.
func TestListen_Off(t *testing.T) {
	tr := ordinary(t)
	c := tr.start("a", "", variables("LEASEHOLD_LISTEN=off"))
	tr.waitJob(c)
	if code, _, err := c.Get(tr.ctx, "/livez"); err == nil {
		t.Errorf("something answers at the default address: %d", code)
	}
	tr.finish()
}

// What refuses a configuration quotes it. It must not quote secrets.
func TestSecrets_NotInRefusals(t *testing.T) {
	t.Parallel()
	const secret = "very-secret-word"
	binary := allPrograms(t).Leasehold
	file := t.TempDir() + "/password"
	if err := os.WriteFile(file, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		code int
		env  []string
		args []string
	}{
		{78, []string{"PASSWORD=" + secret}, []string{"elect"}},
		{
			78,
			[]string{"PASSWORD=" + secret, "PASSWORD_FILE=" + file, "USERNAME=u"},
			[]string{"--", "true"},
		},
		{78, []string{"PASWORD=" + secret}, []string{"elect"}},
		{78, []string{"PASSWORD_=" + secret}, []string{"status"}},
		{78, []string{"ENDPOINTS=http://u:" + secret + "@127.0.0.1:1"}, []string{"elect"}},
		{78, []string{"ENDPOINTS=ftp://u:" + secret + "@127.0.0.1:1"}, []string{"status"}},
		{78, []string{"ENDPOINTS=http://u:" + secret + "@127.0.0.1:1:2"}, []string{"status"}},
		{64, nil, []string{"--password", secret}},
		{64, nil, []string{"--password=" + secret}},
		{64, nil, []string{"PASSWORD=" + secret, "elect"}},
		{64, nil, []string{"elect", "--password=" + secret}},
		{64, nil, []string{"--endpoints=http://u:" + secret + "@127.0.0.1:1"}},
		{
			69,
			[]string{"USERNAME=u", "PASSWORD=" + secret, "ENDPOINTS=127.0.0.1:1"},
			[]string{"status"},
		},
	} {
		env := []string{"PATH=" + os.Getenv("PATH"), "LEASEHOLD_ELECTION=x", "LEASEHOLD_LISTEN=off"}
		for _, kv := range row.env {
			env = append(env, "LEASEHOLD_"+kv)
		}
		ctx := testContext(t, waitTimeout)
		code, stdout, stderr, err := harness.RunOnce(ctx, env, binary, row.args...)
		if err != nil {
			t.Fatal(err)
		}
		if code != row.code || strings.Contains(stdout+stderr, secret) || stderr == "" {
			t.Errorf("%q, %q: exit code %d, want %d, and no secret in %s%s",
				row.env, row.args, code, row.code, stdout, stderr)
		}
	}
}

// A crash of the guard has no exit code, which would be taken for the job's.
func TestGuardCrashes_EndsBySignal(t *testing.T) {
	tr := ordinary(t)
	leader, _, job := tr.pair("")
	tr.must(leader.Signal(syscall.SIGSEGV))
	tr.waitNext(job, waitTimeout)
	code, err := leader.Wait(tr.waitContext(waitTimeout))
	tr.must(err)
	// By its own hand, or by the elector's, which does not wait until all that the runtime
	// tells of a crash is written.
	if code != 128+int(syscall.SIGABRT) && code != 128+int(syscall.SIGKILL) {
		t.Errorf("the guard ended with code %d, want a signal", code)
	}
	tr.finish()
}
