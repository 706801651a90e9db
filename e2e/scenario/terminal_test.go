//go:build linux

package scenario_test

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// newTerminal makes a pseudo-terminal. Closing the master hangs it up.
func newTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	t.Cleanup(func() { _ = master.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = slave.Close() })
	return master, slave
}

// onTerminal makes the command the leader of a session on the terminal,
// which is its standard input.
func onTerminal(slave *os.File) change {
	return func(cfg *harness.CandidateConfig) {
		before := cfg.Prepare
		cfg.Prepare = func(cmd *exec.Cmd) {
			if before != nil {
				before(cmd)
			}
			cmd.Stdin = slave
			cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty, cmd.SysProcAttr.Ctty = true, true, 0
		}
	}
}

// shell has a shell start the candidate; "$@" is its command line.
func (tr *trial) shell(script string) change {
	return func(cfg *harness.CandidateConfig) { tr.wrap(cfg, "sh", "-c", script, "sh") }
}

// daemonOf waits for the daemon that a shell has started in its background, and returns its pid
// and a pidfd. It ends with the test.
func (tr *trial) daemonOf(shell *candidate) (pid, pidfd int) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		children := harness.Children(shell.Guard())
		if len(children) != 1 {
			return fmt.Errorf("children of the shell: %v", children)
		}
		pid = children[0]
		return nil
	}))
	pidfd, err := unix.PidfdOpen(pid, 0)
	tr.must(err)
	tr.Cleanup(func() {
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0) // it has ended, if all went well
		_ = unix.Close(pidfd)
	})
	return pid, pidfd
}

// tells is a job that tells which signals it gets, and ends after TERM.
func tells() change {
	return command("sh", "-c", `trap "echo got TERM; exit 0" TERM
		for s in HUP INT QUIT; do trap "echo got $s" $s; done
		echo ready; while :; do sleep 0.01; done`)
}

// waitOutput waits until a candidate and its job have written exactly this.
func (tr *trial) waitOutput(c *candidate, want string) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if got := c.Output(); got != want {
			return fmt.Errorf("the job of %s says %q, not %q", c.Identity, got, want)
		}
		return nil
	}))
}

// ignored is which signals a process ignores, as /proc has it.
func ignored(t *testing.T, pid int) uint64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if mask, found := strings.CutPrefix(line, "SigIgn:\t"); found {
			set, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return set
		}
	}
	t.Fatalf("no SigIgn in %s", text)
	return 0
}

// A terminal that hangs up ends the daemon in order. As long as the terminal is
// there, SIGHUP is for the job.
func TestTerminal_HangUp(t *testing.T) {
	t.Run("job", func(t *testing.T) {
		tr := ordinary(t)
		master, slave := newTerminal(t)
		c := tr.start("a", "", tells(), onTerminal(slave))
		tr.waitOutput(c, "ready\n")
		tr.must(c.Signal(syscall.SIGHUP))
		tr.waitOutput(c, "ready\ngot HUP\n")
		tr.must(master.Close())
		tr.waitExit(c, 0)
		tr.waitOutput(c, "ready\ngot HUP\ngot TERM\n")
		tr.nothingLeft()
	})
	t.Run("elect", func(t *testing.T) {
		tr := ordinary(t)
		master, slave := newTerminal(t)
		c := tr.start("a", "", subcommand("elect"), onTerminal(slave))
		tr.waitStatus(c, "/leader", http.StatusOK)
		tr.must(master.Close())
		tr.waitExit(c, 0)
		tr.nothingLeft()
	})
	// As zsh does, and bash with huponexit: the terminal is still there when the signal comes.
	t.Run("shell that signals its jobs and exits", func(t *testing.T) {
		tr := ordinary(t)
		dir := tr.sharedDir()
		says := func(file string) string {
			text, _ := os.ReadFile(filepath.Join(dir, file)) // none yet is nothing yet
			return string(text)
		}
		master, slave := newTerminal(t)
		script := `"$@" >` + dir + `/out 2>` + dir + `/log & read x; kill -HUP $!; sleep 0.2`
		shell := tr.start("a", "", tells(), tr.shell(script), onTerminal(slave))
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if out := says("out"); out != "ready\n" {
				return fmt.Errorf("the job says %q", out)
			}
			return nil
		}))
		_, pidfd := tr.daemonOf(shell)
		_, err := master.WriteString("\n")
		tr.must(err)
		if err := harness.Until(tr.waitContext(waitTimeout), func() error {
			ended := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
			if n, err := unix.Poll(ended, 0); n != 1 {
				return fmt.Errorf("the daemon has not ended: %w", err)
			}
			return nil
		}); err != nil {
			t.Fatalf("%v\n%s%s", err, says("log"), says("out"))
		}
		if out, log := says("out"), says("log"); out != "ready\ngot TERM\n" ||
			!strings.Contains(log, `msg="exiting: planned stop"`) ||
			!strings.Contains(log, "exit_code=0") {
			t.Errorf("the job says %q, the daemon\n%s", out, log)
		}
		tr.nothingLeft()
	})
}

// What was ignored when the daemon was started stays ignored, by the job too.
func TestTerminal_IgnoredStaysIgnored(t *testing.T) {
	for _, row := range []struct {
		name    string
		start   func(*trial) change
		signals []syscall.Signal
		mask    uint64
	}{
		{"nohup", func(tr *trial) change {
			return func(cfg *harness.CandidateConfig) { tr.wrap(cfg, "nohup") }
		}, []syscall.Signal{unix.SIGHUP}, 1},
		{"background of a shell", func(tr *trial) change {
			return tr.shell(`trap "" INT QUIT; exec "$@"`) // which it does itself after &
		}, []syscall.Signal{unix.SIGINT, unix.SIGQUIT}, 6},
	} {
		for _, elect := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/elect=%v", row.name, elect), func(t *testing.T) {
				tr := ordinary(t)
				master, slave := newTerminal(t)
				what := tells()
				if elect {
					what = subcommand("elect")
				}
				c := tr.start("a", "", what, row.start(tr), onTerminal(slave))
				tr.waitStatus(c, "/leader", http.StatusOK)
				processes := []int{c.Guard()}
				if !elect {
					tr.waitOutput(c, "ready\n")
					processes = append(processes, *tr.status(c).Job.PID)
				}
				for i, pid := range processes {
					mask := ignored(t, pid)
					if i == 0 {
						// C libraries keep some for themselves: the daemon resets those
						// only for the job.
						mask &= 1<<31 - 1
					}
					if mask != row.mask {
						t.Errorf("process %d ignores %#x, want %#x", pid, mask, row.mask)
					}
				}
				for _, sig := range row.signals {
					tr.must(c.Signal(sig))
					tr.must(c.Signal(sig))
				}
				if row.name == "nohup" {
					tr.must(master.Close())
				}
				tr.waitRenewals(c, 3)
				tr.waitStatus(c, "/leader", http.StatusOK)
				if out := c.Output(); !elect && out != "ready\n" {
					t.Errorf("the job says %q", out)
				}
				tr.finish()
			})
		}
	}
}

// The signal that is to stop the job is not one that it ignores.
func TestTerminal_StopSignalIsNotIgnored(t *testing.T) {
	tr := ordinary(t)
	const job = `trap "echo got INT; exit 0" INT; echo ready; while :; do sleep 0.01; done`
	c := tr.start("a", "", command("sh", "-c", job),
		variables("LEASEHOLD_STOP_SIGNAL=INT", "LEASEHOLD_STOP_GRACE=1m"),
		tr.shell(`trap "" INT QUIT; exec "$@"`))
	tr.waitOutput(c, "ready\n")
	tr.must(c.Signal(syscall.SIGINT)) // the daemon ignores it all the same
	tr.waitRenewals(c, 1)
	tr.must(c.Signal(syscall.SIGTERM))
	tr.waitExit(c, 0)
	tr.waitOutput(c, "ready\ngot INT\n")
	tr.nothingLeft()
}

// What is typed into a shell's terminal is for who has the foreground.
func TestTerminal_Stdin(t *testing.T) {
	const cat = `[ -t 0 ] && echo terminal || readlink /proc/self/fd/0; cat`
	t.Run("foreground", func(t *testing.T) {
		tr := ordinary(t)
		master, slave := newTerminal(t)
		c := tr.start("a", "", command("sh", "-c", cat), onTerminal(slave))
		tr.waitOutput(c, "terminal\n")
		_, err := master.WriteString("typed\n")
		tr.must(err)
		tr.waitOutput(c, "terminal\ntyped\n")
		tr.finish()
	})
	const echo = `while read line; do echo "shell: $line"; done`
	// The shell's job control gives the daemon a process group of its own.
	for name, script := range map[string]string{
		"background":      `set -m; exec 3<&0; "$@" <&3 3<&- & ` + echo,
		"another session": `exec 3<&0; setsid "$@" <&3 3<&- & ` + echo,
	} {
		t.Run(name, func(t *testing.T) {
			tr := ordinary(t)
			master, slave := newTerminal(t)
			c := tr.start("a", "", command("sh", "-c", cat+"; echo end; sleep 1000"),
				tr.shell(script), onTerminal(slave))
			daemon, _ := tr.daemonOf(c)
			tr.waitOutput(c, "/dev/null\nend\n")
			typed := "/dev/null\nend\n"
			for i := range 20 {
				_, err := fmt.Fprintf(master, "%d\n", i)
				tr.must(err)
				typed += fmt.Sprintf("shell: %d\n", i)
				tr.waitOutput(c, typed)
			}
			tr.must(syscall.Kill(daemon, syscall.SIGTERM))
			tr.nothingLeft()
			tr.must(master.Close())
			<-c.Ended()
		})
	}
}

// sharedDir is a directory that the daemon's user can write to.
func (tr *trial) sharedDir() string {
	dir, err := harness.TempDir("e2e-terminal-")
	tr.must(err)
	tr.Cleanup(func() { _ = os.RemoveAll(dir) })
	tr.must(os.Chmod(dir, 0o777))
	return dir
}
