//go:build linux

package scenario_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// TestUntouched: troubles of etcd that are no reason to move the job. It has
// one life through each of them, at TTL 5 s with three members.
func TestUntouched(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute")
	}
	// lost is how many renewals to wait for so that the lease can't have lived
	// on without them: there is one each TTL/5.
	const lost = 6
	plain := func(*testing.T) harness.ClusterConfig { return harness.ClusterConfig{} }
	noChange := func(*trial, *harness.CandidateConfig) {}
	rows := []struct {
		name    string
		cluster func(t *testing.T) harness.ClusterConfig
		auth    bool
		change  func(tr *trial, cfg *harness.CandidateConfig)
		trouble func(tr *trial, c *candidate)
	}{
		{"etcd's leader killed", plain, false, noChange, func(tr *trial, c *candidate) {
			leader, err := tr.etcd.Leader(tr.ctx)
			tr.must(err)
			leader.Kill()
			tr.waitRenewals(c, lost)
		}},
		{"etcd's leader paused", plain, false, noChange, func(tr *trial, c *candidate) {
			leader, err := tr.etcd.Leader(tr.ctx)
			tr.must(err)
			tr.must(leader.Pause())
			tr.Logf("%s paused at %s", leader.Name, time.Now().UTC().Format(time.StampMicro))
			tr.waitRenewals(c, lost)
			// It does not go on: for an instant it would take itself for the
			// leader and may revoke every lease that was renewed elsewhere
			// (etcd's ensureLeadership is content with a fresh tick).
			leader.Kill()
			tr.must(leader.Start())
			tr.must(leader.WaitHealthy(tr.ctx))
			tr.waitRenewals(c, 3)
		}},
		{"each member unreachable in turn", plain, false, noChange, eachUnreachable},
		{"each member unreachable in turn, with auth", plain, true, noChange, eachUnreachable},
		{
			"two endpoints, either unreachable", plain, false,
			func(_ *trial, cfg *harness.CandidateConfig) {
				cfg.Endpoints = cfg.Endpoints[:2]
			}, func(tr *trial, c *candidate) {
				c.Proxies = c.Proxies[:2]
				eachUnreachable(tr, c)
			},
		},
		{"etcd unreachable for TTL/5", plain, false, noChange, func(tr *trial, c *candidate) {
			tr.waitRenewals(c, 1)
			c.SetReachable(false)
			tr.sleepPast(harness.Now(), tr.ttl/5)
			c.SetReachable(true)
			tr.waitRenewals(c, lost)
		}},
		{"rolling restart", plain, false, noChange, func(tr *trial, c *candidate) {
			for _, m := range tr.etcd.Members {
				tr.must(m.Restart(tr.ctx))
				tr.waitRenewals(c, 2)
			}
			tr.waitRenewals(c, 3)
		}},
		{"auth tokens expire", expiringTokens, true, noChange, func(tr *trial, c *candidate) {
			tr.waitRenewals(c, 2*lost)
		}},
		{"rolling restart with auth", plain, true, noChange, func(tr *trial, c *candidate) {
			for _, m := range tr.etcd.Members { // each forgets the tokens it has given
				tr.must(m.Restart(tr.ctx))
				tr.waitRenewals(c, 2)
			}
			tr.waitRenewals(c, 3)
		}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			cluster := row.cluster(t)
			cluster.Size = 3
			tr := newTrial(t, users()[1], cluster)
			tr.ttl = 5 * time.Second
			auth := variables()
			if row.auth {
				auth = tr.enableAuth()
			}
			change := func(cfg *harness.CandidateConfig) {
				auth(cfg)
				row.change(tr, cfg)
			}
			leader := tr.start("a", "", change)
			job := tr.waitJob(leader)
			standby := tr.start("b", "", change)
			tr.waitStatus(standby, "/standby", http.StatusOK)
			row.trouble(tr, leader)
			lives := tr.witness.Lives()
			if len(lives) != 1 || !lives[0].Alive() || lives[0].Pid != job.Pid {
				t.Fatalf("the job was moved: %v", tr.summary())
			}
			tr.waitStatus(leader, "/leader", http.StatusOK)
			tr.waitStatus(standby, "/standby", http.StatusOK)
			tr.must(tr.etcd.WaitHealthy(tr.ctx))
			if row.name == "etcd's leader killed" {
				return // etcdctl would want every member
			}
			tr.finish()
		})
	}
}

func eachUnreachable(tr *trial, c *candidate) {
	for _, p := range c.Proxies {
		p.Cut(harness.BothWays)
		tr.waitRenewals(c, 6)
		p.Recover()
		tr.waitRenewals(c, 1)
	}
}

// enableAuth has etcd ask for a password, and returns what gives it to a candidate.
func (tr *trial) enableAuth() change {
	tr.Helper()
	tr.must(tr.etcd.EnableAuth(tr.ctx, "candidate", "candidate-secret", tr.election))
	return variables("LEASEHOLD_USERNAME=candidate", "LEASEHOLD_PASSWORD=candidate-secret")
}

// expiringTokens gives out tokens that end 2 s later, used or not. (etcd's
// simple tokens live on while they are used.)
func expiringTokens(t *testing.T) harness.ClusterConfig {
	dir := t.TempDir()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"private.pem": {Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)},
		"public.pem":  {Type: "PUBLIC KEY", Bytes: public},
	} {
		text := pem.EncodeToMemory(block)
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	token := "jwt,pub-key=" + dir + "/public.pem,priv-key=" + dir + "/private.pem"
	return harness.ClusterConfig{
		Flags: []string{"--auth-token", token + ",sign-method=RS256,ttl=2s"},
	}
}

// Renewals must not authenticate one by one: each takes etcd 79 ms of bcrypt.
func TestAuth_RenewalsDontAuthenticate(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 40 seconds")
	}
	t.Parallel()
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	tr.ttl = 2 * time.Second
	c := tr.start("a", "", tr.enableAuth())
	tr.waitJob(c)
	before, err := tr.etcd.Members[0].Metric(tr.ctx, authentications)
	tr.must(err)
	tr.waitRenewals(c, 100)
	after, err := tr.etcd.Members[0].Metric(tr.ctx, authentications)
	tr.must(err)
	if after-before > 1 {
		t.Errorf("100 renewals caused %v authentications", after-before)
	}
	tr.finish()
}

// Certificates are renewed while the daemon runs: the next connection must show
// the new one, and the job must not notice.
func TestTLS_NewCertificates(t *testing.T) {
	t.Parallel()
	dir, err := harness.TempDir("leasehold-certs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	certs, err := harness.NewCerts(dir)
	if err != nil {
		t.Fatal(err)
	}
	tr := newTrial(t, users()[1], harness.ClusterConfig{TLS: certs})
	c := tr.start("a", "", func(cfg *harness.CandidateConfig) {
		cfg.Env = append(cfg.Env,
			"LEASEHOLD_TLS_CA_FILE="+certs.CAFile,
			"LEASEHOLD_TLS_CERT_FILE="+certs.ClientCertFile,
			"LEASEHOLD_TLS_KEY_FILE="+certs.ClientKeyFile)
	})
	job := tr.waitJob(c)
	tr.must(certs.IssueClient(4))
	c.Proxies[0].Drop()
	tr.waitRenewals(c, 6)
	if lives := tr.witness.Lives(); len(lives) != 1 || lives[0].Pid != job.Pid ||
		!lives[0].Alive() {
		t.Errorf("the job was moved: %v", tr.summary())
	}
	tr.finish()
}

// A member of etcd whose disk hangs answers renewals, which it passes on, and
// asks after watches, but hears of nothing any more. A standby whose watch it
// serves finds that out.
func TestStandby_OnAMemberWhoseDiskHangs(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		if os.Getenv("E2E_NO_SKIP") == "1" {
			t.Fatal("needs strace, and E2E_NO_SKIP=1 forbids to skip")
		}
		t.Skip("skipped: needs strace, to make a disk hang")
	}
	t.Parallel()
	tr := newTrial(t, users()[1], harness.ClusterConfig{
		Size: 3, Flags: []string{"--unsafe-no-fsync=false"},
	})
	tr.ttl = 5 * time.Second
	leader, standby, job := tr.pair("")
	etcdLeader, err := tr.etcd.Leader(tr.ctx)
	tr.must(err)
	hung := 0
	if tr.etcd.Members[hung] == etcdLeader {
		hung = 1
	}
	for i, p := range standby.Proxies {
		if i != hung {
			p.Cut(harness.BothWays)
		}
	}
	tr.waitRenewals(standby, 8) // long enough for the watch to have moved there
	standby.SetReachable(true)
	end, err := tr.etcd.Members[hung].SlowDisk(tr.ctx, 10*time.Minute)
	tr.must(err)
	defer end()
	tr.must(leader.Signal(syscall.SIGTERM))
	tr.waitExit(leader, 0)
	if next := tr.waitNext(job, waitTimeout); next.Candidate != "b" {
		t.Errorf("the next job is %v, want b's", next)
	}
	end()
	tr.finish()
}

// waitCommit waits until etcd has written to its disk all that it has done so far. If it is killed
// before that, it does it again at its next start, and knows the newest tokens.
func (tr *trial) waitCommit() {
	tr.Helper()
	etcd := tr.etcdClient()
	defer etcd.Close()
	commits := func() float64 {
		n, err := tr.etcd.Members[0].Metric(tr.ctx,
			"etcd_disk_backend_commit_duration_seconds_count")
		tr.must(err)
		return n
	}
	before := commits()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if _, err := etcd.Put(tr.ctx, "another/key", ""); err != nil {
			return err
		}
		if commits() < before+2 { // one may have been under way
			return errors.New("etcd has not committed")
		}
		return nil
	}))
}

// A guard that gives up its elector has the lease revoked with the token that etcd gave the
// elector: to check the password would cost the next job 80 ms. Only where etcd knows the
// token no more the password is taken.
func TestAuth_RevokeTakesTheToken(t *testing.T) {
	for _, row := range []struct {
		name string
		want float64
	}{{"good token", 0}, {"forgotten token", 2}} { // of the old leader's guard, and of the standby
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, users()[1], harness.ClusterConfig{})
			tr.ttl = 5 * time.Minute // etcd may take half a minute to restart
			withAuth := tr.enableAuth()
			leader := tr.start("a", "", withAuth)
			job := tr.waitJob(leader)
			standby := tr.start("b", "", withAuth)
			tr.waitStatus(standby, "/standby", http.StatusOK)
			checked := func() float64 {
				n, err := tr.etcd.Members[0].Metric(tr.ctx, authentications)
				tr.must(err)
				return n
			}
			tr.waitCommit()
			before := checked()
			tr.lastElector(leader) // the token is handed on
			if row.want > 0 {
				tr.must(leader.signalElector(syscall.SIGSTOP)) // so that it gets no other token
				tr.must(leader.Signal(syscall.SIGSTOP))        // nor another elector
				// A member of 3.5 that is asked to end waits for this elector, so it is killed.
				m := tr.etcd.Members[0]
				tr.must(m.Signal(syscall.SIGKILL))
				_, err := m.Wait(tr.ctx)
				tr.must(err)
				tr.must(m.Start())
				tr.must(m.WaitHealthy(tr.ctx))
				before = 0
			}
			killed := harness.Now()
			tr.must(leader.signalElector(syscall.SIGKILL))
			tr.must(leader.Signal(syscall.SIGCONT))
			next := tr.waitNext(job, waitTimeout)
			tr.Logf("the next job started %v after the elector was killed", next.Started-killed)
			tr.waitExit(leader, 70)
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				if n := checked() - before; n != row.want {
					return fmt.Errorf("%v authentications, want %v", n, row.want)
				}
				return nil
			}))
			tr.finish()
		})
	}
}
