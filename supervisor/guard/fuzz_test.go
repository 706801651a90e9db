//go:build linux

package guard

import (
	"encoding/binary"
	"log/slog"
	"math"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// No process has such a pid: PID_MAX_LIMIT of Linux is 1 << 22.
const (
	fuzzElector = 1<<30 + iota
	fuzzSpawner
	fuzzJob
)

// fuzzWorld is what the guards of all inputs share.
type fuzzWorld struct {
	procs  *proctree.Scanner
	exited int // a pidfd of a process that has exited: no signal reaches anybody
	living int // a pidfd of one that has not
}

func newFuzzWorld(f *testing.F) *fuzzWorld {
	f.Helper()
	var w fuzzWorld
	var err error
	if w.procs, err = proctree.NewScanner(); err != nil {
		f.Fatal(err)
	}
	var pids [2]int
	for i, pidfd := range []*int{&w.exited, &w.living} {
		cmd := exec.Command("sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, PidFD: pidfd}
		if err := cmd.Start(); err != nil {
			f.Fatal(err)
		}
		pids[i] = cmd.Process.Pid
		f.Cleanup(func() { _ = cmd.Process.Kill() })
	}
	_ = unix.Kill(pids[0], unix.SIGKILL)
	_, _ = unix.Wait4(pids[0], nil, 0, nil)
	return &w
}

// fuzzGuard is a guard that gets events from an input. Every pid and pidfd is that of nobody.
type fuzzGuard struct {
	*guard
	t     *testing.T
	world *fuzzWorld

	toGuard, fromGuard, spawnerEnd int
	said                           ipc.Inbox
	proven                         bool // the spawner has said that nothing of this job is left
	starts, gone                   int
}

func newFuzzGuard(t *testing.T, w *fuzzWorld) *fuzzGuard {
	t.Helper()
	g := newGuard(Config{
		TTL: time.Hour, Margin: time.Minute, StopSignal: unix.SIGTERM,
		StopGrace: time.Minute,
		Notify:    func(string) {}, Heartbeat: func() {}, Logger: slog.New(slog.DiscardHandler),
	})
	var pipes [2][2]int
	for i := range pipes {
		if err := unix.Pipe2(pipes[i][:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
	}
	sockets, err := unix.Socketpair(unix.AF_UNIX,
		unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	g.procs = w.procs
	g.elector.in, g.elector.outbox.FD, g.elector.pipeEnded = pipes[0][0], pipes[1][1], false
	g.elector.state = electorRunning
	g.elector.pid, g.elector.pidfd = fuzzElector, w.exited
	g.spawner = &spawner{sock: sockets[0], elector: -1, pid: fuzzSpawner, pidfd: w.living}
	if err := g.spawner.layOut(g.cfg); err != nil {
		t.Fatal(err)
	}
	g.spawner.iov = receiveInto(&g.spawner.got)
	g.listChildren()
	t.Cleanup(func() {
		for _, fd := range append(append(pipes[0][:], pipes[1][:]...), sockets[:]...) {
			_ = unix.Close(fd)
		}
		if g.job.pidfd > 0 {
			_ = unix.Close(g.job.pidfd)
		}
		_ = unix.Munmap(g.spawner.mem)
	})
	return &fuzzGuard{
		guard: g, t: t, world: w,
		toGuard: pipes[0][1], fromGuard: pipes[1][0], spawnerEnd: sockets[1],
	}
}

// fuzzTime turns a byte into a moment or a length of time that matters.
func fuzzTime(b byte) time.Duration {
	now := boottime.Now()
	return [...]time.Duration{
		0, ipc.UntilKillBy, 1, now - time.Hour, now, now + time.Hour, now + 2*time.Hour,
		time.Hour, forever, math.MinInt64,
	}[b%10]
}

// elector sends a message of the elector: its kind, four numbers, and a text.
func (g *fuzzGuard) elector(kind byte, args []byte) {
	b := make([]byte, 36, 40)
	for i := range 4 {
		binary.LittleEndian.PutUint64(b[4+8*i:], uint64(fuzzTime(args[i])))
	}
	b = append(b, args[:args[0]%4]...)
	b[0], b[2] = byte(len(b)), kind
	_, _ = unix.Write(g.toGuard, b)
	g.receiveFromElector()
}

// spawnerSays sends a message of the spawner, for this job or another.
func (g *fuzzGuard) spawnerSays(kind byte, args []byte) {
	m := ipc.SpawnerMessage{
		Kind: int32(kind % 9), Serial: g.job.serial + int32(args[0]%8/7),
		Value: int32(args[1]), Extra: int32(args[2] % 2),
	}
	var rights []byte
	if m.Kind == ipc.SpawnerStarted {
		m.Value = fuzzJob
		if args[1]%8 != 0 {
			rights = unix.UnixRights(g.world.exited)
		}
	}
	if g.job.alive() && m.Serial == g.job.serial {
		g.proven = m.Kind == ipc.SpawnerGone || m.Kind == ipc.SpawnerRefused ||
			m.Kind == ipc.SpawnerExited && m.Extra == 1 ||
			g.proven && m.Kind != ipc.SpawnerExited
	}
	_ = unix.Sendmsg(g.spawnerEnd, m.Bytes(), rights, nil, unix.MSG_DONTWAIT)
	g.receiveFromSpawner()
}

// listen counts what the elector gets, and empties the socket to the spawner.
func (g *fuzzGuard) listen() {
	for more := true; more; {
		more, _ = g.said.Fill(g.fromGuard)
		for m, ok := g.said.Next(); ok; m, ok = g.said.Next() {
			if m.Kind == ipc.KindGone {
				g.gone++
			}
		}
	}
	var b [16]byte
	for {
		if _, _, err := unix.Recvfrom(g.spawnerEnd, b[:], unix.MSG_DONTWAIT); err != nil {
			return
		}
	}
}

// event lets one thing happen, and checks what must hold then.
func (g *fuzzGuard) event(b []byte) {
	before, j := g.job, &g.job
	began, elapsed := boottime.Now(), time.Duration(0)
	switch b[0] % 8 {
	case 0, 1, 2:
		g.elector(b[1], b[2:])
	case 3, 4:
		g.spawnerSays(b[1], b[2:])
	case 5:
		elapsed = max(0, fuzzTime(b[1])-began) % (1 << 60)
		j.serveDeadlines(began + elapsed)
	case 6:
		j.nextRound = 0
		if j.state == jobKilling {
			j.killRound()
		}
	case 7:
		g.signal(unix.Signal(b[1] % 65))
	}
	g.listen()
	if before.state == jobIdle && j.state != jobIdle {
		g.starts++
		g.proven = false
	}
	switch same := before.serial == j.serial; {
	case before.state == jobKilling && same && j.state != jobKilling && j.state != jobIdle,
		before.state == jobStopping && same && (j.state == jobForking || j.state == jobRunning):
		g.t.Errorf("the job was %s and is %s", before.state, j.state)
	case same && before.alive() && began >= before.stopAt && j.stopAt != before.stopAt,
		same && before.alive() && began >= before.stopAt && j.killBy != before.killBy:
		g.t.Errorf("the deadlines move after stop-at")
	case b[0]%8 == 5 && began+elapsed >= j.killBy && j.alive() && j.state != jobKilling:
		g.t.Errorf("the job is %s after kill-by", j.state)
	case before.alive() && j.state == jobIdle && !g.proven:
		g.t.Errorf("the job counts as gone, and nothing has proven it")
	case before.alive() && j.state == jobIdle && before.unanswered:
		g.t.Errorf("the job counts as gone, and a start is under way")
	}
	if g.gone > g.starts || !g.guard.elector.givenUp && g.starts-g.gone > 1 {
		g.t.Errorf("%d jobs were started, and %d reported gone", g.starts, g.gone)
	}
}

// FuzzEvents: whatever the elector and the spawner send, in whatever order, the guard's job ends by
// its deadlines, and counts as gone only when the spawner has proven that.
func FuzzEvents(f *testing.F) {
	start := []byte{0, byte(ipc.KindStart), 0, 0, 5, 6}
	started := []byte{3, byte(ipc.SpawnerStarted), 0, 1, 0, 0}
	lost := []byte{0, byte(ipc.KindStop), 0, 0, 0, 0}
	exited := []byte{3, byte(ipc.SpawnerExited), 0, 0, 1, 0}
	for _, events := range [][][]byte{
		{start, started, exited, {6, 0, 0, 0, 0, 0}},
		{start, started, {0, byte(ipc.KindExtend), 6, 6, 0, 0}, {5, 6, 0, 0, 0, 0}, exited},
		{start, lost, started, {3, byte(ipc.SpawnerGone), 0, 0, 0, 0}},
		{start, {3, byte(ipc.SpawnerRefused), 0, 2, 0, 0}, {6, 0, 0, 0, 0, 0}, start, start},
		{start, {7, 15, 0, 0, 0, 0}, {7, 15, 0, 0, 0, 0}, started, started},
		{{0, byte(ipc.KindStart), 0, 0, 4, 4}, {0, byte(ipc.KindExtend), 6, 6, 0, 0}, started},
	} {
		var all []byte
		for _, e := range events {
			all = append(all, e...)
		}
		f.Add(all)
	}
	world := newFuzzWorld(f)
	f.Fuzz(func(t *testing.T, events []byte) {
		g := newFuzzGuard(t, world)
		for n := 0; len(events) >= 6 && n < 64; n++ {
			g.event(events[:6])
			events = events[6:]
		}
	})
}
