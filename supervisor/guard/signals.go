//go:build linux

package guard

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
	"leasehold/supervisor/reload"
)

// relaySignals passes the signals that the runtime catches to the loop. They wait in counters, so
// that none is lost if the pipe is full.
func (g *guard) relaySignals() {
	for {
		var s os.Signal
		select {
		case s = <-g.cfg.Signals:
		case s = <-g.cfg.Children:
		}
		if n, ok := s.(syscall.Signal); ok && int(n) < len(g.pending) {
			g.pending[n].Add(1)
			_, _ = unix.Write(g.wakeW, wakeByte) // a full pipe wakes the loop just as well
		}
	}
}

var wakeByte = []byte{0}

// receiveSignals takes the signals that relaySignals has left.
func (g *guard) receiveSignals() {
	if g.watched[watchWake].Revents == 0 {
		return
	}
	_, _ = unix.Read(g.wakeR, g.scratch[:])
	for n := range g.pending {
		for ; g.pending[n].Load() > 0; g.pending[n].Add(-1) {
			g.signal(unix.Signal(n))
		}
	}
}

// signal acts on a signal that the guard received.
func (g *guard) signal(s unix.Signal) {
	switch s {
	case unix.SIGCHLD: // the loop reaps in each round
	case unix.SIGTERM, unix.SIGINT:
		g.stopSignals++
		switch g.stopSignals {
		case 1:
			g.job.stopSignalled()
			g.cfg.Notify(g.cfg.Stopping)
		case 2:
			g.forceBy = boottime.Now() + forceTimeout
			g.elector.revokeBy = min(g.elector.revokeBy, g.forceBy+forceTimeout)
			g.job.stopSignalled()
		}
		g.send(ipc.Signal{Signal: s})
		g.abortReload("the daemon stops")
	case reload.Signal:
		g.reloadAsked()
	case unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGQUIT:
		if g.job.pid != 0 {
			proctree.SignalPidfd(g.job.pidfd, s)
		}
	}
}
