//go:build linux

package app

import (
	"fmt"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"leasehold/config"
	"leasehold/internal/boottime"
)

// newNotifier makes the function that tells systemd, and one that at the end waits for a moment until systemd has been told. A slow
// systemd loses notifications, and holds up nobody.
func newNotifier() (notify func(state string), told func()) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return func(string) {}, func() {}
	}
	states, done := make(chan string, 64), make(chan struct{})
	go func() { // lives as long as the process, where systemd does not listen
		for s := range states {
			_, _ = daemon.SdNotify(false, s)
		}
		close(done)
	}()
	notify = func(state string) {
		select {
		case states <- state:
		default:
		}
	}
	told = func() {
		close(states)
		select {
		case <-done:
		case <-time.After(flushTime):
		}
	}
	return notify, told
}

// stopping tells systemd that the daemon stops, and how long that may take: where it is longer than the unit's TimeoutStopSec=,
// systemd waits. Beside the grace that is the time for a kill, and for giving the lease back.
func stopping(cfg config.Config) string {
	return fmt.Sprintf("STOPPING=1\nEXTEND_TIMEOUT_USEC=%d", (cfg.StopGrace.Duration + 30*time.Second).Microseconds())
}

// newWatchdog makes the function that tells systemd's watchdog that the daemon turns, at most once in a third of what it allows.
// It has a socket of its own and makes nothing: the guard calls it again and again, and collects no garbage.
func newWatchdog() func() {
	allowed, err := daemon.SdWatchdogEnabled(false)
	if err != nil || allowed == 0 {
		return func() {}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil || unix.Connect(fd, &unix.SockaddrUnix{Name: os.Getenv("NOTIFY_SOCKET")}) != nil {
		return func() {}
	}
	beat, last := []byte("WATCHDOG=1"), time.Duration(0)
	return func() {
		if now := boottime.Now(); now-last >= allowed/3 || last == 0 {
			if _, err := unix.Write(fd, beat); err == nil {
				last = now
			}
		}
	}
}
