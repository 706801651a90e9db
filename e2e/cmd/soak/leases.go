//go:build linux

package main

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// watchLeases checks twice a second that each lease in etcd belongs to a candidate, or expires.
func (r *run) watchLeases(ctx context.Context) {
	var clients []*clientv3.Client
	for _, url := range r.Etcd.Endpoints() {
		client, err := r.Etcd.NewClient(url)
		if err != nil {
			r.check.note("the leases can't be watched at %s: %v", url, err)
			continue
		}
		defer func() { _ = client.Close() }()
		clients = append(clients, client)
	}
	for harness.Wait(ctx, 500*time.Millisecond) == nil {
		var got *clientv3.LeaseLeasesResponse
		err := errors.New("no member was asked")
		for _, c := range clients {
			if got, err = r.leasesAt(ctx, c); err == nil {
				break
			}
		}
		if ctx.Err() == nil {
			r.check.sawLeases(got, err)
		}
	}
}

// leasesAt lists the leases that one member knows after a linearizable read has shown that it is up
// to date.
func (r *run) leasesAt(
	ctx context.Context, client *clientv3.Client,
) (*clientv3.LeaseLeasesResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	began := harness.Now()
	got, err := client.Get(ctx, election)
	if err != nil {
		return nil, err
	}
	r.check.sawRevision(began, got.Header.Revision)
	return client.Leases(ctx)
}

// sawRevision is told the revision that a linearizable read has shown, and when that began.
func (k *checker) sawRevision(began time.Duration, revision int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.shown.reads(began, revision)
}

// leases are those in etcd, and what candidates said of theirs, by their ids in hex.
type leases struct {
	looked time.Duration
	silent check.Intervals          // when no member of etcd answered a read
	reset  time.Duration            // when etcd last gave all leases a new life
	resets []time.Duration          // when it did so
	term   uint64                   // of etcd
	seen   map[string]time.Duration // since when a lease is listed
	claims map[string]claim
	most   int
}

// claim is what /status last said of a lease, and each end of it that it has said.
type claim struct {
	at, until time.Duration
	ends      []time.Duration
}

// claim is told that /status named a lease as valid until a moment.
func (s *leases) claim(id string, until time.Duration) {
	c := s.claims[id]
	if c.at = harness.Now(); until > c.until+around {
		c.ends = append(c.ends, until)
	}
	c.until = max(c.until, until)
	s.claims[id] = c
}

// renewedBefore is when a lease was last renewed before a moment, as far as /status told.
func (s *leases) renewedBefore(id string, at, ttl time.Duration) (last time.Duration, known bool) {
	for _, end := range s.claims[id].ends {
		if end-ttl <= at {
			last, known = end-ttl, true
		}
	}
	return last, known
}

// deadlineOf is until when the lease of a term was valid by its candidate's own account, as far as
// /status told.
func (s *leases) deadlineOf(t *check.Term) (deadline time.Duration, known bool) {
	for _, l := range t.Lives {
		for _, kv := range l.Env {
			if id, found := strings.CutPrefix(kv, "LEASEHOLD_LEASE_ID="); found {
				c, known := s.claims[id]
				return c.until, known
			}
		}
	}
	return 0, false
}

// sawLeases takes the leases that etcd listed, or the error that it did not.
func (k *checker) sawLeases(got *clientv3.LeaseLeasesResponse, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s, now := &k.leases, harness.Now()
	before := s.looked
	s.looked = now
	if err != nil { // without a leader of etcd nothing expires
		s.silent = append(s.silent, check.Interval{From: before, To: now})
		s.reset, s.term = now, 0
		return
	}
	// A new leader of etcd gives each lease its whole TTL again.
	if got.RaftTerm != s.term {
		s.reset, s.term = now, got.RaftTerm
		s.resets = append(s.resets, now)
	}
	k.counts.Leases++
	s.most = max(s.most, len(got.Leases))
	seen := map[string]time.Duration{}
	for _, l := range got.Leases {
		id := strconv.FormatInt(int64(l.ID), 16)
		since, known := s.seen[id]
		if !known {
			since = now
		}
		seen[id] = since
		alone := now - max(since, s.reset, s.claims[id].at)
		if alone > k.ttl+3*time.Second {
			k.violate(nil, "lease %s has belonged to nobody for %v", id, alone)
		}
	}
	s.seen = seen
}
