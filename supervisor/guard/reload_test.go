//go:build linux

package guard

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/reload"
)

// reloadGuard is a guard whose binary after a reload is a shell. As the process that checks, it
// does what the test says, and as an elector it sleeps. The one before it is the test binary, which
// as an elector exits at once.
type reloadGuard struct {
	*testGuard
	listener int
	conn     int    // what the guard has connected; -1: nothing
	request  string // what is sent there
	settings []int  // what goes with it
}

// These are what the shell leaves as a result.
var (
	passes = shellResult(reload.Result{Version: "9", Env: []string{"A=b", "PATH=/usr/bin:/bin"}})
	fails  = shellResult(reload.Result{Refused: "no such luck"})
)

func shellResult(r reload.Result) string {
	return "printf '" + strings.ReplaceAll(string(r.Encode()), "\x00", `\000`) + "' >&3"
}

func newReloadGuard(t *testing.T, idle bool, script string) *reloadGuard {
	t.Helper()
	g := &reloadGuard{testGuard: newElectorGuard(t, idle), conn: -1, request: "reload"}
	g.cfg.Reload = ReloadConfig{
		Path: "/bin/sh", Env: []string{"PATH=/usr/bin:/bin"},
		Check: func(lease, created int64, settings bool) []string {
			given := fmt.Sprintf("lease=%d; created=%d; settings=%v; ", lease, created, settings)
			return []string{"sh", "-c", given + script}
		},
	}
	g.starter.argv = []string{"sh", "-c", "exec sleep 1000"}
	g.starter.image.version = "8"
	g.known.Entered = ipc.Entered{Key: "key", Created: 5}
	g.askerAddress = reload.Address(os.Getpid(), fmt.Sprint(boottime.Now()))
	var err error
	if g.listener, err = unix.Socket(unix.AF_UNIX,
		unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeAll(g.listener, g.conn) })
	if err := unix.Bind(g.listener, &unix.SockaddrUnix{Name: g.askerAddress}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(g.listener, 4); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.until("no fork", func() bool { return g.elector.state != electorStarting })
		for _, pid := range []int{g.elector.pid, g.reload.pid} {
			if pid > 0 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
	})
	return g
}

// until lets the loop turn until f is true. Nobody passes SIGCHLD on here. It sends the request.
func (g *reloadGuard) until(what string, f func() bool) {
	g.t.Helper()
	g.testGuard.until(what, func() bool {
		_, _ = unix.Write(g.wakeW, wakeByte)
		time.Sleep(time.Millisecond)
		if g.conn < 0 {
			g.conn, _, _ = unix.Accept4(g.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if g.conn >= 0 && g.request != "" {
				rights := unix.UnixRights(g.settings...)
				_ = unix.Sendmsg(g.conn, []byte(g.request), rights, nil, unix.MSG_NOSIGNAL)
			}
		}
		return f()
	})
}

// answered lets the loop turn until the guard has answered, and returns that.
func (g *reloadGuard) answered() (message string) {
	g.t.Helper()
	g.until("answered", func() bool {
		var b [4096]byte
		n, err := unix.Read(g.conn, b[:])
		message = string(b[:max(n, 0)])
		return err == nil
	})
	closeAll(g.conn)
	g.conn = -1
	return message
}

// hangUp closes the elector's end of its pipe, as its exit does. The number stays ours.
func (g *reloadGuard) hangUp() {
	g.t.Helper()
	if err := unix.Dup3(g.timer, g.out.FD, unix.O_CLOEXEC); err != nil {
		g.t.Fatal(err)
	}
}

// reloads brings a reload to the point where the next elector runs, and is not ready yet.
func (g *reloadGuard) reloads() {
	g.t.Helper()
	g.hangUp()
	g.signal(reload.Signal)
	g.until("another elector", func() bool {
		return g.reload.state == reloadStarting && g.elector.state == electorRunning
	})
}

// loseElector ends the elector that a reload has brought.
func (g *reloadGuard) loseElector() {
	g.t.Helper()
	pid := g.elector.pid
	if pid <= 0 {
		g.t.Fatalf("there is no elector: %s", g.elector.state)
	}
	_ = unix.Kill(pid, unix.SIGKILL)
	g.until("lost", func() bool { return g.elector.pid != pid })
}

func TestReload_Passes(t *testing.T) {
	for _, idle := range []bool{false, true} {
		g := newReloadGuard(t, idle, `[ $lease = 7 ] && [ $created = 5 ] && `+passes)
		now := boottime.Now()
		g.elector.replacedAt = [2]time.Duration{now, now} // a reload counts as no loss
		g.elector.token = append(g.elector.tokenBuf[:0], "token of a user"...)
		g.reloads()
		g.electorReady(boottime.Now())
		if got := g.answered(); got != "+9" {
			t.Errorf("idle %v: the answer is %q", idle, got)
		}
		if s := &g.starter; s.image.version != "9" || s.image.env[0] != "A=b" ||
			g.reload.before.version != "8" || len(g.elector.token) != 0 {
			t.Errorf("idle %v: %+v after %+v, token %q",
				idle, s.image, g.reload.before, g.elector.token)
		}
		if g.known.Reloaded != 1 || g.known.Silent != 0 || g.job.alive() == idle {
			t.Errorf("idle %v: %+v", idle, g.known)
		}
		g.until("an elector of the new binary", func() bool { // that is between two of its execs
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", g.elector.pid))
			return strings.HasPrefix(string(line), "sleep")
		})
		g.serveReloadDeadlines(g.reload.trialBy)
		if g.reload.trialBy != 0 || g.reload.before.fd != -1 {
			t.Errorf("idle %v: the trial does not end", idle)
		}
	}
}

// TestReload_NothingTouched: a check that does not pass leaves the elector alone.
func TestReload_NothingTouched(t *testing.T) {
	for _, c := range []struct {
		name, script, want string
		event              func(g *reloadGuard) // when it is being checked
	}{
		{"refused", fails, "-no such luck", nil},
		{"something else", "exit 0", "no leasehold that can take over: its check says", nil},
		{"passes, and fails", passes + "; exit 3", "its check exited with code 3", nil},
		{"half a result", "printf 'leasehold: the check has passed' >&3", "-the binary is no", nil},
		{"crash", "kill -SEGV $$", "its check exited with code 139", nil},
		{"a long result", "head -c 9000000 /dev/zero >&3", "the result of the check can't be", nil},
		{
			"too slow", "exec sleep 1000", "the settings has not ended within 15s",
			func(g *reloadGuard) { g.serveReloadDeadlines(g.reload.by) },
		},
		{"stopped", "exec sleep 1000", "-the daemon stops", (*reloadGuard).term},
		{"stopped after it", passes, "-the daemon stops", func(g *reloadGuard) {
			g.until("exited", func() bool { return g.reload.state == reloadReading })
			g.term()
		}},
		{
			"a release", passes, "-the lease is just being given back",
			func(g *reloadGuard) { g.leased(ipc.Lease{ID: 7, Releasing: true}) },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newReloadGuard(t, false, c.script)
			old := g.elector.pid
			g.signal(reload.Signal)
			if c.event != nil {
				g.until("checking", func() bool {
					return g.reload.state != reloadAsked && g.reload.state != reloadForking
				})
				c.event(g)
			}
			if got := g.answered(); !strings.Contains(got, c.want) {
				t.Errorf("the answer is %q, want %q", got, c.want)
			}
			g.until("over", func() bool { return g.reload.state == reloadNone })
			if g.elector.pid != old || g.elector.state != electorRunning || g.reload.pid != 0 ||
				g.starter.checked.fd != -1 || g.starter.result != -1 || g.starter.busy != 0 {
				t.Errorf("something is left: %+v", g.reload)
			}
		})
	}
}

// TestReload_NotNow: what is refused at once.
func TestReload_NotNow(t *testing.T) {
	for _, c := range []struct {
		name, want string
		event      func(g *reloadGuard)
	}{
		{"no path", "path of the binary", func(g *reloadGuard) { g.cfg.Reload.Path = "" }},
		{"stopping", "the daemon stops", (*reloadGuard).term},
		{"no spawner", "the daemon stops", func(g *reloadGuard) { g.spawner.pid = 0 }},
		{"being replaced", "just being replaced", func(g *reloadGuard) { g.killElector("silent") }},
		{"releasing", "being given back", func(g *reloadGuard) {
			g.leased(ipc.Lease{ID: 7, Releasing: true})
		}},
		{"under way", "another reload is under way", func(g *reloadGuard) {
			g.reload.state, g.reload.by = reloadChecking, forever
		}},
		{"key unknown", "key of the job's lease", func(g *reloadGuard) {
			g.known.Entered.Created = 0
		}},
		{"job being stopped", "the job is being stopped", func(g *reloadGuard) {
			g.job.stop(forever, electorAsked)
		}},
		{"near stop-at", "the lease was not renewed for long", func(g *reloadGuard) {
			g.job.stopAt = boottime.Now() + 900*time.Millisecond
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newReloadGuard(t, false, passes)
			c.event(g)
			state := g.elector.state
			g.reloadAsked()
			g.reload.state = reloadNone
			if got := g.answered(); !strings.Contains(got, c.want) || g.elector.state != state {
				t.Errorf("the answer is %q, want %q; the elector is %s",
					got, c.want, g.elector.state)
			}
		})
	}
}

// TestReload_LeaseUnproven: without a lease there is nothing to prove. If the elector has one when
// it has exited, the next one must not be of the new settings: their etcd may be another.
func TestReload_LeaseUnproven(t *testing.T) {
	g := newReloadGuard(t, true, "[ $lease = 0 ] && "+passes)
	g.known.Entered, g.known.Lease = ipc.Entered{}, ipc.Lease{}
	g.signal(reload.Signal)
	g.until("checked", func() bool { return g.reload.state == reloadReading })
	for g.reload.state != reloadEnding { // it has not read the pipe when it kills the elector
		g.receiveCheck()
	}
	_ = g.out.Send(ipc.Entered{Key: "key", Created: 5})
	g.hangUp()
	if got := g.answered(); !strings.Contains(got, leaseChanged) {
		t.Errorf("the answer is %q", got)
	}
	if g.starter.image.version != "8" || g.elector.givenUp || g.reload.state != reloadNone {
		t.Errorf("the next elector is of %+v", g.starter.image)
	}
}

// TestReload_Lost: an elector that is lost after a reload.
func TestReload_Lost(t *testing.T) {
	now := boottime.Now()
	for _, c := range []struct {
		name     string
		lose     func(g *reloadGuard)
		answer   string
		version  string
		restored bool
	}{
		{"before it is ready", (*reloadGuard).loseElector, "lost before it was ready", "8", true},
		{"never ready", func(g *reloadGuard) {
			g.serveReloadDeadlines(g.reload.by)
			g.loseElector()
		}, "lost before it was ready", "8", true},
		{"announces its exit", func(g *reloadGuard) {
			g.message(ipc.Message{Kind: ipc.KindExiting})
			g.loseElector()
		}, "lost before it was ready", "8", true},
		{"on trial", func(g *reloadGuard) {
			g.electorReady(now)
			g.loseElector()
		}, "+9", "8", true},
		{"renewed", func(g *reloadGuard) {
			g.electorReady(now)
			g.reload.renewed = true
			g.elector.replacedAt = [2]time.Duration{}
			g.loseElector()
		}, "+9", "9", false},
		{"renewed, and lost twice", func(g *reloadGuard) {
			g.electorReady(now)
			g.reload.renewed = true
			g.elector.replacedAt = [2]time.Duration{}
			g.loseElector()
			g.until("another one", func() bool { return g.elector.state == electorRunning })
			g.elector.replacedAt = [2]time.Duration{now, now}
			g.loseElector()
		}, "+9", "8", true},
		{"another lease", func(g *reloadGuard) {
			g.electorReady(now)
			g.leased(ipc.Lease{ID: 8})
			g.elector.replacedAt = [2]time.Duration{}
			g.loseElector()
		}, "+9", "9", false},
		{"on trial, and another check runs", func(g *reloadGuard) {
			g.electorReady(now)
			g.answered()
			g.cfg.Reload.Check = func(int64, int64, bool) []string {
				return []string{"sh", "-c", "exec sleep 1000"}
			}
			g.signal(reload.Signal)
			g.until("checking", func() bool { return g.reload.state == reloadChecking })
			g.loseElector()
		}, "-the elector was lost meanwhile", "8", true},
		{"later", func(g *reloadGuard) {
			g.electorReady(now)
			g.serveReloadDeadlines(g.reload.trialBy)
			g.elector.replacedAt = [2]time.Duration{}
			g.loseElector()
		}, "+9", "9", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newReloadGuard(t, false, passes)
			g.reloads()
			g.elector.replacedAt = [2]time.Duration{now, now} // what is restored counts as no loss
			c.lose(g)
			if got := g.answered(); !strings.Contains(got, c.answer) {
				t.Errorf("the answer is %q, want %q", got, c.answer)
			}
			if g.starter.image.version != c.version || g.job.state != jobRunning ||
				g.elector.givenUp {
				t.Errorf("the next elector is of %q, the job is %s",
					g.starter.image.version, g.job.state)
			}
			if c.restored && g.elector.replacedAt != [2]time.Duration{now, now} {
				t.Error("the loss counts")
			}
			if c.restored && (g.reload.before.fd != -1 || g.reload.trialBy != 0) {
				t.Errorf("%+v", g.reload)
			}
		})
	}
}

// TestReload_ForkFails: the next elector can't be executed, and the one before it comes back.
func TestReload_ForkFails(t *testing.T) {
	g := newReloadGuard(t, false, passes)
	g.hangUp()
	g.signal(reload.Signal)
	g.until("checked", func() bool { return g.reload.state == reloadReading })
	for g.reload.state != reloadEnding {
		g.receiveCheck()
	}
	ask := g.starter.askW
	g.starter.askW = -1
	g.until("lost", func() bool { return g.elector.state == electorStarting })
	g.starter.answer.Store(&starterAnswer{err: unix.EACCES})
	g.receiveFromStarter()
	g.starter.askW = ask
	if got := g.answered(); !strings.Contains(got, "can't be started: permission denied") {
		t.Errorf("the answer is %q", got)
	}
	if g.starter.image.version != "8" || g.job.state != jobRunning {
		t.Errorf("the next elector is of %q, the job is %s", g.starter.image.version, g.job.state)
	}
}

// TestReload_Plain: a signal without an asker does the same.
func TestReload_Plain(t *testing.T) {
	g := newReloadGuard(t, false, passes)
	_ = unix.Close(g.listener)
	g.listener = -1
	g.reloads()
	g.electorReady(boottime.Now())
	if g.starter.image.version != "9" || g.reload.state != reloadNone {
		t.Errorf("%+v", g.reload)
	}
}

// TestReload_Request: the guard waits for the request only for a while, and believes nothing else.
func TestReload_Request(t *testing.T) {
	for _, c := range []struct {
		name, request, want string
		event               func(g *reloadGuard)
	}{
		{"something else", "reboot", "asks for something else", nil},
		{"nothing", "", "does not say for what", func(g *reloadGuard) {
			g.serveReloadDeadlines(g.reload.by)
		}},
		{"the daemon stops", "", "the daemon stops", (*reloadGuard).term},
		{"the elector is lost", "", "lost meanwhile", func(g *reloadGuard) {
			g.hangUp()
			g.loseElector()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newReloadGuard(t, false, passes)
			g.request = c.request
			g.signal(reload.Signal)
			if g.reload.state != reloadAsked {
				t.Fatalf("the reload is %s", g.reload.state)
			}
			if c.event != nil {
				c.event(g)
			}
			if got := g.answered(); !strings.Contains(got, c.want) ||
				g.reload.state != reloadNone || g.starter.image.version != "8" {
				t.Errorf("the answer is %q, want %q", got, c.want)
			}
		})
	}
}

// TestReload_SettingsArrive: the check gets what the asker has passed, and nothing else stays open.
func TestReload_SettingsArrive(t *testing.T) {
	g := newReloadGuard(t, false,
		"[ $settings = true ] && read -r line <&4 && [ $line = here ] && "+passes)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer closeAll(pipe[:]...)
	_, _ = unix.Write(pipe[1], []byte("here\n"))
	g.settings = []int{pipe[0], pipe[1]}
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := open()
	g.reloads()
	g.electorReady(boottime.Now())
	if got := g.answered(); got != "+9" {
		t.Errorf("the answer is %q", got)
	}
	if after := open(); after > before+1 { // the binary
		t.Errorf("%d descriptors are open, were %d", after, before)
	}
}
