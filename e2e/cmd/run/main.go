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
	"syscall"

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
	bed, err := newTestbed(ctx)
	if err != nil {
		return 0, err
	}
	defer bed.Close()
	// The candidate has the user's own environment but for what this program decides.
	for _, name := range []string{"JOB", "LEASEHOLD_ENDPOINTS"} {
		if err := os.Unsetenv(name); err != nil {
			return 0, err
		}
	}
	endpoints := bed.Etcd.Endpoints()
	c, err := harness.StartCandidate(harness.CandidateConfig{
		Binary: programs.Leasehold, Election: "run", Identity: "run", Endpoints: endpoints,
		Env: append([]string{"LEASEHOLD_LOG_LEVEL=info"}, os.Environ()...),
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
		endpoints[0], cmp.Or(os.Getenv("LEASEHOLD_LISTEN"), c.Listen))
	for {
		select {
		case <-c.Ended():
			return c.Wait(context.Background())
		case <-signals: // a second one says: at once
			_ = c.Signal(syscall.SIGTERM) // it may have ended by itself
		}
	}
}

func newTestbed(ctx context.Context) (bed *harness.Testbed, err error) {
	var etcd harness.Etcd
	if etcd, err = harness.FindEtcdServer(ctx, os.Stdout); err == nil {
		cluster := harness.ClusterConfig{Etcd: etcd}
		bed, err = harness.NewTestbed(ctx, harness.TestbedConfig{Cluster: cluster})
	}
	if err != nil && ctx.Err() != nil {
		err = errors.New("stopped while etcd was being started")
	}
	return bed, err
}
