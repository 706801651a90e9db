//go:build linux

package image_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// TestRestrictions: the tests here run leasehold under what they claim to, in the
// daemon as in its job.
func TestRestrictions(t *testing.T) {
	s := newTestbed(t)
	b := s.job("a", "")
	job := s.waitJob(b)
	for _, pid := range []int{b.pid(t), b.elector(t)} {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		s.must(err)
		for _, want := range []string{
			"CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1",
			"Uid:\t65532\t65532\t65532\t65532",
		} {
			if !strings.Contains(string(status), want) {
				t.Errorf("process %d has no %q:\n%s", pid, want, status)
			}
		}
	}
	if job.Status["CapEff"] != "0000000000000000" || job.Status["NoNewPrivs"] != "1" ||
		job.Status["NSpid"] == "1" || !strings.HasPrefix(job.Status["Uid"], "65532") {
		t.Errorf("the job: %v", job.Status)
	}
	// The first line of NSpid is how the container counts.
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.pid(t)))
	s.must(err)
	_, after, _ := strings.Cut(string(status), "NSpid:")
	if pids, _, _ := strings.Cut(after, "\n"); !strings.HasSuffix(pids, "\t1") {
		t.Errorf("leasehold is not process 1:\n%s", status)
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", b.pid(t)))
	s.must(err)
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line) // what, where, of which type, how
		root := fmt.Sprintf("/proc/%d/root", b.pid(t))
		info, err := os.Stat(root + f[1])
		s.must(err)
		readOnly := slices.Contains(strings.Split(f[3], ","), "ro")
		anybody := info.IsDir() && info.Mode()&0o002 != 0 && f[2] != "mqueue"
		if !readOnly && (anybody || f[1] == "/") {
			t.Errorf("can be written to: %s, %v", line, info.Mode())
		}
	}
	for _, want := range []string{
		"the job gets no cgroup of its own", "the job runs with no_new_privs",
	} {
		if !strings.Contains(b.Log(), want) {
			t.Errorf("the log does not say %q", want)
		}
	}
	// The probe of an image without curl.
	if out := podman(t, "exec", b.name, "/leasehold", "check", "leader"); out != "ok" {
		t.Errorf("check leader: %q", out)
	}
	b.kill(t, "TERM")
	s.waitExit(b, 0)
}

// TestWholeTree: the job's tree dies to the last process without a cgroup, while the container
// lives on: the next term's job is in the same container.
func TestWholeTree(t *testing.T) {
	s := newTestbed(t)
	s.run("as podman has it", func(s *testbed) { wholeTree(s, "") })
	// As Kubernetes has it on a node with cgroup v2 alone.
	s.run("a read-only cgroup v2", func(s *testbed) {
		if harness.Cgroup2() == "" {
			s.Skip("skipped: needs cgroup v2")
		}
		wholeTree(s, "read-only file system", "-v", harness.Cgroup2()+":/cgroup2:ro")
	})
}

func wholeTree(s *testbed, reason string, flags ...string) {
	roles := []string{"job", "setsid", "child", "grandchild", "daemon"}
	b := s.start(s.Name(), plan{
		image: imageLeasehold, flags: flags,
		args: []string{
			"--", "/testjob", "ignore-term", "setsid", "hold-pipes", "daemonize", "wipe-env",
		},
	})
	job := s.waitJob(b)
	s.waitRoles(job, roles...)
	if !strings.Contains(b.Log(), "the job gets no cgroup of its own") ||
		!strings.Contains(b.Log(), reason) {
		s.Errorf("the log does not say that there is no cgroup for the job, for %q", reason)
	}
	pid := b.pid(s)
	_, err := s.etcd.Etcdctl(s.ctx, "lease", "revoke", s.lease())
	s.must(err)
	s.waitDead(job)
	next := s.waitJob(b, job.Token)
	s.waitRoles(next, roles...)
	if now := b.pid(s); now != pid {
		s.Errorf("the container's process 1 was %d and is %d", pid, now)
	}
	// The elector, the spawner and the job.
	if n := len(harness.Descendants(pid)); n != 2+len(roles) {
		s.Errorf("%d processes in the container, want %d", n, 2+len(roles))
	}
	// A planned stop of a job that will not stop: killed after the grace.
	b.kill(s, "TERM")
	s.waitExit(b, 0)
	s.waitDead(next)
	s.overlaps()
}

// TestZombies: process 1 reaps whatever is handed to it.
func TestZombies(t *testing.T) {
	const orphans = 200
	s := newTestbed(t)
	b := s.start("a", plan{image: imageJob, args: []string{
		"sh", "-c",
		fmt.Sprintf("i=0; while [ $i -lt %d ]; do "+
			"(sh -c 'sleep 0.2; echo orphan' & ); i=$((i+1)); done; exec sleep infinity", orphans),
	}})
	s.waitOutput(b, "orphan\n", orphans)
	pid := b.pid(t)
	s.must(harness.Until(s.wait(waitTimeout), func() error {
		var left []string
		for _, p := range harness.Descendants(pid) {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
			if err == nil {
				left = append(left, string(stat[:bytes.LastIndexByte(stat, ')')+3]))
			}
		}
		if len(left) != 3 { // the elector, the spawner and the job
			return fmt.Errorf("%d processes are left: %q", len(left), left)
		}
		return nil
	}))
	b.kill(t, "TERM")
	s.waitExit(b, 0)
}

// TestSignals: process 1 passes signals to the job, and a second TERM ends the wait for it.
func TestSignals(t *testing.T) {
	s := newTestbed(t)
	s.run("passed on", func(s *testbed) {
		names := []string{"HUP", "USR1", "USR2", "WINCH", "QUIT"}
		script := "trap 'echo got TERM; exit 5' TERM; "
		for _, n := range names {
			script += fmt.Sprintf("trap 'echo got %s' %[1]s; ", n)
		}
		script += "echo ready; while :; do sleep 1000 & wait; done"
		b := s.start("a", plan{image: imageJob, args: []string{"sh", "-c", script}})
		s.waitOutput(b, "ready\n", 1)
		for _, n := range names {
			b.kill(s, n)
			s.waitOutput(b, "got "+n+"\n", 1)
		}
		b.kill(s, "TERM")
		s.waitExit(b, 0)
		s.waitOutput(b, "got TERM\n", 1)
	})
	s.run("twice", func(s *testbed) {
		b := s.start("b", plan{
			image: imageLeasehold, args: []string{"--", "/testjob", "ignore-term"},
			env: []string{"LEASEHOLD_STOP_GRACE=1h"},
		})
		job := s.waitJob(b)
		b.kill(s, "INT")
		s.must(harness.Until(s.wait(waitTimeout), func() error {
			_, body, err := b.Get(s.ctx, "/status")
			if err == nil && !strings.Contains(body, `"stopping"`) {
				err = fmt.Errorf("it does not stop: %s", body)
			}
			return err
		}))
		b.kill(s, "TERM")
		s.waitDead(job)
		s.waitExit(b, 0)
	})
}

// TestPID1_CantBeKilledFromInside: no process of the container can take the guard from the job.
func TestPID1_CantBeKilledFromInside(t *testing.T) {
	s := newTestbed(t)
	s.ttl = 5 * time.Second
	b := s.start("a", plan{
		image: imageJob,
		args:  []string{"sh", "-c", "kill -KILL 1; kill -STOP 1; echo tried; exec sleep infinity"},
	})
	s.waitOutput(b, "tried\n", 1)
	s.waitStatus(b, "/leader", http.StatusOK)
	podman(t, "exec", b.name, "sh", "-c", "kill -KILL 1; kill -STOP 1")
	s.waitRenewals(b, 3)
	s.waitStatus(b, "/leader", http.StatusOK)
	// The guard answers, and stops as planned.
	b.kill(t, "TERM")
	s.waitExit(b, 0)
}

// TestStranger: what root has put into the container falls to process 1, which may not kill it. It
// is not the job's, and keeps neither the next job nor the container's end waiting.
func TestStranger(t *testing.T) {
	s := newTestbed(t)
	b := s.start("a", plan{image: imageJob, args: []string{"sleep", "infinity"}})
	s.waitStatus(b, "/leader", http.StatusOK)
	podman(t, "exec", "-u", "0", b.name, "sh", "-c", "sleep infinity >/dev/null 2>&1 &")
	s.must(harness.Until(s.wait(waitTimeout), func() error {
		for _, pid := range harness.Children(b.pid(t)) {
			if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil &&
				strings.Contains(string(status), "\nUid:\t0\t0\t0\t0\n") {
				return nil
			}
		}
		return errors.New("process 1 has no child of root's")
	}))
	lease := s.lease()
	_, err := s.etcd.Etcdctl(s.ctx, "lease", "revoke", lease)
	s.must(err)
	s.must(harness.Until(s.wait(waitTimeout), func() error {
		if code, body, err := b.Get(s.ctx, "/leader"); err != nil || code != http.StatusOK {
			return fmt.Errorf("/leader: %d, %s, %w", code, body, err)
		}
		leases, err := s.etcd.Leases(s.ctx)
		if err == nil && (len(leases) != 1 || leases[0] == lease) {
			err = fmt.Errorf("leases %q, want a new one", leases)
		}
		return err
	}))
	b.kill(t, "TERM")
	s.waitExit(b, 0)
}

// TestElectorKilled: another elector follows, and the job runs on under its lease. At the third
// within a minute the job is killed and the lease, which has minutes to go, is revoked.
func TestElectorKilled(t *testing.T) {
	s := newTestbed(t)
	leader := s.job("a", "ignore-term daemonize setsid")
	job := s.waitJob(leader)
	s.waitRoles(job, "job", "setsid", "daemon")
	standby := s.job("b", "")
	s.waitStatus(standby, "/standby", http.StatusOK)
	s.replaceElector(leader, 1)
	s.waitStatus(leader, "/leader", http.StatusOK)
	s.replaceElector(leader, 2)
	s.waitStatus(leader, "/leader", http.StatusOK)
	for _, l := range s.witness.Lives() {
		if l.Token != job.Token || !l.Alive() {
			t.Errorf("another job, or one that has exited: %+v", l)
		}
	}
	killed := harness.Now()
	s.must(syscall.Kill(leader.elector(t), syscall.SIGKILL))
	next := s.waitJob(standby)
	s.waitExit(leader, 70)
	t.Logf("the next job started %v after the elector was killed",
		(next.Started - killed).Round(100*time.Microsecond))
	s.overlaps()
	s.lease() // one, the new leader's
	standby.kill(t, "TERM")
	s.waitExit(standby, 0)
}

// TestContainerKilled: the kernel kills all of it at once. Nobody is left to revoke, so that the
// next leader waits for the lease's end.
func TestContainerKilled(t *testing.T) {
	s := newTestbed(t)
	s.ttl = 5 * time.Second
	leader := s.job("a", "ignore-term daemonize setsid")
	job := s.waitJob(leader)
	s.waitRoles(job, "job", "setsid", "daemon")
	standby := s.job("b", "")
	s.waitStatus(standby, "/standby", http.StatusOK)
	leader.kill(t, "KILL")
	died := s.waitDead(job)
	s.waitExit(leader, 137)
	next := s.waitJob(standby)
	took := next.Started - died
	t.Logf("the next job started %v after the container was killed, TTL %v",
		took.Round(time.Millisecond), s.ttl)
	// The TTL was granted anew a fifth of it earlier at most. Etcd looks for
	// expired leases twice a second.
	if least, most := s.ttl*3/5, s.ttl+3*time.Second; took < least || took > most {
		t.Errorf("the next job started %v after the container was killed, want %v to %v",
			took, least, most)
	}
	s.overlaps()
	standby.kill(t, "TERM")
	s.waitExit(standby, 0)
}

// TestSidecar: elect, in an image that holds nothing else.
func TestSidecar(t *testing.T) {
	s := newTestbed(t)
	b := s.start("a", plan{
		image: imageLeasehold, args: []string{"elect"}, env: []string{"LEASEHOLD_STOP_GRACE=0s"},
	})
	s.waitStatus(b, "/leader", http.StatusOK)
	podman(t, "exec", b.name, "/leasehold", "check", "leader")
	b.kill(t, "TERM")
	s.waitExit(b, 0)
	if leases, err := s.etcd.Leases(s.ctx); err != nil || len(leases) > 0 {
		t.Errorf("left in etcd: %q, %v", leases, err)
	}
}

// TestCopyFrom: examples/image as it stands.
func TestCopyFrom(t *testing.T) {
	s := newTestbed(t)
	b := s.start("a", plan{image: imageJob})
	s.waitOutput(b, "running, token ", 1)
	s.waitStatus(b, "/leader", http.StatusOK)
	b.kill(t, "TERM")
	s.waitExit(b, 0)
}

// TestInstall: an init container puts leasehold into a volume, and a container of an image
// that knows nothing of it runs it there. Both have a read-only root; the second can't
// write to the volume either.
func TestInstall(t *testing.T) {
	s := newTestbed(t)
	volume := sharedDir(t)
	install := func(dest string, flags ...string) *box {
		return s.start("init", plan{
			image: imageLeasehold, args: []string{"install", dest}, flags: flags,
		})
	}
	shared := []string{"-v", volume + ":/shared"}
	s.waitExit(install("/shared", shared...), 0)
	s.waitExit(install("/shared/other-name", shared...), 0)

	var names []string
	entries, err := os.ReadDir(volume)
	s.must(err)
	for _, e := range entries {
		names = append(names, e.Name())
		info, err := e.Info()
		s.must(err)
		if info.Mode() != 0o755 {
			t.Errorf("%s has mode %v", e.Name(), info.Mode())
		}
	}
	if !slices.Equal(names, []string{"leasehold", "other-name"}) {
		t.Errorf("the volume holds %q", names)
	}

	run := plan{
		image: imageDebian, args: []string{"/testjob"},
		flags: []string{
			"-v", volume + ":/shared:ro", "--user", "1000:1000",
			"--entrypoint", `["/shared/leasehold","--"]`,
		},
	}
	b := s.start("a", run)
	job := s.waitJob(b)
	// An upgrade while it runs, as when another pod on the node shares the volume.
	s.waitExit(install("/shared", shared...), 0)
	// The guard now runs electors, and then the revocation, from the file that was replaced.
	s.loseElectors(b)
	s.waitDead(job)
	s.waitExit(b, 70)
	if leases, err := s.etcd.Leases(s.ctx); err != nil || len(leases) > 0 {
		t.Errorf("left in etcd: %q, %v", leases, err)
	}

	for _, c := range []struct {
		what, dest string
		flags      []string
		want       string
	}{
		{"a read-only root", "/", nil, "read-only file system"},
		{
			"a read-only volume", "/shared",
			[]string{"-v", volume + ":/shared:ro"},
			"read-only file system",
		},
		{"no such directory", "/nowhere/", shared, "no such file or directory"},
		{"no such parent", "/shared/no/leasehold", shared, "no such file or directory"},
		{
			"a volume of another user", "/owned",
			[]string{"--tmpfs", "/owned:mode=0755"},
			"permission denied",
		},
		{
			"a full volume", "/small",
			[]string{"--tmpfs", "/small:size=1m,mode=1777"},
			"no space left on device",
		},
		{"below a file", "/shared/leasehold/x", shared, "not a directory"},
	} {
		b := install(c.dest, c.flags...)
		s.waitExit(b, 71)
		log := b.Log()
		if !strings.HasPrefix(log, "leasehold: install "+c.dest+": ") ||
			!strings.Contains(log, c.want) || strings.Count(log, "\n") != 1 {
			t.Errorf("%s: %q, want %q", c.what, log, c.want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(volume, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left in the volume: %q, %v", left, err)
	}
}

// sharedDir is a directory to which any user can write, as Kubernetes' emptyDir is.
func sharedDir(t *testing.T) string {
	t.Helper()
	dir, err := harness.TempDir("leasehold-shared-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}
