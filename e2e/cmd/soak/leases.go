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
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var ids []int64
		var term uint64
		err := errors.New("no member was asked")
		for _, c := range clients {
			if ids, term, err = leasesAt(ctx, c); err == nil {
				break
			}
		}
		if ctx.Err() == nil {
			r.check.sawLeases(ids, term, err)
		}
	}
}

// leasesAt lists the leases that one member knows after a linearizable read has shown that it is up
// to date.
func leasesAt(ctx context.Context, client *clientv3.Client) ([]int64, uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if _, err := client.Get(ctx, election); err != nil {
		return nil, 0, err
	}
	got, err := client.Leases(ctx)
	if err != nil {
		return nil, 0, err
	}
	var ids []int64
	for _, l := range got.Leases {
		ids = append(ids, int64(l.ID))
	}
	return ids, got.RaftTerm, nil
}

// leases are those in etcd, and what candidates said of theirs.
type leases struct {
	looked   time.Duration
	silent   check.Intervals         // when no member of etcd answered a read
	reset    time.Duration           // when etcd last gave all leases a new life
	term     uint64                  // of etcd
	nobodys  map[int64]time.Duration // since when a lease was seen, by id
	claimed  map[int64]time.Duration // when /status last named it
	deadline map[int64]time.Duration // until when /status said that it was valid
	most     int
}

func newLeases(now time.Duration) leases {
	return leases{
		looked: now, nobodys: map[int64]time.Duration{},
		claimed: map[int64]time.Duration{}, deadline: map[int64]time.Duration{},
	}
}

// claim is told that /status named a lease, by its id in hex, as valid until a moment.
func (s *leases) claim(hex string, until time.Duration) {
	if id, err := strconv.ParseInt(hex, 16, 64); err == nil {
		s.claimed[id] = harness.Now()
		s.deadline[id] = max(s.deadline[id], until)
	}
}

// deadlineOf is until when the lease of a term was valid by its candidate's own account, as far as
// /status told.
func (s *leases) deadlineOf(t *check.Term) (deadline time.Duration, known bool) {
	for _, l := range t.Lives {
		for _, kv := range l.Env {
			hex, found := strings.CutPrefix(kv, "LEASEHOLD_LEASE_ID=")
			if id, err := strconv.ParseInt(hex, 16, 64); found && err == nil {
				deadline, known = s.deadline[id]
				return deadline, known
			}
		}
	}
	return 0, false
}

// sawLeases takes the leases that etcd listed, or the error that it did not.
func (k *checker) sawLeases(ids []int64, term uint64, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s, now := &k.leases, harness.Now()
	// A new leader of etcd gives each lease its whole TTL again, and without one nothing expires.
	if err != nil || term != s.term {
		s.reset, s.term = now, term
	}
	if err != nil {
		s.silent = append(s.silent, check.Interval{From: s.looked, To: now})
	}
	s.looked = now
	if err != nil {
		return
	}
	k.counts.Leases++
	s.most = max(s.most, len(ids))
	listed := map[int64]time.Duration{}
	for _, id := range ids {
		listed[id] = now
		if since, known := s.nobodys[id]; known {
			listed[id] = since
		}
		alone := now - max(listed[id], s.reset, s.claimed[id])
		if alone > k.ttl+3*time.Second {
			k.violate(nil, "lease %x has belonged to nobody for %v", id, alone)
		}
	}
	s.nobodys = listed
}
