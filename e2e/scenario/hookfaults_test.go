//go:build linux

package scenario_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// hookLog is where hooks write why they run.
type hookLog struct {
	tr   *trial
	file string
}

func (tr *trial) newHookLog() *hookLog {
	tr.Helper()
	dir, err := harness.TempDir("leasehold-hooks-")
	tr.must(err)
	tr.Cleanup(func() { _ = os.RemoveAll(dir) })
	tr.must(os.Chmod(dir, 0o777))
	return &hookLog{tr, filepath.Join(dir, "log")}
}

// hook writes a line, and then does what the script says.
func (l *hookLog) hook(name, script string) string {
	return fmt.Sprintf("sh -c 'echo %s $LEASEHOLD_REASON $LEASEHOLD_IDENTITY "+
		"$LEASEHOLD_FENCING_TOKEN >> %s; %s'", name, l.file, script)
}

func (l *hookLog) lines() []string {
	text, _ := os.ReadFile(l.file) // before the first one there is none
	return strings.Fields(strings.ReplaceAll(strings.TrimSpace(string(text)), " ", ","))
}

// wait waits until the lines are these. On a busy machine a guard may be taken for hung: so a hook
// may run twice.
func (l *hookLog) wait(want ...string) {
	l.tr.Helper()
	l.tr.must(harness.Until(l.tr.waitContext(waitTimeout), func() error {
		if got := slices.Compact(l.lines()); strings.Join(got, " ") != strings.Join(want, " ") {
			return fmt.Errorf("hooks: %q, want %q", got, want)
		}
		return nil
	}))
}

func hookSettings(log *hookLog, preStart, postStop string, more ...string) change {
	return variables(append([]string{
		"LEASEHOLD_PRE_START=" + log.hook("pre", preStart),
		"LEASEHOLD_POST_STOP=" + log.hook("post", postStop),
	}, more...)...)
}

// Whatever the hook after the job does, the next leader comes, and after it: nothing of the hook is
// left by then.
func TestHooks_Misbehaving(t *testing.T) {
	t.Parallel()
	const stubborn = `trap "" TERM HUP INT; while :; do sleep 1; done`
	for _, u := range users() {
		for _, row := range []struct{ name, postStop, log string }{
			{"succeeds", "true", ""},
			{"fails", "exit 3", "exit code 3"},
			{"hangs", "sleep 1000", "it has not exited within 2s"},
			{"ignores TERM", stubborn, "it has not exited within 2s"},
			{"forks", `(setsid sh -c "sleep 1000" &) ; exit 0`, ""},
			{"prints megabytes", "yes | head -c 3000000", ""},
		} {
			t.Run(u.name+"/"+row.name, func(t *testing.T) {
				t.Parallel()
				tr := newTrial(t, u, harness.ClusterConfig{})
				tr.ttl = 30 * time.Second
				log := tr.newHookLog()
				leader := tr.start("a", "", hookSettings(log, "true", row.postStop,
					"LEASEHOLD_POST_STOP_TIMEOUT=2s"))
				leader.mayExit = true
				job := tr.waitJob(leader)
				standby := tr.start("b", "")
				tr.waitStatus(standby, "/standby", http.StatusOK)
				token := fmt.Sprint(job.Token)
				log.wait("post,startup,a", "pre,start,a,"+token)
				tr.must(leader.Signal(syscall.SIGTERM))
				tr.waitNext(job, waitTimeout)
				log.wait("post,startup,a", "pre,start,a,"+token, "post,stop,a,"+token)
				tr.finish()
				if row.log != "" && !strings.Contains(leader.Log(), row.log) {
					t.Errorf("the log does not say %q", row.log)
				}
			})
		}
	}
}

// A hook before the start that fails counts as the job's failure: it is tried again, and then the
// candidate resigns. The hook after the job runs each time.
func TestHooks_PreStartFails(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	log := tr.newHookLog()
	failing := tr.start("a", "", hookSettings(log, "exit 7", "true", "LEASEHOLD_RESTART_LIMIT=2"))
	tr.waitLog(failing, "LEASEHOLD_PRE_START has failed: exit code 7")
	if code, _, err := failing.Get(tr.ctx, "/leader"); err == nil && code == http.StatusOK {
		t.Error("/leader is 200 although the job was never started")
	}
	standby := tr.start("b", "")
	if job := tr.waitJob(standby); job.Candidate != "b" {
		t.Errorf("the job is of %s", job.Candidate)
	}
	s := tr.status(failing)
	if s.Job.LastExit == nil || s.Job.LastExit.Code == nil || *s.Job.LastExit.Code != 7 {
		t.Errorf("last exit: %+v", s.Job.LastExit)
	}
	pre, post := 0, 0
	for _, line := range log.lines() {
		if strings.HasPrefix(line, "pre") {
			pre++
		} else {
			post++
		}
	}
	if pre < 2 || post != pre+1 { // once at the start of the daemon
		t.Errorf("hooks before a start: %d, after: %d", pre, post)
	}
	tr.finish()
}

// While the hook before the start runs, nobody is served yet. After a stop the job is not started,
// and a stop signal that the hook does not ignore ends it at once.
func TestHooks_StopDuringPreStart(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		user
		signal, preStart string
	}{
		{users()[0], "TERM", "sleep 1000"},
		{users()[1], "TERM", "sleep 1000"},
		{users()[0], "QUIT", "sleep 1000"},
		{users()[0], "WINCH", "sleep 5"}, // it ignores that, and comes to its end
	} {
		t.Run(row.name+"/"+row.signal, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, row.user, harness.ClusterConfig{})
			log := tr.newHookLog()
			leader := tr.start("a", "", hookSettings(log, row.preStart, "true",
				"LEASEHOLD_STOP_GRACE=30s", "LEASEHOLD_STOP_SIGNAL="+row.signal))
			tr.waitLog(leader, "to=starting")
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				if got := log.lines(); len(got) < 2 {
					return fmt.Errorf("hooks: %q", got)
				}
				return nil
			}))
			if s := tr.status(leader); s.State != "leading" || s.Job.State != "starting" {
				t.Errorf("%+v", s)
			}
			tr.waitStatus(leader, "/leader", http.StatusServiceUnavailable)
			at := time.Now()
			tr.must(leader.Signal(syscall.SIGTERM))
			tr.waitExit(leader, 0)
			if d := time.Since(at); d > 20*time.Second {
				t.Errorf("the stop took %v", d)
			}
			if got := log.lines(); len(got) != 3 || !strings.HasPrefix(got[2], "post,stop") {
				t.Errorf("hooks: %q", got)
			}
			if len(tr.witness.Lives()) > 0 {
				t.Error("the job was started")
			}
			tr.nothingLeft()
		})
	}
}

// Each run of the job has its hooks, in one term.
func TestHooks_Restart(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	log := tr.newHookLog()
	leader := tr.start("a", "", hookSettings(log, "true", "true"))
	job := tr.waitJob(leader)
	token := fmt.Sprint(job.Token)
	tr.must(syscall.Kill(job.Pid, syscall.SIGKILL))
	first := []string{"post,startup,a", "pre,start,a," + token, "post,stop,a," + token}
	log.wait(append(first, "pre,start,a,"+token)...)
	tr.waitStatus(leader, "/leader", http.StatusOK)
	tr.finish()
	for _, o := range check.Overlaps(tr.witness.Lives()) {
		t.Error(o)
	}
}

// hookScript notes when it runs, and what it leaves: a line has the pid of its runner, and the time
// since boot in seconds, to a hundredth.
const hookScript = `
log=%s
note() { read -r up rest </proc/uptime; echo "$1 $PPID $up" >>$log; }
live() { i=0; while [ $i -lt $1 ]; do note alive; sleep 0.02; i=$((i+1)); done; }
once() { [ ! -e $log.once ] && : >$log.once; }
[ "$LEASEHOLD_REASON" = startup ] && exit 0
[ "$1" = far ] && live 100000
note begin
%s
note end
`

// hookNote is a line of it.
type hookNote struct {
	what   string
	runner int
	at     time.Duration
}

func (l *hookLog) notes() (notes []hookNote) {
	text, _ := os.ReadFile(l.file)
	for line := range strings.Lines(string(text)) {
		var n hookNote
		var at float64
		if _, err := fmt.Sscan(line, &n.what, &n.runner, &at); err == nil {
			n.at = time.Duration(at * float64(time.Second))
			notes = append(notes, n)
		}
	}
	return notes
}

// waitBegun waits until the hook has begun that often, and returns the last runner.
func (l *hookLog) waitBegun(times int) (runner int) {
	l.tr.Helper()
	l.tr.must(harness.Until(l.tr.waitContext(waitTimeout), func() error {
		begun := 0
		for _, n := range l.notes() {
			if n.what == "begin" {
				begun, runner = begun+1, n.runner
			}
		}
		if begun < times {
			return fmt.Errorf("the hook has begun %d times, want %d", begun, times)
		}
		return nil
	}))
	return runner
}

// Whoever is lost or hangs while the hook runs: it is run to its end, and nothing of it is left
// when the next job starts.
func TestHooks_EndBeforeTheNextStart(t *testing.T) {
	t.Parallel()
	const (
		slow    = "live 30"                                  // 0.6 s at least
		leaving = "once && (live 100000; true); live 5"      // and again without that
		far     = "setsid sh $0 far & sleep 0.1; kill -9 $$" // in a session of its own
	)
	kill := func(tr *trial, sig syscall.Signal, pids ...int) {
		for _, pid := range pids {
			tr.must(syscall.Kill(pid, sig))
		}
	}
	stop := func(tr *trial, c *candidate, log *hookLog) (runner int) {
		tr.must(c.Signal(syscall.SIGTERM))
		return log.waitBegun(1)
	}
	for _, u := range users() {
		for _, row := range []struct {
			name, script string
			inject       func(tr *trial, c *candidate, log *hookLog)
			log          string // of the candidate
			fails        bool   // the hook does not come to its end
		}{
			{
				name: "guard hangs", script: slow, log: "guard hangs",
				inject: func(tr *trial, c *candidate, _ *hookLog) {
					kill(tr, syscall.SIGSTOP, c.Guard())
				},
			},
			{
				name: "guard hangs during it", script: slow,
				inject: func(tr *trial, c *candidate, log *hookLog) {
					stop(tr, c, log)
					kill(tr, syscall.SIGSTOP, c.Guard())
				},
			},
			{
				name: "guard killed during it", script: slow,
				inject: func(tr *trial, c *candidate, log *hookLog) {
					stop(tr, c, log)
					kill(tr, syscall.SIGKILL, c.Guard())
				},
			},
			{
				name: "guard killed, elector killed during it", script: slow,
				inject: func(tr *trial, c *candidate, log *hookLog) {
					elector, err := c.Elector()
					tr.must(err)
					kill(tr, syscall.SIGKILL, c.Guard())
					log.waitBegun(1)
					kill(tr, syscall.SIGKILL, elector)
				},
			},
			{
				name: "elector killed during it", script: slow,
				inject: func(tr *trial, c *candidate, log *hookLog) {
					stop(tr, c, log)
					tr.must(c.signalElector(syscall.SIGKILL))
				},
			},
			{
				name: "spawner killed during it", script: slow,
				inject: func(tr *trial, c *candidate, log *hookLog) {
					stop(tr, c, log)
					spawner, err := c.Spawner()
					tr.must(err)
					kill(tr, syscall.SIGKILL, spawner)
				},
			},
			{
				name: "runner killed", script: leaving,
				inject: func(tr *trial, c *candidate, log *hookLog) {
					kill(tr, syscall.SIGKILL, stop(tr, c, log))
				},
			},
			{
				name: "guard killed, and the runner", script: leaving,
				inject: func(tr *trial, c *candidate, log *hookLog) {
					kill(tr, syscall.SIGKILL, c.Guard())
					kill(tr, syscall.SIGKILL, log.waitBegun(1))
				},
			},
			{
				name: "runner hangs", script: leaving, fails: true, log: "hangs: killing it",
				inject: func(tr *trial, c *candidate, log *hookLog) {
					kill(tr, syscall.SIGSTOP, stop(tr, c, log))
				},
			},
			{
				name: "guard killed, and the runner hangs", script: leaving, fails: true,
				log: "LEASEHOLD_POST_STOP has failed",
				inject: func(tr *trial, c *candidate, log *hookLog) {
					kill(tr, syscall.SIGKILL, c.Guard())
					kill(tr, syscall.SIGSTOP, log.waitBegun(1))
				},
			},
			{
				name: "leaves a session, and is killed", script: far, fails: true,
				log:    "killed by signal 9",
				inject: func(tr *trial, c *candidate, log *hookLog) { stop(tr, c, log) },
			},
		} {
			t.Run(u.name+"/"+row.name, func(t *testing.T) {
				t.Parallel()
				tr := newTrial(t, u, harness.ClusterConfig{})
				tr.ttl = 30 * time.Second
				log := tr.newHookLog()
				leader := tr.start("a", "", log.slowHook(row.script, "8s"))
				leader.mayExit = true
				job := tr.waitJob(leader)
				standby := tr.start("b", "")
				standby.mayExit = true // its guard, too, may be taken for hung on a busy machine
				tr.waitStatus(standby, "/standby", http.StatusOK)
				row.inject(tr, leader, log)
				next := tr.waitNext(job, waitTimeout)
				if row.log != "" {
					tr.waitLog(leader, row.log)
				}
				tr.finish()
				log.checkEnd(next, !row.fails)
			})
		}
	}
}

// A guard that is process 1 of its container can't be killed from inside when it hangs. The hook
// runs all the same.
func TestHooks_PID1Hangs(t *testing.T) {
	harness.NeedsRoot(t)
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	tr.ttl = 15 * time.Second
	log := tr.newHookLog()
	leader := tr.start("a", "", log.slowHook("live 30", "4s"), func(cfg *harness.CandidateConfig) {
		tr.wrap(cfg, "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
	})
	leader.mayExit = true
	job := tr.waitJob(leader)
	standby := tr.start("b", "")
	tr.waitStatus(standby, "/standby", http.StatusOK)
	guard := harness.Children(leader.Guard()) // of unshare
	if len(guard) != 1 {
		t.Fatalf("children of unshare: %v", guard)
	}
	tr.must(syscall.Kill(guard[0], syscall.SIGSTOP))
	next := tr.waitNext(job, waitTimeout)
	if syscall.Kill(guard[0], 0) != nil {
		t.Error("the guard has ended")
	}
	tr.must(syscall.Kill(guard[0], syscall.SIGKILL))
	tr.finish()
	log.checkEnd(next, true)
}

// slowHook is the settings of a hook that notes when it runs.
func (l *hookLog) slowHook(script, timeout string) change {
	l.tr.Helper()
	file := l.file + ".sh"
	l.tr.must(os.WriteFile(file, fmt.Appendf(nil, hookScript, l.file, script), 0o644))
	return variables("LEASEHOLD_POST_STOP=sh "+file, "LEASEHOLD_POST_STOP_TIMEOUT="+timeout,
		"LEASEHOLD_LOSS_GRACE=0s", "LEASEHOLD_MARGIN=1s", "LEASEHOLD_STOP_GRACE=1s")
}

// checkEnd checks that nothing of the hook was there any more when the next job began.
func (l *hookLog) checkEnd(next harness.Life, toItsEnd bool) {
	l.tr.Helper()
	notes := l.notes()
	last := notes[len(notes)-1]
	if last.at > next.Forked { // both are rounded down
		l.tr.Errorf("the hook: %s at %v, but the next job has started at %v", last.what, last.at,
			next.Forked)
	}
	if toItsEnd && last.what != "end" {
		l.tr.Errorf("the hook was not run to its end: %+v", last)
	}
	l.tr.Logf("%d notes, the last one %v before the next start", len(notes), next.Forked-last.at)
}
