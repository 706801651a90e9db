//go:build linux

package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"leasehold/internal/boottime"
)

// TestMain plays the part that its first argument names.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "run-check" {
		os.Exit(Run(os.Args[2:]))
	}
	if len(os.Args) > 2 && os.Args[1] == "run-hook" {
		os.Exit(RunHook(os.Args[2:]))
	}
	if len(os.Args) > 2 && os.Args[1] == "ask-hook" { // until somebody kills it
		asking, alive, err := os.Pipe()
		if err != nil {
			panic(err)
		}
		until := boottime.Now() + time.Hour
		if _, err := hookOf(os.Args[2]).Start(until, int(asking.Fd())); err != nil {
			panic(err)
		}
		time.Sleep(time.Hour)
		_ = alive.Close()
	}
	if len(os.Args) > 2 && os.Args[1] == "ask" { // until somebody kills it
		c := shell("", os.Args[2])
		c.Env, c.Timeout = os.Environ(), time.Hour
		_ = c.Probe(context.Background())
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "ask-and-work" {
		os.Exit(askAndWork())
	}
	goleak.VerifyTestMain(m)
}

func shell(mark, script string) *Command {
	return &Command{
		Runner: []string{"test", "run-check"}, Argv: []string{"sh", "-c", script},
		Env: append(os.Environ(), "CHECK_MARK="+mark), Timeout: time.Minute,
	}
}

func newMark(t *testing.T) string { return fmt.Sprintf("%s-%d", t.Name(), os.Getpid()) }

// marked lists the processes that have the mark in their environment.
func marked(mark string) (found []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range all {
		if text, err := os.ReadFile(path); err == nil &&
			strings.Contains(string(text), "CHECK_MARK="+mark+"\x00") {
			line, _ := os.ReadFile(filepath.Dir(path) + "/cmdline")
			found = append(found, filepath.Dir(path)+" "+string(line))
		}
	}
	return found
}

// waitMarked waits until that many processes have the mark.
func waitMarked(t *testing.T, mark string, n int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		found := marked(mark)
		if n > 0 && len(found) >= n || n == 0 && len(found) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("want %d processes, found %q", n, found)
		}
	}
}

func TestCommand_Result(t *testing.T) {
	for _, row := range []struct{ name, script, want string }{
		{"passes", "echo fine", ""},
		{"fails", "echo first; echo no answer >&2; exit 3", "exit code 3: first | no answer"},
		{"killed", "kill -9 $$", "killed by signal 9"},
		{"control characters", `printf 'a\033[31m\001\377'; exit 1`, "exit code 1: a�[31m��"},
		{"megabytes", "yes | head -c 5000000; exit 1", "y | y"},
		{"reads nothing", "cat; exit 4", "exit code 4"},
	} {
		t.Run(row.name, func(t *testing.T) {
			err := shell(newMark(t), row.script).Probe(context.Background())
			switch {
			case row.want == "" && err == nil:
			case err == nil || row.want == "" || !strings.Contains(err.Error(), row.want):
				t.Errorf("got %v, want %q", err, row.want)
			case len(err.Error()) > 3*maxOutput:
				t.Errorf("%d bytes long", len(err.Error()))
			}
		})
	}
	c := shell("", "")
	c.Argv = []string{"no-such-command"}
	if err := c.Probe(context.Background()); err == nil ||
		!strings.Contains(err.Error(), "no-such-command") {
		t.Errorf("no such command: %v", err)
	}
}

// Whatever a check forks, and whatever that ignores, nothing is left when the result is there.
func TestCommand_LeavesNothingBehind(t *testing.T) {
	const stubborn = `trap '' TERM HUP INT; while :; do sleep 1; done`
	daemon := fmt.Sprintf(`(setsid sh -c "(setsid sh -c \"%s\" &)" >/dev/null 2>&1 &)`, stubborn)
	for _, row := range []struct {
		name, script string
		timeout      time.Duration
		want         string
	}{
		{"hangs", "sleep 1000", 200 * time.Millisecond, "no result within 200ms"},
		{"ignores TERM", stubborn, 200 * time.Millisecond, "no result within"},
		{"daemonizes and passes", daemon + "; sleep 0.2", time.Minute, ""},
		{"daemonizes and hangs", daemon + "; sleep 1000", time.Second / 2, "no result within"},
		{"holds the output", "sleep 1000 & exit 0", time.Minute, ""},
		{"prints without end", "yes", 300 * time.Millisecond, "no result within"},
		{"leaves one that prints", "(setsid yes &); exit 0", time.Minute, ""},
		{
			"forks a tree", `f() { if [ $1 -gt 0 ]; then f $(($1-1)) & f $(($1-1)) & fi
			sleep 1000; }; f 5`, time.Second, "no result within",
		},
		{
			"forks without end", `while :; do (setsid sh -c 'sleep 0.01; sleep 0.01' &); done`,
			time.Second, "no result within",
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := shell(newMark(t), row.script)
			c.Timeout = row.timeout
			err := c.Probe(context.Background())
			if row.want == "" && err != nil ||
				row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)) {
				t.Errorf("got %v, want %q", err, row.want)
			}
			if left := marked(newMark(t)); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

func TestCommand_Cancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	c := shell(newMark(t), "setsid sleep 1000 & sleep 1000")
	done := make(chan error, 1)
	go func() { done <- c.Probe(ctx) }()
	waitMarked(t, newMark(t), 4) // the runner, the shell and both sleeps
	if err := c.Probe(ctx); !errors.Is(err, ErrNoResult) {
		t.Errorf("a second one beside it: %v", err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	waitMarked(t, newMark(t), 0)
}

// If the process that asks is killed, its checks are killed, with all that they have forked.
func TestCommand_AskerKilled(t *testing.T) { killAsker(t, "ask") }

// killAsker has a process ask, by that part of the test binary, and kills it.
func killAsker(t *testing.T, part string) {
	t.Helper()
	mark := newMark(t)
	asker := exec.Command("/proc/self/exe", part, "(setsid sleep 1000 &); sleep 1000")
	asker.Env = append(os.Environ(), "CHECK_MARK="+mark)
	if err := asker.Start(); err != nil {
		t.Fatal(err)
	}
	waitMarked(t, mark, 5)
	_ = asker.Process.Signal(syscall.SIGKILL)
	_ = asker.Wait()
	waitMarked(t, mark, 0)
}

// askAndWork makes a check, and garbage meanwhile. It prints the longest time that the garbage
// took.
func askAndWork() int {
	c := shell("", "true")
	c.Env = os.Environ()
	done := make(chan error, 1)
	go func() { done <- c.Probe(context.Background()) }()
	longest, kept := time.Duration(0), make([][]byte, 16)
	for n := 0; ; n++ {
		began := time.Now()
		kept[n%len(kept)] = make([]byte, 256<<10)
		longest = max(longest, time.Since(began))
		select {
		case err := <-done:
			fmt.Println(longest.Milliseconds(), err)
			return 0
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// If the exec of a runner hangs, because the binary is on a mount that does, whoever asks goes on.
func TestCommand_ExecHangs(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("needs strace")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// strace calls the path its own program's, too, and that is executed by nobody.
	out, err := exec.Command(strace, "-f", "-qq", "-o", os.DevNull, "-P", "/proc/self/exe",
		"-e", "trace=execve", "-e", "inject=execve:delay_enter=4000000:when=1",
		self, "ask-and-work").CombinedOutput()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n") // strace says something first
	result := lines[len(lines)-1]
	var longest int
	var passed string
	if _, scan := fmt.Sscan(result, &longest, &passed); scan != nil || err != nil ||
		passed != "<nil>" {
		t.Fatalf("%v: %s", err, out)
	}
	if longest > 2000 {
		t.Errorf("it did nothing for %d ms while the exec hung for 4000", longest)
	}
}

// However many checks are made, and however they end, no descriptor stays open. (That no goroutine
// stays, goleak checks.)
func TestCommand_LeaksNothing(t *testing.T) {
	open := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	check := func() {
		for _, script := range []string{
			"true", "exit 1", "yes | head -c 1000000", "sleep 1000 & exit 0", "kill -9 $PPID",
		} {
			_ = shell(newMark(t), script).Probe(context.Background())
		}
		hangs := shell(newMark(t), "sleep 1000")
		hangs.Timeout = 20 * time.Millisecond
		_ = hangs.Probe(context.Background())
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		_ = shell(newMark(t), "sleep 1000").Probe(ctx)
		c := shell(newMark(t), "true")
		c.Argv = []string{"no-such-command"}
		_ = c.Probe(context.Background())
		waitMarked(t, newMark(t), 0)
	}
	check()
	before := open()
	for range 10 {
		check()
	}
	for end := time.Now().Add(20 * time.Second); open() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) { // one that was cancelled closes its own a little later
			t.Fatalf("%d descriptors are open, and %d were", open(), before)
		}
	}
}
