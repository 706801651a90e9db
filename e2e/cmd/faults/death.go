//go:build linux

package main

import (
	"context"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// watchDeath finds the moment from which on no thread of a process runs in user space any more:
// SIGKILL has reached each of them. The process' connection closes only when each has had a
// processor to end on, and its memory has been freed. It is 0 when ctx ends first.
func watchDeath(ctx context.Context, pid int) <-chan time.Duration {
	found := make(chan time.Duration, 1) // closed when the watch has ended
	go func() {
		defer close(found)
		// It must not wait for a processor among all that has just woken.
		defer harness.RealTime(1)()
		pause := unix.NsecToTimespec(200_000)
		for ctx.Err() == nil {
			_ = unix.Nanosleep(&pause, nil)
			if harness.Killed(pid) {
				found <- harness.Now()
				return
			}
		}
	}()
	return found
}
