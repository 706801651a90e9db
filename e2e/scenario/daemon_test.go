//go:build linux

package scenario_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// Whoever reads the log of a daemon that has ended must not have to guess if
// its exit code is the job's: a job may end with any code.
func TestExitCode_TheLastLineSaysWhose(t *testing.T) {
	tr := ordinary(t)
	never := variables("LEASEHOLD_RESTART=never")
	shell := func(script string) change { return command("/bin/sh", "-c", script) }
	untilStopped := shell("trap 'exit 9' TERM; while :; do sleep 0.01; done")
	noEtcd := variables("LEASEHOLD_WAIT=1ms", "LEASEHOLD_ENDPOINTS=127.0.0.1:1")
	nothing := func(*candidate) {}
	for _, row := range []struct {
		name    string
		changes []change
		then    func(c *candidate)
		code    int
		says    string
	}{
		{"job: 0", []change{shell("exit 0")}, nothing, 0, "the job exited with code 0"},
		{"job: 75", []change{never, shell("exit 75")}, nothing, 75, "the job exited with code 75"},
		{"job: signal", []change{never, shell("kill -s QUIT $$")}, nothing, 128 + 3, "signal 3"},
		{"daemon: 0", []change{untilStopped}, func(c *candidate) {
			tr.waitStatus(c, "/leader", http.StatusOK)
			tr.must(c.Signal(syscall.SIGINT))
		}, 0, "planned stop"},
		{"daemon: 69", []change{noEtcd, shell("exit 3")}, nothing, 69, "LEASEHOLD_WAIT"},
		{"daemon: 76", []change{never}, func(c *candidate) {
			tr.waitStatus(c, "/leader", http.StatusOK)
			_, err := tr.etcd.Etcdctl(tr.ctx, "del", tr.status(c).Leader.Key)
			tr.must(err)
		}, 76, "leadership lost"},
		{"daemon: 70", []change{shell("exec sleep 1000")}, func(c *candidate) {
			tr.waitStatus(c, "/leader", http.StatusOK)
			tr.loseElectors(c)
		}, 70, "elector is lost"},
		{"elector: 70", []change{shell("exec sleep 1000")}, func(c *candidate) {
			tr.waitStatus(c, "/leader", http.StatusOK)
			tr.must(c.Signal(syscall.SIGKILL))
		}, 128 + 9, "exit_code=70"},
	} {
		c := tr.start(strings.ReplaceAll(row.name, ": ", "-"), "", row.changes...)
		row.then(c)
		tr.waitExit(c, row.code)
		want := fmt.Sprintf("exit_code=%d", row.code)
		if row.code == 128+9 {
			want = "exit_code=70"
		}
		// After the guard's death the elector is still writing.
		err := harness.Until(tr.waitContext(waitTimeout), func() error {
			lines := strings.Split(strings.TrimSpace(c.Log()), "\n")
			if last := lines[len(lines)-1]; !strings.Contains(last, row.says) ||
				!strings.Contains(last, want) {
				return fmt.Errorf("the last line is %q, want %q and %s", last, row.says, want)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", row.name, err)
		}
	}
	tr.finish()
}

// TestLog: the first line says what the daemon was given, and each names its
// election and candidate.
func TestLog(t *testing.T) {
	tr := ordinary(t)
	for _, row := range []struct {
		name    string
		changes []change
	}{
		{"job", []change{command("true"), variables("LEASEHOLD_RESTART=never")}},
		{"elect", []change{subcommand("elect")}},
	} {
		json := variables("LEASEHOLD_LOG_FORMAT=json", "LEASEHOLD_STOP_GRACE=1s")
		c := tr.start(row.name, "", append(row.changes, json)...)
		if row.name == "elect" {
			tr.waitStatus(c, "/leader", http.StatusOK)
			tr.must(c.Signal(syscall.SIGTERM))
		}
		tr.waitExit(c, 0)
		for i, line := range strings.Split(strings.TrimSpace(c.Log()), "\n") {
			for _, want := range []string{
				`"election":"` + tr.election + `"`, `"identity":"` + row.name + `"`,
			} {
				if !strings.Contains(line, want) {
					t.Errorf("%s is not in %s", want, line)
				}
			}
			if i > 0 {
				continue
			}
			ttl := `"ttl":"` + tr.ttl.String() + `","stop_at":"`
			for _, want := range []string{
				`"msg":"starting"`, `"version":"`, `"endpoints":"http://`, c.Listen, ttl,
				`"kill_by":"`,
			} {
				if !strings.Contains(line, want) {
					t.Errorf("%s is not in the first line, %s", want, line)
				}
			}
		}
	}
	tr.finish()
}

// TestLog_Warnings: what nobody has planned is a warning, in both formats: a job that keeps
// failing, an outage of etcd, the loss and the kill that follow. The end of the outage has a line.
func TestLog_Warnings(t *testing.T) {
	for format, line := range map[string]struct{ level, message, elapsed string }{
		"text": {"level=%s ", `msg="?%s.*`, "elapsed=[0-9.]+m?s\\b"},
		"json": {`"level":"%s",`, `"msg":"%s.*`, `"elapsed":"[0-9.]+m?s"`},
	} {
		t.Run(format, func(t *testing.T) {
			tr := ordinary(t)
			tr.ttl = 6 * time.Second // A starved spawner must not count as one that hangs.
			settings := variables("LEASEHOLD_LOG_FORMAT="+format, "LEASEHOLD_RESTART_LIMIT=2")
			logs := func(c *candidate, level, message, rest string) {
				t.Helper()
				want := regexp.MustCompile(
					fmt.Sprintf(line.level+line.message, level, message) + rest)
				tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
					if !want.MatchString(c.Log()) {
						return fmt.Errorf("no line %s in the log of %s", want, c.Identity)
					}
					return nil
				}))
			}
			failing := tr.start("a", "exit=1", settings)
			logs(failing, "INFO", "job exited by itself: starting it again", "")
			logs(failing, "WARN", "LEASEHOLD_RESTART_LIMIT is reached: resigning", "")
			tr.must(failing.Signal(syscall.SIGTERM))
			tr.waitExit(failing, 0)
			failing = tr.start("b", "exit=1", settings, variables("LEASEHOLD_RESTART_LIMIT=0"))
			logs(failing, "WARN", "job keeps failing: starting it again", "")
			tr.must(failing.Signal(syscall.SIGTERM))
			tr.waitExit(failing, 0)

			c := tr.start("c", "ignore-term", settings)
			tr.waitJob(c)
			c.SetReachable(false)
			logs(c, "WARN", "lease not renewed", "")
			logs(c, "WARN", "leadership lost", "")
			logs(c, "WARN", "job killed: kill-by has passed", line.elapsed)
			c.SetReachable(true)
			logs(c, "INFO", "etcd can be used again", line.elapsed)
			tr.finish()
		})
	}
}

// A client that is slow to ask holds the end of the daemon up by a second, when
// the lease is revoked already. Impatience must not turn a planned stop into a
// fault.
func TestExitCode_ASecondSignalAtTheVeryEnd(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 5 * time.Minute
	c := tr.start("a", "")
	tr.waitStatus(c, "/leader", http.StatusOK)
	slow, err := (&net.Dialer{}).DialContext(tr.ctx, "tcp", c.Listen)
	tr.must(err)
	t.Cleanup(func() { _ = slow.Close() })
	_, err = slow.Write([]byte("GET /status HTTP/1.1\r\n"))
	tr.must(err)
	tr.waitStatus(c, "/livez", http.StatusOK) // accepted after the slow one
	tr.must(c.Signal(syscall.SIGTERM))
	tr.leasesAre()
	if err := c.Signal(syscall.SIGTERM); err != nil {
		t.Logf("it was faster: %v", err)
	}
	tr.waitExit(c, 0)
	tr.finish()
}

// Only names with the prefix count. The library underneath would take the bare
// ones as well.
func TestConfig_BareNamesChangeNothing(t *testing.T) {
	tr := ordinary(t)
	bare := variables(
		"TTL=99s", "ELECTION=jobs/another", "IDENTITY=nobody", "ENDPOINTS=http://127.0.0.1:1",
		"LISTEN=127.0.0.1:1", "USERNAME=somebody", "PASSWORD=something", "PASSWORD_FILE=/nowhere",
		"RESTART=never", "WAIT=0s", "STOP_SIGNAL=KILL", "STOP_GRACE=0s", "LOG_FORMAT=json",
		"LOG_LEVEL=error", "LEVEL=error", "FORMAT=json", "MARGIN=1ns", "LOSS_GRACE=1ns",
		"DIAL_TIMEOUT=1ns", "TLS_CA_FILE=/nowhere", "CA_FILE=/nowhere", "TLS_CERT_FILE=/nowhere",
		"SERVER_NAME=nowhere",
		// What Kubernetes puts into every container of a namespace with a service called
		// "leasehold" is no setting either.
		"LEASEHOLD_SERVICE_HOST=10.0.0.1", "LEASEHOLD_SERVICE_PORT=4040",
		"LEASEHOLD_PORT=tcp://10.0.0.1:4040", "LEASEHOLD_PORT_4040_TCP_ADDR=10.0.0.1",
	)
	c := tr.start("a", "", bare)
	job := tr.waitJob(c)
	tr.waitStatus(c, "/leader", http.StatusOK)
	var s struct {
		Election, Identity string
		Lease              struct {
			TTL float64 `json:"ttl_seconds"`
		}
	}
	_, body, err := c.Get(tr.ctx, "/status")
	tr.must(err)
	tr.must(json.Unmarshal([]byte(body), &s))
	if s.Election != tr.election || s.Identity != "a" || s.Lease.TTL != tr.ttl.Seconds() {
		t.Errorf("/status: %s", body)
	}
	if n, err := tr.etcd.Members[0].Metric(tr.ctx, authentications); err == nil && n > 0 {
		t.Errorf("%v authentications", n)
	}
	tr.must(tr.witness.Tell(job, "exit 3")) // it is restarted
	_, err = tr.witness.WaitForJob(tr.waitContext(waitTimeout), func(l harness.Life) bool {
		return l.Pid != job.Pid
	})
	tr.must(err)
	tr.finish()
	if log := c.Log(); !strings.Contains(log, "level=DEBUG") {
		t.Errorf("the log is not at level debug as text:\n%s", log)
	}
}

// WAIT counts from the start and ends with the election.
func TestWait_IsATime(t *testing.T) {
	tr := ordinary(t)
	leader := tr.start("a", "", variables("LEASEHOLD_WAIT=2s"))
	job := tr.waitJob(leader)
	for _, row := range []struct {
		wait time.Duration
		env  string
		code int
	}{
		{time.Second, "", 75},
		{0, "", 75}, // a leads
		// etcd does not answer
		{time.Second, "LEASEHOLD_ENDPOINTS=127.0.0.1:1", 69},
		{0, "LEASEHOLD_ENDPOINTS=127.0.0.1:1", 69},
	} {
		began := harness.Now()
		env := []string{"LEASEHOLD_WAIT=" + row.wait.String()}
		if row.env != "" {
			env = append(env, row.env)
		}
		c := tr.start("b", "", variables(env...))
		tr.waitExit(c, row.code)
		// On a loaded machine the start and the end of the daemon alone take seconds.
		if took := harness.Now() - began; took < row.wait || took > row.wait+20*time.Second {
			t.Errorf("with WAIT=%v %s it took %v to give up", row.wait, row.env, took)
		}
	}
	// More than its WAIT has passed since a was elected, and it was not ended. A new campaign is
	// not bounded by it either.
	_, err := tr.etcd.Etcdctl(tr.ctx, "del", tr.status(leader).Leader.Key)
	tr.must(err)
	tr.waitNext(job, waitTimeout)
	tr.finish()
}

// A candidate alone whose job keeps failing waits longer and longer between
// two terms.
func TestRestart_LimitDoesNotSpin(t *testing.T) {
	tr := ordinary(t)
	c := tr.start("a", "exit=1", variables("LEASEHOLD_RESTART_LIMIT=1"))
	var lives []harness.Life
	tr.must(tr.witness.Wait(tr.waitContext(waitTimeout), func(l []harness.Life) bool {
		lives = l
		return len(l) == 4
	}))
	for i := range lives[1:] {
		gap, least := lives[i+1].Started-lives[i].End, 4*(500*time.Millisecond<<i)/5
		if lives[i+1].Token == lives[i].Token {
			t.Error("it did not resign")
		}
		if gap < least {
			t.Errorf("%v between end and start %d, want %v at least", gap, i+1, least)
		}
	}
	tr.waitStatus(c, "/livez", http.StatusOK)
	tr.finish()
}

// Cut off from etcd, the daemon says so, and is not to be restarted for it.
func TestCutOff_LiveButNotReady(t *testing.T) {
	for _, sub := range []string{"run", "elect"} {
		t.Run(sub, func(t *testing.T) {
			tr := ordinary(t)
			kind := variables()
			if sub == "elect" {
				kind = subcommand("elect")
			}
			c := tr.start("a", "", kind)
			tr.waitStatus(c, "/leader", http.StatusOK)
			const lossGraceAndMargin = 900 * time.Millisecond // of 3 s
			c.SetReachable(false)
			end := time.Duration(1<<63 - 1) // of the lease, at the latest
			for turned := false; !turned || harness.Now() < end+tr.ttl; {
				s := tr.status(c)
				if s.Lease != nil && s.Lease.ValidFor > 0 {
					left := time.Duration(s.Lease.ValidFor * float64(time.Second))
					end = min(end, harness.Now()+left)
				}
				asked := harness.Now()
				code, body, err := c.Get(tr.ctx, "/leader")
				tr.must(err)
				switch {
				case code == http.StatusOK &&
					(turned || asked >= end-lossGraceAndMargin+100*time.Millisecond):
					t.Fatalf("/leader says %s %v before the end of the lease", body, end-asked)
				case code == http.StatusServiceUnavailable && !turned:
					turned = true
					if asked > end-100*time.Millisecond {
						t.Errorf("/leader turned only %v before the end of the lease", end-asked)
					}
				}
				if code, body, err := c.Get(tr.ctx, "/livez"); code != http.StatusOK {
					t.Fatalf("/livez: %d, %s, %v", code, body, err)
				}
				code, body, err = c.Get(tr.ctx, "/readyz")
				tr.must(err)
				if turned &&
					(code != http.StatusServiceUnavailable || len(strings.TrimSpace(body)) < 20) {
					t.Fatalf("/readyz of a daemon that is cut off: %d, %s", code, body)
				}
			}
			c.SetReachable(true)
			tr.waitStatus(c, "/leader", http.StatusOK)
			n, err := c.Metric(tr.ctx, `leasehold_losses_total{reason="contact_lost"}`)
			if err != nil || n != 1 {
				t.Errorf("losses of contact: %v, %v, want 1", n, err)
			}
			tr.finish()
		})
	}
}

// TestJob_TermVariables: what the job is told is what etcd has.
func TestJob_TermVariables(t *testing.T) {
	tr := ordinary(t)
	leader, standby, first := tr.pair("")
	verify := func(c *candidate, job harness.Life) {
		t.Helper()
		value := func(name string) string {
			for _, kv := range job.Env {
				if v, found := strings.CutPrefix(kv, name+"="); found {
					return v
				}
			}
			t.Errorf("the job of %s is not told %s", c.Identity, name)
			return ""
		}
		key := value("LEASEHOLD_KEY")
		out, err := tr.etcd.Etcdctl(tr.ctx, "get", key, "--write-out=json")
		tr.must(err)
		var got struct {
			Kvs []struct {
				Value          []byte
				CreateRevision int64 `json:"create_revision"`
				Lease          int64
			}
		}
		tr.must(json.Unmarshal([]byte(out), &got))
		if len(got.Kvs) != 1 {
			t.Fatalf("etcd has %s for %s", out, key)
		}
		kv := got.Kvs[0]
		for name, want := range map[string]string{
			"LEASEHOLD_FENCING_TOKEN": fmt.Sprint(kv.CreateRevision),
			"LEASEHOLD_LEASE_ID":      fmt.Sprintf("%x", kv.Lease),
			"LEASEHOLD_IDENTITY":      string(kv.Value),
			"LEASEHOLD_ELECTION":      tr.election,
		} {
			if v := value(name); v != want {
				t.Errorf("%s=%s, and etcd has %s", name, v, want)
			}
		}
	}
	verify(leader, first)
	tr.must(leader.Signal(syscall.SIGTERM))
	second := tr.waitNext(first, waitTimeout)
	verify(standby, second)
	if second.Token <= first.Token {
		t.Errorf("token %d follows %d", second.Token, first.Token)
	}
	tr.finish()
}

// A daemon that was started with signals blocked and with files open, as some
// supervisors do, works all the same, and its job gets none of it.
func TestJob_InheritsNeitherMaskNorFiles(t *testing.T) {
	tr := ordinary(t)
	read, write, err := os.Pipe()
	tr.must(err)
	t.Cleanup(func() { _, _ = read.Close(), write.Close() })

	runtime.LockOSThread()
	var blocked, old unix.Sigset_t
	for _, sig := range []syscall.Signal{
		unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGCHLD, unix.SIGPIPE,
	} {
		blocked.Val[0] |= 1 << (sig - 1)
	}
	tr.must(unix.PthreadSigmask(unix.SIG_BLOCK, &blocked, &old))
	c := tr.start("a", "", func(cfg *harness.CandidateConfig) {
		cfg.Prepare = func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cmd.SysProcAttr.Credential}
			cmd.ExtraFiles = []*os.File{read, write, write}
		}
	})
	tr.must(unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil))
	runtime.UnlockOSThread()

	job := tr.waitJob(c)
	if job.Status["SigBlk"] != "0000000000000000" || job.Status["SigIgn"] != "0000000000000000" {
		t.Errorf("the job's masks: blocked %s, ignored %s",
			job.Status["SigBlk"], job.Status["SigIgn"])
	}
	for fd, target := range job.Descriptors {
		if strings.HasPrefix(target, "pipe:") && !slices.Contains([]string{"0", "1", "2"}, fd) {
			t.Errorf("descriptor %s of the job is %s", fd, target)
		}
	}
	elector, err := c.Elector()
	tr.must(err)
	for name, pid := range map[string]int{"elector": elector, "job": job.Pid} {
		var theirs, mine unix.Stat_t
		tr.must(unix.Fstat(int(write.Fd()), &mine))
		found, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		tr.must(err)
		for _, f := range found {
			if unix.Stat(fmt.Sprintf("/proc/%d/fd/%s", pid, f.Name()), &theirs) == nil &&
				theirs.Ino == mine.Ino && theirs.Dev == mine.Dev {
				t.Errorf("the %s holds, as %s, a pipe that its daemon was given", name, f.Name())
			}
		}
	}
	tr.finish() // by a SIGTERM that it was started with blocked
}

// TERM may come at any moment of a start. Before the daemon has taken its
// signals over, it may end by it; nothing is left in either case.
func TestSignals_StopDuringTheStart(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 5 * time.Minute
	for i := range 12 {
		c := tr.start(fmt.Sprintf("a%d", i), "")
		tr.sleepPast(harness.Now(), time.Duration(i*i)*time.Millisecond)
		tr.must(c.Signal(syscall.SIGTERM))
		code, err := c.Wait(tr.waitContext(waitTimeout))
		tr.must(err)
		if code != 0 && (code != 128+15 || c.Log() != "") {
			t.Errorf("TERM %d ms after the start: exit code %d", i*i, code)
		}
		tr.leasesAre()
		tr.noProcesses()
	}
	tr.finish()
}

// Ctrl-C signals the terminal's whole foreground group. The job must hear its
// own stop signal, once, and no more.
func TestSignals_CtrlCReachesTheGuardAlone(t *testing.T) {
	tr := ordinary(t)
	c := tr.start("a", "", variables("LEASEHOLD_STOP_SIGNAL=USR2", "LEASEHOLD_STOP_GRACE=1m"),
		command("sh", "-c", `for s in INT TERM HUP QUIT; do trap "echo got $s" $s; done
			trap 'echo got USR2; sleep 0.2; exit 5' USR2
			echo ready; while :; do sleep 0.01; done`))
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if !strings.Contains(c.Output(), "ready\n") {
			return fmt.Errorf("the job says %q", c.Output())
		}
		return nil
	}))
	// The daemon was started as the leader of a process group.
	tr.must(syscall.Kill(-c.Guard(), syscall.SIGINT))
	tr.waitExit(c, 0)
	if out := c.Output(); out != "ready\ngot USR2\n" {
		t.Errorf("the job says %q", out)
	}
	tr.finish()
}

// None of these is a reason to end, for a daemon without a job.
func TestSignals_EndNothingWithoutAJob(t *testing.T) {
	tr := ordinary(t)
	m := tr.etcd.Members[0]
	tr.must(m.Stop(tr.ctx)) // so that no job can be running
	run := tr.start("run", "")
	elect := tr.start("elect", "", subcommand("elect"))
	for _, c := range []*candidate{run, elect} {
		tr.waitStatus(c, "/livez", http.StatusOK)
		for _, sig := range []syscall.Signal{
			unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGQUIT,
		} {
			tr.must(c.Signal(sig))
		}
	}
	tr.must(m.Start())
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		for _, c := range []*candidate{run, elect} {
			if code, body, _ := c.Get(tr.ctx, "/readyz"); code != http.StatusOK {
				return fmt.Errorf("/readyz of %s: %d, %s", c.Identity, code, body)
			}
		}
		return nil
	}))
	tr.finish()
}

// What could not be written is counted, and told once somebody reads again.
func TestStandardErrorBlocked_LostLinesAreCounted(t *testing.T) {
	tr := ordinary(t)
	read, write, err := os.Pipe()
	tr.must(err)
	t.Cleanup(func() { _, _ = read.Close(), write.Close() })
	// A page: it is soon full.
	_, err = unix.FcntlInt(write.Fd(), unix.F_SETPIPE_SZ, 4096)
	tr.must(err)
	c := tr.start("a", "", subcommand("elect"), variables("LEASEHOLD_STOP_GRACE=0s"),
		func(cfg *harness.CandidateConfig) {
			cfg.Prepare = func(cmd *exec.Cmd) { cmd.Stderr = write }
		})
	tr.waitStatus(c, "/leader", http.StatusOK)
	lost := func() float64 {
		n, err := c.Metric(tr.ctx, "leasehold_terms_total")
		tr.must(err)
		return n
	}
	// Each term logs some lines; 256 are kept for a reader who comes back.
	for lost() < 120 {
		before := lost()
		_, err := tr.etcd.Etcdctl(tr.ctx, "del", "--prefix", tr.election+"/")
		tr.must(err)
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if lost() == before {
				return fmt.Errorf("no new term")
			}
			return nil
		}))
	}
	text := make(chan string, 1)
	go func() {
		var all strings.Builder
		buf := make([]byte, 64<<10)
		for {
			n, err := read.Read(buf)
			all.Write(buf[:n])
			if err != nil || strings.Contains(all.String(), "exit_code=0") {
				text <- all.String()
				return
			}
		}
	}()
	// A line must come for the count to come with it.
	_, err = tr.etcd.Etcdctl(tr.ctx, "del", "--prefix", tr.election+"/")
	tr.must(err)
	tr.waitStatus(c, "/leader", http.StatusOK)
	tr.finish()
	if got := <-text; !strings.Contains(got, "dropped=") {
		t.Errorf("no word of lost lines in\n%s", got)
	}
}

// TestStandardErrorTostop: in the background of a terminal that stops who writes, the daemon writes
// all the same, and sleeps.
func TestStandardErrorTostop(t *testing.T) {
	tr := ordinary(t)
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	tr.must(err)
	defer func() { _ = master.Close() }()
	tr.must(unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	tr.must(err)
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	tr.must(err)
	defer func() { _ = terminal.Close() }()
	shown := make(chan string, 1)
	go func() {
		var all strings.Builder
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			all.Write(buf[:n])
			if err != nil || strings.Contains(all.String(), "exit_code=0") {
				shown <- all.String()
				return
			}
		}
	}()
	var shell *exec.Cmd
	c := tr.start("a", "", func(cfg *harness.CandidateConfig) {
		cfg.Prepare = func(cmd *exec.Cmd) {
			// The terminal is the shell's, and the daemon in its background.
			shell = cmd
			cmd.Args = append([]string{
				"setsid", "--ctty", "--wait",
				"sh", "-c", `stty tostop; set -m; "$@" & wait $!`, "sh", cmd.Path,
			}, cmd.Args[1:]...)
			cmd.Path, err = exec.LookPath("setsid")
			tr.must(err)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
		}
	})
	tr.waitStatus(c, "/leader", http.StatusOK)
	var daemon int
	for _, pid := range harness.Descendants(shell.Process.Pid) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if strings.HasPrefix(string(cmdline), tr.programs.Leasehold+"\x00--\x00") {
			daemon = pid
		}
	}
	used := func() time.Duration {
		var ts unix.Timespec
		tr.must(unix.ClockGettime(int32(^daemon<<3|2), &ts)) // CPU time: clock_getcpuclockid(3)
		return time.Duration(ts.Nano())
	}
	const interval = time.Second
	before := used()
	tr.sleepPast(harness.Now(), interval)
	if busy := used() - before; busy > interval/4 {
		t.Errorf("in %v the guard was busy for %v", interval, busy)
	} else {
		t.Logf("in %v the guard was busy for %v", interval, busy)
	}
	tr.must(syscall.Kill(daemon, syscall.SIGTERM))
	tr.waitExit(c, 0)
	select {
	case text := <-shown:
		for _, want := range []string{
			"the job gets no cgroup", "job started", "exiting: planned stop",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("the terminal does not show %q:\n%s", want, text)
			}
		}
	case <-time.After(waitTimeout):
		t.Error("the last line does not come")
	}
	tr.finish()
}

// Systemd must not be told that all is well while half of the daemon hangs.
func TestNotify_WatchdogWhileBothTurn(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 6 * time.Second
	name := fmt.Sprintf("@leasehold-watchdog-%d", os.Getpid())
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	tr.must(err)
	t.Cleanup(func() { _ = socket.Close() })
	buf := make([]byte, 4096)
	next := func(until time.Duration) string {
		tr.must(socket.SetReadDeadline(time.Now().Add(until - harness.Now())))
		n, err := socket.Read(buf)
		if err != nil {
			return ""
		}
		return string(buf[:n])
	}
	count := func(d time.Duration) (beats int) {
		for end := harness.Now() + d; harness.Now() < end; {
			if strings.Contains(next(end), "WATCHDOG=1") {
				beats++
			}
		}
		return beats
	}
	tr.ttl = 15 * time.Second // so that the elector is not replaced so soon
	c := tr.start("a", "", variables("NOTIFY_SOCKET="+name, "WATCHDOG_USEC=900000"))
	tr.waitJob(c)
	if n := count(2 * time.Second); n < 2 {
		t.Errorf("%d signs of life in 2 s", n)
	}
	tr.must(c.signalElector(syscall.SIGSTOP))
	count(300 * time.Millisecond) // what was on its way
	if n := count(2 * time.Second); n != 0 {
		t.Errorf("%d signs of life while the elector is stopped", n)
	}
	tr.must(c.signalElector(syscall.SIGCONT))
	if n := count(2 * time.Second); n < 2 {
		t.Errorf("%d signs of life in 2 s after the elector goes on", n)
	}
	tr.finish()

	elect := tr.start("b", "", subcommand("elect"),
		variables("NOTIFY_SOCKET="+name, "WATCHDOG_USEC=900000", "LEASEHOLD_STOP_GRACE=0s"))
	want := []string{"READY=1", "STATUS=leading, token ", "WATCHDOG=1"}
	for end := harness.Now() + 30*time.Second; len(want) > 0; {
		got := next(end)
		if got == "" {
			t.Fatalf("systemd was not told %q", want)
		}
		want = slices.DeleteFunc(want, func(w string) bool { return strings.Contains(got, w) })
	}
	tr.must(elect.Signal(syscall.SIGTERM))
	for end := harness.Now() + 30*time.Second; ; {
		if got := next(end); strings.Contains(got, "STOPPING=1") {
			break
		} else if got == "" {
			t.Fatal("systemd was not told that elect stops")
		}
	}
	tr.finish()
}

// As process 1 the guard is the last to leave: a container that stops has
// nothing left in it.
func TestPID1_StopsEverything(t *testing.T) {
	harness.NeedsRoot(t)
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	tr.ttl = 5 * time.Minute
	c := tr.start("a", "daemonize setsid hold-pipes ignore-term",
		func(cfg *harness.CandidateConfig) {
			tr.wrap(cfg, "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
		})
	job := tr.waitJob(c)
	tr.waitRoles(job, "daemon", "setsid", "grandchild")
	guard := harness.Children(c.Guard())
	if len(guard) != 1 {
		t.Fatalf("children of unshare: %v", guard)
	}
	tr.must(syscall.Kill(guard[0], syscall.SIGTERM))
	tr.waitExit(c, 0)
	tr.waitDead(job)
	tr.noProcesses()
	tr.leasesAre()
}

// An identity is a name, and no more: two candidates of one name are two.
func TestIdentity_OfTwo(t *testing.T) {
	tr := ordinary(t)
	first := tr.start("a", "")
	tr.waitStatus(first, "/leader", http.StatusOK)
	second := tr.start("a", "")
	tr.waitStatus(second, "/standby", http.StatusOK)
	if code, body, err := second.Get(tr.ctx, "/leader"); code != http.StatusServiceUnavailable {
		t.Errorf("/leader of a standby that has the leader's name: %d, %s, %v", code, body, err)
	}
	if s := tr.status(second); s.Name != "a" || s.State != "standby" {
		t.Errorf("/status of the standby: %+v", s)
	}
	job := tr.waitJob(first)
	tr.must(first.Signal(syscall.SIGTERM))
	tr.waitNext(job, soon)
	tr.waitStatus(second, "/leader", http.StatusOK)
	for _, o := range check.Overlaps(tr.witness.Lives()) {
		t.Error(o)
	}
	tr.finish()
}

// The job's standard streams are the daemon's own.
func TestJob_StandardStreams(t *testing.T) {
	tr := ordinary(t)
	c := tr.start("a", "", variables("LEASEHOLD_RESTART=never"),
		command("sh", "-c", "cat; echo and this >&2; exit 3"),
		func(cfg *harness.CandidateConfig) {
			cfg.Prepare = func(cmd *exec.Cmd) { cmd.Stdin = strings.NewReader("read this\n") }
		})
	tr.waitExit(c, 3)
	if out := c.Output(); out != "read this\n" {
		t.Errorf("standard output: %q", out)
	}
	if log := c.Log(); !strings.Contains(log, "and this\n") {
		t.Errorf("standard error:\n%s", log)
	}
	tr.nothingLeft()
}

// A sidecar holds the lease for as long as it said, also where that is longer
// than the TTL.
func TestElect_HoldsLongerThanTheTTL(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 2 * time.Second
	a := tr.start("a", "", subcommand("elect"), variables("LEASEHOLD_STOP_GRACE=5s"))
	tr.waitStatus(a, "/leader", http.StatusOK)
	b := tr.start("b", "", subcommand("elect"))
	tr.waitStatus(b, "/standby", http.StatusOK)
	began := harness.Now()
	tr.must(a.Signal(syscall.SIGTERM))
	tr.waitStatus(b, "/leader", http.StatusOK)
	if held := harness.Now() - began; held < 5*time.Second || held > waitTimeout {
		t.Errorf("the lease was held for %v, want 5s", held)
	}
	tr.waitExit(a, 0)
	tr.finish()
}
