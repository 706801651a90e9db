//go:build linux

package guard

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
)

// Until its exec the job's first process has the memory that guard and spawner share. The guard
// writes there at any time: each renewal moves stop-at. Neither may disturb the other.
func TestSpawner_RenewedDuringTheStart(t *testing.T) {
	runtime.LockOSThread() // the spawner ends with the thread that forked it
	proc, err := unix.Open("/proc", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSpawner(Config{Path: "/bin/true", Argv: []string{"true"}, TTL: time.Second}, nil,
		proc, -1, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)

	stopAt := int64(boottime.Now() + time.Hour)
	atomic.StoreInt64(&s.area.stopAt, stopAt)
	s.send(ipc.SpawnerStart, 1)
	awaitExit(t, s, 1)
	if got := atomic.LoadInt64(&s.area.stopAt); got != stopAt {
		t.Errorf("the job has changed stop-at from %#x to %#x", stopAt, got)
	}
	if got := atomic.LoadInt32(&s.area.cancelled); got != 0 {
		t.Errorf("the job has changed the cancelled start to %#x", got)
	}

	stop := make(chan struct{})
	var renewals sync.WaitGroup
	renewals.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				atomic.StoreInt64(&s.area.stopAt, int64(boottime.Now()+time.Hour))
			}
		}
	})
	for serial := int32(2); serial <= 100; serial++ {
		s.send(ipc.SpawnerStart, serial)
		awaitExit(t, s, serial)
	}
	close(stop)
	renewals.Wait()
}

// awaitExit waits until the job of that start has exited, and fails unless it did so by itself.
func awaitExit(t *testing.T, s *spawner, serial int32) {
	t.Helper()
	for {
		fd, ok := s.receive()
		closeAll(fd)
		switch {
		case !ok:
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.sock), Events: unix.POLLIN}}, -1)
		case s.got.Serial != serial || s.got.Kind == ipc.SpawnerStarted:
		case s.got.Kind != ipc.SpawnerExited || s.got.Value != 0:
			t.Fatalf("start %d: message %d with %#x", serial, s.got.Kind, s.got.Value)
		default:
			return
		}
	}
}

// The guard may count the spawner's last heartbeat before it reads that nothing of the job is left.
// The spawner does nothing more then. It must not count as one that hangs, however long something
// else keeps the cgroup.
func TestSpawner_LastHeartbeatBeforeGone(t *testing.T) {
	g := newTestGuard(t)
	g.start()
	g.started()
	g.lost()
	if !g.spawner.awaited {
		t.Fatal("nothing is awaited of the spawner although it was asked to kill")
	}
	now := boottime.Now()
	atomic.AddUint32(&g.spawner.area.heartbeats, 1)
	g.serveSpawnerSilence(now)
	gone := ipc.SpawnerMessage{Kind: ipc.SpawnerGone, Serial: g.job.serial}
	if err := unix.Sendto(g.spawner.elector, gone.Bytes(), 0, nil); err != nil {
		t.Fatal(err)
	}
	g.receiveFromSpawner()
	for range 3 {
		now += time.Hour
		g.serveSpawnerSilence(now)
	}
	if g.spawner.missedChecks >= 3 { // then it is killed
		t.Error("the guard has killed a spawner that has done all it was asked for")
	}
}
