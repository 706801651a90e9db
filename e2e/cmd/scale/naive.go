//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"

	"leasehold/e2e/harness"
)

// naive is a client that campaigns as one usually does, with etcd's own packages.
type naive struct {
	stop  chan struct{}
	ended chan error
	leads atomic.Int64 // since when; 0: not yet
}

// startNaive starts one that takes part in an election of its kind, with a connection of its own.
func (t *trial) startNaive(ctx context.Context, number int) *naive {
	n := &naive{stop: make(chan struct{}), ended: make(chan error, 1)}
	go func() { n.ended <- n.run(ctx, t, fmt.Sprint(number)) }()
	return n
}

func (n *naive) run(ctx context.Context, t *trial, identity string) (err error) {
	client, err := clientv3.New(clientv3.Config{Endpoints: t.endpoints, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	session, err := concurrency.NewSession(client, concurrency.WithTTL(int(t.TTL)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, session.Close()) }()
	election := concurrency.NewElection(session, "scale/naive")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		<-n.stop
		if n.leads.Load() == 0 {
			cancel()
		}
	}()
	switch err := election.Campaign(ctx, identity); {
	case errors.Is(err, context.Canceled): // it is stopped, and Campaign has removed its key
		return nil
	case err != nil:
		return err
	}
	n.leads.Store(int64(harness.Now()))
	<-n.stop
	return election.Resign(context.WithoutCancel(ctx))
}

// naive does with naive clients what change does, at the same pace: it shows how much of a
// hand-over's time is etcd's and this machine's.
func (t *trial) naive(ctx context.Context) (err error) {
	var queue []*naive
	defer func() {
		for _, n := range queue {
			close(n.stop)
		}
		for _, n := range queue {
			err = errors.Join(err, <-n.ended)
		}
	}()
	join := func(count int) error {
		for range count {
			queue = append(queue, t.startNaive(ctx, len(queue)))
		}
		return until(ctx, func() error {
			m, err := t.metrics(ctx)
			keys, want := m["etcd_debugging_mvcc_keys_total"], float64(len(queue))
			if err == nil && keys < want {
				_ = harness.Wait(ctx, 20*time.Millisecond)
				err = fmt.Errorf("%v of %v naive clients are in the queue", keys, want)
			}
			return err
		})
	}
	// In their order: so the first one in the slice leads.
	for range t.Shape.Size {
		if err := join(1); err != nil {
			return err
		}
	}
	if err := harness.Wait(ctx, t.Shape.TTL); err != nil {
		return err
	}
	for range changes {
		old, next := queue[0], queue[1]
		queue = queue[1:]
		began := harness.Now()
		close(old.stop)
		err := errors.Join(<-old.ended, until(ctx, func() error {
			if next.leads.Load() == 0 {
				return errors.New("the next naive client does not lead")
			}
			return nil
		}))
		if err != nil {
			return err
		}
		t.Naive = append(t.Naive, harness.Milliseconds(time.Duration(next.leads.Load())-began))
		half := t.Shape.TTL / changes / 2
		if err := harness.Wait(ctx, began+half-harness.Now()); err != nil {
			return err
		}
		if err := join(1); err != nil {
			return err
		}
		if err := harness.Wait(ctx, began+2*half-harness.Now()); err != nil {
			return err
		}
	}
	return nil
}
