//go:build linux

package main

import (
	"context"
	"errors"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"leasehold/e2e/harness"
)

// watchLeases checks twice a second that each lease in etcd belongs to a
// candidate, or expires.
func (s *stage) watchLeases(ctx context.Context) {
	var clients []*clientv3.Client
	for _, url := range s.etcd.Endpoints() {
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, Logger: zap.NewNop()})
		if err != nil {
			s.check.note("the leases can't be watched at %s: %v", url, err)
			continue
		}
		defer func() { _ = client.Close() }()
		clients = append(clients, client)
	}
	watch := leaseWatch{looked: harness.Now(), limit: s.ttl + 3*time.Second, since: map[int64]time.Duration{}}
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
			watch.look(s.check, ids, term, err)
		}
	}
}

// leasesAt lists the leases that one member knows after a linearizable read has
// shown that it is up to date.
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

// leaseWatch knows for how long leases have belonged to nobody.
type leaseWatch struct {
	limit  time.Duration
	since  map[int64]time.Duration // nobody's since then
	looked time.Duration
	reset  time.Duration // when etcd last gave all leases a new life
	term   uint64
}

func (w *leaseWatch) look(k *checker, ids []int64, term uint64, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := harness.Now()
	// A new leader of etcd gives each lease its whole TTL again, and without one
	// nothing expires.
	if err != nil || term != w.term {
		w.reset, w.term = now, term
	}
	if err != nil {
		k.silent = append(k.silent, span{w.looked, now})
	}
	w.looked = now
	if err != nil {
		return
	}
	k.counts.Leases++
	k.mostLeases = max(k.mostLeases, len(ids))
	known := map[int64]bool{}
	for _, id := range ids {
		known[id] = true
		if _, found := w.since[id]; !found {
			w.since[id] = now
		}
		since := max(w.since[id], w.reset, k.claimed[id])
		if now-since > w.limit {
			k.violate(nil, "lease %x has belonged to nobody for %v", id, now-since)
		}
	}
	for id := range w.since {
		if !known[id] {
			delete(w.since, id)
			delete(k.claimed, id)
		}
	}
}
