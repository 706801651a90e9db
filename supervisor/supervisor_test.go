//go:build linux

package supervisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	ossignal "os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/guard"
	"leasehold/supervisor/proctree"
)

// The test binary plays every part: the guard as main would run it, an elector that obeys the test over a socket, and jobs that
// hold a connection to the test for as long as they live.

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "guard":
			os.Exit(guardMain())
		case "elector":
			os.Exit(electorMain(os.Args[2:]))
		case "probe":
			fmt.Print("\n")
			time.Sleep(10 * time.Second)
			os.Exit(0)
		case "revoke":
			dialTest("revoke " + os.Args[2])
			if os.Getenv("TEST_REVOKE") == "hang" {
				select {}
			}
			os.Exit(0)
		case "job":
			jobMain(os.Args[2])
		}
	}
	os.Exit(runTests(m))
}

// guardBinary is a copy of the test binary that an ordinary user can execute, and setuidBinary one that makes them who the test is.
var guardBinary, setuidBinary string

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "supervisor")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	guardBinary, setuidBinary = filepath.Join(dir, "leasehold"), filepath.Join(dir, "setuid")
	image, err := os.ReadFile("/proc/self/exe")
	err = errors.Join(err, os.Chmod(dir, 0o755))
	for _, path := range []string{guardBinary, setuidBinary} {
		err = errors.Join(err, os.WriteFile(path, image, 0o755))
	}
	if err := errors.Join(err, os.Chmod(setuidBinary, 0o755|os.ModeSetuid)); err != nil {
		panic(err)
	}
	return m.Run()
}

const (
	testTTL    = 3 * time.Second
	testMargin = 300 * time.Millisecond
	testWait   = 20 * time.Second

	exitLost = 70 // of a guard that has lost the elector or the spawner
)

func guardMain() int {
	signals := make(chan os.Signal, 64)
	ossignal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1)
	children := make(chan os.Signal, 1)
	ossignal.Notify(children, unix.SIGCHLD)
	self, err := os.Executable()
	if err != nil {
		return 1
	}
	path := self
	if p := os.Getenv("TEST_PATH"); p != "" {
		path = p
	}
	exit, err := guard.Run(guard.Config{
		Path: path, Argv: []string{"job", "job", os.Getenv("TEST_JOB")}, Env: os.Environ(),
		Election: "election", Identity: "identity", TTL: testTTL, Margin: testMargin, StopSignal: unix.SIGTERM, NewPrivs: os.Getenv("TEST_NEW_PRIVS") != "",
		Elector: []string{"leasehold", "elector"}, Probe: []string{"leasehold", "probe"},
		Revoke: func(lease int64, _ time.Duration) []string {
			return []string{"leasehold", "revoke", strconv.FormatInt(lease, 16)}
		},
		Signals: signals, Children: children, Notify: func(string) {}, Heartbeat: func() {},
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitLost
	}
	return exit.Code
}

// dialTest connects to the test and says who is there. The connection stays open for the life of the process.
func dialTest(hello string) net.Conn {
	c, err := net.Dial("unix", os.Getenv("TEST_SOCKET"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "reach the test:", err)
		os.Exit(3)
	}
	fmt.Fprintf(c, "%s %d\n", hello, os.Getpid())
	return c
}

// electorMain obeys: "lead STOP-AT KILL-BY" (durations from now), "extend …", "end planned|contact|lost", "exit CODE".
func electorMain(args []string) int {
	ossignal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	guard, _ := strconv.Atoi(args[0])
	spawner, _ := strconv.Atoi(args[1])
	cgroupDir := ""
	if len(args) > 2 {
		cgroupDir = args[2]
	}
	test := dialTest("elector")
	causes := map[string]error{"planned": errors.New("planned"), "contact": errors.New("contact"), "lost": errors.New("lost")}
	h, err := Connect(HandleConfig{
		In: 3, Out: 4, SpawnerSock: 5, SpawnerPidfd: 6, Guard: guard, Spawner: spawner, CgroupDir: cgroupDir, TTL: testTTL, Margin: func() time.Duration { return testMargin },
		Restart: RestartNever, Signal: func(s unix.Signal) { fmt.Fprintf(test, "signal %d\n", s) },
		Turning: func() bool { return true }, Changed: func() {},
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		fmt.Fprintln(test, "connect", err)
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	handleDone := make(chan error, 1)
	go func() {
		err := h.Run(ctx)
		fmt.Fprintf(test, "run %v\n", err)
		handleDone <- err
	}()
	lease, _ := strconv.ParseInt(os.Getenv("TEST_LEASE"), 10, 64)
	h.Lease(lease, testTTL)
	h.Ready()
	var term context.Context
	var end context.CancelCauseFunc
	begin := func() { term, end = context.WithCancelCause(context.Background()) }
	begin()
	defer func() { end(nil) }()
	lines := bufio.NewScanner(test)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		duration := func(i int) time.Duration {
			d, err := time.ParseDuration(f[i])
			if err != nil {
				panic(err)
			}
			return d
		}
		switch f[0] {
		case "lead":
			t := Term{Key: "election/abc", Token: 7, LeaseID: lease, StopAt: boottime.Now() + duration(1), KillBy: boottime.Now() + duration(2)}
			go func() {
				err := h.Supervise(term, t, func(cause error) time.Duration {
					switch {
					case errors.Is(cause, causes["planned"]):
						return 10 * time.Second
					case errors.Is(cause, causes["contact"]):
						return -1
					}
					return 0
				})
				fmt.Fprintf(test, "led %v\n", err)
			}()
		case "again":
			end(nil)
			begin()
		case "extend":
			h.Extend(boottime.Now()+duration(1), boottime.Now()+duration(2))
			fmt.Fprintln(test, "extended")
		case "end":
			end(causes[f[1]])
		case "exit":
			cancel()
			<-handleDone
			h.Lease(0, 0)
			code, _ := strconv.Atoi(f[1])
			h.Exit(code, "test")
			return code
		}
	}
	return 1
}

// jobMain is a job, or one of its descendants.
func jobMain(behaviour string) {
	again := func(behaviour string, setsid bool) {
		cmd := exec.Command("/proc/self/exe", "job", behaviour)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: setsid}
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	switch behaviour {
	case "daemonize":
		again("child-of-daemonize", true)
	case "child-of-daemonize":
		again("stubborn", true)
		os.Exit(0)
	case "stubborn":
		ossignal.Ignore(unix.SIGTERM, unix.SIGHUP, unix.SIGINT)
	case "sudo":
		cmd := exec.Command(os.Getenv("TEST_SETUID"), "job", "escape")
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	case "escape": // as sudo does, and from the cgroup: who may, may write there
		_ = syscall.Setuid(0)
		_ = os.WriteFile(os.Getenv("TEST_OUTSIDE"), []byte(strconv.Itoa(os.Getpid())), 0)
		dialTest(fmt.Sprintf("job escape as-%d", os.Geteuid()))
		select {}
	case "exit-5":
		os.Exit(5)
	case "leave-behind":
		again("stubborn", true)
		time.Sleep(200 * time.Millisecond) // its child has said hello by then, or is killed earlier: both are fine
		os.Exit(0)
	case "storm":
		// Some hundred processes at any time, all of them short-lived and replaced at once. It says hello first: once they run, the
		// deadline may come before it has the processor again.
		ossignal.Ignore(unix.SIGTERM)
		dialTest("job " + behaviour)
		for range 50 {
			go func() {
				for {
					_ = exec.Command("/bin/sh", "-c", "trap '' TERM; (setsid sleep 0.1 &) ; sleep 0.05").Run()
				}
			}()
		}
		select {}
	case "threads":
		// The main thread goes, the others stay: the state in /proc reads Z and the process lives.
		go func() {
			runtime.LockOSThread()
			dialTest("job threads")
			select {}
		}()
		time.Sleep(100 * time.Millisecond)
		runtime.LockOSThread()
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
	}
	dialTest("job " + behaviour)
	select {}
}

// rig is a guard with its elector and job, and what they say.
type rig struct {
	t      *testing.T
	guard  *exec.Cmd
	exited chan int

	mu      sync.Mutex
	cond    *sync.Cond
	said    []string
	elector net.Conn
	lease   int64
	alive   map[string]int // jobs by "behaviour pid" whose connection is open
	pids    map[string]int
}

func newRig(t *testing.T, job string, uid int, env ...string) *rig {
	t.Helper()
	return newRigIn(t, nil, job, uid, env...)
}

// newRigIn starts the guard in a cgroup, where one is given.
func newRigIn(t *testing.T, cgroup *os.File, job string, uid int, env ...string) *rig {
	t.Helper()
	r := &rig{t: t, lease: rand.Int64(), exited: make(chan int, 1), alive: map[string]int{}, pids: map[string]int{}}
	r.cond = sync.NewCond(&r.mu)
	dir, err := os.MkdirTemp("", "rig")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if err := os.Chmod(socket, 0o777); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go r.serve(c)
		}
	}()
	r.guard = exec.Command(guardBinary, "guard")
	r.guard.Env = append(os.Environ(), append(env, "TEST_SOCKET="+socket, "TEST_JOB="+job, fmt.Sprint("TEST_LEASE=", r.lease))...)
	r.guard.Stdout, r.guard.Stderr = os.Stdout, os.Stderr
	r.guard.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if uid != 0 {
		r.guard.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
		r.guard.Dir = "/"
	}
	if cgroup != nil {
		r.guard.SysProcAttr.UseCgroupFD, r.guard.SysProcAttr.CgroupFD = true, int(cgroup.Fd())
	}
	if err := r.guard.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = r.guard.Wait()
		r.exited <- r.guard.ProcessState.ExitCode()
	}()
	t.Cleanup(r.cleanUp)
	r.waitSaid("elector")
	return r
}

func (r *rig) serve(c net.Conn) {
	defer c.Close()
	lines := bufio.NewScanner(c)
	who := ""
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		r.mu.Lock()
		r.said = append(r.said, lines.Text())
		if who == "" {
			who = lines.Text()
			pid, _ := strconv.Atoi(f[len(f)-1])
			r.pids[f[0]] = pid
			switch f[0] {
			case "elector":
				r.elector = c
			case "job":
				r.alive[who] = pid
			}
		}
		r.cond.Broadcast()
		r.mu.Unlock()
	}
	r.mu.Lock()
	delete(r.alive, who)
	r.cond.Broadcast()
	r.mu.Unlock()
}

// wait waits until f is true.
func (r *rig) wait(what string, f func() bool) {
	r.t.Helper()
	timer := time.AfterFunc(testWait, r.cond.Broadcast)
	defer timer.Stop()
	end := time.Now().Add(testWait)
	r.mu.Lock()
	defer r.mu.Unlock()
	for !f() {
		if time.Now().After(end) {
			r.t.Fatalf("%s: not within %v; said %q, alive %v", what, testWait, r.said, r.alive)
		}
		r.cond.Wait()
	}
}

func (r *rig) waitSaid(prefix string) string {
	r.t.Helper()
	line := ""
	r.wait(prefix, func() bool {
		for _, s := range r.said {
			if strings.HasPrefix(s, prefix) {
				line = s
				return true
			}
		}
		return false
	})
	return line
}

func (r *rig) waitJobs(n int) {
	r.t.Helper()
	r.wait(fmt.Sprintf("%d processes of the job", n), func() bool { return len(r.alive) >= n })
}

// requireDead fails if any process of the job is alive. It is called when its death has just been claimed: a process that has
// ended has closed its connection, but the other end may take a moment to read that, so the pid decides.
func (r *rig) requireDead() {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for who, pid := range r.alive {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if !proctree.PidfdExited(fd) {
			r.t.Errorf("%s is alive", who)
		}
		_ = unix.Close(fd)
	}
}

// children lists the guard's.
func (r *rig) children() (pids []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", r.guard.Process.Pid))
	for _, path := range lists {
		list, _ := os.ReadFile(path)
		for _, f := range strings.Fields(string(list)) {
			pids = append(pids, number(" "+f))
		}
	}
	return pids
}

// spawner is the pid of the guard's child that is not the elector, while there is no other.
func (r *rig) spawner() (pid int) {
	for _, child := range r.children() {
		if child != r.pids["elector"] {
			pid = child
		}
	}
	return pid
}

// count counts what was said so. The mutex is held.
func (r *rig) count(line string) (n int) {
	for _, s := range r.said {
		if s == line {
			n++
		}
	}
	return n
}

func (r *rig) tell(format string, args ...any) {
	r.t.Helper()
	if _, err := fmt.Fprintf(r.elector, format+"\n", args...); err != nil {
		r.t.Fatal(err)
	}
}

// lead starts the job, waits until that many of its processes run, and only then sets the deadlines, from now on: how long a start
// takes is the machine's affair.
func (r *rig) lead(processes int, stopAt, killBy time.Duration) {
	r.t.Helper()
	r.tell("lead 1h 2h")
	r.waitJobs(processes)
	r.tell("extend %v %v", stopAt, killBy)
	r.waitSaid("extended")
}

func (r *rig) waitExit(code int) {
	r.t.Helper()
	select {
	case got := <-r.exited:
		r.exited <- got
		if got != code {
			r.t.Errorf("the guard exited with %d, not %d", got, code)
		}
	case <-time.After(testWait):
		r.t.Fatalf("the guard did not exit")
	}
}

// cleanUp ends what a failed test left, by pid.
func (r *rig) cleanUp() {
	r.mu.Lock()
	pids := []int{r.guard.Process.Pid, r.pids["elector"]}
	for _, pid := range r.alive {
		pids = append(pids, pid)
	}
	r.mu.Unlock()
	select {
	case <-r.exited:
		if !r.t.Failed() {
			return
		}
	default:
	}
	for _, pid := range pids {
		if pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// eachUser runs a test as root, whose job has a cgroup, and as an ordinary user, whose job has none.
func eachUser(t *testing.T, f func(t *testing.T, uid int)) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Run("user", func(t *testing.T) { f(t, 0) })
		return
	}
	t.Run("root", func(t *testing.T) { t.Parallel(); f(t, 0) })
	t.Run("user", func(t *testing.T) { t.Parallel(); f(t, 65534) })
}

func TestGuard_PlannedStop(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		r := newRig(t, "plain", uid)
		r.tell("lead 1h 2h")
		r.waitJobs(1)
		r.tell("end planned")
		r.waitSaid("led <nil>")
		r.requireDead()
		r.tell("exit 0")
		r.waitExit(0)
	})
}

func TestGuard_DeadlinesWithoutRenewal(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, job := range []string{"plain", "stubborn", "daemonize", "threads"} {
			t.Run(job, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, job, uid)
				processes := 1
				if job == "daemonize" {
					processes = 2
				}
				r.lead(processes, 600*time.Millisecond, 900*time.Millisecond)
				r.waitSaid("led <nil>")
				r.requireDead()
				r.tell("exit 76")
				r.waitExit(76)
			})
		}
	})
}

func TestGuard_ExtendMovesDeadlinesUntilStopAt(t *testing.T) {
	r := newRig(t, "stubborn", 0)
	r.lead(1, 500*time.Millisecond, time.Hour)
	for range 5 {
		r.tell("extend 500ms 1h")
		time.Sleep(200 * time.Millisecond)
	}
	r.mu.Lock()
	alive := len(r.alive)
	r.mu.Unlock()
	if alive != 1 {
		t.Fatal("the job was stopped although its deadlines were moved")
	}
	time.Sleep(600 * time.Millisecond) // stop-at passes, and the job ignores the stop signal
	r.tell("extend 1h 2h")
	r.tell("end lost")
	r.waitSaid("led")
	r.requireDead()
	r.tell("exit 0")
	r.waitExit(0)
}

func TestGuard_ElectorKilled(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, job := range []string{"plain", "stubborn", "daemonize"} {
			t.Run(job, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, job, uid)
				r.tell("lead 1h 2h")
				r.waitJobs(1)
				if job == "daemonize" {
					r.waitJobs(2)
				}
				_ = unix.Kill(r.pids["elector"], unix.SIGKILL)
				r.waitSaid("revoke " + strconv.FormatInt(r.lease, 16))
				r.requireDead()
				r.waitExit(exitLost)
			})
		}
	})
}

func TestGuard_ElectorStoppedPastKillBy(t *testing.T) {
	r := newRig(t, "stubborn", 0)
	r.lead(1, 500*time.Millisecond, 700*time.Millisecond)
	_ = unix.Kill(r.pids["elector"], unix.SIGSTOP)
	r.waitSaid("revoke " + strconv.FormatInt(r.lease, 16))
	r.requireDead()
	r.waitExit(exitLost)
}

func TestHandle_GuardKilled(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
			for _, job := range []string{"plain", "stubborn", "daemonize", "threads"} {
				t.Run(job+"/"+unix.SignalName(sig), func(t *testing.T) {
					t.Parallel()
					r := newRig(t, job, uid)
					if sig == unix.SIGSTOP { // which matters only near kill-by
						r.tell("lead 4s 5s")
					} else {
						r.tell("lead 1h 2h")
					}
					r.waitJobs(1)
					if job == "daemonize" {
						r.waitJobs(2)
					}
					_ = unix.Kill(r.guard.Process.Pid, sig)
					r.waitSaid("led " + ErrGuardGone.Error())
					r.requireDead()
					r.waitSaid("run " + ErrGuardGone.Error())
					r.waitExit(-1)
					r.tell("exit 70")
				})
			}
		}
	})
}

// TestHandle_SilentGuard: silence alone costs the job nothing. It does where the guard had to act.
func TestHandle_SilentGuard(t *testing.T) {
	stopped := func(t *testing.T, lead string) *rig {
		t.Parallel()
		r := newRig(t, "stubborn", 0)
		r.tell(lead)
		r.waitJobs(1)
		_ = unix.Kill(r.guard.Process.Pid, unix.SIGSTOP)
		return r
	}
	taken := func(r *rig) {
		r.t.Helper()
		r.waitSaid("led " + ErrGuardGone.Error())
		r.requireDead()
		r.waitExit(-1)
		r.tell("exit 70")
	}
	t.Run("far from kill-by", func(t *testing.T) {
		r := stopped(t, "lead 1h 2h")
		time.Sleep(testTTL / 2) // five times what it may take to answer elsewhere
		_ = unix.Kill(r.guard.Process.Pid, unix.SIGCONT)
		r.waitJobs(1)
		r.tell("end lost")
		r.waitSaid("led <nil>")
		r.requireDead()
		r.tell("exit 0")
		r.waitExit(0)
	})
	t.Run("a loss", func(t *testing.T) {
		r := stopped(t, "lead 1h 2h")
		began := boottime.Now()
		r.tell("end lost")
		taken(r)
		if took := boottime.Now() - began; took > 4*time.Second {
			t.Errorf("it took %v", took)
		} else {
			t.Logf("it took %v", took)
		}
	})
	t.Run("near the kill-by that it knows", func(t *testing.T) {
		r := stopped(t, "lead 4s 5s")
		r.tell("extend 1h 2h")
		taken(r)
	})
}

func TestGuard_JobEndsByItself(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		t.Run("code", func(t *testing.T) {
			r := newRig(t, "exit-5", uid)
			r.tell("lead 1h 2h")
			r.waitSaid("led the job ended with code 5")
			r.tell("exit 5")
			r.waitExit(5)
		})
		t.Run("leaves a process behind", func(t *testing.T) {
			r := newRig(t, "leave-behind", uid)
			r.tell("lead 1h 2h")
			r.waitSaid("led the job ended with code 0")
			r.requireDead()
			r.tell("exit 0")
			r.waitExit(0)
		})
		t.Run("not executable", func(t *testing.T) {
			r := newRig(t, "plain", uid, "TEST_PATH=/etc/passwd")
			r.tell("lead 1h 2h")
			r.waitSaid("led the job could not be started: permission denied")
			r.tell("exit 126")
			r.waitExit(126)
		})
	})
}

func TestGuard_SecondSignalKills(t *testing.T) {
	r := newRig(t, "stubborn", 0)
	r.tell("lead 1h 2h")
	r.waitJobs(1)
	_ = unix.Kill(r.guard.Process.Pid, unix.SIGTERM)
	r.waitSaid("signal 15")
	r.tell("end planned")
	_ = unix.Kill(r.guard.Process.Pid, unix.SIGTERM)
	r.waitSaid("led <nil>")
	r.requireDead()
	r.tell("exit 0")
	r.waitExit(0)
}

// TestGuard_SleepsBesideZombies: a process that has ended can't be reaped for as long as a tracer holds it.
func TestGuard_SleepsBesideZombies(t *testing.T) {
	t.Run("job", func(t *testing.T) {
		t.Parallel()
		r := newRig(t, "plain", 0)
		r.tell("lead 1h 2h")
		release := hold(t, number(r.waitSaid("job")))
		_ = unix.Kill(number(r.waitSaid("job")), unix.SIGKILL)
		r.requireSleep()
		release()
		r.waitSaid("led the job was ended by signal 9")
		r.tell("exit 0")
		r.waitExit(0)
	})
	t.Run("revoke", func(t *testing.T) {
		t.Parallel()
		r := newRig(t, "plain", 0, "TEST_REVOKE=hang")
		r.tell("lead 1h 2h")
		r.waitJobs(1)
		_ = unix.Kill(r.pids["elector"], unix.SIGKILL)
		release := hold(t, number(r.waitSaid("revoke"))) // until its time is up, and longer
		time.Sleep(testTTL)
		r.requireSleep()
		release()
		r.waitExit(exitLost)
	})
}

// TestGuard_SpawnerLost: all of the job falls to the guard, also while a tracer keeps the spawner from being reaped.
func TestGuard_SpawnerLost(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		for _, traced := range []bool{false, true} {
			t.Run(fmt.Sprintf("traced=%v", traced), func(t *testing.T) {
				t.Parallel()
				if traced && os.Getuid() != 0 {
					t.Skip("skipped: needs root")
				}
				r := newRig(t, "daemonize", uid)
				r.tell("lead 1h 2h")
				r.waitJobs(2)
				spawner := r.spawner()
				release := func() {}
				if traced {
					release = hold(t, spawner)
				}
				_ = unix.Kill(spawner, unix.SIGKILL)
				r.waitSaid("revoke " + strconv.FormatInt(r.lease, 16))
				r.requireDead()
				r.waitExit(exitLost)
				release()
			})
		}
	})
}

// TestHandle_GuardKilledSpawnerStopped: two faults at once, after which the lease must not stay for ever.
func TestHandle_GuardKilledSpawnerStopped(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		r := newRig(t, "daemonize", uid)
		r.tell("lead 1h 2h")
		r.waitJobs(2)
		_ = unix.Kill(r.spawner(), unix.SIGSTOP)
		_ = unix.Kill(r.guard.Process.Pid, unix.SIGKILL)
		r.waitSaid("led " + ErrGuardGone.Error())
		r.requireDead()
		r.waitSaid("run " + ErrGuardGone.Error())
		r.tell("exit 70")
	})
}

// TestGuard_StartCalledOff: a start that comes to nothing leaves no cgroup behind in which the next job would be killed at once.
func TestGuard_StartCalledOff(t *testing.T) {
	needCgroup(t)
	r := newRig(t, "plain", 0)
	spawner := r.spawner()
	_ = unix.Kill(spawner, unix.SIGSTOP)
	r.tell("lead 200ms 300ms")
	time.Sleep(350 * time.Millisecond) // kill-by has passed, and the spawner is not yet given up
	_ = unix.Kill(spawner, unix.SIGCONT)
	r.waitSaid("led <nil>")
	r.tell("again")
	r.tell("lead 1h 2h")
	r.waitJobs(1)
	r.tell("end planned")
	r.wait("the second term ends", func() bool { return r.count("led <nil>") == 2 })
	r.requireDead()
	r.tell("exit 0")
	r.waitExit(0)
}

// number is the pid at the end of what a process said first.
func number(said string) int {
	pid, _ := strconv.Atoi(said[strings.LastIndexByte(said, ' ')+1:])
	return pid
}

// hold traces a process, so that nobody reaps it before it is released. The rest of the test is bound to its thread.
func hold(t *testing.T, pid int) (release func()) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.PtraceSeize(pid); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		for {
			var ws unix.WaitStatus
			if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); err != nil && err != unix.EINTR {
				t.Fatal(err)
			}
			if ws.Signaled() {
				return
			}
			_ = unix.PtraceCont(pid, int(ws.StopSignal()))
		}
	}
}

// requireSleep fails if the guard, and what it has started, takes more than a little of a processor.
func (r *rig) requireSleep() {
	r.t.Helper()
	const interval = time.Second
	pids := append([]int{r.guard.Process.Pid}, r.children()...)
	used := func() (sum time.Duration) {
		for _, pid := range pids {
			var ts unix.Timespec
			if unix.ClockGettime(int32(^pid<<3|2), &ts) == nil { // its CPU-time clock, clock_getcpuclockid(3)
				sum += time.Duration(ts.Nano())
			}
		}
		return sum
	}
	before := used()
	time.Sleep(interval)
	if busy := used() - before; busy > interval/4 {
		r.t.Errorf("in %v the guard was busy for %v", interval, busy)
	} else {
		r.t.Logf("in %v the guard was busy for %v", interval, busy)
	}
}

func TestGuard_LostContactKillsForkStorm(t *testing.T) {
	eachUser(t, func(t *testing.T, uid int) {
		r := newRig(t, "storm", uid)
		r.lead(1, 1500*time.Millisecond, 1700*time.Millisecond)
		r.waitSaid("led <nil>")
		r.requireDead()
		r.tell("exit 0")
		r.waitExit(0)
	})
}

// TestGuard_SetUserID: what gains privileges can leave the job's cgroup, and a guard without CAP_KILL can't kill it there. So it
// gains none, unless the user wants it to.
func TestGuard_SetUserID(t *testing.T) {
	const user = 65534
	parent := needCgroup(t)
	outside := filepath.Join(parent, "cgroup.procs")
	for _, c := range []struct {
		name string
		env  []string
		euid int
	}{
		{"no_new_privs", nil, user},
		{"off", []string{"TEST_NEW_PRIVS=1"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := delegateCgroup(t, parent, user)
			r := newRigIn(t, dir, "sudo", user, append(c.env, "TEST_SETUID="+setuidBinary, "TEST_OUTSIDE="+outside)...)
			if dirs, _ := filepath.Glob(filepath.Join(dir.Name(), "leasehold-*")); len(dirs) != 1 {
				t.Fatalf("the job has no cgroup of its own: %q", dirs)
			}
			r.tell("lead 1h 2h")
			said := r.waitSaid("job escape")
			if !strings.HasPrefix(said, fmt.Sprintf("job escape as-%d ", c.euid)) {
				t.Fatalf("%q, want the user %d", said, c.euid)
			}
			r.tell("end lost")
			if c.euid == 0 { // the guard can't kill it, and the lease is held on to
				r.wait("the rest of the job is dead", func() bool { return len(r.alive) == 1 })
				pid, err := strconv.Atoi(said[strings.LastIndexByte(said, ' ')+1:])
				if err := errors.Join(err, unix.Kill(pid, unix.SIGKILL)); err != nil {
					t.Error(err)
				}
			}
			r.waitSaid("led <nil>")
			r.requireDead()
			r.tell("exit 0")
			r.waitExit(0)
		})
	}
}

// delegateCgroup makes a cgroup that belongs to a user.
func delegateCgroup(t *testing.T, parent string, uid int) *os.File {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "delegated-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
		for end := time.Now().Add(testWait); ; _, _ = unix.Poll(nil, 5) {
			if removeTree(dir); unix.Access(dir, unix.F_OK) != nil {
				return
			}
			if time.Now().After(end) {
				t.Errorf("%s can't be removed", dir)
				return
			}
		}
	})
	for _, name := range []string{"", "cgroup.procs", "cgroup.subtree_control"} {
		if err := os.Chown(filepath.Join(dir, name), uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// TestGuard_LocksMemory: with CAP_IPC_LOCK whatever the limit, without it only where there is none.
func TestGuard_LocksMemory(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old); err != nil {
		t.Fatal(err)
	}
	finite := old.Cur != unix.RLIM_INFINITY
	eachUser(t, func(t *testing.T, uid int) {
		want := !finite || uid == 0 && proctree.HasCapability(unix.CAP_IPC_LOCK)
		r := newRig(t, "plain", uid)
		r.tell("lead 1h 2h")
		r.waitJobs(1)
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.guard.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if locked := !strings.Contains(string(text), "VmLck:\t       0 kB\n"); locked != want {
			t.Errorf("memory is locked: %v, want %v; limit %d", locked, want, old.Cur)
		}
		if mine, jobs := lockLimit(t, os.Getpid()), lockLimit(t, r.pids["job"]); jobs != mine {
			t.Errorf("the job's limit is %q, want %q", jobs, mine)
		}
		r.tell("end planned")
		r.waitSaid("led <nil>")
		r.tell("exit 0")
		r.waitExit(0)
	})
}

// lockLimit is the line of /proc that tells how much memory a process may lock.
func lockLimit(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "Max locked memory") {
			return line
		}
	}
	t.Fatalf("no limit of locked memory in %s", text)
	return ""
}

// needCgroup skips where this user can't make cgroups, which CI forbids.
func needCgroup(t *testing.T) string {
	t.Helper()
	parent, err := proctree.OwnCgroup()
	if err == nil {
		err = unix.Access(parent, unix.W_OK)
	}
	if err != nil {
		if os.Getenv("E2E_NO_SKIP") != "" {
			t.Fatalf("needs root (cgroup v2): %v", err)
		}
		t.Skip("skipped: needs root (cgroup v2)")
	}
	return parent
}

// removeTree removes a cgroup and those inside it, the innermost first.
func removeTree(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeTree(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}
