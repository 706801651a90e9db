//go:build linux

package supervisor

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// newTestSupervisor makes one without a guard: what it sends goes nowhere.
func newTestSupervisor(t *testing.T) *Supervisor {
	t.Helper()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(pipe[0]); _ = unix.Close(pipe[1]) })
	return &Supervisor{
		cfg: Config{Changed: func() {}}, log: slog.New(slog.DiscardHandler),
		metrics: newMetrics(prometheus.NewRegistry()), outbox: ipc.Outbox{FD: pipe[1]},
		guardGone: make(chan struct{}), job: job{shown: Job{State: JobNone}, pidfd: -1},
	}
}

// TestSupervisor_States: each event leads where the diagram says, and only a run that nobody ended
// has ended by itself.
func TestSupervisor_States(t *testing.T) {
	type s = *Supervisor
	started := func(s s) { s.started(ipc.Started{PID: 7}) }
	exited := func(s s) { s.firstExited(ipc.Exited{Code: 5}) }
	stop := func(s s) { s.stopAsked("planned", forever) }
	gone := func(s s) { s.gone(ipc.Gone{}) }
	frozen := func(s s) { s.frozen(ipc.Frozen{}) }
	for _, c := range []struct {
		name   string
		events []func(s)
		state  JobState
		ended  *outcome
	}{
		{"asked", nil, JobStarting, nil},
		{"runs", []func(s){started}, JobRunning, nil},
		{"stopped while starting", []func(s){stop, started}, JobStopping, nil},
		{
			"exits by itself",
			[]func(s){started, exited, gone},
			JobExited,
			&outcome{exit: ExitError{Exit: proctree.Exit{Code: 5}}, byItself: true},
		},
		{
			"exits when told",
			[]func(s){started, stop, exited, gone},
			JobExited,
			&outcome{exit: ExitError{Exit: proctree.Exit{Code: 5}}},
		},
		{
			"the guard ends it by its own clock",
			[]func(s){started, exited, func(s s) { s.gone(ipc.Gone{Ordered: true}) }},
			JobExited,
			&outcome{exit: ExitError{Exit: proctree.Exit{Code: 5}}},
		},
		{
			"refused",
			[]func(s){func(s s) { s.refused(ipc.Refused{Code: 127, Why: "no such file"}) }, gone},
			JobExited,
			&outcome{
				exit:     ExitError{Exit: proctree.Exit{Code: 127}, Refused: "no such file"},
				byItself: true,
			},
		},
		{"restarts", []func(s){started, exited, gone, s.restarting}, JobBackoff, nil},
		{"term over", []func(s){started, exited, gone, s.restarting, s.termOver}, JobExited, nil},
		{"stop after the end", []func(s){started, exited, gone, stop}, JobExited, nil},
		{"gone twice", []func(s){started, exited, gone, gone}, JobExited, nil},
		{"frozen", []func(s){started, frozen}, JobFrozen, nil},
		{"thawed", []func(s){started, frozen, s.thawed}, JobRunning, nil},
		{"frozen while stopping", []func(s){started, stop, frozen}, JobStopping, nil},
		{
			"killed while frozen",
			[]func(s){started, frozen, exited, gone},
			JobExited,
			&outcome{exit: ExitError{Exit: proctree.Exit{Code: 5}}, byItself: true},
		},
		{
			"guard lost while frozen",
			[]func(s){started, frozen, func(s s) { s.guardIsLost("guard hangs") }},
			JobStopping, nil,
		},
		{
			"guard lost",
			[]func(s){started, func(s s) { s.guardIsLost("guard exited") }},
			JobStopping, nil,
		},
		{
			"killed in the guard's place",
			[]func(s){started, func(s s) { s.guardIsLost("guard exited") }, s.goneWithoutGuard},
			JobExited, nil,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newTestSupervisor(t)
			ended, err := s.startAsked(Term{StopAt: forever, KillBy: forever})
			if err != nil {
				t.Fatal(err)
			}
			for _, event := range c.events {
				event(s)
			}
			if got := s.Snapshot().State; got != c.state {
				t.Errorf("the job is %s, want %s", got, c.state)
			}
			select {
			case got := <-ended:
				if c.ended != nil && got != *c.ended {
					t.Errorf("the run ended with %+v, want %+v", got, *c.ended)
				}
			default:
				if c.ended != nil {
					t.Errorf("the run has not ended")
				}
			}
		})
	}
}

// TestSupervisor_NoStartWithoutGuard: who has lost the guard starts nothing any more.
func TestSupervisor_NoStartWithoutGuard(t *testing.T) {
	s := newTestSupervisor(t)
	s.guardIsLost("guard hangs")
	if _, err := s.startAsked(Term{}); !errors.Is(err, ErrGuardLost) {
		t.Errorf("%v, want %v", err, ErrGuardLost)
	}
	if got := s.Snapshot().State; got != JobNone {
		t.Errorf("the job is %s, want %s", got, JobNone)
	}
}

// TestSupervisor_KillWaits: the kernel may keep whoever writes to cgroup.kill waiting. Nobody who
// asks for the job waits with it.
func TestSupervisor_KillWaits(t *testing.T) {
	dir := t.TempDir()
	kill := filepath.Join(dir, "cgroup.kill")
	if err := unix.Mkfifo(kill, 0o600); err != nil {
		t.Fatal(err)
	}
	events := filepath.Join(dir, "cgroup.events")
	if err := os.WriteFile(events, []byte("populated 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fifo, err := unix.Open(kill, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fifo) }()
	for err == nil {
		_, err = unix.Write(fifo, make([]byte, 4096))
	}
	s := newTestSupervisor(t)
	if s.cgroup, err = proctree.OpenCgroup(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := s.startAsked(Term{}); err != nil {
		t.Fatal(err)
	}
	s.started(ipc.Started{PID: 7})
	killed := make(chan struct{})
	go func() {
		s.killNow()
		close(killed)
	}()
	for s.killing.TryLock() { // until it writes
		s.killing.Unlock()
		runtime.Gosched()
	}
	if state := s.Snapshot().State; state != JobRunning {
		t.Errorf("state %s", state)
	}
	s.firstExited(ipc.Exited{Code: 5})
	if state := s.Snapshot().State; state != JobStopping {
		t.Errorf("state %s after the exit", state)
	}
	select {
	case <-killed:
		t.Fatal("the kill did not wait")
	default:
	}
	for err == nil {
		_, err = unix.Read(fifo, make([]byte, 4096))
	}
	<-killed
}

// TestSupervisor_Frozen: a frozen job may outlast kill-by, until we ask for its thaw. From then on
// it counts as one that runs: also if the guard's report of an earlier freeze comes only then.
func TestSupervisor_Frozen(t *testing.T) {
	s := newTestSupervisor(t)
	s.cfg.Freeze, s.cfg.Margin = true, func() time.Duration { return 0 }
	now := boottime.Now()
	if _, err := s.startAsked(Term{StopAt: now - 2, KillBy: now - 1}); err != nil {
		t.Fatal(err)
	}
	s.started(ipc.Started{PID: 7})
	overdue := func(want bool, when string) {
		t.Helper()
		if got := s.killOverdue(); got != want {
			t.Errorf("%s: overdue %v, want %v", when, got, want)
		}
	}
	overdue(true, "running past kill-by")
	if s.Suspend() {
		t.Error("the term goes on past kill-by, and the job is not known to be frozen")
	}
	s.frozen(ipc.Frozen{StopAt: now - 2})
	overdue(false, "frozen")
	if !s.Suspend() {
		t.Error("the term can't be suspended while the job is frozen")
	}
	s.Extend(now-1, now)
	overdue(true, "asked to be thawed, and past the new kill-by")
	s.frozen(ipc.Frozen{StopAt: now - 2})
	overdue(true, "the guard says that it was frozen before")
	s.frozen(ipc.Frozen{StopAt: now - 1})
	overdue(false, "frozen again")
	s.stopAsked("planned", now)
	overdue(true, "frozen, and to be killed")
	if s.Suspend() {
		t.Error("the term can be suspended while the job is being stopped")
	}
}

// TestSupervisor_Suspend: a term can be suspended while the job runs or is frozen, and not once the
// guard stops it or kills it by its own clock.
func TestSupervisor_Suspend(t *testing.T) {
	s := newTestSupervisor(t)
	s.cfg.Freeze = true
	if _, err := s.startAsked(Term{StopAt: forever, KillBy: forever}); err != nil {
		t.Fatal(err)
	}
	suspends := func(want bool, when string) {
		t.Helper()
		if got := s.Suspend(); got != want {
			t.Errorf("%s: %v, want %v", when, got, want)
		}
	}
	suspends(false, "starting")
	s.started(ipc.Started{PID: 7})
	suspends(true, "running")
	s.frozen(ipc.Frozen{StopAt: forever})
	suspends(true, "frozen")
	s.ending()
	suspends(false, "the guard ends it")
}

// TestSupervisor_OverPastStopAt: in a term that is suspended nothing is started.
func TestSupervisor_OverPastStopAt(t *testing.T) {
	s := newTestSupervisor(t)
	s.cfg.Freeze = true
	now := boottime.Now()
	past, ahead := Term{Token: 1, StopAt: now}, Term{Token: 2, StopAt: forever}
	if s.job.term = ahead; s.over(t.Context(), ahead) || !s.over(t.Context(), past) {
		t.Error("a term is over, or is not, because of another one")
	}
	s.job.term.StopAt = now // the deadlines of the job are those that count
	if !s.over(t.Context(), ahead) {
		t.Error("a term is not over past stop-at")
	}
}
