//go:build linux

package scenario_test

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/control"
	"leasehold/e2e/harness"
)

// records returns what lies beside the election: the candidates by identity, and the terms, the
// oldest first.
func (tr *trial) records(etcd *clientv3.Client) (map[string]control.Candidate, []control.Term) {
	tr.Helper()
	resp, err := etcd.Get(tr.ctx, control.Prefix(tr.election), clientv3.WithPrefix(),
		clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	tr.must(err)
	candidates := map[string]control.Candidate{}
	var terms []control.Term
	for _, kv := range resp.Kvs {
		k, err := control.ParseKey(string(kv.Key))
		tr.must(err)
		switch k.Kind {
		case control.CandidateKey:
			var c control.Candidate
			tr.must(control.Decode(kv.Value, &c))
			if kv.Lease != k.Lease {
				tr.Errorf("the record %s is bound to the lease %x", kv.Key, kv.Lease)
			}
			candidates[c.Identity] = c
		case control.HistoryKey:
			var t control.Term
			tr.must(control.Decode(kv.Value, &t))
			terms = append(terms, t)
		case control.EndedHoldKey, control.JobExitedKey:
		default:
			tr.Errorf("there is the key %s", kv.Key)
		}
	}
	return candidates, terms
}

// waitRecords waits until these candidates have records, and until the terms are as wanted:
// identity, why they ended, and starts of the job.
func (tr *trial) waitRecords(
	etcd *clientv3.Client, identities string, terms ...string,
) (map[string]control.Candidate, []control.Term) {
	tr.Helper()
	var candidates map[string]control.Candidate
	var history []control.Term
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		candidates, history = tr.records(etcd)
		var names, got []string
		for name := range candidates {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, t := range history {
			got = append(got, fmt.Sprintf("%s %q %d", t.Identity, t.Why, t.Starts))
		}
		if strings.Join(names, " ") != identities || !slices.Equal(got, terms) {
			return fmt.Errorf("records of %v, terms %v; want %s, %v", names, got, identities, terms)
		}
		return nil
	}))
	return candidates, history
}

// TestRecords: candidates say who they are, and the history says who led, when, and why no longer.
func TestRecords(t *testing.T) {
	tr := ordinary(t)
	etcd := tr.etcdClient()
	a := tr.start("a", "")
	job := tr.waitJob(a)
	_, begun := tr.waitRecords(etcd, "a", `a "" 0`)
	if begun[0].Token != job.Token {
		t.Errorf("the term has the token %d, want %d", begun[0].Token, job.Token)
	}
	b := tr.start("b", "")
	tr.waitRecords(etcd, "a b", `a "" 0`)
	c := tr.start("c", "")
	candidates, _ := tr.waitRecords(etcd, "a b c", `a "" 0`)
	for name, c := range candidates {
		if !c.Ready || c.Priority != 50 || c.Leasehold == "" ||
			c.Since.IsZero() || c.URL != "" { // they listen on the loopback interface
			t.Errorf("the record of %s is %+v", name, c)
		}
	}

	// The job is started again, and stopped in order.
	tr.must(tr.witness.Tell(job, "exit 3"))
	_, err := tr.witness.WaitForJob(tr.waitContext(waitTimeout), func(l harness.Life) bool {
		return l.Token == job.Token && l.Pid != job.Pid
	})
	tr.must(err)
	tr.must(a.Signal(syscall.SIGTERM))
	tr.waitExit(a, 0)
	next := tr.waitJob(b)
	_, terms := tr.waitRecords(etcd, "b c", `a "stopped" 2`, `b "" 0`)
	if e := terms[0].LastExit; e == nil || e.At.Before(terms[0].Started) ||
		e.At.After(terms[0].Ended) {
		t.Errorf("the term is %+v, and its job exited %+v", terms[0], e)
	}

	// Another elector goes on with both records.
	before, _ := tr.records(etcd)
	tr.must(b.signalElector(syscall.SIGKILL))
	tr.must(b.WaitReplaced(tr.waitContext(waitTimeout), 1))
	tr.must(c.signalElector(syscall.SIGKILL))
	tr.must(c.WaitReplaced(tr.waitContext(waitTimeout), 1))
	_, err = tr.etcd.Etcdctl(tr.ctx, "del", tr.status(b).Leader.Key)
	tr.must(err)
	tr.waitDead(next)
	job = tr.waitJob(c)
	candidates, terms = tr.waitRecords(etcd, "b c",
		`a "stopped" 2`, `b "key deleted" 1`, `c "" 0`)
	if !candidates["c"].Since.Equal(before["c"].Since) {
		t.Errorf("the record of c was %+v and is %+v", before["c"], candidates["c"])
	}
	if terms[1].Token != next.Token {
		t.Errorf("the term %+v has the token %d", terms[1], next.Token)
	}

	// The elector can still write the end, and then nobody can.
	tr.must(syscall.Kill(c.Guard(), syscall.SIGKILL))
	c.mayExit = true
	tr.waitDead(job)
	tr.waitJob(b)
	tr.waitRecords(etcd, "b", `a "stopped" 2`, `b "key deleted" 1`, `c "guard lost" 1`, `b "" 0`)
	d := tr.start("d", "")
	tr.waitRecords(etcd, "b d", `a "stopped" 2`, `b "key deleted" 1`, `c "guard lost" 1`, `b "" 0`)
	b.mayExit = true
	tr.must(syscall.Kill(b.Guard(), syscall.SIGSTOP))
	for _, find := range []func() (int, error){b.Elector, b.Spawner} {
		pid, err := find()
		tr.must(err)
		tr.must(syscall.Kill(pid, syscall.SIGKILL))
	}
	tr.must(syscall.Kill(b.Guard(), syscall.SIGKILL))
	tr.waitJob(d)
	tr.waitRecords(etcd, "d", `a "stopped" 2`, `b "key deleted" 1`, `c "guard lost" 1`,
		`b "lost" 0`, `d "" 0`)
	tr.stop()
	tr.waitRecords(etcd, "", `a "stopped" 2`, `b "key deleted" 1`, `c "guard lost" 1`,
		`b "lost" 0`, `d "stopped" 1`)
	tr.nothingLeft()
}
