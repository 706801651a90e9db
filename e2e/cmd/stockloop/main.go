// Stockloop is what one usually writes with etcd's own packages to keep a job
// on one machine: a session, a campaign, a command that is cancelled when the
// session is done. It is here to be compared with.
//
//	ENDPOINTS=… ELECTION=… IDENTITY=… TTL=15 stockloop COMMAND [ARG...]
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	for ctx.Err() == nil {
		if err := candidate(ctx, os.Args[1:]); err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "stockloop:", err)
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// candidate campaigns once and runs the command while the session lasts.
func candidate(ctx context.Context, command []string) error {
	ttl, err := strconv.Atoi(os.Getenv("TTL"))
	if err != nil {
		return fmt.Errorf("TTL: %w", err)
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints:   strings.Split(os.Getenv("ENDPOINTS"), ","),
		DialTimeout: time.Second,
	})
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	session, err := concurrency.NewSession(client, concurrency.WithTTL(ttl), concurrency.WithContext(ctx))
	if err != nil {
		return err
	}
	election := concurrency.NewElection(session, os.Getenv("ELECTION"))
	if err := election.Campaign(ctx, os.Getenv("IDENTITY")); err != nil {
		return errors.Join(err, closeSession(client, session))
	}

	term, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-session.Done():
			cancel()
		case <-term.Done():
		}
	}()
	cmd := exec.CommandContext(term, command[0], command[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(),
		"LEASEHOLD_IDENTITY="+os.Getenv("IDENTITY"),
		"LEASEHOLD_FENCING_TOKEN="+strconv.FormatInt(election.Rev(), 10))
	return errors.Join(cmd.Run(), closeSession(client, session))
}

// closeSession revokes the lease, also when the context of the session has
// ended, for which Session.Close would not.
func closeSession(client *clientv3.Client, session *concurrency.Session) error {
	session.Orphan()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	_, err := client.Revoke(ctx, session.Lease())
	return err
}
