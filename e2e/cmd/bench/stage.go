//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/harness"
)

const (
	patience  = 30 * time.Second       // for what takes a tenth of it on a slow machine
	settle    = 250 * time.Millisecond // from a candidate's coming to the next fault
	observe   = 3 * time.Second        // for how long two jobs are watched living at once
	benchUser = "candidate"
	benchPass = "candidate-secret"
)

// A stage is an etcd of one member and what reaches it in one way: plainly,
// over TLS, or with user and password.
type stage struct {
	*bench
	road   string // plain, tls, auth
	etcd   *harness.Cluster
	client *clientv3.Client // the operator's
	certs  *harness.Certs
	count  int // of identities and elections given out
}

func (b *bench) newStage(ctx context.Context, road string) (*stage, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s := &stage{bench: b, road: road}
	cfg := harness.ClusterConfig{Etcd: b.etcd}
	operator := clientv3.Config{DialTimeout: patience}
	if road == "tls" {
		var err error
		if s.certs, err = harness.NewCerts(b.dir); err != nil {
			return nil, err
		}
		cfg.TLS = s.certs
		if operator.TLS, err = clientTLS(s.certs); err != nil {
			return nil, err
		}
	}
	var err error
	if s.etcd, err = harness.StartCluster(ctx, cfg); err != nil {
		return nil, err
	}
	if road == "auth" {
		if err := s.etcd.EnableAuth(ctx, benchUser, benchPass, "bench/"); err != nil {
			s.close()
			return nil, err
		}
		operator.Username, operator.Password, _ = strings.Cut(s.etcd.Auth, ":")
	}
	operator.Endpoints = s.etcd.Endpoints()
	if s.client, err = clientv3.New(operator); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *stage) close() {
	if s.client != nil {
		_ = s.client.Close()
	}
	s.etcd.Close()
}

func clientTLS(certs *harness.Certs) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(certs.ClientCertFile, certs.ClientKeyFile)
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(certs.CAFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &tls.Config{Certificates: []tls.Certificate{own}, RootCAs: roots, MinVersion: tls.VersionTLS12}, nil
}

// A candidate is one daemon of a contender.
type candidate struct {
	*harness.Candidate
	of       harness.Implementation
	elector  int // its pid, where that is to be killed
	election string
}

// start starts a candidate with the test job. binary, if not empty, is a copy
// of the contender's program.
func (s *stage) start(of harness.Implementation, election string, ttl time.Duration, binary string) (*candidate, error) {
	c := &candidate{of: of, election: election}
	s.count++
	identity := fmt.Sprintf("%s-%d", strings.ReplaceAll(of.Name, " ", "-"), s.count)
	cfg := of.Config(harness.Candidacy{Programs: harness.ProgramsIn(s.programs), Etcd: s.etcd, Endpoints: s.etcd.Endpoints(), Election: election, Identity: identity, TTL: ttl, Witness: s.witness})
	if of.Name == harness.Leasehold.Name {
		cfg.Env = append(cfg.Env, s.credentials()...)
	}
	if binary != "" {
		cfg.Binary = binary
	}
	var err error
	c.Candidate, err = harness.StartCandidate(cfg)
	return c, err
}

// credentials are the variables by which leasehold reaches this etcd.
func (s *stage) credentials() []string {
	switch s.road {
	case "tls":
		return []string{"LEASEHOLD_TLS_CA_FILE=" + s.certs.CAFile,
			"LEASEHOLD_TLS_CERT_FILE=" + s.certs.ClientCertFile, "LEASEHOLD_TLS_KEY_FILE=" + s.certs.ClientKeyFile}
	case "auth":
		return []string{"LEASEHOLD_USERNAME=" + benchUser, "LEASEHOLD_PASSWORD=" + benchPass}
	}
	return nil
}

// end ends the candidate and whatever it left behind.
func (s *stage) end(c *candidate) {
	if c.of.Name == harness.Leasehold.Name {
		_ = c.Signal(syscall.SIGCONT)
		if elector, err := c.Elector(); err == nil {
			_ = syscall.Kill(elector, syscall.SIGCONT)
		}
		c.Close()
	} else {
		_ = syscall.Kill(-c.Guard(), syscall.SIGKILL) // the job is in its group
		<-c.Ended()
	}
	for _, l := range s.witness.Lives() {
		if l.Candidate == c.Identity && l.Alive() {
			_ = s.witness.Tell(l, "exit 0") // it may be ending
		}
	}
}

// job waits for the candidate's job.
func (s *stage) job(ctx context.Context, c *candidate, within time.Duration) (harness.Life, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("no job of %s within %v; its log:\n%s", c.Identity, within, c.Log()))
	defer cancel()
	return s.witness.WaitForJob(ctx, func(l harness.Life) bool { return l.Candidate == c.Identity })
}

// queue waits until the election has that many candidates, and returns the
// leader's key.
func (s *stage) queue(ctx context.Context, election string, length int64) (key string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = harness.Until(ctx, func() error {
		got, err := s.client.Get(ctx, election+"/", append(clientv3.WithFirstCreate(), clientv3.WithPrefix())...)
		if err != nil {
			return err
		}
		if got.Count != length {
			return fmt.Errorf("%d candidates in %s, want %d", got.Count, election, length)
		}
		key = string(got.Kvs[0].Key)
		return nil
	})
	return key, err
}
