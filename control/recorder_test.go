package control_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/control"
	"leasehold/e2e/harness"
	"leasehold/election"
)

const testElection = "jobs/records"

// newTestEtcd starts etcd and returns a client of ours, and one of etcd's own.
func newTestEtcd(t *testing.T) (*election.Client, *clientv3.Client) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs etcd")
	}
	cluster := harness.NewTestCluster(t, harness.ClusterConfig{})
	ours, err := election.Connect(election.Config{
		Endpoints: cluster.Endpoints(), DialTimeout: time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ours.Close)
	theirs, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = theirs.Close() })
	return ours, theirs
}

// newTestRecorder runs a recorder until stop is called.
func newTestRecorder(
	t *testing.T, etcd control.Etcd, identity string,
) (r *control.Recorder, stop func()) {
	t.Helper()
	r = control.NewRecorder(control.RecorderConfig{
		Election: testElection, Candidate: control.Candidate{Identity: identity, Ready: true},
		Logger:  slog.New(slog.NewTextHandler(t.Output(), nil)),
		Changed: func() {},
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.Run(ctx, etcd)
	}()
	stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(stop)
	return r, stop
}

// waitForTerms waits until the history is as wanted: token, identity, why and starts of each term.
func waitForTerms(t *testing.T, etcd *clientv3.Client, want ...string) []control.Term {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var terms []control.Term
	if err := harness.Until(ctx, func() error {
		resp, err := etcd.Get(ctx, control.History(testElection), clientv3.WithPrefix())
		if err != nil {
			return err
		}
		terms = nil
		var got []string
		for _, kv := range resp.Kvs {
			var term control.Term
			if err := control.Decode(kv.Value, &term); err != nil {
				return err
			}
			if string(kv.Key) != control.TermOf(testElection, term.Token) ||
				term.Ended.IsZero() != (term.Why == "") {
				return fmt.Errorf("%s: %s", kv.Key, kv.Value)
			}
			terms = append(terms, term)
			got = append(got, fmt.Sprintf("%d %s %q %d",
				term.Token, term.Identity, term.Why, term.Starts))
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("the history is\n%s\nwant\n%s",
				strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return terms
}

// TestRecorder_History: a leader writes the beginning and the end of its term. What a leader could
// not write, the next one does.
func TestRecorder_History(t *testing.T) {
	ours, theirs := newTestEtcd(t)
	a, stopA := newTestRecorder(t, ours, "a")
	a.Joined(1, false)
	a.Began(11, false)
	a.Renewed()
	begun := waitForTerms(t, theirs, `11 a "" 0`)
	a.Ended("stopped", 2, &control.Exit{Code: 3, At: time.Now()})
	a.Left()
	stopA() // as an exit does
	ended := waitForTerms(t, theirs, `11 a "stopped" 2`)[0]
	if !ended.Started.Equal(begun[0].Started) || ended.Ended.Before(ended.Started) ||
		ended.LastExit == nil || ended.LastExit.Code != 3 {
		t.Errorf("the term is %+v", ended)
	}

	b, stopB := newTestRecorder(t, ours, "b")
	b.Began(12, false)
	b.Renewed()
	begun = waitForTerms(t, theirs, `11 a "stopped" 2`, `12 b "" 0`)
	stopB() // it crashes
	adopter, stopAdopter := newTestRecorder(t, ours, "b")
	adopter.Began(12, true)
	adopter.Renewed()
	adopter.Ended("resigned", 1, nil)
	adopter.Left()
	again := waitForTerms(t, theirs, `11 a "stopped" 2`, `12 b "resigned" 1`)
	if !again[1].Started.Equal(begun[1].Started) {
		t.Errorf("the adopted term began at %v, and before that at %v",
			again[1].Started, begun[1].Started)
	}
	adopter.Began(13, false)
	adopter.Renewed()
	waitForTerms(t, theirs, `11 a "stopped" 2`, `12 b "resigned" 1`, `13 b "" 0`)
	stopAdopter() // it crashes

	c, _ := newTestRecorder(t, ours, "c")
	c.Began(14, false)
	c.Renewed()
	waitForTerms(t, theirs,
		`11 a "stopped" 2`, `12 b "resigned" 1`, `13 b "lost" 0`, `14 c "" 0`)
}

// TestRecorder_LateEnd: a leader that could not write the end of its term in time still does, even
// if the next one has called it lost.
func TestRecorder_LateEnd(t *testing.T) {
	ours, theirs := newTestEtcd(t)
	a, _ := newTestRecorder(t, ours, "a")
	a.Began(11, false)
	a.Renewed()
	waitForTerms(t, theirs, `11 a "" 0`)
	a.Ended("contact lost", 1, nil)
	b, _ := newTestRecorder(t, ours, "b")
	b.Began(12, false)
	b.Renewed()
	waitForTerms(t, theirs, `11 a "lost" 0`, `12 b "" 0`)
	a.Joined(2, false)
	waitForTerms(t, theirs, `11 a "contact lost" 1`, `12 b "" 0`)
}

// repeated is an etcd of which a member carries out each request once more, when the test asks for
// it: as one that hung.
type repeated struct {
	control.Etcd
	mu   sync.Mutex
	sent []*pb.TxnRequest
}

func (r *repeated) Txn(ctx context.Context, in *pb.TxnRequest) (*pb.TxnResponse, error) {
	r.mu.Lock()
	r.sent = append(r.sent, in)
	r.mu.Unlock()
	return r.Etcd.Txn(ctx, in)
}

// TestRecorder_RequestTwice: a request that is carried out again changes nothing.
func TestRecorder_RequestTwice(t *testing.T) {
	ours, theirs := newTestEtcd(t)
	etcd := &repeated{Etcd: ours}
	crashed, stop := newTestRecorder(t, ours, "a")
	crashed.Began(10, false)
	crashed.Renewed()
	waitForTerms(t, theirs, `10 a "" 0`)
	stop()
	a, _ := newTestRecorder(t, etcd, "a")
	a.Began(11, false)
	a.Renewed()
	waitForTerms(t, theirs, `10 a "lost" 0`, `11 a "" 0`)
	a.Ended("stopped", 1, nil)
	a.Left()
	want := []string{`10 a "lost" 0`, `11 a "stopped" 1`}
	waitForTerms(t, theirs, want...)
	etcd.mu.Lock()
	defer etcd.mu.Unlock()
	writes := 0
	for _, in := range etcd.sent {
		resp, err := ours.Txn(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		if len(in.Compare) > 0 {
			writes++
			if resp.Succeeded {
				t.Errorf("%v was carried out twice", in)
			}
		}
	}
	if writes == 0 {
		t.Error("no request was conditional")
	}
	waitForTerms(t, theirs, want...)
}

// TestTerms_LatestFirst: whichever was written first.
func TestTerms_LatestFirst(t *testing.T) {
	ours, theirs := newTestEtcd(t)
	for _, token := range []int64{9, 12, 11, 100} {
		value := string(control.Encode(&control.Term{Token: token}))
		_, err := theirs.Put(t.Context(), control.TermOf(testElection, token), value)
		if err != nil {
			t.Fatal(err)
		}
	}
	terms, err := control.Terms(t.Context(), ours, testElection, 3)
	if err != nil || len(terms) != 3 || terms[0].Token != 100 || terms[1].Token != 12 ||
		terms[2].Token != 11 {
		t.Errorf("%+v, %v; want those of the tokens 100, 12 and 11", terms, err)
	}
}

// TestRecorder_KeepsTerms: the last terms stay, and so do keys that are none of ours.
func TestRecorder_KeepsTerms(t *testing.T) {
	ours, theirs := newTestEtcd(t)
	foreign := control.History(testElection) + "007"
	put := func(key string, value []byte) {
		if _, err := theirs.Put(t.Context(), key, string(value)); err != nil {
			t.Fatal(err)
		}
	}
	put(foreign, []byte("x"))
	put(control.TermOf(testElection, 1), []byte("\xff"))
	put(control.TermOf(testElection, 999),
		[]byte(`{"version":1,"started":"2026-01-01T00:00:00+24:00"}`))
	for token := int64(2); token < control.KeepTerms+5; token++ {
		put(control.TermOf(testElection, token), control.Encode(&control.Term{Token: token}))
	}
	r, _ := newTestRecorder(t, ours, "a")
	r.Began(1000, false)
	r.Renewed()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := harness.Until(ctx, func() error {
		resp, err := theirs.Get(ctx, control.History(testElection), clientv3.WithPrefix())
		if err != nil {
			return err
		}
		kept := map[string]bool{}
		for _, kv := range resp.Kvs {
			kept[string(kv.Key)] = true
		}
		if len(kept) != control.KeepTerms+1 || !kept[foreign] ||
			!kept[control.TermOf(testElection, 1000)] || kept[control.TermOf(testElection, 5)] ||
			!kept[control.TermOf(testElection, 6)] {
			return fmt.Errorf("%d terms: %v", len(kept), kept)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// silentEtcd never answers.
type silentEtcd struct{ asked atomic.Int32 }

func (e *silentEtcd) Txn(ctx context.Context, _ *pb.TxnRequest) (*pb.TxnResponse, error) {
	e.asked.Add(1)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (e *silentEtcd) Explain(err error, _, _ string) error { return err }

// TestRecorder_Silent: while etcd does not answer, whoever tells the recorder of a term never waits
// for it, and the daemon's exit waits for a second.
func TestRecorder_Silent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := control.NewRecorder(control.RecorderConfig{
			Election: testElection, Candidate: control.Candidate{Identity: "a"},
			Logger:  slog.New(slog.DiscardHandler),
			Changed: func() {},
		})
		etcd := &silentEtcd{}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			r.Run(ctx, etcd)
		}()
		for token := range int64(50) {
			began := time.Now()
			r.Joined(token+1, false)
			r.Began(token+1, false)
			r.Renewed()
			r.Ended("stopped", 1, nil)
			r.Left()
			if took := time.Since(began); took != 0 {
				t.Errorf("term %d has waited for %v", token+1, took)
			}
			time.Sleep(time.Second)
		}
		if etcd.asked.Load() == 0 {
			t.Error("it has asked for nothing")
		}
		began := time.Now()
		cancel()
		<-ended
		if took := time.Since(began); took > time.Second {
			t.Errorf("it ended after %v", took)
		}
	})
}

// oneKey is an etcd that keeps what is put last, and answers each read with that.
type oneKey struct {
	silentEtcd
	last atomic.Pointer[mvccpb.KeyValue]
}

func (e *oneKey) Txn(_ context.Context, in *pb.TxnRequest) (*pb.TxnResponse, error) {
	resp := &pb.TxnResponse{Succeeded: true}
	for _, op := range in.Success {
		if put := op.GetRequestPut(); put != nil {
			e.last.Store(&mvccpb.KeyValue{Key: put.Key, Value: put.Value, Lease: put.Lease})
		}
		got := &pb.RangeResponse{}
		if kv := e.last.Load(); kv != nil {
			got.Kvs = append(got.Kvs, kv)
		}
		resp.Responses = append(resp.Responses, &pb.ResponseOp{
			Response: &pb.ResponseOp_ResponseRange{ResponseRange: got},
		})
	}
	return resp, nil
}

// TestRecorder_Ready: a candidate whose fitness changes says so, also before its first record is
// written, and keeps since when it is there.
func TestRecorder_Ready(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		etcd := &oneKey{}
		r, stop := newTestRecorder(t, etcd, "a")
		record := func() (c control.Candidate) {
			t.Helper()
			time.Sleep(10 * time.Second)
			if kv := etcd.last.Load(); kv != nil {
				if err := control.Decode(kv.Value, &c); err != nil {
					t.Error(err)
				}
			}
			return c
		}
		r.SetReady(false)
		if c := record(); c.Identity != "" {
			t.Errorf("a record without a lease: %+v", c)
		}
		r.SetReady(true)
		r.Joined(7, false)
		r.SetReady(false)
		began := record()
		if began.Ready || began.Since.IsZero() {
			t.Errorf("%+v", began)
		}
		r.SetReady(true)
		if c := record(); !c.Ready || !c.Since.Equal(began.Since) {
			t.Errorf("%+v, first %+v", c, began)
		}
		r.Left()
		r.SetReady(false)
		if c := record(); !c.Ready {
			t.Errorf("written without a lease: %+v", c)
		}
		stop()
	})
}

// TestRecorder_Candidate: the record of a candidate is bound to its lease. The process that adopts
// the lease says the same, and since when.
func TestRecorder_Candidate(t *testing.T) {
	ours, theirs := newTestEtcd(t)
	ctx := t.Context()
	grant := &pb.LeaseGrantRequest{ID: 31, TTL: 60}
	leases := pb.NewLeaseClient(theirs.ActiveConnection())
	if _, err := leases.LeaseGrant(ctx, grant); err != nil {
		t.Fatal(err)
	}
	a, stop := newTestRecorder(t, ours, "a")
	a.Joined(31, false)
	first := waitForCandidate(t, theirs, 31, 1)
	stop()
	b, _ := newTestRecorder(t, ours, "b")
	b.Joined(31, true)
	if second := waitForCandidate(t, theirs, 31, 2); second.Identity != "b" ||
		!second.Since.Equal(first.Since) {
		t.Errorf("%+v became %+v", first, second)
	}
	b.Joined(32, false) // whose lease is gone by now: that is nobody's problem
	b.Began(7, false)
	b.Renewed()
	waitForTerms(t, theirs, `7 b "" 0`)
	if p := b.Problem(); p != "" {
		t.Error(p)
	}
}

// waitForCandidate waits for this version of a candidate's record.
func waitForCandidate(
	t *testing.T, etcd *clientv3.Client, lease, version int64,
) (c control.Candidate) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := harness.Until(ctx, func() error {
		resp, err := etcd.Get(ctx, control.CandidateOf(testElection, lease))
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 || resp.Kvs[0].Version != version || resp.Kvs[0].Lease != lease {
			return fmt.Errorf("the record is %v", resp.Kvs)
		}
		return control.Decode(resp.Kvs[0].Value, &c)
	}); err != nil {
		t.Fatal(err)
	}
	return c
}
