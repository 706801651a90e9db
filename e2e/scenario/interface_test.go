//go:build linux

package scenario_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// variables adds environment variables to a candidate's.
func variables(env ...string) change {
	return func(cfg *harness.CandidateConfig) { cfg.Env = append(cfg.Env, env...) }
}

// command replaces the job.
func command(job ...string) change {
	return func(cfg *harness.CandidateConfig) { cfg.Job = job }
}

// subcommand runs leasehold with a subcommand instead of a job.
func subcommand(args ...string) change {
	return func(cfg *harness.CandidateConfig) { cfg.Job, cfg.Args = nil, args }
}

// ordinary is a trial as an ordinary user, with one member of etcd.
func ordinary(t *testing.T) *trial {
	t.Helper()
	t.Parallel()
	return newTrial(t, users()[1], harness.ClusterConfig{})
}

func TestExitCode_OfTheDaemon(t *testing.T) {
	never := variables("LEASEHOLD_RESTART=never")
	dir := t.TempDir()
	fit := filepath.Join(dir, "fit")
	if err := errors.Join(
		os.Chmod(filepath.Dir(dir), 0o755), os.WriteFile(fit, nil, 0o644),
	); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name      string
		behaviour string
		change    change
		then      func(tr *trial, c *candidate, job harness.Life)
		code      int
	}{
		{"planned stop, whatever the job's code", "stop-code=7", variables(), terminate, 0},
		{"job ended with 0", "", variables(), tell("exit 0"), 0},
		{"never: job ended with 0", "", never, tell("exit 0"), 0},
		{"never: job ended with 7", "", never, tell("exit 7"), 7},
		{"never: job ended by a signal", "", never, tell("signal 9"), 128 + 9},
		{"never: leadership lost", "", never, func(tr *trial, c *candidate, _ harness.Life) {
			_, err := tr.etcd.Etcdctl(tr.ctx, "del", tr.status(c).Leader.Key)
			tr.must(err)
		}, 76},
		{"never: contact lost", "", never, func(_ *trial, c *candidate, _ harness.Life) {
			c.SetReachable(false)
		}, 76},
		{
			"never: handed over because it is unfit", "", variables("LEASEHOLD_RESTART=never",
				"LEASEHOLD_FITNESS_CMD=test -e "+fit, "LEASEHOLD_FITNESS_INTERVAL=100ms",
				"LEASEHOLD_HEALTH_TIMEOUT=1s", "LEASEHOLD_HEALTH_RETRIES=2"),
			func(tr *trial, _ *candidate, job harness.Life) {
				b := tr.start("b", "")
				tr.waitStatus(b, "/standby", http.StatusOK)
				tr.must(os.Remove(fit))
				tr.waitNext(job, waitTimeout)
				tr.must(b.Signal(syscall.SIGTERM))
				tr.waitExit(b, 0)
			}, 76,
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			tr := ordinary(t)
			c := tr.start("a", row.behaviour, row.change)
			job := tr.waitJob(c)
			row.then(tr, c, job)
			tr.waitExit(c, row.code)
			tr.waitDead(job)
			tr.nothingLeft()
		})
	}
}

func terminate(tr *trial, c *candidate, _ harness.Life) { tr.must(c.Signal(syscall.SIGTERM)) }

func tell(what string) func(*trial, *candidate, harness.Life) {
	return func(tr *trial, _ *candidate, job harness.Life) { tr.must(tr.witness.Tell(job, what)) }
}

func TestExitCode_BeforeAnyCampaign(t *testing.T) {
	t.Parallel()
	binary := allPrograms(t).Leasehold
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	nobody, err := harness.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(t.TempDir(), "not-executable")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	envFile, badFile := filepath.Join(t.TempDir(), "x.env"), filepath.Join(t.TempDir(), "bad.env")
	for path, text := range map[string]string{
		envFile: "# of a unit\nLEASEHOLD_ELECTION='jobs/x'\nLEASEHOLD_LISTEN=off\n" +
			"LEASEHOLD_ENDPOINTS=" + nobody + "\nJOB=backup\n",
		badFile: "LEASEHOLD_ELECTION=jobs/x\nLEASEHOLD_TTL 5s\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good := []string{
		"LEASEHOLD_ELECTION=jobs/x", "LEASEHOLD_LISTEN=off", "LEASEHOLD_ENDPOINTS=" + nobody,
	}
	address := taken.Addr().String()
	addressTaken := []string{"LEASEHOLD_ELECTION=jobs/x", "LEASEHOLD_LISTEN=" + address}
	for _, row := range []struct {
		name string
		env  []string
		args string // separated by blanks
		code int
		says []string
	}{
		{"version", nil, "version", 0, []string{"leasehold"}},
		{"help", nil, "help", 0, []string{"LEASEHOLD_ELECTION", "LEASEHOLD_TTL", "15s"}},
		{"--version", nil, "--version", 0, []string{"leasehold"}},
		{"--help", nil, "--help", 0, []string{"LEASEHOLD_ELECTION", "LEASEHOLD_TTL", "15s"}},
		{"-h of a command", nil, "status -h", 0, []string{
			"Usage: leasehold status [ELECTION] [--json]",
		}},
		{"no arguments", good, "", 64, []string{"leasehold"}},
		{"no command", good, "--", 64, nil},
		{"a flag", good, "--ttl 5s", 64, []string{"LEASEHOLD_TTL"}},
		{"unknown command", good, "resign", 64, []string{
			`no such command "resign"`, "leasehold -- resign",
		}},
		{"misspelt command", good, "statsu", 64, []string{
			`no such command "statsu": did you mean status?`,
		}},
		{"an env file", nil, "-f " + envFile + " status", 69, []string{nobody}},
		{"an env file of the daemon", nil, "-f " + envFile + " -- no-such-command", 127, []string{
			"no-such-command",
		}},
		{"the environment overrules the file", []string{
			"LEASEHOLD_ELECTION=a//b",
		}, "status -f " + envFile, 78, []string{"LEASEHOLD_ELECTION"}},
		{"an argument overrules both", good, "status a//b -f " + envFile, 78, []string{
			"LEASEHOLD_ELECTION",
		}},
		{"a faulty env file", nil, "elect -f " + badFile, 78, []string{
			badFile + ":2: there is no =",
		}},
		{"no env file", nil, "elect -f " + envFile + "x", 78, []string{envFile + "x"}},
		{"nothing set", nil, "-- true", 78, []string{"LEASEHOLD_ELECTION"}},
		{"all faults at once", []string{
			"LEASEHOLD_TTL=15", "LEASEHOLD_STOP_SIGNAL=FOO", "LEASEHOLD_MARGIN=x",
			"LEASEHOLD_RESTART=often", "LEASEHOLD_RESTART_LIMIT=-1", "LEASEHOLD_LISTEN=4040",
			"LEASEHOLD_LOG_LEVEL=loud", "LEASEHOLD_LOG_FORMAT=xml", "LEASEHOLD_ENDPOINTS=ftp://x",
			"LEASEHOLD_USERNAME=u", "LEASEHOLD_ELECTOIN=jobs/x", "LEASEHOLD_TLS_CERT_FILE=/nowhere",
			"LEASEHOLD_DIAL_TIMEOUT=0s",
		}, "-- true", 78, []string{
			"LEASEHOLD_TTL", "LEASEHOLD_STOP_SIGNAL", "LEASEHOLD_MARGIN", "LEASEHOLD_RESTART:",
			"LEASEHOLD_RESTART_LIMIT", "LEASEHOLD_LISTEN", "LEASEHOLD_LOG_LEVEL",
			"LEASEHOLD_LOG_FORMAT", "LEASEHOLD_ENDPOINTS", "LEASEHOLD_USERNAME",
			"LEASEHOLD_ELECTOIN", "LEASEHOLD_ELECTION", "LEASEHOLD_TLS_KEY_FILE",
			"LEASEHOLD_DIAL_TIMEOUT", "write 15s",
		}},
		{"times that don't fit", append(
			slices.Clone(good), "LEASEHOLD_TTL=5s", "LEASEHOLD_LOSS_GRACE=4s",
		), "-- true", 78, []string{"LEASEHOLD_TTL", "4s"}},
		{"elect with a job's settings", append(
			slices.Clone(good), "LEASEHOLD_RESTART=never",
		), "elect", 78, []string{"LEASEHOLD_RESTART"}},
		{"command not found", good, "-- no-such-command", 127, []string{"no-such-command"}},
		{"command not executable", good, "-- " + script, 126, []string{script}},
		{"the endpoint's address is taken", addressTaken, "-- true", 71, []string{address}},
		{"the same, elect", addressTaken, "elect", 71, []string{address}},
		{"status without etcd", good, "status", 69, nil},
		{"check without a daemon", []string{"LEASEHOLD_LISTEN=" + nobody}, "check", 69, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			ctx := testContext(t, waitTimeout)
			env := append([]string{"PATH=" + os.Getenv("PATH")}, row.env...)
			args := strings.Fields(row.args)
			code, stdout, stderr, err := harness.RunOnce(ctx, env, binary, args...)
			if err != nil {
				t.Fatal(err)
			}
			if code != row.code {
				t.Errorf("exit code %d, want %d", code, row.code)
			}
			for _, word := range row.says {
				if !strings.Contains(stdout+stderr, word) {
					t.Errorf("does not say %s", word)
				}
			}
			if t.Failed() {
				t.Logf("standard output:\n%s\nstandard error:\n%s", stdout, stderr)
			}
		})
	}
}

func TestStatusAndCheck(t *testing.T) {
	tr := ordinary(t)
	ask := func(c *candidate, args ...string) (int, string) {
		t.Helper()
		env := []string{
			"LEASEHOLD_ELECTION=" + tr.election,
			"LEASEHOLD_ENDPOINTS=" + strings.Join(tr.etcd.Endpoints(), ","),
		}
		if c != nil {
			env = []string{"LEASEHOLD_LISTEN=" + c.Listen}
		}
		code, out, _, err := harness.RunOnce(tr.ctx, env, tr.programs.Leasehold, args...)
		tr.must(err)
		return code, out
	}
	if code, out := ask(nil, "status"); code != 1 {
		t.Errorf("status without a leader: %d, %s", code, out)
	}
	leader, standby, job := tr.pair("")
	code, out := ask(nil, "status")
	if code != 0 || !strings.Contains(out, "a") ||
		!strings.Contains(out, strconv.FormatInt(job.Token, 10)) || !strings.Contains(out, "b") {
		t.Errorf("status: %d, %s", code, out)
	}
	if code, out := ask(nil, "status", "--json"); code != 0 || !strings.HasPrefix(out, "{") {
		t.Errorf("status --json: %d, %s", code, out)
	}
	for _, row := range []struct {
		c    *candidate
		what string
		code int
	}{
		{leader, "live", 0},
		{leader, "ready", 0},
		{leader, "leader", 0},
		{leader, "standby", 1},
		{standby, "live", 0},
		{standby, "ready", 0},
		{standby, "leader", 1},
		{standby, "standby", 0},
	} {
		if code, out := ask(row.c, "check", row.what); code != row.code {
			t.Errorf("check %s of %s: %d, want %d: %s",
				row.what, row.c.Identity, code, row.code, out)
		}
	}
	tr.finish()
}

// TestMetrics: every metric names the election. There are also those of the process, which the
// daemon may read although nobody may look into its memory.
func TestMetrics(t *testing.T) {
	tr := ordinary(t)
	leader, standby, _ := tr.pair("")
	elect := tr.start("c", "", subcommand("elect"))
	tr.waitStatus(elect, "/standby", http.StatusOK)
	for _, c := range []*candidate{leader, standby, elect} {
		_, text, err := c.Get(tr.ctx, "/metrics")
		tr.must(err)
		for line := range strings.Lines(text) {
			name, labels, _ := strings.Cut(line, "{")
			if !strings.HasPrefix(name, "#") &&
				!strings.Contains(labels, fmt.Sprintf("election=%q", tr.election)) {
				t.Errorf("%s: %q does not name the election", c.Identity, line)
			}
		}
		for name, want := range map[string]float64{
			"leasehold_ready": 1, "leasehold_lease_ttl_seconds": tr.ttl.Seconds(),
		} {
			if got, err := c.Metric(tr.ctx, name); err != nil || got != want {
				t.Errorf("%s: %s is %v, %v, want %v", c.Identity, name, got, err, want)
			}
		}
		for _, name := range []string{
			"process_resident_memory_bytes", "process_open_fds", "go_goroutines",
			"leasehold_fencing_token", "leasehold_last_transition_timestamp_seconds",
		} {
			if got, err := c.Metric(tr.ctx, name+"{"); err != nil || got <= 0 {
				t.Errorf("%s: %s is %v, %v", c.Identity, name, got, err)
			}
		}
	}
	tr.stop()
}

func TestWait(t *testing.T) {
	tr := ordinary(t)
	leader := tr.start("a", "", variables("LEASEHOLD_WAIT=0s")) // nobody else is there
	job := tr.waitJob(leader)
	for _, wait := range []string{"0s", "500ms"} {
		tr.waitExit(tr.start("b", "", variables("LEASEHOLD_WAIT="+wait)), 75)
	}
	if d := check.NewHistory(tr.witness.Lives())[0].End; d != 0 || len(tr.witness.Lives()) != 1 {
		t.Error("those that did not wait moved the job")
	}
	tr.must(leader.Signal(syscall.SIGTERM))
	tr.waitDead(job)
	tr.finish()
}

func TestRestart(t *testing.T) {
	for _, row := range []struct {
		policy, ends string
		again        bool
	}{
		{"always", "exit 0", true},
		{"always", "exit 3", true},
		{"on-failure", "exit 3", true},
		{"on-failure", "signal 11", true},
	} {
		t.Run(row.policy+" after "+row.ends, func(t *testing.T) {
			tr := ordinary(t)
			leader, _, job := tr.pair("", variables("LEASEHOLD_RESTART="+row.policy))
			tr.must(tr.witness.Tell(job, row.ends))
			tr.waitLog(leader, "job exited by itself: starting it again")
			again, err := tr.witness.WaitForJob(tr.waitContext(waitTimeout),
				func(l harness.Life) bool { return l.Pid != job.Pid })
			tr.must(err)
			if again.Candidate != "a" || again.Token != job.Token {
				t.Errorf("the job runs again on %s with token %d, want a and %d",
					again.Candidate, again.Token, job.Token)
			}
			tr.waitStatus(leader, "/leader", http.StatusOK)
			s := tr.status(leader)
			if s.Job.Restarts != 1 || s.Job.LastExit == nil {
				t.Errorf("job in /status: %+v, want one restart and its cause", s.Job)
			}
			tr.finish()
		})
	}

	t.Run("pause", func(t *testing.T) {
		tr := ordinary(t)
		leader := tr.start("a", "exit=1", variables("LEASEHOLD_RESTART_LIMIT=0"))
		tr.waitStatus(leader, "/readyz", http.StatusOK)
		var s status
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			// The fourth backoff is long enough to be seen: 4 s.
			if s = tr.status(leader); s.Job.Restarts < 4 || s.Job.State != "backoff" {
				return fmt.Errorf("%s, %d restarts, want 4", s.Job.State, s.Job.Restarts)
			}
			return nil
		}))
		if s.State != "leading" {
			t.Errorf("state between two runs of the job: %s, want leading", s.State)
		}
		if code, _, err := leader.Get(tr.ctx, "/leader"); code != http.StatusServiceUnavailable {
			t.Errorf("/leader between two runs of the job: %d, %v", code, err)
		}
		tr.finish()
	})

	t.Run("limit", func(t *testing.T) {
		tr := ordinary(t)
		leader := tr.start("a", "exit=1", variables("LEASEHOLD_RESTART_LIMIT=2"))
		tr.waitStatus(leader, "/readyz", http.StatusOK)
		standby := tr.start("b", "")
		tr.waitJob(standby) // a fails twice and goes to the back of the queue
		tr.waitStatus(leader, "/standby", http.StatusOK)
		runs := 0
		for _, l := range tr.witness.Lives() {
			if l.Candidate == "a" {
				runs++
			}
		}
		if runs != 2 {
			t.Errorf("the job of a ran %d times before it resigned, want 2", runs)
		}
		tr.finish()
	})
}

// TestJob_Surroundings: what a job finds when it starts, whatever its daemon
// was given.
func TestJob_Surroundings(t *testing.T) {
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			const secret = "very-secret-word"
			c := tr.start("a", "", command("sleep", "1000"), variables(
				"LEASEHOLD_STOP_GRACE=1s", "NOTIFY_SOCKET=@nobody-listens",
				"WATCHDOG_USEC=20000000", "WATCHDOG_PID=1", "KEPT=yes",
				// Without the prefix they are none of ours.
				"TTL=99s", "PASSWORD="+secret, "USERNAME=somebody", "LISTEN=127.0.0.1:1",
			), func(cfg *harness.CandidateConfig) {
				tr.wrap(cfg, "sh", "-c",
					`trap "" INT HUP TERM USR1 PIPE; exec 7</dev/null 9</dev/null; exec "$@"`, "sh")
			})
			tr.waitStatus(c, "/leader", http.StatusOK)
			s := tr.status(c)
			proc := fmt.Sprintf("/proc/%d/", *s.Job.PID)
			// The job may still be between fork and exec.
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				name, err := os.ReadFile(proc + "comm")
				if err == nil && string(name) != "sleep\n" {
					err = fmt.Errorf("it is %s", name)
				}
				return err
			}))

			data, err := os.ReadFile(proc + "status")
			tr.must(err)
			// HUP, INT and QUIT (see TestTerminal_IgnoredStaysIgnored), and nothing else.
			const none = "0000000000000000"
			for field, mask := range map[string]string{
				"SigIgn": "0000000000000007", "SigBlk": none, "SigCgt": none,
			} {
				if !strings.Contains(string(data), field+":\t"+mask+"\n") {
					t.Errorf("%s of the job is not %s in\n%s", field, mask, data)
				}
			}
			// It opens libraries when it starts, and closes them.
			if err := harness.Until(tr.waitContext(waitTimeout), func() error {
				var open []string
				entries, err := os.ReadDir(proc + "fd")
				for _, e := range entries {
					open = append(open, e.Name())
				}
				if err == nil && !slices.Equal(open, []string{"0", "1", "2"}) {
					err = fmt.Errorf("descriptors of the job: %q", open)
				}
				return err
			}); err != nil {
				t.Error(err)
			}

			data, err = os.ReadFile(proc + "environ")
			tr.must(err)
			env := strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")
			want := []string{
				"KEPT=yes", "TTL=99s", "LISTEN=127.0.0.1:1",
				"PASSWORD=" + secret, "USERNAME=somebody",
				"LEASEHOLD_ELECTION=" + tr.election, "LEASEHOLD_IDENTITY=a",
				"LEASEHOLD_KEY=" + s.Leader.Key,
				fmt.Sprintf("LEASEHOLD_FENCING_TOKEN=%d", s.Leader.Token),
				"LEASEHOLD_LEASE_ID=" + s.Lease.ID,
			}
			for _, kv := range want {
				if !slices.Contains(env, kv) {
					t.Errorf("the job's environment lacks %s", kv)
				}
			}
			for _, kv := range env {
				name, _, _ := strings.Cut(kv, "=")
				// See TestJob_AsksItsDaemon.
				kept := name == "LEASEHOLD_ENDPOINTS" || name == "LEASEHOLD_LISTEN"
				wanted := slices.ContainsFunc(want, func(w string) bool {
					return strings.HasPrefix(w, name+"=")
				})
				ours := name == "NOTIFY_SOCKET" ||
					strings.HasPrefix(name, "LEASEHOLD_") || strings.HasPrefix(name, "WATCHDOG_")
				if ours && !kept && !wanted {
					t.Errorf("the job's environment holds %s", kv)
				}
			}
			tr.finish()
		})
	}
}

// TestJob_AsksItsDaemon: leasehold status and leasehold check work in a job as it finds itself.
func TestJob_AsksItsDaemon(t *testing.T) {
	tr := ordinary(t)
	const ask = `until "$0" check leader; do sleep 0.05; done; exec "$0" status`
	c := tr.start("a", "", command("sh", "-c", ask, tr.programs.Leasehold),
		variables("LEASEHOLD_RESTART=never"))
	tr.waitExit(c, 0)
	if out := c.Output(); !strings.Contains(out, "ok\n") ||
		!strings.Contains(out, tr.election+`: leader is "a"`) {
		t.Errorf("in the job they print %q", out)
	}
	tr.finish()
}

// TestJob_NoNewPrivs: a job that the daemon may not be able to kill gains no privileges, unless the
// user wants it to, and then the log warns.
func TestJob_NoNewPrivs(t *testing.T) {
	for _, u := range users() {
		for _, setting := range []string{"", "off"} {
			t.Run(u.name+"/"+setting, func(t *testing.T) {
				t.Parallel()
				tr := newTrial(t, u, harness.ClusterConfig{})
				c := tr.start("a", "", command("grep", "^NoNewPrivs", "/proc/self/status"),
					variables("LEASEHOLD_RESTART=never", "LEASEHOLD_NO_NEW_PRIVS="+setting))
				tr.waitExit(c, 0)
				want := "NoNewPrivs:\t0\n"
				if !u.root && setting == "" {
					want = "NoNewPrivs:\t1\n"
				}
				if out := c.Output(); out != want {
					t.Errorf("the job has %q, want %q", out, want)
				}
				warned := strings.Contains(c.Log(), "level=WARN msg=\"LEASEHOLD_NO_NEW_PRIVS=off")
				if warned != (!u.root && setting == "off") {
					t.Errorf("is there a warning? %v", warned)
				}
				tr.finish()
			})
		}
	}
}

func TestSecrets(t *testing.T) {
	tr := ordinary(t)
	const secret = "very-secret-word"
	tr.must(tr.etcd.EnableAuth(tr.ctx, "candidate", secret, tr.election))
	file := filepath.Join(t.TempDir(), "password")
	tr.must(os.WriteFile(file, []byte(secret+"\n"), 0o600))
	a := tr.start("a", "", variables("LEASEHOLD_USERNAME=candidate", "LEASEHOLD_PASSWORD="+secret))
	job := tr.waitJob(a)
	wrong := tr.start("b", "",
		variables("LEASEHOLD_USERNAME=candidate", "LEASEHOLD_PASSWORD=wrong-"+secret))
	tr.waitStatus(wrong, "/readyz", http.StatusServiceUnavailable)
	// The reason is told to those who ask, and to those who read the log.
	if err := harness.Until(tr.waitContext(waitTimeout), func() error {
		const reason = "invalid user ID or password"
		_, body, err := wrong.Get(tr.ctx, "/readyz")
		switch log := wrong.Log(); {
		case err != nil:
			return err
		case !strings.Contains(body, reason):
			return fmt.Errorf("/readyz does not say why: %s", body)
		case !strings.Contains(log, reason):
			return fmt.Errorf("the log does not say why")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	for _, kv := range job.Env {
		if strings.Contains(kv, secret) {
			t.Errorf("in the job's environment: %s", kv)
		}
	}
	for _, c := range tr.candidates {
		for _, path := range []string{"/status", "/readyz", "/metrics"} {
			_, body, err := c.Get(tr.ctx, path)
			tr.must(err)
			if strings.Contains(body, secret) {
				t.Errorf("%s of %s holds the password: %s", path, c.Identity, body)
			}
		}
	}
	tr.finish()
	for _, c := range tr.candidates {
		if strings.Contains(c.Log(), secret) {
			t.Errorf("the log of %s holds the password: %s", c.Identity, c.Log())
		}
	}
}

// The endpoint tells its status to those who ask for the name that it was given, and not to a web
// page that goes by another.
func TestListen_ByName(t *testing.T) {
	tr := ordinary(t)
	name, err := os.Hostname()
	tr.must(err)
	listener, err := net.Listen("tcp", net.JoinHostPort(name, "0"))
	if err != nil {
		t.Skipf("skipped: this machine's name is of no use as an address: %v", err)
	}
	address := listener.Addr().String()
	tr.must(listener.Close())
	_, port, err := net.SplitHostPort(address)
	tr.must(err)
	c := tr.start("a", "", subcommand("elect"),
		variables("LEASEHOLD_LISTEN="+net.JoinHostPort(name, port)))
	c.Listen = net.JoinHostPort(name, port)
	tr.waitStatus(c, "/status", http.StatusOK)
	req, err := http.NewRequestWithContext(tr.ctx, http.MethodGet, "http://"+address+"/status", nil)
	tr.must(err)
	req.Host = "page.example"
	resp, err := http.DefaultClient.Do(req)
	tr.must(err)
	tr.must(resp.Body.Close())
	if resp.StatusCode != http.StatusMisdirectedRequest {
		t.Errorf("/status for page.example: %s, want 421", resp.Status)
	}
	tr.finish()
}

func TestSignals_GoToTheJob(t *testing.T) {
	tr := ordinary(t)
	leader := tr.start("a", "", command("sh", "-c",
		`for s in HUP USR1 USR2 WINCH QUIT; do trap "echo got $s" $s; done
		echo ready; while :; do sleep 0.01; done`))
	said := func(line string) {
		t.Helper()
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if !strings.Contains(leader.Output(), line+"\n") {
				return fmt.Errorf("the job has not said %q in %q", line, leader.Output())
			}
			return nil
		}))
	}
	said("ready")
	standby := tr.start("b", "")
	tr.waitStatus(standby, "/standby", http.StatusOK)
	for name, sig := range map[string]syscall.Signal{
		"HUP": unix.SIGHUP, "USR1": unix.SIGUSR1, "USR2": unix.SIGUSR2,
		"WINCH": unix.SIGWINCH, "QUIT": unix.SIGQUIT,
	} {
		tr.must(leader.Signal(sig))
		said("got " + name)
		tr.must(standby.Signal(sig)) // has no job: it is dropped
	}
	tr.waitRenewals(standby, 1)
	tr.waitStatus(standby, "/standby", http.StatusOK)
	tr.finish()
}

func TestStop_ASecondSignalKills(t *testing.T) {
	tr := ordinary(t)
	leader, _, job := tr.pair("ignore-term", variables("LEASEHOLD_STOP_GRACE=10m"))
	tr.must(leader.Signal(syscall.SIGTERM))
	tr.waitStatus(leader, "/leader", http.StatusServiceUnavailable)
	if s := tr.status(leader); s.State != "stopping" {
		t.Errorf("state %s, want stopping", s.State)
	}
	tr.must(leader.Signal(syscall.SIGTERM))
	tr.waitExit(leader, 0)
	tr.waitNext(job, waitTimeout)
	tr.finish()
}

// The lease is renewed while the job takes its time to stop.
func TestStop_RenewalsGoOnDuringTheGrace(t *testing.T) {
	tr := ordinary(t)
	leader, _, job := tr.pair("slow-stop=5s", variables("LEASEHOLD_STOP_GRACE=1m"))
	tr.must(leader.Signal(syscall.SIGTERM))
	next := tr.waitNext(job, waitTimeout)
	end := tr.waitDead(job)
	if next.Started < end {
		t.Errorf("the next job started %v before the end of one "+
			"that took longer than the TTL to stop", end-next.Started)
	}
	tr.finish()
}

func TestElect(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = time.Minute
	const grace = 5 * time.Second
	hold := variables("LEASEHOLD_STOP_GRACE=" + grace.String())
	a := tr.start("a", "", subcommand("elect"), hold)
	tr.waitStatus(a, "/leader", http.StatusOK)
	b := tr.start("b", "", subcommand("elect"), hold)
	tr.waitStatus(b, "/standby", http.StatusOK)
	began := harness.Now()
	tr.must(a.Signal(syscall.SIGTERM))
	tr.waitStatus(a, "/leader", http.StatusServiceUnavailable)
	if code, _, err := b.Get(tr.ctx, "/leader"); code != http.StatusServiceUnavailable {
		t.Errorf("/leader of b while a holds its lease: %d, %v", code, err)
	}
	tr.waitStatus(b, "/leader", http.StatusOK)
	if held := harness.Now() - began; held < grace || held > revokeTimeout {
		t.Errorf("the lease was held for %v, want %v", held, grace)
	}
	tr.waitExit(a, 0)
	tr.must(b.Signal(syscall.SIGTERM))
	tr.waitStatus(b, "/leader", http.StatusServiceUnavailable)
	if err := b.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		tr.must(err)
	}
	tr.waitExit(b, 0)
	tr.nothingLeft()

	tr.ttl = 3 * time.Second // to be out of reach for that long
	c := tr.start("c", "", subcommand("elect"))
	tr.waitStatus(c, "/leader", http.StatusOK)
	c.SetReachable(false)
	tr.waitStatus(c, "/leader", http.StatusServiceUnavailable)
	c.SetReachable(true)
	tr.waitStatus(c, "/leader", http.StatusOK)
	tr.finish()
}

// Etcd may come later than the daemon.
func TestStart_WithoutEtcd(t *testing.T) {
	tr := ordinary(t)
	m := tr.etcd.Members[0]
	tr.must(m.Stop(tr.ctx))
	c := tr.start("a", "")
	tr.waitStatus(c, "/livez", http.StatusOK)
	tr.waitStatus(c, "/readyz", http.StatusServiceUnavailable)
	if s := tr.status(c); s.State != "connecting" || s.Name != "" {
		t.Errorf("state %s, leader %q; want connecting and none", s.State, s.Name)
	}
	tr.must(m.Start())
	tr.waitJob(c)
	tr.finish()
}

// Nobody reads standard error: the daemon must do all it does, in time.
func TestStandardErrorBlocked(t *testing.T) {
	tr := ordinary(t)
	read, write, err := os.Pipe()
	tr.must(err)
	t.Cleanup(func() { _, _ = read.Close(), write.Close() })
	fd := int(write.Fd()) // asking again would make it block
	tr.must(unix.SetNonblock(fd, true))
	for { // until it is full
		if _, err := unix.Write(fd, make([]byte, 4096)); err != nil {
			break
		}
	}
	tr.must(unix.SetNonblock(fd, false))
	leader, _, job := tr.pair("", func(cfg *harness.CandidateConfig) {
		cfg.Prepare = func(cmd *exec.Cmd) { cmd.Stderr = write }
	})
	tr.waitRenewals(leader, 6)
	leader.SetReachable(false)
	next := tr.waitNext(job, waitTimeout)
	if end := tr.waitDead(job); end > next.Started {
		t.Errorf("the old job died %v after the next one's start", end-next.Started)
	}
	leader.SetReachable(true)
	tr.waitStatus(leader, "/standby", http.StatusOK)
	for _, o := range check.Overlaps(tr.witness.Lives()) {
		t.Error(o)
	}
	tr.finish()
}

// Whoever talks to the health endpoint can't disturb the job.
func TestHealthEndpoint_BadClients(t *testing.T) {
	tr := ordinary(t)
	c := tr.start("a", "")
	job := tr.waitJob(c)
	tr.waitRenewals(c, 1)
	for i := range 1000 {
		conn, err := (&net.Dialer{}).DialContext(tr.ctx, "tcp", c.Listen)
		if err != nil {
			break // more than it takes is as good as it gets
		}
		t.Cleanup(func() { _ = conn.Close() })
		text := []string{
			"", "GET /status HTTP/1.1\r\nHost:", "\x00\xff\x16\x03\x01\r\n\r\n",
			"POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\nxx",
			strings.Repeat("x", 4096),
		}[i%5]
		_, _ = conn.Write([]byte(text)) // it may have hung up on us already
	}
	before := harness.Now()
	tr.must(tr.witness.Wait(tr.waitContext(waitTimeout), func(lives []harness.Life) bool {
		return len(lives) == 1 && lives[0].Alive()
	}))
	tr.sleepPast(before, 2*tr.ttl)
	if lives := tr.witness.Lives(); len(lives) != 1 || !lives[0].Alive() ||
		lives[0].Pid != job.Pid {
		t.Errorf("the job was moved: %v", tr.summary())
	}
	tr.waitStatus(c, "/leader", http.StatusOK)
	tr.finish()
}

// A hundred terms leave no descriptor and no thread behind.
func TestHundredTerms(t *testing.T) {
	if testing.Short() {
		t.Skip("takes ten seconds")
	}
	tr := ordinary(t)
	// A hundred losses are a hundred moments in which a guard that the machine holds up is taken
	// for hung. How soon follows the TTL; this is the default one.
	tr.ttl = 15 * time.Second
	c := tr.start("a", "")
	job := tr.waitJob(c)
	elector, err := c.Elector()
	tr.must(err)
	count := func(pid int, of string) int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/%s", pid, of))
		tr.must(err)
		return len(entries)
	}
	var fds [2]int
	for term := 2; term <= 100; term++ {
		_, err := tr.etcd.Etcdctl(tr.ctx, "del", "--prefix", tr.election)
		tr.must(err)
		job = tr.waitNext(job, waitTimeout)
		if term == 10 {
			tr.waitStatus(c, "/leader", http.StatusOK) // by then the elector has opened the job
			fds = [2]int{count(c.Guard(), "fd"), count(elector, "fd")}
		}
	}
	for i, pid := range []int{c.Guard(), elector} {
		// A connection may be on its way out.
		err := harness.Until(tr.waitContext(waitTimeout), func() error {
			if n := count(pid, "fd"); n > fds[i] {
				return fmt.Errorf("%d descriptors after term 100, %d after term 10", n, fds[i])
			}
			return nil
		})
		if err != nil {
			t.Errorf("process %d: %v", i, err)
		}
		if n := count(pid, "task"); n > 25 {
			t.Errorf("process %d has %d threads", i, n)
		}
	}
	for _, o := range check.Overlaps(tr.witness.Lives()) {
		t.Logf("after a deletion: %v", o) // outside the promise
	}
	tr.finish()
}

// As process 1 of a container the guard reaps what is handed to it, and the loss of
// its electors costs no TTL.
func TestPID1(t *testing.T) {
	harness.NeedsRoot(t)
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	tr.ttl = time.Minute
	leader, _, job := tr.pair("daemonize", func(cfg *harness.CandidateConfig) {
		tr.wrap(cfg, "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
	})
	tr.waitRoles(job, "daemon")
	guard := harness.Children(leader.Guard()) // of unshare
	if len(guard) != 1 {
		t.Fatalf("children of unshare: %v", guard)
	}
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		for _, pid := range harness.Children(guard[0]) {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err == nil && bytes.Contains(stat, []byte(") Z ")) {
				return fmt.Errorf("a zombie is left: %s", stat)
			}
		}
		return nil
	}))
	for n := range 3 {
		for _, pid := range harness.Children(guard[0]) {
			if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil &&
				bytes.Contains(cmdline, []byte("\x00elector\x00")) {
				tr.must(syscall.Kill(pid, syscall.SIGKILL))
			}
		}
		if n < 2 {
			tr.waitReplaced(leader, float64(n+1))
		}
	}
	tr.waitNext(job, revokeTimeout)
	tr.waitExit(leader, 70)
	for _, o := range check.Overlaps(tr.witness.Lives()) {
		t.Error(o)
	}
	tr.finish()
}

func TestNotify(t *testing.T) {
	tr := ordinary(t)
	name := fmt.Sprintf("@leasehold-notify-%d", os.Getpid())
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	tr.must(err)
	t.Cleanup(func() { _ = socket.Close() })
	expect := func(want ...string) {
		t.Helper()
		ctx := tr.waitContext(waitTimeout)
		deadline, _ := ctx.Deadline()
		tr.must(socket.SetReadDeadline(deadline))
		var got []string
		buf := make([]byte, 4096)
		for len(want) > 0 {
			n, err := socket.Read(buf)
			if err != nil {
				t.Fatalf("systemd was not told %q but %q", want, got)
			}
			for line := range strings.Lines(string(buf[:n])) {
				got = append(got, line)
				want = slices.DeleteFunc(want, func(w string) bool {
					return strings.HasPrefix(line, w)
				})
			}
		}
	}
	m := tr.etcd.Members[0]
	tr.must(m.Stop(tr.ctx))
	c := tr.start("a", "", variables("NOTIFY_SOCKET="+name))
	expect("READY=1", "STATUS=connecting to etcd")
	tr.must(m.Start())
	job := tr.waitJob(c)
	expect(fmt.Sprintf("STATUS=leading, token %d", job.Token))
	tr.must(c.Signal(syscall.SIGTERM))
	expect("STOPPING=1")
	tr.waitExit(c, 0)
	tr.finish()
}

// Closed early, the daemon's contexts must not hang: this is the ordinary end
// of a machine.
func TestStop_WhileEtcdIsDown(t *testing.T) {
	tr := ordinary(t)
	leader, standby, job := tr.pair("")
	tr.must(tr.etcd.Members[0].Stop(tr.ctx))
	ctx, cancel := context.WithTimeout(tr.ctx, 2*tr.ttl+10*time.Second)
	defer cancel()
	for _, c := range []*candidate{leader, standby} {
		tr.must(c.Signal(syscall.SIGTERM))
		code, err := c.Wait(ctx)
		tr.must(err)
		if code != 0 {
			t.Errorf("candidate %s ended with code %d, want 0", c.Identity, code)
		}
	}
	tr.waitDead(job)
}
