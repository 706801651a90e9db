//go:build linux

package supervisor_test

import (
	"bufio"
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
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
	"leasehold/supervisor/guard"
	"leasehold/supervisor/proctree"
)

// The test binary plays every part: the guard as main would run it, an elector that obeys the test
// over a socket, and jobs that hold a connection to the test for as long as they live.

// TestMain plays the part that its first argument names.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "guard":
			if harness.RaceDetector() {
				notRealTime()
			}
			os.Exit(guardMain())
		case "normal-guard":
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

// notRealTime executes the guard without the right to real-time priority. The race detector's locks
// spin: a real-time thread that waits for one keeps its holder from running, for a second.
func notRealTime() {
	const capSysNice = 23
	runtime.LockOSThread()
	err := unix.Prctl(unix.PR_CAPBSET_DROP, capSysNice, 0, 0, 0)
	if errors.Is(err, unix.EPERM) {
		return // an ordinary user
	}
	args := append([]string{os.Args[0], "normal-guard"}, os.Args[2:]...)
	panic(errors.Join(err, unix.Exec("/proc/self/exe", args, os.Environ())))
}

// guardBinary is a copy of the test binary that an ordinary user can execute, and setuidBinary one
// that makes them who the test is.
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

// fromEnv is a duration that newRig was given for this test, or else the usual one.
func fromEnv(name string, usual time.Duration) time.Duration {
	if d, err := time.ParseDuration(os.Getenv(name)); err == nil {
		return d
	}
	return usual
}

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
		Election: "election", Identity: "identity", TTL: fromEnv("TEST_TTL", testTTL),
		Margin:     fromEnv("TEST_MARGIN", testMargin),
		StopSignal: unix.SIGTERM, StopGrace: testWait, NewPrivs: os.Getenv("TEST_NEW_PRIVS") != "",
		Elector: []string{"leasehold", "elector"}, Probe: []string{"leasehold", "probe"},
		Revoke: func(lease int64, _ time.Duration) []string {
			return []string{"leasehold", "revoke", strconv.FormatInt(lease, 16)}
		},
		Signals: signals, Children: children, Notify: func(string) {}, Heartbeat: func() {},
		Logger: slog.New(slog.NewMultiHandler(
			slog.NewTextHandler(os.Stderr, nil),
			slog.NewTextHandler(dialTest("guard"), &slog.HandlerOptions{Level: slog.LevelDebug}),
		)),
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitLost
	}
	return exit.Code
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
	r := &rig{
		t: t, lease: rand.Int64(), exited: make(chan int, 1), alive: map[string]int{},
		pids: map[string]int{},
	}
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
	r.guard.Env = append(os.Environ(), append(env, "TEST_SOCKET="+socket, "TEST_JOB="+job,
		fmt.Sprint("TEST_LEASE=", r.lease))...)
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
	r.waitSaid("ready")
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

// waitIdle waits until the guard, which has had one job, knows that nothing of it is left.
func (r *rig) waitIdle() {
	r.t.Helper()
	r.wait("the guard has no job", func() bool {
		return slices.ContainsFunc(r.said, func(s string) bool {
			return strings.Contains(s, `msg="job state"`) && strings.Contains(s, " to=idle ")
		})
	})
}

// requireDead fails if any process of the job is alive. It is called when its death has just been
// claimed: a process that has ended has closed its connection, but the other end may take a moment
// to read that, so the pid decides.
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
		if child != r.pid("elector") {
			pid = child
		}
	}
	return pid
}

// replaced waits until that many electors have taken the place of another, and returns what the
// last one has learned. lead, end and the like are for that one then.
func (r *rig) replaced(n int) (said string) {
	r.t.Helper()
	r.wait(fmt.Sprintf("elector %d takes another one's place", n), func() bool {
		seen := 0
		for _, s := range r.said {
			if strings.HasPrefix(s, "adopted ") {
				seen++
				said = s
			}
		}
		return seen >= n
	})
	return said
}

// pid is that of the elector, or of the job's first process, that said hello last.
func (r *rig) pid(who string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pids[who]
}

// killElector sends a signal to the elector that runs now.
func (r *rig) killElector(sig unix.Signal) { _ = unix.Kill(r.pid("elector"), sig) }

// loseElectors kills as many electors as the guard does not replace any more.
func (r *rig) loseElectors() {
	r.t.Helper()
	for n := range 2 {
		r.killElector(unix.SIGKILL)
		r.replaced(n + 1)
	}
	r.killElector(unix.SIGKILL)
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
	r.mu.Lock()
	elector := r.elector
	r.mu.Unlock()
	if _, err := fmt.Fprintf(elector, format+"\n", args...); err != nil {
		r.t.Fatal(err)
	}
}

// lead starts the job, waits until that many of its processes run, and only then sets the
// deadlines, from now on: how long a start takes is the machine's affair.
func (r *rig) lead(processes int, stopAt, killBy time.Duration) {
	r.t.Helper()
	r.tell("lead 1h 2h")
	r.waitJobs(processes)
	r.tell("extend %v %v", stopAt, killBy)
	r.waitSaid("extended")
}

// endPlanned ends the term and then the daemon, and requires that nothing of the job is left.
func (r *rig) endPlanned() {
	r.t.Helper()
	r.tell("end planned")
	r.waitSaid("led <nil>")
	r.requireDead()
	r.tell("exit 0")
	r.waitExit(0)
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

// eachUser runs a test as root, whose job has a cgroup, and as an ordinary user, whose job has
// none.
func eachUser(t *testing.T, f func(t *testing.T, uid int)) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Run("user", func(t *testing.T) { f(t, 0) })
		return
	}
	t.Run("root", func(t *testing.T) { t.Parallel(); f(t, 0) })
	t.Run("user", func(t *testing.T) { t.Parallel(); f(t, 65534) })
}

// number is the pid at the end of what a process said first.
func number(said string) int {
	pid, _ := strconv.Atoi(said[strings.LastIndexByte(said, ' ')+1:])
	return pid
}
