// Fencing is a job for leasehold that counts in etcd, as fast as it can. etcd refuses its
// writes once its term is over:
//
//	leasehold -- fencing COUNTER
//
// It reads the endpoints of etcd from ETCDCTL_ENDPOINTS, as etcdctl does. See docs/fencing.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// errFenced: the term in which this process was started is over.
// Whatever it still does is too late.
var errFenced = errors.New("refused: the term is over")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "fencing:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("usage: leasehold -- fencing COUNTER")
	}
	token, err := strconv.ParseInt(os.Getenv("LEASEHOLD_FENCING_TOKEN"), 10, 64)
	if err != nil {
		return fmt.Errorf("read LEASEHOLD_FENCING_TOKEN: %w", err)
	}
	endpoints := strings.Split(os.Getenv("ETCDCTL_ENDPOINTS"), ",")
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints})
	if err != nil {
		return fmt.Errorf("connect to etcd: %w", err)
	}
	defer func() { _ = client.Close() }()
	s := fencedStore{kv: client, key: os.Getenv("LEASEHOLD_KEY"), token: token}
	for {
		if err := s.count(ctx, args[0]); err != nil {
			return err
		}
	}
}

// fencedStore writes to etcd while the term lasts in which this process was started.
type fencedStore struct {
	kv    clientv3.KV
	key   string // LEASEHOLD_KEY
	token int64  // LEASEHOLD_FENCING_TOKEN
}

// put writes if the leader's key is still the one that our token belongs to. etcd checks and writes
// in one step.
func (s fencedStore) put(ctx context.Context, key, value string) error {
	resp, err := s.kv.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(s.key), "=", s.token)).
		Then(clientv3.OpPut(key, value)).
		Commit()
	if err != nil {
		return fmt.Errorf("write %s: %w", key, err)
	}
	if !resp.Succeeded {
		return errFenced
	}
	return nil
}

// count adds one to the counter, whose value also tells who did: "COUNT TOKEN".
func (s fencedStore) count(ctx context.Context, counter string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	resp, err := s.kv.Get(ctx, counter)
	if err != nil {
		return fmt.Errorf("read %s: %w", counter, err)
	}
	count := 0
	if len(resp.Kvs) > 0 {
		if _, err := fmt.Sscan(string(resp.Kvs[0].Value), &count); err != nil {
			return fmt.Errorf("read %s: %w", counter, err)
		}
	}
	// A process can be frozen here for any time.
	// Then what it has read is old, and it does not know.
	err = s.put(ctx, counter, fmt.Sprintf("%d %d", count+1, s.token))
	if errors.Is(err, errFenced) {
		return fmt.Errorf("%w: count %d with token %d is not written", err, count+1, s.token)
	}
	return err
}
