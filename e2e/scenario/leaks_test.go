//go:build linux

package scenario_test

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// leaks is a trial in which nothing that is left can go by itself: a lease
// outlives every wait here.
func leaks(t *testing.T, u user) *trial {
	t.Helper()
	t.Parallel()
	tr := newTrial(t, u, harness.ClusterConfig{})
	tr.ttl = 5 * time.Minute
	return tr
}

// leasesAre waits until etcd holds these leases, each with one key of the election, and nothing
// else but the history and the candidates' records, which are bound to the leases.
func (tr *trial) leasesAre(want ...string) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(revokeTimeout), func() error {
		leases, err := tr.etcd.Leases(tr.ctx)
		if err != nil {
			return err
		}
		keys, err := tr.etcd.Etcdctl(tr.ctx, "get", "--prefix", "--keys-only", "")
		if err != nil {
			return err
		}
		slices.Sort(want)
		slices.Sort(leases)
		var wantKeys []string
		for _, l := range want {
			wantKeys = append(wantKeys, tr.election+"/"+strings.TrimLeft(l, "0"))
		}
		found := slices.DeleteFunc(strings.Fields(keys), func(key string) bool {
			kind := path.Base(path.Dir(key))
			return strings.HasPrefix(key, "leasehold/v1/") &&
				(kind == "history" || kind == "candidates")
		})
		slices.Sort(found)
		slices.Sort(wantKeys)
		if !slices.Equal(leases, want) || !slices.Equal(found, wantKeys) {
			return fmt.Errorf("etcd holds leases %q and keys %q, want leases %q",
				leases, found, want)
		}
		return nil
	}))
}

// lease is the candidate's, as etcdctl prints it.
func (tr *trial) lease(c *candidate) string {
	tr.Helper()
	s := tr.status(c)
	if s.Lease == nil {
		tr.Fatalf("%s has no lease", c.Identity)
	}
	return fmt.Sprintf("%016s", s.Lease.ID)
}

// processesOf lists the processes in whose environment the election is named,
// zombies apart: those of its daemons and of their jobs.
func processesOf(election string) []string {
	found, _ := filepath.Glob("/proc/[0-9]*/environ")
	var processes []string
	for _, path := range found {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended, or is another user's
		}
		if slices.Contains(strings.Split(string(data), "\x00"), "LEASEHOLD_ELECTION="+election) {
			cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
			words := strings.ReplaceAll(string(cmdline), "\x00", " ")
			processes = append(processes, filepath.Base(filepath.Dir(path))+" "+words)
		}
	}
	return processes
}

// noProcesses waits until nothing of the election's daemons and jobs runs.
func (tr *trial) noProcesses() {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if left := processesOf(tr.election); len(left) > 0 {
			return fmt.Errorf("processes are left: %q", left)
		}
		return nil
	}))
}

// TestNothingLeft has the ends of a daemon with a job.
func TestLeaks_OfAnElectorAlone(t *testing.T) {
	tr := leaks(t, users()[1])
	grace := variables("LEASEHOLD_STOP_GRACE=100ms")
	a := tr.start("a", "", subcommand("elect"), grace)
	tr.waitStatus(a, "/leader", 200)
	b := tr.start("b", "", subcommand("elect"), grace)
	tr.waitStatus(b, "/standby", 200)
	first := tr.lease(a)
	tr.leasesAre(first, tr.lease(b))
	tr.must(b.Signal(syscall.SIGTERM))
	tr.waitExit(b, 0)
	tr.leasesAre(first)
	tr.must(a.Signal(syscall.SIGINT))
	tr.waitExit(a, 0)
	tr.leasesAre()
	tr.noProcesses()
}

// TestLeaks_OfTermsAndJobs: what a candidate loses or gives up on its way.
func TestLeaks_OfTermsAndJobs(t *testing.T) {
	tr := leaks(t, users()[1])

	// Its job ends, and the daemon with it.
	for word, code := range map[string]int{"exit=0": 0, "exit=7": 7} {
		c := tr.start("ends-"+word, word, variables("LEASEHOLD_RESTART=never"))
		tr.waitExit(c, code)
		tr.leasesAre()
	}
	// It resigns after a failure: the new lease replaces the old one.
	c := tr.start("resigns", "exit=1", variables("LEASEHOLD_RESTART_LIMIT=1"))
	tr.must(tr.witness.Wait(tr.waitContext(waitTimeout), func(lives []harness.Life) bool {
		terms := map[int64]bool{}
		for _, l := range lives {
			if l.Candidate == "resigns" {
				terms[l.Token] = true
			}
		}
		return len(terms) == 3
	}))
	tr.must(c.Signal(syscall.SIGTERM))
	tr.waitExit(c, 0)
	tr.leasesAre()

	// Its key is deleted, while it leads and while it waits.
	leader, standby, job := tr.pair("")
	for _, other := range []*candidate{standby, leader} {
		old := tr.lease(other)
		_, err := tr.etcd.Etcdctl(tr.ctx, "del", tr.election+"/"+strings.TrimLeft(old, "0"))
		tr.must(err)
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if s := tr.status(other); s.State != "standby" || s.Lease == nil ||
				fmt.Sprintf("%016s", s.Lease.ID) == old {
				return fmt.Errorf("%s is %s with lease %+v", other.Identity, s.State, s.Lease)
			}
			return nil
		}))
		tr.leasesAre(tr.lease(leader), tr.lease(standby))
	}
	tr.waitNext(job, waitTimeout)

	// It does not wait.
	for _, wait := range []string{"0s", "3s"} {
		third := tr.start("waits-"+wait, "", variables("LEASEHOLD_WAIT="+wait))
		tr.waitExit(third, 75)
		tr.leasesAre(tr.lease(leader), tr.lease(standby))
	}
	tr.finish()
	tr.leasesAre()
	tr.noProcesses()
}

// TestRefused_StartsNothing: whoever is told that it can't be done has done
// nothing: no write to etcd, no lease, no process, no job.
func TestRefused_StartsNothing(t *testing.T) {
	tr := leaks(t, users()[1])
	dir := t.TempDir()
	notExecutable, ran := filepath.Join(dir, "not-executable"), filepath.Join(dir, "ran")
	tr.must(os.WriteFile(notExecutable, []byte("#!/bin/sh\n"), 0o600))
	taken, err := harness.StartProxy("127.0.0.1:0", "127.0.0.1:1")
	tr.must(err)
	t.Cleanup(taken.Close)
	touch := []string{"--", "/bin/sh", "-c", "touch " + ran}
	revision := func() string {
		out, err := tr.etcd.Etcdctl(tr.ctx, "get", "x", "--write-out=fields")
		tr.must(err)
		for line := range strings.Lines(out) {
			if strings.HasPrefix(line, `"Revision"`) {
				return line
			}
		}
		t.Fatalf("no revision in %s", out)
		return ""
	}
	before := revision()
	for _, row := range []struct {
		name string
		env  []string
		args []string
		code int
	}{
		{
			"wrong configuration",
			[]string{"LEASEHOLD_TTL=1s", "LEASEHOLD_RESTART=sometimes"},
			touch, 78,
		},
		{
			"wrong configuration, elect",
			[]string{"LEASEHOLD_TTL=1s", "LEASEHOLD_STOP_SIGNAL=HUP"},
			[]string{"elect"},
			78,
		},
		{"wrong usage", nil, []string{"--ttl", "5s"}, 64},
		{"job without --", nil, touch[1:], 64},
		{"command not found", nil, []string{"--", dir + "/nothing"}, 127},
		{"command not executable", nil, []string{"--", notExecutable}, 126},
		{"a directory", nil, []string{"--", dir}, 126},
		{"address taken", []string{"LEASEHOLD_LISTEN=" + taken.Addr()}, touch, 71},
		{"address of another host", []string{"LEASEHOLD_LISTEN=192.0.2.1:4040"}, touch, 71},
		{
			"address taken, elect",
			[]string{"LEASEHOLD_LISTEN=" + taken.Addr()},
			[]string{"elect"},
			71,
		},
	} {
		env := append([]string{
			"PATH=" + os.Getenv("PATH"), "LEASEHOLD_ELECTION=" + tr.election,
			"LEASEHOLD_LISTEN=off", "LEASEHOLD_ENDPOINTS=" + strings.Join(tr.etcd.Endpoints(), ","),
		}, row.env...)
		binary := tr.programs.Leasehold
		code, stdout, stderr, err := harness.RunOnce(tr.ctx, env, binary, row.args...)
		tr.must(err)
		if code != row.code {
			t.Errorf("%s: exit code %d, want %d: %s%s", row.name, code, row.code, stdout, stderr)
		}
		if stdout != "" || stderr == "" {
			t.Errorf("%s: standard output %q, standard error %q", row.name, stdout, stderr)
		}
		if row.code == 78 && strings.Count(stderr, "LEASEHOLD_") < 2 {
			t.Errorf("%s: not all faults are named in %q", row.name, stderr)
		}
		tr.noProcesses()
	}
	if after := revision(); after != before {
		t.Errorf("etcd was written to: %s, before %s", after, before)
	}
	tr.leasesAre()
	if _, err := os.Stat(ran); !os.IsNotExist(err) {
		t.Errorf("the job has run: %v", err)
	}
}
