package election

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/harness"
)

func TestCandidate_Blockers(t *testing.T) {
	cluster := newTestEtcd(t)
	lease := strings.Fields(etcdctl(t, cluster, "lease", "grant", "600"))[1]
	value := "\x01\xff" + strings.Repeat("v", 2*maxIdentity)
	for _, key := range []string{
		"by hand", "it's\x01\xff/binary", "nested/" + strings.TrimLeft(lease, "0"), "",
		strings.Repeat("k", 600),
	} {
		etcdctl(t, cluster, "put", t.Name()+"/"+key, value)
		a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
		s := a.waitForBlocker("no lease")
		r, err := query(t.Context(), testConfig(t, cluster.Endpoints(), ""))
		if err != nil || r.Leader != nil || len(r.Blockers) != 1 || r.Blockers[0] != *s.Blocker ||
			len(r.Queue) != 1 {
			t.Errorf("%q: query: %+v, %v", key, r, err)
		}
		// The remedy is a command that works as it stands, in bash.
		bash := exec.Command("bash", "-c", s.Blocker.Remedy)
		bash.Env = append(os.Environ(), "ETCDCTL_ENDPOINTS="+cluster.Endpoints()[0],
			"PATH="+etcdctlDir(cluster)+":"+os.Getenv("PATH"))
		if out, err := bash.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", s.Blocker.Remedy, err, out)
		}
		a.waitForTerm()
		a.stop(nil)
		a.waitForReturn()
	}
}

// The remedy deletes the blocker's key and no other. bash ends an argument at a NUL, and etcdctl
// takes one that begins with a dash for an option.
func TestBlocker_RemedyDeletesOneKey(t *testing.T) {
	cluster := newTestEtcd(t)
	client, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, key := range []string{
		t.Name() + "/1f\x00", t.Name() + "/1f\x00\xff\"'\\\n\x00", "-r/x", "--all", "-r/x\x00",
	} {
		whole, _, _ := strings.Cut(key, "\x00")
		for _, k := range []string{whole, key} {
			if _, err := client.Put(t.Context(), k, ""); err != nil {
				t.Fatal(err)
			}
		}
		e := queueEntry{key: key}
		bash := exec.Command("bash", "-c", e.blocker().Remedy)
		bash.Env = append(os.Environ(), "ETCDCTL_ENDPOINTS="+cluster.Endpoints()[0],
			"PATH="+etcdctlDir(cluster)+":"+os.Getenv("PATH"))
		if out, err := bash.CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", e.blocker().Remedy, err, out)
		}
		for _, k := range []string{whole, key} {
			got, err := client.Get(t.Context(), k)
			if err != nil || (len(got.Kvs) == 0) != (k == key) {
				t.Errorf("after %s: %q is %v, %v", e.blocker().Remedy, k, got, err)
			}
		}
	}
}

// A key whose lease is alive is waited for. Nobody is advised to delete it.
func TestCandidate_BlockersWithALease(t *testing.T) {
	cluster := newTestEtcd(t)
	for key, why := range map[string]string{
		"nested/%s": "nested election", "not-the-lease": "not a candidate's",
	} {
		resign := make(chan struct{})
		a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testCallbacks) {
			h.lead = func(ctx context.Context, _ Term) error {
				select {
				case <-resign:
				case <-ctx.Done():
				}
				return nil
			}
		})
		a.waitForTerm()
		// It comes after the candidate's start, which would refuse a nested election.
		lease := strings.Fields(etcdctl(t, cluster, "lease", "grant", "600"))[1]
		key = strings.ReplaceAll(key, "%s", strings.TrimLeft(lease, "0"))
		etcdctl(t, cluster, "put", t.Name()+"/"+key, "", "--lease", lease)
		resign <- struct{}{} // and campaign again, behind that
		if s := a.waitForBlocker(why); s.Blocker.Remedy != "" {
			t.Errorf("%q: remedy %q", key, s.Blocker.Remedy)
		}
		etcdctl(t, cluster, "lease", "revoke", lease)
		a.waitForTerm()
		a.stop(nil)
		a.waitForReturn()
	}
}

// Whoever writes to a leader's key takes its lease from it. It must not stay and block the others.
func TestCandidate_LeadersKeyOverwritten(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		flags func(t *testing.T, cluster *harness.Cluster) []string
		seen  bool // by the leader, before its planned stop
	}{
		{"seen", func(*testing.T, *harness.Cluster) []string { return nil }, true},
		{"not seen", func(*testing.T, *harness.Cluster) []string { return nil }, false},
		{"with another lease", func(t *testing.T, cluster *harness.Cluster) []string {
			lease := strings.Fields(etcdctl(t, cluster, "lease", "grant", "600"))[1]
			return []string{"--lease=" + lease}
		}, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			cluster := newTestEtcd(t)
			a := newTestCandidate(t, cluster.Endpoints(), "a", func(cfg *Config, _ *testCallbacks) {
				cfg.TTL = 30 * time.Second // renewed each 6 s
			})
			term := a.waitForTerm()
			b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
			b.waitForState(Standby)
			put := append([]string{"put", term.Key, "somebody"}, row.flags(t, cluster)...)
			if row.seen {
				etcdctl(t, cluster, put...)
				if end := a.waitForEnd(); !errors.Is(end.cause, ErrKeyOverwritten) {
					t.Errorf("the term's context ended with %v", end.cause)
				}
				select {
				case <-term.Lost:
					t.Error("Term.Lost is closed, although the key keeps the next leader waiting")
				default:
				}
				a.waitForState(Standby) // again
			} else {
				a.waitForExtensions(1)
				etcdctl(t, cluster, put...)
				a.stop(nil)
				a.waitForReturn()
			}
			b.waitForTerm()
			a.stop(nil)
			a.waitForReturn()
			b.stop(nil)
			b.waitForReturn()
			if out := etcdctl(t, cluster, "get", "--prefix", "--keys-only", t.Name()); out != "" {
				t.Errorf("keys left in etcd: %s", out)
			}
		})
	}
}

func TestCandidate_StandbysKeyOverwritten(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	old := b.waitForState(Standby).LeaseID
	key := fmt.Sprintf("%s/%x", t.Name(), old)
	etcdctl(t, cluster, "put", key, "somebody")
	b.waitFor(
		"standby again", func(s Snapshot) bool { return s.State == Standby && s.LeaseID != old },
	)
	if out := etcdctl(t, cluster, "get", key); out != "" {
		t.Errorf("the key is still there: %s", out)
	}
	a.stop(nil)
	b.waitForTerm()
}

func TestCandidate_StrangeIdentities(t *testing.T) {
	cluster := newTestEtcd(t)
	for _, identity := range []string{"", "\x00\xff", strings.Repeat("ü", 100_000)} {
		a := newTestCandidate(t, cluster.Endpoints(), identity, nil)
		a.waitForTerm()
		b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
		s := b.waitForState(Standby)
		if s.Leader == nil || len(s.Leader.Identity) > maxIdentity+3 ||
			!utf8.ValidString(s.Leader.Identity) {
			t.Errorf("%.20q: leader %+v", identity, s.Leader)
		}
		for _, c := range []*testCandidate{b, a} {
			c.stop(nil)
			c.waitForReturn()
		}
	}
}

// TestBlocker_LongKey: a key of any length, which anybody can write, is shown in part, and with no
// command that would delete another key.
func TestBlocker_LongKey(t *testing.T) {
	for _, lease := range []int64{0, 7} {
		e := newQueueEntry("e/", kv("e/"+strings.Repeat("ü\x00", 1<<19), 3, lease))
		if b := e.blocker(); len(b.Key) > 4*maxKey || len(b.Why) > 200 || b.Remedy != "" ||
			!strings.Contains(b.Why, "1572866 bytes") {
			t.Errorf("the blocker has %d bytes of key, %q, %q", len(b.Key), b.Why, b.Remedy)
		}
	}
}
