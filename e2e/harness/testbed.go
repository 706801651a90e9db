//go:build linux

package harness

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"leasehold/control"
)

// WaitTimeout bounds every wait for what must come. It takes a tenth of it on a slow machine.
const WaitTimeout = 30 * time.Second

// TestbedConfig says what a testbed has.
type TestbedConfig struct {
	Cluster  ClusterConfig
	Programs *Programs // that machines run
	// Isolated puts each member of etcd and each machine on a node of a network of its own, as
	// root; otherwise all are on 127.0.0.1.
	Isolated bool
	// Prefix is that of all elections. With Auth, candidates may use nothing else, but for the keys
	// beside them.
	Prefix string
	Auth   bool
}

// Testbed is an etcd cluster and the network that machines reach it by.
type Testbed struct {
	Etcd     *Cluster
	Programs *Programs
	Network  *Network         // nil on 127.0.0.1
	Client   *clientv3.Client // an operator's, whom no fault cuts off
	Prefix   string           // of all elections
}

// NewTestbed starts etcd.
func NewTestbed(ctx context.Context, cfg TestbedConfig) (*Testbed, error) {
	b := &Testbed{Programs: cfg.Programs, Prefix: cfg.Prefix}
	if err := b.open(ctx, cfg); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

func (b *Testbed) open(ctx context.Context, cfg TestbedConfig) (err error) {
	ctx, cancel := context.WithTimeout(ctx, WaitTimeout)
	defer cancel()
	if cfg.Isolated {
		if b.Network, err = NewNetwork(); err != nil {
			return err
		}
		cfg.Cluster.Network = b.Network
	}
	if b.Etcd, err = StartCluster(ctx, cfg.Cluster); err != nil {
		return err
	}
	if cfg.Auth {
		if err := b.Etcd.EnableAuth(ctx, CandidateUser, CandidatePassword, cfg.Prefix); err != nil {
			return err
		}
		// What docs/etcd.md lists for the keys beside the elections.
		beside := strings.TrimSuffix(control.Prefix(cfg.Prefix), "/")
		if _, err := b.Etcd.Etcdctl(ctx, "role", "grant-permission", "--prefix", CandidateRole,
			"readwrite", beside); err != nil {
			return err
		}
	}
	b.Client, err = b.Etcd.NewClient()
	return err
}

// Close ends etcd and the network. Machines are closed by whoever made them.
func (b *Testbed) Close() {
	if b.Client != nil {
		_ = b.Client.Close()
	}
	if b.Etcd != nil {
		b.Etcd.Close()
	}
	if b.Network != nil {
		b.Network.Close()
	}
}

// Recover ends the faults of the network and of etcd's members, and waits until etcd serves.
func (b *Testbed) Recover(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, WaitTimeout)
	defer cancel()
	if b.Network != nil {
		if err := b.Network.Recover(); err != nil {
			return err
		}
	}
	for _, m := range b.Etcd.Members {
		if m.Continue() != nil { // it has ended
			if err := m.Start(); err != nil {
				return err
			}
		}
	}
	return b.Etcd.WaitHealthy(ctx)
}

// Leading is the first key of an election's queue and its lease.
type Leading struct {
	Key   string
	Lease clientv3.LeaseID
}

// WaitQueue waits until the election has that many candidates.
func (b *Testbed) WaitQueue(ctx context.Context, election string, n int64) (l Leading, err error) {
	ctx, cancel := context.WithTimeout(ctx, WaitTimeout)
	defer cancel()
	err = Until(ctx, func() error {
		opts := append(clientv3.WithFirstCreate(), clientv3.WithPrefix())
		got, err := b.Client.Get(ctx, election+"/", opts...)
		if err == nil && got.Count != n {
			err = fmt.Errorf("%d candidates in %s, want %d", got.Count, election, n)
		}
		if err == nil {
			l = Leading{string(got.Kvs[0].Key), clientv3.LeaseID(got.Kvs[0].Lease)}
		}
		return err
	})
	return l, err
}

// Left lists the leases in etcd, and the keys of elections.
func (b *Testbed) Left(ctx context.Context) (leases []clientv3.LeaseID, keys []string, err error) {
	list, err := b.Client.Leases(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("list the leases: %w", err)
	}
	for _, l := range list.Leases {
		leases = append(leases, l.ID)
	}
	got, err := b.Client.Get(ctx, b.Prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return nil, nil, fmt.Errorf("list the keys: %w", err)
	}
	for _, kv := range got.Kvs {
		keys = append(keys, string(kv.Key))
	}
	return leases, keys, nil
}

// WaitEmpty waits until etcd holds no lease, and no key of an election.
func (b *Testbed) WaitEmpty(ctx context.Context) error {
	return Until(ctx, func() error {
		leases, keys, err := b.Left(ctx)
		if err == nil && len(leases)+len(keys) > 0 {
			err = fmt.Errorf("left in etcd: leases %x, keys %q", leases, keys)
		}
		return err
	})
}

// Clear removes what candidates have left in etcd.
func (b *Testbed) Clear(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, WaitTimeout)
	defer cancel()
	leases, _, err := b.Left(ctx)
	for _, l := range leases {
		_, _ = b.Client.Revoke(ctx, l) // it may just have ended by itself
	}
	_, errDelete := b.Client.Delete(ctx, b.Prefix, clientv3.WithPrefix())
	return errors.Join(err, errDelete, b.WaitEmpty(ctx))
}

// Who candidates are where etcd's auth is on.
const (
	CandidateUser     = "candidate"
	CandidateRole     = "candidates"
	CandidatePassword = "candidate-secret"
)

// NewClient makes a client of etcd's for an operator. Without endpoints it reaches all members.
func (c *Cluster) NewClient(endpoints ...string) (*clientv3.Client, error) {
	user, password, _ := strings.Cut(c.Auth, ":")
	return c.newClient(user, password, endpoints)
}

// NewAnonymousClient makes a client without user and password.
func (c *Cluster) NewAnonymousClient() (*clientv3.Client, error) { return c.newClient("", "", nil) }

func (c *Cluster) newClient(user, password string, endpoints []string) (*clientv3.Client, error) {
	cfg := clientv3.Config{
		Endpoints: endpoints, Username: user, Password: password,
		DialTimeout: WaitTimeout, Logger: zap.NewNop(),
	}
	if len(endpoints) == 0 {
		cfg.Endpoints = c.Endpoints()
	}
	if c.cfg.TLS != nil {
		var err error
		if cfg.TLS, err = c.cfg.TLS.ClientConfig(); err != nil {
			return nil, err
		}
	}
	return clientv3.New(cfg)
}

// CandidateEnv are the variables by which leasehold is let in.
func (c *Cluster) CandidateEnv() []string {
	var env []string
	if t := c.cfg.TLS; t != nil {
		env = append(env, "LEASEHOLD_TLS_CA_FILE="+t.CAFile,
			"LEASEHOLD_TLS_CERT_FILE="+t.ClientCertFile, "LEASEHOLD_TLS_KEY_FILE="+t.ClientKeyFile)
	}
	if c.Auth != "" {
		env = append(env, "LEASEHOLD_USERNAME="+CandidateUser,
			"LEASEHOLD_PASSWORD="+CandidatePassword)
	}
	return env
}
