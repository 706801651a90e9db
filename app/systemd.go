//go:build linux

package app

import (
	"fmt"
	"os"
	"strconv"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"leasehold/config"
	"leasehold/internal/boottime"
)

// A notifier tells systemd what the daemon does. It never waits: if systemd is slow, notifications
// are lost. Without a systemd that listens it does nothing.
type notifier struct {
	states chan string   // nil: nobody listens
	done   chan struct{} // closed when all has been sent
}

func newNotifier() *notifier {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return &notifier{}
	}
	n := &notifier{states: make(chan string, 64), done: make(chan struct{})}
	go func() {
		defer close(n.done)
		for s := range n.states {
			_, _ = sdnotify.SdNotify(false, s)
		}
	}()
	return n
}

// notify has a state sent soon. It never blocks.
func (n *notifier) notify(state string) {
	select {
	case n.states <- state:
	default:
	}
}

// flush waits for a moment until all has been sent. Nothing can be sent after that.
func (n *notifier) flush() {
	if n.states == nil {
		return
	}
	close(n.states)
	select {
	case <-n.done:
	case <-time.After(flushTime):
	}
}

// stopping is the message that the daemon stops, and how long that may take. If it may take longer
// than the unit's TimeoutStopSec=, systemd waits for it. The time covers the grace, a kill, and
// giving the lease back; and the hook after the job.
func stopping(cfg config.Config) string {
	within := cfg.StopGrace.Duration + cfg.Timing().PostStop + 30*time.Second
	return fmt.Sprintf("STOPPING=1\nEXTEND_TIMEOUT_USEC=%d", within.Microseconds())
}

// newWatchdog makes the function that notifies systemd's watchdog, at most once in a third of the
// time that systemd allows. It has a socket of its own and allocates nothing: the guard calls it
// again and again, and collects no garbage.
func newWatchdog() func() {
	allowed, err := sdnotify.SdWatchdogEnabled(false)
	if err != nil || allowed == 0 {
		return func() {}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil || unix.Connect(fd, &unix.SockaddrUnix{Name: os.Getenv("NOTIFY_SOCKET")}) != nil {
		return func() {}
	}
	message, last := []byte("WATCHDOG=1"), time.Duration(0)
	return func() {
		if now := boottime.Now(); now-last >= allowed/3 || last == 0 {
			if _, err := unix.Write(fd, message); err == nil {
				last = now
			}
		}
	}
}

// maxPing bounds the time between two pings of the elector to the guard: with them the guard
// notifies systemd's watchdog.
func maxPing() time.Duration {
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || usec <= 0 {
		return time.Minute
	}
	quarter := time.Duration(min(usec, 1e12)) * time.Microsecond / 4
	return min(max(quarter, 10*time.Millisecond), time.Minute)
}
