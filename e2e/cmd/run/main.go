//go:build linux

// Run tries leasehold with a job of one's own: it starts an etcd and one candidate that runs $JOB
// in a shell. Ctrl-C ends both, and nothing is left.
//
//	JOB='while sleep 1; do date; done' bin/run
//
// The candidate is bin/leasehold, which is built beside it. LEASEHOLD_* variables are passed on to
// it.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

func main() {
	code, err := try()
	os.Exit(max(code, harness.ExitCode("run", err)))
}

func try() (int, error) {
	command := os.Getenv("JOB")
	if command == "" {
		return 0, errors.New(
			"no job is given; for example: make run JOB='while sleep 1; do date; done'")
	}
	programs, err := harness.ProgramsBeside()
	if err != nil {
		return 0, err
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	ctx, stop := harness.Interruptible()
	defer stop()
	etcd, err := startEtcd(ctx)
	if ctx.Err() != nil {
		err = errors.New("stopped while etcd was being started")
	}
	if etcd != nil {
		defer etcd.Close()
	}
	if err != nil {
		return 0, err
	}
	level := cmp.Or(os.Getenv("LEASEHOLD_LOG_LEVEL"), "info")
	c, err := harness.StartCandidate(harness.CandidateConfig{
		Binary: programs.Leasehold, Election: "run", Identity: "run", Endpoints: etcd.Endpoints(),
		Env: append(passedOn(os.Environ()), "LEASEHOLD_LOG_LEVEL="+level),
		Job: []string{"/bin/sh", "-c", command},
		Prepare: func(cmd *exec.Cmd) {
			cmd.Dir = ""
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		},
	})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	fmt.Printf("etcd on %s, health on http://%s/status; Ctrl-C ends both\n",
		etcd.Endpoints()[0], cmp.Or(os.Getenv("LEASEHOLD_LISTEN"), c.Listen))
	for {
		select {
		case <-c.Ended():
			return c.Wait(context.Background())
		case <-signals: // a second one says: at once
			_ = c.Signal(syscall.SIGTERM) // it may have ended by itself
		}
	}
}

func startEtcd(ctx context.Context) (*harness.Cluster, error) {
	server, err := harness.FindEtcdServer(ctx, os.Stdout)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return harness.StartCluster(ctx, harness.ClusterConfig{Etcd: harness.Etcd{Server: server}})
}

// passedOn is the user's own environment but for what this program decides.
func passedOn(environ []string) []string {
	var env []string
	for _, kv := range environ {
		if name, _, _ := strings.Cut(kv, "="); name != "LEASEHOLD_ENDPOINTS" && name != "JOB" {
			env = append(env, kv)
		}
	}
	return env
}
