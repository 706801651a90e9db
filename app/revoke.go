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

// revoke revokes the lease of a lost elector. Its arguments are the lease in hex and how long to
// try. It reads the token that etcd gave the elector, if any, from standard input.
func revoke(args []string) int {
	nameProcess(roleRevoke)
	_ = hideMemory() // if that fails, the lease must still be revoked
	lease, err := strconv.ParseInt(args[0], 16, 64)
	within, err2 := time.ParseDuration(args[1])
	if err := errors.Join(err, err2); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitUsage
	}
	// Settings that do not concern etcd must not keep us from revoking.
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
