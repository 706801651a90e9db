//go:build linux

package main

import (
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

// A child may wait for ever for threads of Go's runtime that it doesn't have. It ends in time all
// the same.
func TestRawFork_EndsInTime(t *testing.T) {
	const children = 2000
	stop := make(chan struct{})
	var others sync.WaitGroup
	for range 4 { // which have the runtime interrupt whoever forks
		others.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					runtime.GC()
				}
			}
		})
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	left := map[int]bool{}
	defer func() {
		for pid := range left {
			_ = unix.Kill(pid, unix.SIGKILL)
			_, _ = unix.Wait4(pid, nil, 0, nil)
		}
	}()
	end := boottime.Now() + 3*time.Second
	for range children {
		switch pid := rawFork(end); {
		case pid == 0:
			for {
				rawSleep(10*time.Millisecond, -1, end)
			}
		case pid > 0:
			left[pid] = true
		}
	}
	close(stop)
	others.Wait()
	if len(left) < children/2 {
		t.Fatalf("%d children", len(left))
	}
	bound := end + 30*time.Second
	for ; boottime.Now() < bound && len(left) > 0; time.Sleep(10 * time.Millisecond) {
		for pid := range left {
			if got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); got == pid && err == nil {
				delete(left, pid)
			}
		}
	}
	if len(left) > 0 {
		t.Errorf("%d of %d children are left", len(left), children)
	}
}
