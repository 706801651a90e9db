// Naiveclient is what one usually writes with etcd's own packages to keep a job on one machine: a
// session, a campaign, a command that is cancelled when the session is done. It is here to be
// compared with.
//
//	ENDPOINTS=… ELECTION=… IDENTITY=… TTL=15 naiveclient COMMAND [ARG...]
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
			fmt.Fprintln(os.Stderr, "naiveclient:", err)
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// candidate campaigns once and runs the command while the session lasts.
func candidate(ctx context.Context, command []string) (err error) {
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
	session, err := concurrency.NewSession(client,
		concurrency.WithTTL(ttl), concurrency.WithContext(ctx))
	if err != nil {
		return err
	}
	defer func() { // Session.Close revokes nothing once ctx has ended
		session.Orphan()
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		_, errRevoke := client.Revoke(ctx, session.Lease())
		err = errors.Join(err, errRevoke)
	}()
	election := concurrency.NewElection(session, os.Getenv("ELECTION"))
	if err := election.Campaign(ctx, os.Getenv("IDENTITY")); err != nil {
		return err
	}

	cmd := exec.CommandContext(session.Ctx(), command[0], command[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(),
		"LEASEHOLD_IDENTITY="+os.Getenv("IDENTITY"), "LEASEHOLD_KEY="+election.Key(),
		"LEASEHOLD_FENCING_TOKEN="+strconv.FormatInt(election.Rev(), 10))
	return cmd.Run()
}
