//go:build linux

package scenario_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
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

	"leasehold/e2e/harness"
)

// The version of the binary that a reload brings.
const newVersion = "2.0-test"

// reloadPrograms builds the daemon with the other version, and the program that stands in for one.
func reloadPrograms(t *testing.T) *harness.Programs {
	t.Helper()
	return build(t, &built.reload, "-ldflags", "-s -w -X main.version="+newVersion,
		".", "./e2e/cmd/standin")
}

// installed is a daemon whose binary and env file can be replaced.
type installed struct {
	*candidate
	tr     *trial
	binary string // what was started
	file   string // its env file
	lines  []string
}

// install starts a candidate from a directory of its own, with its settings in a file.
func (tr *trial) install(identity, behaviour string, changes ...change) *installed {
	tr.Helper()
	dir, err := harness.TempDir("leasehold-reload-")
	tr.must(err)
	tr.Cleanup(func() { _ = os.RemoveAll(dir) })
	in := &installed{
		tr: tr, binary: filepath.Join(dir, "leasehold"), file: filepath.Join(dir, "env"),
	}
	in.put(tr.programs.Leasehold)
	changes = append(changes, func(cfg *harness.CandidateConfig) {
		before := cfg.Prepare
		cfg.Prepare = func(cmd *exec.Cmd) {
			if before != nil {
				before(cmd)
			}
			cmd.Env = slices.DeleteFunc(cmd.Env, func(entry string) bool {
				ours := strings.HasPrefix(entry, "LEASEHOLD_")
				if ours {
					in.lines = append(in.lines, entry)
				}
				return ours
			})
			in.write()
			cmd.Path = in.binary
			cmd.Args = slices.Concat([]string{in.binary, "-f", in.file}, cmd.Args[1:])
		}
	})
	in.candidate = tr.start(identity, behaviour, changes...)
	return in
}

// put replaces the binary as a package manager does.
func (in *installed) put(binary string) {
	in.tr.Helper()
	text, err := os.ReadFile(binary)
	in.tr.must(err)
	in.tr.must(os.WriteFile(in.binary+".new", text, 0o755))
	in.tr.must(os.Rename(in.binary+".new", in.binary))
}

// putStandin replaces the binary by one that behaves so, and is the new one otherwise.
func (in *installed) putStandin(mode string) {
	in.tr.Helper()
	programs, dir := reloadPrograms(in.tr.T), filepath.Dir(in.binary)
	in.tr.must(os.WriteFile(filepath.Join(dir, "mode"), []byte(mode), 0o644))
	in.tr.must(os.WriteFile(filepath.Join(dir, "real"), []byte(programs.Leasehold), 0o644))
	in.put(programs.Beside("standin"))
}

// write writes the env file: the settings from the start, then these.
func (in *installed) write(more ...string) {
	in.tr.Helper()
	text := strings.Join(append(slices.Clone(in.lines), more...), "\n") + "\n"
	in.tr.must(os.WriteFile(in.file, []byte(text), 0o644))
}

// reload runs `leasehold reload`, and returns its exit code and what it says.
func (tr *trial) reload(uid uint32, args ...string) (code int, said string) {
	tr.Helper()
	var out bytes.Buffer
	cmd := exec.CommandContext(tr.ctx, reloadPrograms(tr.T).Leasehold,
		append([]string{"reload"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env, cmd.Dir = append([]string{"PATH=" + os.Getenv("PATH")}, tr.asking...), "/"
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		tr.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

// reloads has a daemon reload, which must succeed.
func (in *installed) reloads() {
	in.tr.Helper()
	code, said := in.tr.reload(in.tr.user.uid, strconv.Itoa(in.Guard()))
	if code != 0 || said != "reloaded: leasehold "+newVersion+"\n" {
		in.tr.Fatalf("reload of %s: %d, %s", in.Identity, code, said)
	}
}

// refuses has a daemon reload, which must fail for this reason. Nothing may have happened.
func (in *installed) refuses(want string, command ...string) {
	in.tr.Helper()
	before := in.look()
	code, said := in.tr.reload(in.tr.user.uid, append([]string{strconv.Itoa(in.Guard())},
		command...)...)
	if code != 1 || !strings.Contains(said, want) {
		in.tr.Errorf("reload of %s: %d, %q; want 1, %q", in.Identity, code, said, want)
	}
	if after := in.look(); after != before {
		in.tr.Errorf("%s: before %+v, after %+v", want, before, after)
	}
}

// shown is what a reload changes, and what it must leave alone.
type shown struct {
	version, lease string
	token          int64
	job, elector   int
}

func (in *installed) tryLook() (l shown, err error) {
	_, body, err := in.Get(in.tr.ctx, "/status")
	if err != nil {
		return l, err
	}
	s := struct {
		status
		Version string
	}{}
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		return l, err
	}
	l.version = s.Version
	if s.Lease != nil {
		l.lease = s.Lease.ID
	}
	if s.Leader != nil {
		l.token = s.Leader.Token
	}
	if s.Job.PID != nil {
		l.job = *s.Job.PID
	}
	l.elector, err = in.Elector()
	return l, err
}

func (in *installed) look() shown {
	in.tr.Helper()
	l, err := in.tryLook()
	in.tr.must(err)
	return l
}

// waitSame waits until another elector shows the same job, token and lease as before. A request may
// be lost with the old one.
func (in *installed) waitSame(before shown, version string) {
	in.tr.Helper()
	in.tr.must(harness.Until(in.tr.waitContext(waitTimeout), func() error {
		got, err := in.tryLook()
		want := before
		switch want.elector, want.version = got.elector, version; {
		case err != nil:
			return err
		case got.elector == before.elector:
			return errors.New("it is the same elector")
		case got != want:
			return fmt.Errorf("%s: %+v, want %+v", in.Identity, got, want)
		}
		return nil
	}))
}

// TestReload: leader and standby get another binary, while they renew. The job, its term and the
// queue stay.
func TestReload(t *testing.T) {
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			leader := tr.install("a", "")
			job := tr.waitJob(leader.candidate)
			standby := tr.install("b", "")
			tr.waitStatus(standby.candidate, "/standby", http.StatusOK)
			third := tr.start("c", "")
			tr.waitStatus(third, "/standby", http.StatusOK)
			queue := tr.queue()
			for _, in := range []*installed{leader, standby} {
				tr.waitRenewals(in.candidate, 2)
				before := in.look()
				in.put(reloadPrograms(t).Leasehold)
				in.reloads()
				in.waitSame(before, newVersion)
				tr.waitRenewals(in.candidate, 5) // for longer than the TTL
				in.waitSame(before, newVersion)
			}
			reloads, err := leader.Metric(tr.ctx,
				`leasehold_elector_replacements_total{reason="reload"}`)
			if err != nil || reloads != 1 {
				t.Errorf("%v reloads are counted, %v", reloads, err)
			}
			tr.sameJob(job)
			if now := tr.queue(); now != queue {
				t.Errorf("the queue was %s, and is %s", queue, now)
			}
			tr.must(leader.Signal(syscall.SIGTERM))
			if next := tr.waitNext(job, soon); next.Candidate != standby.Identity {
				t.Errorf("%s leads, want %s", next.Candidate, standby.Identity)
			}
			tr.waitExit(leader.candidate, 0)
			tr.finish()
		})
	}
}

// otherCluster starts another etcd that has the same cluster id: its token, its member's name and
// peer URL are those of the first. It returns its endpoint.
func (tr *trial) otherCluster() string {
	tr.Helper()
	m := tr.etcd.Members[0]
	dir, err := harness.TempDir("leasehold-etcd-")
	tr.must(err)
	var free [2]string
	for i := range free {
		addr, err := harness.FreeAddr()
		tr.must(err)
		free[i] = "http://" + addr
	}
	args := m.Flags()
	for i, arg := range args {
		switch arg {
		case "--data-dir":
			args[i+1] = dir
		case "--listen-client-urls", "--advertise-client-urls":
			args[i+1] = free[0]
		case "--listen-peer-urls":
			args[i+1] = free[1]
		case "--listen-metrics-urls":
			args = slices.Delete(args, i, i+2)
		}
		if i+2 >= len(args) {
			break
		}
	}
	etcd, err := harness.FindEtcd(tr.ctx, os.Stderr)
	tr.must(err)
	other, err := harness.StartChild("the other etcd", nil, exec.Command(etcd.Server, args...))
	tr.must(err)
	tr.Cleanup(func() {
		other.Kill()
		_ = os.RemoveAll(dir)
	})
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		code, body, err := harness.Get(tr.ctx, time.Second, free[0]+"/health")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	}))
	return free[0]
}

// TestReload_Refused: whatever is wrong, the command says so and fails. The old elector goes on.
func TestReload_Refused(t *testing.T) {
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			in := tr.install("a", "")
			job := tr.waitJob(in.candidate)
			tr.waitRenewals(in.candidate, 2)
			for name, value := range map[string]string{
				"ELECTION": "other", "IDENTITY": "other", "TTL": "9s", "MARGIN": "299ms",
				"STOP_SIGNAL": "INT", "STOP_GRACE": "501ms", "NO_NEW_PRIVS": "off",
				"LISTEN": "off", "STATE_DIR": "/var/lib/x", "CONTACT_LOSS": "freeze",
				"LOG_FORMAT": "json",
			} {
				in.write("LEASEHOLD_" + name + "=" + value)
				in.refuses("LEASEHOLD_" + name + " can't be changed by a reload")
			}
			nobody, err := harness.FreeAddr()
			tr.must(err)
			same := tr.etcd.Endpoints()[0]
			for setting, want := range map[string]string{
				"RESTART=sometimes":                           "LEASEHOLD_RESTART: ",
				"RESTRAT=never":                               "did you mean LEASEHOLD_RESTART?",
				"TLS_CA_FILE=/no/such/file":                   "/no/such/file",
				"ENDPOINTS=http://" + nobody:                  nobody + ": ",
				"ENDPOINTS=" + tr.otherCluster() + "," + same: "another cluster",
				"X=\nno assignment":                           "there is no =",
			} {
				in.write("LEASEHOLD_" + setting)
				in.refuses(want)
			}
			in.write()
			tr.must(os.Rename(in.file, in.file+"-gone"))
			in.refuses("no such file")
			in.write()
			in.refuses("the command can't be changed by a reload", "--", "/bin/other")

			for _, binary := range []string{"/bin/true", "/bin/false"} {
				in.put(binary)
				in.refuses("the binary is no leasehold that can take over")
			}
			in.put("/etc/hosts")
			in.refuses("can't be executed")
			tr.must(os.Remove(in.binary))
			in.refuses("no such file")
			in.putStandin("other protocol")
			in.refuses("the daemon speaks version 99 of the protocol")
			in.putStandin("check crashes")
			in.refuses("its check exited with code 2")

			in.put(reloadPrograms(t).Leasehold)
			in.reloads()
			tr.sameJob(job)
			tr.finish()
		})
	}
}

// TestReload_Restored: a binary passes the check, and its elector crashes or hangs. The one before
// it comes back, with its place in the queue.
func TestReload_Restored(t *testing.T) {
	for _, mode := range []string{"elector crashes", "elector hangs"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, users()[1], harness.ClusterConfig{})
			tr.ttl = 10 * time.Second
			leader := tr.install("a", "")
			job := tr.waitJob(leader.candidate)
			standby := tr.install("b", "")
			tr.waitStatus(standby.candidate, "/standby", http.StatusOK)
			queue := tr.queue()
			for _, in := range []*installed{leader, standby} {
				before := in.look()
				in.putStandin(mode)
				for range 3 { // more often than a guard replaces electors that are lost
					code, said := tr.reload(0, strconv.Itoa(in.Guard()))
					if code != 1 || !strings.Contains(said, "lost before it was ready") {
						t.Errorf("reload of %s: %d, %q", in.Identity, code, said)
					}
					tr.waitRenewals(in.candidate, 1)
				}
				in.waitSame(before, before.version)
				if !strings.Contains(in.Log(), "going back to the one before it") {
					t.Error("the log says nothing of it")
				}
				in.put(reloadPrograms(t).Leasehold)
				in.reloads()
				in.waitSame(before, newVersion)
				// Now it is lost within a minute. One that renews the lease of a job is replaced
				// by its like, once.
				want := before.version
				if in == leader {
					tr.waitRenewals(in.candidate, 1)
					want = newVersion
				}
				for range 2 {
					before.elector, _ = in.Elector()
					tr.must(in.signalElector(syscall.SIGKILL))
					in.waitSame(before, want)
					want = before.version
				}
			}
			tr.sameJob(job)
			if now := tr.queue(); now != queue {
				t.Errorf("the queue was %s, and is %s", queue, now)
			}
			tr.finish()
		})
	}
}

// TestReload_Strangers: the signal goes to nobody who would end by it, and nobody may send it who
// may not signal the daemon.
func TestReload_Strangers(t *testing.T) {
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	in := tr.install("a", "")
	job := tr.waitJob(in.candidate)
	elect := tr.start("b", "", subcommand("elect"))
	tr.waitStatus(elect, "/standby", http.StatusOK)
	elector, err := in.Elector()
	tr.must(err)
	spawner, err := in.Spawner()
	tr.must(err)
	// A Go program catches the signal, whatever it makes of it.
	dir := t.TempDir()
	tr.must(os.WriteFile(filepath.Join(dir, "mode"), []byte("sleeps"), 0o644))
	tr.must(os.Link(reloadPrograms(t).Beside("standin"), filepath.Join(dir, "standin")))
	other, err := harness.StartChild("another program", nil,
		exec.Command(filepath.Join(dir, "standin"), "run", "--", "leasehold"))
	tr.must(err)
	t.Cleanup(other.Kill)
	before := in.look()
	for name, pid := range map[string]int{
		"elector": elector, "spawner": spawner, "job": before.job, "elect": elect.Guard(),
		"test": os.Getpid(), "another program": other.Pid(),
	} {
		code, said := tr.reload(0, strconv.Itoa(pid))
		if code != 1 || !strings.Contains(said, "is not a leasehold that runs a job") {
			t.Errorf("reload of %s: %d, %q", name, code, said)
		}
	}
	for args, want := range map[string]struct {
		code int
		said string
	}{
		"4194305": {1, "there is no process 4194305"},
		"x":       {64, "is no pid"},
		"0":       {64, "is no pid"},
	} {
		code, said := tr.reload(0, args)
		if code != want.code || !strings.Contains(said, want.said) {
			t.Errorf("reload %s: %d, %q", args, code, said)
		}
	}
	if os.Geteuid() == 0 {
		code, said := tr.reload(65533, strconv.Itoa(in.Guard()))
		if code != 1 || !strings.Contains(said, "not permitted to signal process") {
			t.Errorf("reload by another user: %d, %q", code, said)
		}
	}
	if after := in.look(); after != before {
		t.Errorf("before %+v, after %+v", before, after)
	}
	tr.sameJob(job)
	tr.finish()
}

// TestReload_NoAnswer: a guard that does not answer, here because it takes nobody's word but root's
// and its own user's.
func TestReload_NoAnswer(t *testing.T) {
	harness.NeedsRoot(t)
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	in := tr.install("a", "")
	job := tr.waitJob(in.candidate)
	cmd := exec.CommandContext(tr.ctx, "setpriv", "--reuid=65533", "--clear-groups",
		"--inh-caps=+kill", "--ambient-caps=+kill", reloadPrograms(t).Leasehold, "reload",
		strconv.Itoa(in.Guard()))
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 69 || !strings.Contains(string(out), "does not answer") {
		t.Errorf("%v, %s", err, out)
	}
	tr.waitLog(in.candidate, "msg=reloaded")
	tr.sameJob(job)
	tr.finish()
}

// TestReload_UnderWay: while a check hangs, nobody else can ask, and a stop does not wait for it.
// Nothing of the check is left.
func TestReload_UnderWay(t *testing.T) {
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			in := tr.install("a", "")
			job := tr.waitJob(in.candidate)
			in.putStandin("check hangs")
			type answer struct {
				code int
				said string
			}
			ask := func() <-chan answer {
				first := make(chan answer, 1)
				go func() {
					code, said := tr.reload(u.uid, strconv.Itoa(in.Guard()))
					first <- answer{code, said}
				}()
				return first
			}
			checking := func() (pid int) {
				tr.must(harness.Until(tr.waitContext(waitTimeout), func() (err error) {
					pid, err = harness.FindProcess(in.Guard(), "check-reload")
					return err
				}))
				return pid
			}
			first := ask()
			checking()
			in.refuses("another reload of process")
			tr.must(in.Signal(syscall.Signal(35)))
			tr.waitLog(in.candidate, "reload refused: another reload is under way")
			got := <-first
			if got.code != 1 || !strings.Contains(got.said, "has not ended within 15s") {
				t.Errorf("the first one: %+v", got)
			}
			tr.sameJob(job)

			first = ask()
			check := checking()
			tr.must(in.signalElector(syscall.SIGKILL))
			if got := <-first; got.code != 1 || !strings.Contains(got.said, "was lost meanwhile") {
				t.Errorf("the elector is lost: %+v", got)
			}
			tr.waitReplaced(in.candidate, 1)
			tr.waitRenewals(in.candidate, 1)
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				if syscall.Kill(check, 0) == nil {
					return fmt.Errorf("the check %d runs", check)
				}
				return nil
			}))
			tr.sameJob(job)

			first = ask()
			check = checking()
			tr.must(in.Signal(syscall.SIGTERM))
			if got := <-first; got.code != 1 || !strings.Contains(got.said, "the daemon stops") {
				t.Errorf("the daemon stops: %+v", got)
			}
			tr.waitExit(in.candidate, 0)
			if syscall.Kill(check, 0) == nil {
				t.Error("the check has outlived its guard")
			}
			tr.finish()
		})
	}
}

// TestReload_Twenty: one reload after the other leaves nothing open, and counts against nothing.
func TestReload_Twenty(t *testing.T) {
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	in := tr.install("a", "")
	job := tr.waitJob(in.candidate)
	in.put(reloadPrograms(t).Leasehold)
	open := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", in.Guard()))
		tr.must(err)
		return len(entries)
	}
	in.reloads()
	in.reloads() // that of the first is still needed then
	before := open()
	for range 20 {
		in.reloads()
	}
	tr.waitRenewals(in.candidate, 2)
	in.write("LEASEHOLD_TTL=9s")
	in.refuses("LEASEHOLD_TTL")
	if after := open(); after != before {
		t.Errorf("%d descriptors are open, were %d", after, before)
	}
	if children := harness.Children(in.Guard()); len(children) != 2 {
		t.Errorf("the guard's children are %v", children)
	}
	tr.sameJob(job)
	tr.finish()
}

// TestReload_Settings: the settings of the file take effect.
func TestReload_Settings(t *testing.T) {
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
	text, err := os.ReadFile(certs.ClientCertFile)
	tr.must(err)
	first := filepath.Join(dir, "first.pem")
	tr.must(os.WriteFile(first, text, 0o644))
	tls := []string{
		"LEASEHOLD_TLS_CA_FILE=" + certs.CAFile,
		"LEASEHOLD_TLS_CERT_FILE=" + first,
		"LEASEHOLD_TLS_KEY_FILE=" + certs.ClientKeyFile,
	}
	in := tr.install("a", "", variables(tls...), tr.enableAuth())
	job := tr.waitJob(in.candidate)
	in.write("LEASEHOLD_PASSWORD=wrong")
	in.refuses("user name or password is wrong")
	in.write("LEASEHOLD_TLS_CERT_FILE=", "LEASEHOLD_TLS_KEY_FILE=")
	in.refuses("certificate")

	// Other files, and without the proxies.
	tr.must(os.Remove(first))
	in.write("LEASEHOLD_ENDPOINTS="+strings.Join(tr.etcd.Endpoints(), ","),
		"LEASEHOLD_TLS_CERT_FILE="+certs.ClientCertFile)
	in.put(reloadPrograms(t).Leasehold)
	in.reloads()
	in.SetReachable(false)
	tr.waitRenewals(in.candidate, 6)
	tr.sameJob(job)

	// The loss of all electors revokes the lease by these settings. After one reload more those
	// from before this one come back.
	in.reloads()
	tr.loseElectorsOf(in)
	in.mayExit = true
	tr.waitDead(job)
	tr.waitExit(in.candidate, 70)
	tr.nothingLeft()
}

// TestReload_Environment: with --env the settings come from whoever asks. Otherwise those count
// that the daemon was started with.
func TestReload_Environment(t *testing.T) {
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			var settings []string
			in := &installed{tr: tr}
			in.candidate = tr.start("a", "", func(cfg *harness.CandidateConfig) {
				before := cfg.Prepare
				cfg.Prepare = func(cmd *exec.Cmd) {
					if before != nil {
						before(cmd)
					}
					settings = slices.DeleteFunc(slices.Clone(cmd.Env), func(entry string) bool {
						return !strings.HasPrefix(entry, "LEASEHOLD_")
					})
				}
			})
			job := tr.waitJob(in.candidate)
			pid := strconv.Itoa(in.Guard())
			ask := func(want string, code int, args ...string) {
				t.Helper()
				got, said := tr.reload(u.uid, args...)
				if got != code || !strings.Contains(said, want) {
					t.Errorf("reload %q: %d, %q; want %d, %q", args, got, said, code, want)
				}
			}
			tr.asking = []string{"LEASEHOLD_TTL=99s"} // it does not count
			ask("reloaded: leasehold", 0, pid)
			ask("LEASEHOLD_ELECTION: missing", 1, "--env", pid)
			tr.asking = append(slices.Clone(settings), "LEASEHOLD_TTL=99s")
			ask("LEASEHOLD_TTL can't be changed by a reload, from 3s to 1m39s", 1, "--env", pid)
			direct := "LEASEHOLD_ENDPOINTS=" + strings.Join(tr.etcd.Endpoints(), ",")
			tr.asking = append(slices.Clone(settings), direct)
			ask("reloaded: leasehold", 0, pid, "--env", "--", tr.programs.Testjob)
			in.SetReachable(false)
			tr.waitRenewals(in.candidate, 6)
			tr.sameJob(job)
			tr.finish()
		})
	}
}

// TestReload_Squatters: somebody else listens where the answer would go. The command names them,
// and a plain kill works. They learn nothing.
func TestReload_Squatters(t *testing.T) {
	harness.NeedsRoot(t)
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	in := tr.install("a", "")
	job := tr.waitJob(in.candidate)
	fields, err := harness.Stat(fmt.Sprintf("/proc/%d", in.Guard()))
	tr.must(err)
	address := fmt.Sprintf("@leasehold-reload/%d/%s", in.Guard(), fields[19])
	dir, err := harness.TempDir("leasehold-squatter-") // which another user may enter
	tr.must(err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	tr.must(os.WriteFile(filepath.Join(dir, "mode"), []byte("squats "+address), 0o644))
	tr.must(os.WriteFile(filepath.Join(dir, "real"), nil, 0o644))
	tr.must(os.Link(reloadPrograms(t).Beside("standin"), filepath.Join(dir, "standin")))
	cmd := exec.Command(filepath.Join(dir, "standin"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65533, Gid: 65533}}
	squatter, err := harness.StartChild("the squatter", nil, cmd)
	tr.must(err)
	t.Cleanup(squatter.Kill)
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if !strings.Contains(squatter.Output(), "listens") {
			return fmt.Errorf("it says %q and %q", squatter.Output(), squatter.Log())
		}
		return nil
	}))
	in.refuses(fmt.Sprintf("by process %d of user 65533", squatter.Pid()))
	in.put(reloadPrograms(t).Leasehold)
	before := in.look()
	tr.must(in.Signal(syscall.Signal(35)))
	in.waitSame(before, newVersion)
	if said := squatter.Output(); strings.Contains(said, "heard") {
		t.Errorf("the squatter has %s", said)
	}
	tr.sameJob(job)
	tr.finish()
}

// loseElectorsOf kills electors until the guard gives up.
func (tr *trial) loseElectorsOf(in *installed) {
	tr.Helper()
	for in.Running() && tr.ctx.Err() == nil {
		_ = in.signalElector(syscall.SIGKILL)
		_ = harness.Wait(tr.ctx, 10*time.Millisecond)
	}
}

// waitLog waits for a line of a candidate's log.
func (tr *trial) waitLog(c *candidate, want string) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if !strings.Contains(c.Log(), want) {
			return fmt.Errorf("the log of %s does not say %q", c.Identity, want)
		}
		return nil
	}))
}
