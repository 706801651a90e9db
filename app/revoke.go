//go:build linux

package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"leasehold/config"
	"leasehold/election"
)

// revoke gives a dead elector's lease back. Its arguments are the lease in hex and for how long to
// try. On its standard input it reads the token that etcd gave the elector, if any.
func revoke(args []string) int {
	_ = hideMemory() // without, the lease must be revoked all the same
	lease, err := strconv.ParseInt(args[0], 16, 64)
	within, err2 := time.ParseDuration(args[1])
	if err := errors.Join(err, err2); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitUsage
	}
	// What does not concern etcd must not stand in the way.
	cfg, err := config.Load(config.ForStatus)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitConfig
	}
	log := newLog(cfg)
	defer log.flush()
	token, err := io.ReadAll(os.Stdin)
	if err != nil {
		log.Warn("read the elector's token: etcd has to check the password instead", "err", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	ec := cfg.ElectionConfig(log.Logger)
	ec.AuthToken = string(token)
	if err := election.Revoke(ctx, ec, lease); err != nil {
		log.Warn("revoke the lease", "lease", args[0], "err", err)
		return exitUnavailable
	}
	return exitOK
}
