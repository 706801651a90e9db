//go:build linux

// Writer is a process of a job that reads and writes the storage of package store until it is
// killed: also when the job's first process has exited. It ends with the witness whose connection
// it has as descriptor 3.
package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"leasehold/e2e/store"
)

// pause is between an answer and the next request.
const pause = 20 * time.Millisecond

func main() {
	fmt.Fprintln(os.Stderr, "writer:", run())
	os.Exit(1)
}

// run writes until it fails.
func run() error {
	token, err := strconv.ParseInt(os.Getenv("LEASEHOLD_FENCING_TOKEN"), 10, 64)
	if err != nil {
		return fmt.Errorf("read LEASEHOLD_FENCING_TOKEN: %w", err)
	}
	log, err := store.OpenLog(os.Getenv(store.LogVariable))
	if err != nil {
		return err
	}
	etcd, err := clientv3.New(clientv3.Config{
		Endpoints: strings.Split(os.Getenv("LEASEHOLD_ENDPOINTS"), ","), Logger: zap.NewNop(),
	})
	if err != nil {
		return fmt.Errorf("connect to etcd: %w", err)
	}
	guard := store.Guard{Key: os.Getenv("LEASEHOLD_KEY"), Token: token}
	name := fmt.Sprintf("%s/%d", os.Getenv("LEASEHOLD_IDENTITY"), os.Getpid())
	go endWithWitness()
	c := store.Client{Name: name, Etcd: etcd, Log: log}
	for ctx := context.Background(); err == nil; time.Sleep(pause) {
		if rand.IntN(3) == 0 {
			err = c.Read(ctx)
		} else {
			err = c.Write(ctx, guard)
		}
	}
	return err
}

// endWithWitness reads nothing: what the witness says is for the job's first process.
func endWithWitness() {
	witness := []unix.PollFd{{Fd: 3, Events: unix.POLLRDHUP}}
	for {
		_, err := unix.Poll(witness, -1)
		if err == nil || err != unix.EINTR {
			os.Exit(98)
		}
	}
}
