//go:build linux

package supervisor

import (
	"errors"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/proctree"
)

// The job notifies us as a service notifies systemd (sd_notify(3)). The guard has made the socket,
// and each elector gets it. What comes while there is none waits in it.

// maxNotification is the longest notification that systemd takes, too (PIPE_BUF), and maxFds the
// most descriptors that the kernel passes at once (SCM_MAX_FD).
const (
	maxNotification = 4096
	maxFds          = 253
)

// readNotifications receives what the job notifies, until the socket is closed.
func (s *Supervisor) readNotifications() {
	conn, err := s.notify.SyscallConn()
	if err != nil {
		return
	}
	text := make([]byte, maxNotification)
	control := make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*maxFds))
	for {
		n, controlLen := 0, 0
		var received error
		if err := conn.Read(func(fd uintptr) bool {
			n, controlLen, _, _, received = unix.Recvmsg(int(fd), text, control,
				unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			return !errors.Is(received, unix.EAGAIN)
		}); err != nil {
			return
		}
		if received != nil && !errors.Is(received, unix.EINTR) {
			s.log.Error("the job's notifications can't be read any more", "err", received)
			return
		}
		if received == nil {
			sender, fds := parseControl(control[:controlLen])
			s.notification(string(text[:n]), sender)
			// Also those that we have no use for. And whoever has sent BARRIER=1 waits for the end
			// of its own, so that we still find it.
			for _, fd := range fds {
				_ = unix.Close(fd)
			}
		}
	}
}

// parseControl returns the sender's pid in our namespace, or 0, and the descriptors that came.
func parseControl(control []byte) (sender int, fds []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return 0, nil
	}
	for i := range messages {
		if creds, err := unix.ParseUnixCredentials(&messages[i]); err == nil {
			sender = int(creds.Pid)
		}
		if more, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, more...)
		}
	}
	return sender, fds
}

// notification acts on what a process has sent. Anybody may send to the socket, so only the job's
// own processes count. One that has exited by now can't be looked up, and does not count either.
func (s *Supervisor) notification(text string, sender int) {
	ready, alive, asks := false, false, false
	for line := range strings.Lines(text) {
		switch strings.TrimSuffix(line, "\n") {
		case "READY=1":
			ready = true
		case "WATCHDOG=1":
			alive = true
		case "WATCHDOG=trigger":
			asks = true
		}
	}
	if !ready && !alive && !asks {
		return // such as STATUS=
	}
	if !proctree.Descends(sender, s.cfg.Spawner) {
		s.log.Debug("notification dropped: its sender is no process of the job, or has exited",
			"pid", sender)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &s.job.health
	switch s.job.shown.State {
	case JobStarting, JobRunning: // the guard's message about the start may come later
	case JobFrozen: // it was sent before
	default:
		return
	}
	h.fedAt, h.asks = time.Now(), h.asks || asks
	if alive && h.state == HealthGood {
		h.wellAt = boottime.Now()
	}
	if ready && !h.notified {
		h.notified = true
		s.readyChanged()
		return
	}
	s.wakeMonitor()
}

// openNotify opens the socket that the guard has made.
func (s *Supervisor) openNotify() error {
	if s.cfg.NotifySock < 0 {
		return nil
	}
	if err := unix.SetNonblock(s.cfg.NotifySock, true); err != nil {
		return err
	}
	s.notify = os.NewFile(uintptr(s.cfg.NotifySock), "notify")
	return nil
}
