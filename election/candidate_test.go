package election

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"leasehold/e2e/harness"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testTTL is the TTL of the candidates in these tests: the shortest of which losing one etcd member takes nothing away.
const testTTL = 5 * time.Second

// testHolder stands for what a daemon does with its leadership.
type testHolder struct {
	// onLeased and lead may be set before the candidate runs. Without lead a term lasts until its context ends.
	onLeased func(id int64)
	lead     func(context.Context, Term) error

	terms chan Term // each term that begins
	ended chan ended

	mu       sync.Mutex
	leased   []int64
	extended Deadlines
	calls    int
}

// ended is the end of a term as Lead sees it.
type ended struct {
	at    time.Duration
	cause error
}

func (h *testHolder) Leased(id int64, _ time.Duration) {
	h.mu.Lock()
	h.leased = append(h.leased, id)
	h.mu.Unlock()
	if h.onLeased != nil {
		h.onLeased(id)
	}
}

func (h *testHolder) Extended(d Deadlines) {
	h.mu.Lock()
	h.extended = d
	h.calls++
	h.mu.Unlock()
}

func (h *testHolder) extensions() (int, Deadlines) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls, h.extended
}

func (h *testHolder) Lead(ctx context.Context, term Term) error {
	h.terms <- term
	var err error
	if h.lead != nil {
		err = h.lead(ctx, term)
	} else {
		<-ctx.Done()
	}
	h.ended <- ended{harness.Now(), context.Cause(ctx)}
	return err
}

// testCandidate is a candidate that runs until its test ends.
type testCandidate struct {
	*Candidate
	*testHolder
	t       *testing.T
	stop    context.CancelCauseFunc
	done    chan struct{} // closed when Run has returned
	err     error         // what it returned
	updates chan struct{}
}

func testConfig(t *testing.T, endpoints []string, identity string) Config {
	level := slog.LevelWarn
	if testing.Verbose() {
		level = slog.LevelDebug
	}
	return Config{
		Endpoints: endpoints, Election: strings.ReplaceAll(t.Name(), "/", "-"), Identity: identity,
		TTL: testTTL, LossGrace: -1, Margin: -1, Wait: -1, DialTimeout: time.Second,
		Now:        harness.Now,
		Logger:     slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level})).With("identity", identity),
		Registerer: prometheus.NewRegistry(),
	}
}

// newTestCandidate runs a candidate. The configuration may be changed before that.
func newTestCandidate(t *testing.T, endpoints []string, identity string, change func(*Config, *testHolder)) *testCandidate {
	t.Helper()
	c := &testCandidate{
		testHolder: &testHolder{terms: make(chan Term, 1000), ended: make(chan ended, 1000)},
		t:          t, done: make(chan struct{}), updates: make(chan struct{}, 1),
	}
	cfg := testConfig(t, endpoints, identity)
	cfg.Callbacks = c.testHolder
	cfg.Changed = func() { poke(c.updates) }
	if change != nil {
		change(&cfg, c.testHolder)
	}
	var err error
	if c.Candidate, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(context.Background())
	c.stop = stop
	go func() {
		defer close(c.done)
		c.err = c.Run(ctx)
	}()
	t.Cleanup(func() {
		stop(errors.New("test ends"))
		select {
		case <-c.done:
		case <-time.After(15 * time.Second):
			t.Errorf("%s: Run does not return", identity)
		}
	})
	return c
}

// waitForTerm waits until the candidate leads.
func (c *testCandidate) waitForTerm() Term {
	c.t.Helper()
	select {
	case term := <-c.terms:
		return term
	case <-c.done:
		c.t.Fatalf("Run returned %v instead of leading", c.err)
	case <-time.After(30 * time.Second):
		c.t.Fatalf("no term begins: %+v", c.Snapshot())
	}
	panic("unreachable")
}

// waitForEnd waits until Lead has returned.
func (c *testCandidate) waitForEnd() ended {
	c.t.Helper()
	select {
	case e := <-c.ended:
		return e
	case <-time.After(30 * time.Second):
		c.t.Fatalf("the term does not end: %+v", c.Snapshot())
	}
	panic("unreachable")
}

// waitFor waits for a snapshot.
func (c *testCandidate) waitFor(what string, good func(Snapshot) bool) Snapshot {
	c.t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		if s := c.Snapshot(); good(s) {
			return s
		}
		select {
		case <-c.updates:
		case <-timeout:
			c.t.Fatalf("not %s: %+v", what, c.Snapshot())
		}
	}
}

func (c *testCandidate) waitForState(state State) Snapshot {
	c.t.Helper()
	return c.waitFor(string(state), func(s Snapshot) bool { return s.State == state })
}

// waitForReturn waits until Run has returned.
func (c *testCandidate) waitForReturn() error {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(30 * time.Second):
		c.t.Fatalf("Run does not return: %+v", c.Snapshot())
	}
	return c.err
}

// newTestEtcd starts an etcd of one member.
func newTestEtcd(t *testing.T) *harness.Cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("needs etcd")
	}
	return harness.NewTestCluster(t, harness.ClusterConfig{})
}

func etcdctl(t *testing.T, cluster *harness.Cluster, args ...string) string {
	t.Helper()
	out, err := cluster.Etcdctl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// waitForLeases waits until etcd has these leases and no others.
func waitForLeases(t *testing.T, cluster *harness.Cluster, want ...int64) {
	t.Helper()
	var ids []string
	for _, id := range want {
		ids = append(ids, fmt.Sprintf("%016x", id))
	}
	slices.Sort(ids)
	until(t, func() error {
		got, err := cluster.Leases(t.Context())
		if err != nil {
			return err
		}
		for i := range got {
			got[i] = fmt.Sprintf("%016s", got[i])
		}
		slices.Sort(got)
		if !slices.Equal(got, ids) {
			return fmt.Errorf("leases in etcd: %v, want %v", got, ids)
		}
		return nil
	})
}

func until(t *testing.T, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := harness.Until(ctx, f); err != nil {
		t.Fatal(err)
	}
}

func TestCandidate_PlannedHandOver(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	first := a.waitForTerm()
	if s := a.Snapshot(); !s.Leading || s.State != Leading || s.LeaseID != first.LeaseID || s.TTL != testTTL {
		t.Errorf("snapshot while leading: %+v", s)
	}
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	s := b.waitForState(Standby)
	if s.Leader == nil || s.Leader.Identity != "a" || s.Leader.Token != first.Token || s.Leading {
		t.Errorf("snapshot of the standby: %+v", s)
	}
	cause := errors.New("planned")
	a.stop(cause)
	end := a.waitForEnd()
	if !errors.Is(end.cause, cause) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	second := b.waitForTerm()
	t.Logf("hand-over: %v after Lead returned", harness.Now()-end.at)
	if err := a.waitForReturn(); err != nil {
		t.Errorf("Run after a planned stop: %v", err)
	}
	if second.Token <= first.Token {
		t.Errorf("token %d follows %d", second.Token, first.Token)
	}
	waitForLeases(t, cluster, second.LeaseID)
	b.stop(cause)
	b.waitForReturn()
	waitForLeases(t, cluster)
	if out := etcdctl(t, cluster, "get", "--prefix", "--keys-only", ""); out != "" {
		t.Errorf("keys left in etcd: %s", out)
	}
	a.testHolder.mu.Lock()
	if want := []int64{first.LeaseID, 0}; !slices.Equal(a.leased, want) {
		t.Errorf("Leased was called with %v, want %v", a.leased, want)
	}
	a.testHolder.mu.Unlock()
}

func TestCandidate_KeyDeletedWhileLeading(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	first := a.waitForTerm()
	etcdctl(t, cluster, "del", first.Key)
	if end := a.waitForEnd(); !errors.Is(end.cause, ErrKeyDeleted) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	select {
	case <-first.Lost:
	default:
		t.Error("Term.Lost is not closed")
	}
	second := a.waitForTerm()
	if second.Token <= first.Token || second.LeaseID == first.LeaseID {
		t.Errorf("term %+v follows %+v", second, first)
	}
	waitForLeases(t, cluster, second.LeaseID)
}

func TestCandidate_KeyMadeAnewWhileLeading(t *testing.T) {
	cluster := newTestEtcd(t)
	release := make(chan struct{})
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testHolder) {
		h.lead = func(ctx context.Context, _ Term) error {
			<-ctx.Done()
			<-release
			return nil
		}
	})
	term := a.waitForTerm()
	etcdctl(t, cluster, "del", term.Key)
	etcdctl(t, cluster, "put", term.Key, "thief")
	a.waitForState(Stopping)
	close(release)
	if end := a.waitForEnd(); !errors.Is(end.cause, ErrKeyDeleted) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	// What the thief put has no lease, so it blocks the next campaign.
	s := a.waitFor("blocked", func(s Snapshot) bool { return s.Blocker != nil })
	if s.Blocker.Key != term.Key || s.State != Standby || s.Leader != nil {
		t.Errorf("snapshot: %+v, blocker %+v", s, s.Blocker)
	}
	etcdctl(t, cluster, "del", term.Key)
	a.waitForTerm()
}

func TestCandidate_LeaseRevokedWhileLeading(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	term := a.waitForTerm()
	etcdctl(t, cluster, "lease", "revoke", fmt.Sprintf("%x", term.LeaseID))
	// Usually the watch is faster than the next renewal.
	if end := a.waitForEnd(); !errors.Is(end.cause, ErrKeyDeleted) && !errors.Is(end.cause, ErrLeaseLost) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	waitForLeases(t, cluster, a.waitForTerm().LeaseID)
}

// A loss must reach Lead even when its context has already ended.
func TestCandidate_KeyDeletedWhileStopping(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testHolder) {
		h.lead = func(ctx context.Context, term Term) error {
			<-ctx.Done()
			<-term.Lost
			return nil
		}
	})
	term := a.waitForTerm()
	a.stop(errors.New("planned"))
	if s := a.waitForState(Stopping); s.Leading {
		t.Errorf("leading while stopping: %+v", s)
	}
	before, _ := a.extensions()
	until(t, func() error { // the lease is renewed until Lead has returned
		if now, _ := a.extensions(); now == before {
			return errors.New("no renewal while stopping")
		}
		return nil
	})
	etcdctl(t, cluster, "del", term.Key)
	a.waitForEnd()
	a.waitForReturn()
	waitForLeases(t, cluster)
}

func TestCandidate_KeyDeletedWhileStandby(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	first := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	old := b.waitForState(Standby).LeaseID
	etcdctl(t, cluster, "del", fmt.Sprintf("%s/%x", t.Name(), old))
	s := b.waitFor("standby again", func(s Snapshot) bool { return s.State == Standby && s.LeaseID != old })
	waitForLeases(t, cluster, first.LeaseID, s.LeaseID)
	a.stop(nil)
	if term := b.waitForTerm(); term.LeaseID != s.LeaseID {
		t.Errorf("term %+v, want lease %x", term, s.LeaseID)
	}
}

func TestCandidate_LeadReturns(t *testing.T) {
	cluster := newTestEtcd(t)
	results := make(chan error)
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testHolder) {
		h.lead = func(context.Context, Term) error { return <-results }
	})
	var last Term
	for range 20 {
		term := a.waitForTerm()
		if term.Token <= last.Token || term.LeaseID == last.LeaseID {
			t.Fatalf("term %+v follows %+v", term, last)
		}
		last = term
		results <- nil
	}
	a.waitForTerm()
	began := harness.Now()
	results <- &Backoff{For: 300 * time.Millisecond}
	until(t, func() error {
		if s := a.Snapshot(); s.State != Connecting || !strings.Contains(s.Reason, "resigned") {
			return fmt.Errorf("snapshot: %+v", s)
		}
		return nil
	})
	waitForLeases(t, cluster)
	a.waitForTerm()
	if took := harness.Now() - began; took < 300*time.Millisecond {
		t.Errorf("campaigned again after %v", took)
	}
	fault := errors.New("the job's own")
	results <- fault
	if err := a.waitForReturn(); !errors.Is(err, fault) {
		t.Errorf("Run returned %v", err)
	}
	waitForLeases(t, cluster)
}

func TestCandidate_Wait(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	term := a.waitForTerm()
	for _, wait := range []time.Duration{0, 300 * time.Millisecond} {
		b := newTestCandidate(t, cluster.Endpoints(), "b", func(cfg *Config, _ *testHolder) { cfg.Wait = wait })
		began := harness.Now()
		if err := b.waitForReturn(); !errors.Is(err, ErrNotElected) || !strings.Contains(err.Error(), "'a' is ahead") {
			t.Errorf("wait %v: Run returned %v", wait, err)
		}
		if took := harness.Now() - began; took > wait+time.Second {
			t.Errorf("wait %v took %v", wait, took)
		}
	}
	waitForLeases(t, cluster, term.LeaseID)
	a.stop(nil)
	a.waitForReturn()
	// With nobody ahead it is elected, and having been elected once it waits for ever.
	c := newTestCandidate(t, cluster.Endpoints(), "c", func(cfg *Config, _ *testHolder) { cfg.Wait = 0 })
	etcdctl(t, cluster, "del", c.waitForTerm().Key)
	c.waitForEnd()
	c.waitForTerm()
	c.stop(nil)
	if err := c.waitForReturn(); err != nil {
		t.Errorf("Run returned %v", err)
	}
}

func TestCandidate_EtcdDownAtStart(t *testing.T) {
	cluster := newTestEtcd(t)
	if err := cluster.Members[0].Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, wait := range []time.Duration{0, 300 * time.Millisecond} {
		b := newTestCandidate(t, cluster.Endpoints(), "b", func(cfg *Config, _ *testHolder) { cfg.Wait = wait })
		if err := b.waitForReturn(); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("wait %v: Run returned %v", wait, err)
		}
	}
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	s := a.waitFor("refused", func(s Snapshot) bool { return strings.Contains(s.Reason, "connection refused") })
	if s.State != Connecting || harness.Now()-s.LastHeartbeat > HeartbeatInterval {
		t.Errorf("snapshot: %+v", s)
	}
	if err := cluster.Members[0].Start(); err != nil {
		t.Fatal(err)
	}
	a.waitForTerm()
}

// etcdctl elect uses etcd's own concurrency.Election.
func TestCandidate_SharesTheElectionWithEtcdctl(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	first := a.waitForTerm()

	listen := cluster.EtcdctlCommand(cluster.Endpoints(), "elect", "--listen", t.Name())
	var heard syncBuffer
	listen.Stdout = &heard
	elect := cluster.EtcdctlCommand(cluster.Endpoints(), "elect", t.Name(), "other")
	for _, cmd := range []*exec.Cmd{listen, elect} {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			cmd.Process.Kill()
			cmd.Wait()
		}()
	}
	hears := func(what string) {
		t.Helper()
		until(t, func() error {
			if !strings.Contains(heard.String(), what) {
				return fmt.Errorf("elect --listen says %q, not %q", heard.String(), what)
			}
			return nil
		})
	}
	hears(first.Key + "\na\n")
	until(t, func() error {
		r, err := Query(t.Context(), testConfig(t, cluster.Endpoints(), ""))
		if err == nil && len(r.Queue) != 2 {
			err = fmt.Errorf("queue: %+v", r)
		}
		return err
	})
	a.stop(nil)
	a.waitForReturn()
	hears("\nother\n")

	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	s := b.waitForState(Standby)
	if s.Leader == nil || s.Leader.Identity != "other" || s.Blocker != nil {
		t.Errorf("snapshot: %+v", s)
	}
	if err := elect.Process.Signal(os.Interrupt); err != nil { // it resigns
		t.Fatal(err)
	}
	b.waitForTerm()
	hears("\nb\n")
}

type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

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
		r, err := Query(t.Context(), testConfig(t, cluster.Endpoints(), ""))
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

// A key whose lease is alive is waited for. Nobody is advised to delete it.
func TestCandidate_BlockersWithALease(t *testing.T) {
	cluster := newTestEtcd(t)
	for key, why := range map[string]string{
		"nested/%s": "nested election", "not-the-lease": "not a candidate's",
	} {
		resign := make(chan struct{})
		a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testHolder) {
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

// waitForBlocker waits until a key keeps the candidate waiting, for a reason that contains why.
func (c *testCandidate) waitForBlocker(why string) Snapshot {
	c.t.Helper()
	s := c.waitFor("blocked", func(s Snapshot) bool { return s.Blocker != nil })
	if !strings.Contains(s.Blocker.Why, why) || s.State != Standby || s.Leader != nil {
		c.t.Errorf("%s: snapshot %+v, blocker %+v", why, s, s.Blocker)
	}
	return s
}

// Whoever writes to a leader's key takes its lease from it. It must not stay and block the others.
func TestCandidate_LeadersKeyOverwritten(t *testing.T) {
	for _, row := range []struct {
		name  string
		flags func(t *testing.T, cluster *harness.Cluster) []string
		seen  bool // by the leader, before its planned stop
	}{
		{"seen", func(*testing.T, *harness.Cluster) []string { return nil }, true},
		{"not seen", func(*testing.T, *harness.Cluster) []string { return nil }, false},
		{"with another lease", func(t *testing.T, cluster *harness.Cluster) []string {
			return []string{"--lease=" + strings.Fields(etcdctl(t, cluster, "lease", "grant", "600"))[1]}
		}, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			cluster := newTestEtcd(t)
			a := newTestCandidate(t, cluster.Endpoints(), "a", func(cfg *Config, _ *testHolder) {
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
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	old := b.waitForState(Standby).LeaseID
	key := fmt.Sprintf("%s/%x", t.Name(), old)
	etcdctl(t, cluster, "put", key, "somebody")
	b.waitFor("standby again", func(s Snapshot) bool { return s.State == Standby && s.LeaseID != old })
	if out := etcdctl(t, cluster, "get", key); out != "" {
		t.Errorf("the key is still there: %s", out)
	}
	a.stop(nil)
	b.waitForTerm()
}

func etcdctlDir(cluster *harness.Cluster) string {
	return filepath.Dir(cluster.EtcdctlCommand(nil, "version").Path)
}

func TestCandidate_StrangeIdentities(t *testing.T) {
	cluster := newTestEtcd(t)
	for _, identity := range []string{"", "\x00\xff", strings.Repeat("ü", 100_000)} {
		a := newTestCandidate(t, cluster.Endpoints(), identity, nil)
		a.waitForTerm()
		b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
		s := b.waitForState(Standby)
		if s.Leader == nil || len(s.Leader.Identity) > maxIdentity+3 || !utf8.ValidString(s.Leader.Identity) {
			t.Errorf("%.20q: leader %+v", identity, s.Leader)
		}
		for _, c := range []*testCandidate{b, a} {
			c.stop(nil)
			c.waitForReturn()
		}
	}
}

func TestQuery(t *testing.T) {
	cluster := newTestEtcd(t)
	cfg := testConfig(t, cluster.Endpoints(), "")
	if r, err := Query(t.Context(), cfg); err != nil || r.Leader != nil || len(r.Queue) != 0 {
		t.Errorf("an empty election: %+v, %v", r, err)
	}
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	term := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	b.waitForState(Standby)
	dark := harness.NewTestProxy(t, cluster.Endpoints()[0])
	dark.Cut(harness.BothWays)
	cfg.Endpoints = []string{"http://127.0.0.1:1", "http://" + dark.Addr(), cluster.Endpoints()[0]}
	for range 5 { // the order is random
		r, err := Query(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if r.Leader == nil || *r.Leader != (Entry{"a", term.Key, term.Token}) || r.LeaseID != term.LeaseID || r.LeaseLeft <= 0 || r.LeaseLeft > testTTL ||
			len(r.Queue) != 2 || r.Queue[1].Identity != "b" {
			t.Errorf("query: %+v", r)
		}
	}
	cfg.Endpoints = cfg.Endpoints[:2]
	began := harness.Now()
	if _, err := Query(t.Context(), cfg); err == nil || harness.Now()-began > 3*time.Second {
		t.Errorf("no member answers: %v after %v", err, harness.Now()-began)
	}
}

func TestRevoke(t *testing.T) {
	cluster := newTestEtcd(t)
	dark := harness.NewTestProxy(t, cluster.Endpoints()[0])
	dark.Cut(harness.BothWays)
	cfg := testConfig(t, []string{"http://" + dark.Addr()}, "")
	id := strings.Fields(etcdctl(t, cluster, "lease", "grant", "600"))[1]
	lease, err := strconv.ParseInt(id, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := Revoke(ctx, cfg, lease); err == nil {
		t.Error("revoked in the dark")
	}
	waitForLeases(t, cluster, lease)
	done := make(chan error)
	go func() { done <- Revoke(t.Context(), cfg, lease) }()
	dark.Recover()
	if err := <-done; err != nil {
		t.Error(err)
	}
	waitForLeases(t, cluster)
	key := fmt.Sprintf("%s/%x", cfg.Election, lease)
	etcdctl(t, cluster, "put", key, "somebody")
	if err := Revoke(t.Context(), cfg, lease); err != nil {
		t.Errorf("a lease that is gone: %v", err)
	}
	if out := etcdctl(t, cluster, "get", key); out != "" {
		t.Errorf("the candidate's key, overwritten, is still there: %s", out)
	}
}
