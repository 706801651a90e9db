//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"leasehold/e2e/harness"
)

// patience bounds the wait for what must come. It takes a tenth of it on a
// slow machine.
const patience = 30 * time.Second

// With auth the candidates are this user, who may do anything in the elections.
const (
	authUser     = "candidate"
	authPassword = "candidate-secret"
	prefix       = "faults/"
)

// shape is what tells stages apart.
type shape struct {
	members int
	flags   string
	auth    bool
}

// A Stage is an etcd cluster in a network of its own. One trial after the other
// uses it, so that whatever is in etcd is that trial's.
type Stage struct {
	Etcd    *harness.Cluster
	Network *harness.Network
	Client  *clientv3.Client // the operator's, whose ways no fault touches

	*runner
	shape shape
}

func (h *runner) newStage(ctx context.Context, of shape) (*Stage, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s := &Stage{runner: h, shape: of}
	var err error
	if s.Network, err = harness.NewNetwork(); err != nil {
		return nil, err
	}
	s.Etcd, err = harness.StartCluster(ctx, harness.ClusterConfig{Etcd: h.etcd, Size: of.members, Flags: strings.Fields(of.flags), Network: s.Network})
	if err != nil {
		s.close()
		return nil, err
	}
	operator := clientv3.Config{Endpoints: s.Etcd.Endpoints(), DialTimeout: patience, Logger: zap.NewNop()}
	if of.auth {
		if err := s.Etcd.EnableAuth(ctx, authUser, authPassword, prefix); err != nil {
			s.close()
			return nil, err
		}
		operator.Username, operator.Password, _ = strings.Cut(s.Etcd.Auth, ":")
	}
	if s.Client, err = clientv3.New(operator); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *Stage) close() {
	if s.Client != nil {
		_ = s.Client.Close()
	}
	if s.Etcd != nil {
		s.Etcd.Close()
	}
	s.Network.Close()
}

// mend ends whatever faults there are, and waits until etcd serves.
func (s *Stage) mend(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := s.Network.Recover(); err != nil {
		return err
	}
	for _, m := range s.Etcd.Members {
		if m.Continue() != nil { // it has ended
			if err := m.Start(); err != nil {
				return err
			}
		}
	}
	return s.Etcd.WaitHealthy(ctx)
}

// left lists what candidates have left in etcd.
func (s *Stage) left(ctx context.Context) (leases []clientv3.LeaseID, keys []string, err error) {
	list, err := s.Client.Leases(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("list the leases: %w", err)
	}
	for _, l := range list.Leases {
		leases = append(leases, l.ID)
	}
	got, err := s.Client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return nil, nil, fmt.Errorf("list the keys: %w", err)
	}
	for _, kv := range got.Kvs {
		keys = append(keys, string(kv.Key))
	}
	return leases, keys, nil
}

// nothingLeft waits until etcd holds no lease and no key any more. A lease that
// could not be revoked in the dark ends by itself.
func (s *Stage) nothingLeft(ctx context.Context, ttl time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, ttl+3*time.Second)
	defer cancel()
	return harness.Until(ctx, func() error {
		leases, keys, err := s.left(ctx)
		if err == nil && len(leases)+len(keys) > 0 {
			err = fmt.Errorf("left in etcd: leases %x, keys %q", leases, keys)
		}
		return err
	})
}

// sweep removes what candidates have left that don't promise to leave nothing.
func (s *Stage) sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	leases, _, err := s.left(ctx)
	for _, l := range leases {
		_, errRevoke := s.Client.Revoke(ctx, l) // it may just have ended by itself
		_ = errRevoke
	}
	_, errDelete := s.Client.Delete(ctx, prefix, clientv3.WithPrefix())
	return errors.Join(err, errDelete, s.nothingLeft(ctx, patience))
}

// queue waits until the election has that many candidates, and returns the
// leader's key and lease.
func (s *Stage) queue(ctx context.Context, election string, length int64) (key string, lease clientv3.LeaseID, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = harness.Until(ctx, func() error {
		got, err := s.Client.Get(ctx, election+"/", append(clientv3.WithFirstCreate(), clientv3.WithPrefix())...)
		if err != nil {
			return err
		}
		if got.Count != length {
			return fmt.Errorf("%d candidates in %s, want %d", got.Count, election, length)
		}
		key, lease = string(got.Kvs[0].Key), clientv3.LeaseID(got.Kvs[0].Lease)
		return nil
	})
	return key, lease, err
}
