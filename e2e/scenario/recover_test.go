//go:build linux

package scenario_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// recoverTTL is long, so that a leader that waited for the old lease is told from one that did not.
const recoverTTL = 40 * time.Second

// recovery is a daemon with a state file, all of whose processes are killed at once.
type recovery struct {
	*trial
	uid    uint32
	dir    string // STATE_DIR
	cgroup *harness.Cgroup
	first  *candidate
	left   []*harness.Cgroup // that may hold what is left of it
	// wrapped: every daemon is the child of another program.
	wrapped bool
	job     harness.Life
	lease   string
}

// place is where a daemon runs, and who runs it.
type place struct {
	uid       uint32 // 0: root
	delegated bool   // the user may make cgroups there
	behaviour string // of the job
	wrap      []string
}

// lead has a daemon lead.
func (r *recovery) lead(p place) {
	r.Helper()
	r.uid = p.uid
	dir, err := harness.TempDir("leasehold-state-")
	r.must(err)
	r.Cleanup(func() { _ = os.RemoveAll(dir) })
	r.dir = filepath.Join(dir, "a")
	r.must(errors.Join(os.Chmod(dir, 0o755), os.Mkdir(r.dir, 0o700),
		os.Chown(r.dir, int(p.uid), int(p.uid))))
	r.cgroup = r.makeCgroup()
	r.left = []*harness.Cgroup{r.cgroup}
	if p.delegated {
		for _, file := range []string{"", "cgroup.procs", "cgroup.subtree_control"} {
			r.must(os.Chown(filepath.Join(r.cgroup.Path, file), int(p.uid), int(p.uid)))
		}
	}
	r.first = r.startIn(r.cgroup, p.behaviour, func(cfg *harness.CandidateConfig) {
		wrapIn(cfg, p.wrap)
	})
	r.job = r.waitJob(r.first)
	r.waitStatus(r.first, "/leader", http.StatusOK)
	leases, err := r.etcd.Leases(r.ctx)
	r.must(err)
	if len(leases) != 1 {
		r.Fatalf("leases: %q, want one", leases)
	}
	r.lease = leases[0]
}

// wrapIn has a program start the daemon.
func wrapIn(cfg *harness.CandidateConfig, wrap []string) {
	if prepare := cfg.Prepare; len(wrap) > 0 {
		cfg.Prepare = func(cmd *exec.Cmd) {
			prepare(cmd)
			path, err := exec.LookPath(wrap[0])
			if err == nil {
				cmd.Args = append(slices.Clone(wrap), append([]string{cmd.Path},
					cmd.Args[1:]...)...)
				cmd.Path = path
			}
		}
	}
}

// startIn starts a daemon of the same identity and user.
func (r *recovery) startIn(cgroup *harness.Cgroup, behaviour string, changes ...change) *candidate {
	r.Helper()
	c := r.start("a", behaviour, append([]change{func(cfg *harness.CandidateConfig) {
		cfg.UID, cfg.Prepare = r.uid, cgroup.Enter
		cfg.Env = append(cfg.Env, "LEASEHOLD_STATE_DIR="+r.dir)
	}}, changes...)...)
	c.mayExit = true
	return c
}

// killAll kills all processes of the daemon at once, and the job with it.
func (r *recovery) killAll() {
	r.Helper()
	r.must(r.cgroup.Kill())
	_, err := r.first.Wait(r.waitContext(waitTimeout))
	r.must(err)
	r.waitDead(r.job)
	r.must(r.cgroup.WaitEmpty(r.waitContext(waitTimeout)))
}

// killDaemon kills the daemon's processes at once, before one of them can kill the job. Then it
// kills the job's first process. It leaves those processes alone that the test keeps.
func (r *recovery) killDaemon(kept ...int) {
	r.Helper()
	r.kill(kept...)
	_, err := r.first.Wait(r.waitContext(waitTimeout))
	r.must(err)
}

func (r *recovery) kill(kept ...int) {
	guard := r.first.Guard()
	pids := append(harness.Descendants(guard), guard)
	for _, sig := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGKILL} {
		for _, pid := range pids {
			if !slices.Contains(kept, pid) {
				_ = syscall.Kill(pid, sig)
			}
		}
	}
}

// recovers fails the test unless the next daemon leads long before the old lease can have expired.
func (r *recovery) recovers(proof string, began time.Duration, next *candidate) {
	r.Helper()
	job := r.waitNext(r.job, recoverTTL/4)
	r.Logf("the job runs again %v after the start of the daemon",
		(job.Started - began).Round(time.Millisecond))
	r.waitLogged(next, "proof=\""+proof)
	r.end()
}

// waits fails the test if the next daemon gives up the old lease, or runs its job under it. says is
// what it says why.
func (r *recovery) waits(next *candidate, says string) {
	r.Helper()
	r.waitStatus(next, "/standby", http.StatusOK)
	r.waitLogged(next, says)
	if strings.Contains(next.Log(), "the state file can't be used") {
		r.Error("the elector took another descriptor for the state file")
	}
	time.Sleep(500 * time.Millisecond) // a request to revoke would have arrived
	leases, err := r.etcd.Leases(r.ctx)
	r.must(err)
	if !slices.Contains(leases, r.lease) {
		r.Errorf("the lease %s is gone; there are %q", r.lease, leases)
	}
	for _, l := range r.witness.Lives() {
		if l.Token > r.job.Token {
			r.Errorf("a job of the next term: %+v", l)
		}
	}
	for _, c := range r.left {
		r.must(c.Kill())
	}
	r.waitDead(r.job)
	_, err = r.etcd.Etcdctl(r.ctx, "lease", "revoke", r.lease) // in place of its end
	r.must(err)
	r.waitNext(r.job, waitTimeout)
	r.end()
}

// waitExited waits for the end of one process.
func (r *recovery) waitExited(of harness.Life) {
	r.Helper()
	r.must(r.witness.Wait(r.waitContext(waitTimeout), func(lives []harness.Life) bool {
		return !slices.ContainsFunc(lives, func(l harness.Life) bool {
			return l.Pid == of.Pid && l.Started == of.Started && l.Alive()
		})
	}))
}

func (r *recovery) waitLogged(c *candidate, text string) {
	r.Helper()
	if !strings.Contains(c.Log(), text) {
		r.Errorf("candidate %s has not logged %q:\n%s", c.Identity, text, c.Log())
	}
}

// end stops the daemon, and checks that two jobs never ran at once.
func (r *recovery) end() {
	r.Helper()
	for _, c := range r.candidates {
		if c.ended() || !r.wrapped {
			continue
		}
		for _, pid := range harness.Children(c.Guard()) { // unshare(1) ignores SIGTERM
			r.must(syscall.Kill(pid, syscall.SIGTERM))
		}
		r.waitExit(c, 0)
	}
	r.finish()
	for _, o := range check.Overlaps(r.witness.Lives()) {
		r.Error(o)
	}
}

func newRecovery(t *testing.T) *recovery {
	t.Helper()
	harness.NeedsRoot(t)
	if harness.Cgroup2() == "" {
		t.Skip("skipped: needs cgroup v2")
	}
	tr := newTrial(t, user{}, harness.ClusterConfig{})
	tr.ttl = recoverTTL
	return &recovery{trial: tr}
}

const nobody = 65534

// TestRecovered: after all processes of a daemon were killed at once, the next one leads without
// waiting for the old lease, where it can prove that the job has exited.
func TestRecovered(t *testing.T) {
	t.Parallel()
	const empty = "its cgroup is empty"
	for _, delegated := range []bool{false, true} {
		p := place{uid: nobody, delegated: delegated}
		t.Run(fmt.Sprintf("delegated=%v/cgroup empty", delegated), func(t *testing.T) {
			t.Parallel()
			r := newRecovery(t)
			r.lead(p)
			r.killAll()
			began := harness.Now()
			r.recovers(empty, began, r.startIn(r.makeCgroup(), ""))
		})
		t.Run(fmt.Sprintf("delegated=%v/cgroup made again", delegated), func(t *testing.T) {
			t.Parallel()
			r := newRecovery(t)
			r.lead(p)
			r.killAll()
			r.must(r.cgroup.Remove(r.ctx)) // as systemd does
			again, err := harness.CgroupAt(r.cgroup.Path)
			r.must(err)
			r.cgroup = again
			began := harness.Now()
			r.recovers(empty, began, r.startIn(again, ""))
		})
	}
	t.Run("after a hook", func(t *testing.T) {
		t.Parallel()
		r := newRecovery(t)
		r.lead(place{uid: nobody})
		r.killAll()
		began := harness.Now()
		next := r.startIn(r.makeCgroup(), "",
			postStop(`[ "$LEASEHOLD_REASON" = startup ] && echo "the hook"`))
		r.recovers(empty, began, next)
		r.waitLogged(next, "the hook")
	})
	t.Run("process 1", func(t *testing.T) {
		t.Parallel()
		r := newRecovery(t)
		r.wrapped = true
		own := []string{"unshare", "--pid", "--fork", "--kill-child", "--mount-proc"}
		r.lead(place{wrap: own, behaviour: "daemonize setsid leave-cgroup wipe-env"})
		r.waitRoles(r.job, "daemon", "setsid")
		r.must(syscall.Kill(r.first.Guard(), syscall.SIGKILL)) // unshare; the kernel does the rest
		r.waitDead(r.job)
		r.must(r.cgroup.WaitEmpty(r.waitContext(waitTimeout)))
		began := harness.Now()
		r.recovers("the daemon was process 1", began,
			r.startIn(r.makeCgroup(), "", func(cfg *harness.CandidateConfig) { wrapIn(cfg, own) }))
	})
}

// postStop has a daemon run a script as its hook after the job.
func postStop(script string) change {
	return variables("LEASEHOLD_POST_STOP=sh -c '" + script + "'")
}

// edit changes the state file as somebody who knows its checksum.
func (r *recovery) edit(change func([]byte) []byte) {
	r.Helper()
	path := filepath.Join(r.dir, "leasehold.state")
	content, err := os.ReadFile(path)
	r.must(err)
	head, body, _ := bytes.Cut(content, []byte("\n"))
	body = change(body)
	words := strings.Fields(string(head))
	words[len(words)-1] = fmt.Sprintf("%x", sha256.Sum256(body))
	r.overwrite(append([]byte(strings.Join(words, " ")+"\n"), body...))
}

// overwrite writes the state file in place: it stays the same file.
func (r *recovery) overwrite(content []byte) {
	r.Helper()
	path := filepath.Join(r.dir, "leasehold.state")
	r.must(os.WriteFile(path, content, 0))
}

// TestRecovered_Waits: where it is not certain that the old job has exited, its lease has to
// expire.
func TestRecovered_Waits(t *testing.T) {
	leaves := "daemonize leave-cgroup"
	for _, c := range []struct {
		what string
		place
		before func(r *recovery) // instead of killing all at once; may be nil
		change func(cfg *harness.CandidateConfig, r *recovery)
		says   string
	}{
		{
			what: "root can leave its cgroup", says: "it runs as root",
		},
		{
			what: "root has left its cgroup", place: place{behaviour: leaves},
			before: func(r *recovery) {
				daemon := r.survivor()
				elsewhere := r.makeCgroup()
				r.left = append(r.left, elsewhere)
				r.must(os.WriteFile(filepath.Join(elsewhere.Path, "cgroup.procs"),
					fmt.Append(nil, daemon), 0))
				r.must(r.cgroup.Kill())
				r.must(r.cgroup.WaitEmpty(r.waitContext(waitTimeout)))
			},
			says: "it runs as root",
		},
		{
			what:  "a user's job has left the cgroup of the job",
			place: place{uid: nobody, delegated: true, behaviour: leaves},
			before: func(r *recovery) {
				r.killDaemon(r.survivor())
			},
			says: "a process is in its cgroup",
		},
		{
			what:   "the spawner lives",
			place:  place{uid: nobody},
			before: func(r *recovery) { r.killAllBut(harness.Spawner) },
			says:   "a process of another daemon holds the lock",
		},
		{
			what:   "the elector lives",
			place:  place{uid: nobody},
			before: func(r *recovery) { r.killAllBut(harness.Elector) },
			says:   "a process of another daemon holds the lock",
		},
		{
			what: "not process 1 of a pid namespace that lives on",
			place: place{
				wrap: []string{
					"unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
					"sh", "-c", `"$0" "$@" & sleep 600`,
				},
				behaviour: "daemonize",
			},
			before: func(r *recovery) {
				kept := []int{r.survivor(), r.first.Guard()}
				for _, pid := range harness.Descendants(r.first.Guard()) {
					name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
					if slices.Contains([]string{"sh\n", "sleep\n"}, string(name)) {
						kept = append(kept, pid)
					}
				}
				r.kill(kept...)
				r.waitExited(r.job)
			},
			says: "it runs as root",
		},
		{
			what: "a copy", place: place{uid: nobody},
			change: func(_ *harness.CandidateConfig, r *recovery) {
				copied := r.dir + "-copy"
				out, err := exec.CommandContext(r.ctx, "cp", "-a", r.dir, copied).CombinedOutput()
				if err != nil {
					r.Fatalf("%v: %s", err, out)
				}
				r.dir = copied
			},
			says: "it is a copy",
		},
		{
			what: "another identity", place: place{uid: nobody},
			change: func(cfg *harness.CandidateConfig, _ *recovery) {
				cfg.Env = append(cfg.Env, "LEASEHOLD_IDENTITY=b")
			},
			says: "it is of the identity",
		},
		{
			what: "the hook at the start of the daemon fails", place: place{uid: nobody},
			change: func(cfg *harness.CandidateConfig, _ *recovery) {
				postStop(`[ "$LEASEHOLD_REASON" != startup ]`)(cfg)
			},
			says: "the lease of the daemon before is not revoked after all",
		},
		{
			what: "garbage", place: place{uid: nobody},
			change: func(_ *harness.CandidateConfig, r *recovery) {
				r.overwrite(bytes.Repeat([]byte("garbage\x00"), 1000))
			},
			says: "not a state file",
		},
		{
			what: "truncated", place: place{uid: nobody},
			change: func(_ *harness.CandidateConfig, r *recovery) {
				r.must(os.Truncate(filepath.Join(r.dir, "leasehold.state"), 200))
			},
			says: "checksum is wrong",
		},
		{
			what: "a file that can't be written", place: place{uid: nobody},
			change: func(_ *harness.CandidateConfig, r *recovery) {
				path := filepath.Join(r.dir, "leasehold.state")
				r.must(errors.Join(os.Chown(path, 0, 0), os.Chmod(path, 0o444)))
			},
			says: "permission denied",
		},
		{
			what: "a directory that can't be written", place: place{uid: nobody},
			change: func(_ *harness.CandidateConfig, r *recovery) {
				r.dir = filepath.Join(filepath.Dir(r.dir), "none")
			},
			says: "no such file or directory",
		},
		{
			what: "another boot", place: place{uid: nobody},
			change: func(_ *harness.CandidateConfig, r *recovery) {
				r.edit(func(body []byte) []byte {
					return regexp.MustCompile(`"boot_id":"...`).ReplaceAll(body,
						[]byte(`"boot_id":"xxx`))
				})
			},
			says: "the boot id is another one",
		},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			r := newRecovery(t)
			r.lead(c.place)
			if c.before == nil {
				c.before = (*recovery).killAll
			}
			c.before(r)
			if c.change == nil {
				c.change = func(*harness.CandidateConfig, *recovery) {}
			}
			next := r.startIn(r.makeCgroup(), "", func(cfg *harness.CandidateConfig) {
				before := r.dir
				c.change(cfg, r)
				if r.dir != before {
					cfg.Env = append(cfg.Env, "LEASEHOLD_STATE_DIR="+r.dir)
				}
			})
			r.waits(next, c.says)
		})
	}
}

// survivor is the pid of the descendant of the job that is to survive. The witness knows only how
// it counts itself, which may be in another pid namespace.
func (r *recovery) survivor() int {
	r.Helper()
	r.waitRoles(r.job, "daemon")
	lives := r.witness.Lives()
	i := slices.IndexFunc(lives, func(l harness.Life) bool { return l.Role == "daemon" })
	own := regexp.MustCompile(fmt.Sprintf(`(?m)^NSpid:.*\s%d$`, lives[i].Pid))
	for _, pid := range r.cgroup.Processes() {
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)) // it may just have ended
		if own.Match(status) {
			return pid
		}
	}
	r.Fatalf("%+v is not in %s", lives[i], r.cgroup.Path)
	return 0
}

// killAllBut stops one of the daemon's processes, and kills the others and the job.
func (r *recovery) killAllBut(p harness.Process) {
	r.Helper()
	pid, err := r.first.Pid(p)
	r.must(err)
	r.must(syscall.Kill(pid, syscall.SIGSTOP))
	r.killDaemon(pid)
}

// TestRecovered_OtherElection: the file of another election says nothing, and its lease is left
// alone.
func TestRecovered_OtherElection(t *testing.T) {
	t.Parallel()
	r := newRecovery(t)
	r.lead(place{uid: nobody})
	r.killAll()
	next := r.startIn(r.makeCgroup(), "", func(cfg *harness.CandidateConfig) {
		cfg.Env = append(cfg.Env, "LEASEHOLD_ELECTION="+r.election+"-other")
	})
	r.waitNext(r.job, waitTimeout)
	r.waitLogged(next, "it is of the election")
	leases, err := r.etcd.Leases(r.ctx)
	r.must(err)
	if !slices.Contains(leases, r.lease) {
		r.Errorf("the lease %s is gone; there are %q", r.lease, leases)
	}
	_, err = r.etcd.Etcdctl(r.ctx, "lease", "revoke", r.lease)
	r.must(err)
	r.finish()
}

// TestRecovered_NotTheJobs: no descriptor of the state file reaches the job, and a daemon that
// stops in order leaves no lease in it.
func TestRecovered_NotTheJobs(t *testing.T) {
	t.Parallel()
	r := newRecovery(t)
	r.lead(place{uid: nobody})
	for fd, target := range r.job.Descriptors {
		if strings.Contains(target, "leasehold.state") {
			t.Errorf("descriptor %s of the job is %s", fd, target)
		}
	}
	for _, entry := range r.job.Env {
		if strings.HasPrefix(entry, "LEASEHOLD_STATE_DIR=") {
			t.Errorf("the job has %s", entry)
		}
	}
	info, err := os.Stat(filepath.Join(r.dir, "leasehold.state"))
	r.must(err)
	if info.Mode() != fs.FileMode(0o600) {
		t.Errorf("mode %v", info.Mode())
	}
	r.finish()
	content, err := os.ReadFile(filepath.Join(r.dir, "leasehold.state"))
	r.must(err)
	if !strings.Contains(string(content), `"lease":"0000000000000000"`) {
		t.Errorf("a lease is left in %s", content)
	}
}
