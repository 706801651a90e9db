//go:build linux

package scenario_test

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"leasehold/e2e/harness"
)

// watch starts a watch.
func (tr *trial) watch(stdout *os.File, args ...string) *harness.Child {
	tr.Helper()
	return tr.follow("watch", stdout, args...)
}

// follow starts a command that goes on until it is interrupted. What it says so far is its Output.
func (tr *trial) follow(command string, stdout *os.File, args ...string) *harness.Child {
	tr.Helper()
	cmd := exec.Command(tr.programs.Leasehold, append([]string{command}, args...)...)
	if stdout != nil {
		cmd.Stdout = stdout
	}
	cmd.Env = append([]string{
		"PATH=" + os.Getenv("PATH"), "LEASEHOLD_ELECTION=" + tr.election,
		"LEASEHOLD_ENDPOINTS=" + strings.Join(tr.etcd.Endpoints(), ","),
	}, tr.asking...)
	child, err := harness.StartChild(cmd.String(), nil, cmd)
	tr.must(err)
	tr.Cleanup(child.Kill)
	return child
}

// said waits until the watch says the last of these, and checks that it has said all of them, in
// this order.
func (tr *trial) said(watch *harness.Child, wants ...string) (lines string) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		lines = watch.Output()
		rest := strings.Join(strings.Fields(lines), " ")
		for _, want := range wants {
			i := strings.Index(rest, want)
			if i < 0 {
				return fmt.Errorf("%q does not follow in\n%s%s", want, lines, watch.Log())
			}
			rest = rest[i+len(want):]
		}
		return nil
	}))
	return lines
}

// interrupted ends a watch, as Ctrl-C does, or timeout(1), which sends the signal twice.
func (tr *trial) interrupted(watch *harness.Child) {
	tr.Helper()
	tr.must(watch.Signal(syscall.SIGINT))
	ctx := tr.waitContext(waitTimeout)
	for ctx.Err() == nil && watch.Signal(syscall.SIGINT) == nil {
		runtime.Gosched()
	}
	if code, err := watch.Wait(ctx); err != nil || code != 0 {
		tr.Errorf("the watch ended with %d (%v), want 0: %s", code, err, watch.Log())
	}
}

// TestWatch: watch shows what becomes of an election, live and from a revision.
func TestWatch(t *testing.T) {
	tr := ordinary(t)
	live := tr.watch(nil)
	tr.said(live, "leader nobody leads")
	all, job := tr.startAll("abc")
	asJSON := tr.watch(nil, "--json")
	tr.said(asJSON, `"event":"leader","what":"leads","identity":"a"`)

	tr.must(all[0].Signal(syscall.SIGKILL)) // the guard: a failover
	next := tr.waitNext(job, waitTimeout)
	tr.commands("held", "hold", "--reason", "new disk\x1b[2J")
	tr.commands("released", "release")
	tr.expectCommand(0, `"c" leads`, "switchover", "--to", "c")
	last := tr.waitNext(next, waitTimeout)
	tr.waitQueue("cb")
	wants := []string{
		"candidates a joined, candidates: 1", fmt.Sprintf("leader a leads, token %d", job.Token),
		"b joined, candidates: 2", "c joined, candidates: 3",
		"a left, candidates: 2", fmt.Sprintf("leader b leads, token %d", next.Token),
		"hold held by ", ": new disk", "hold released",
		"switchover asked by ", ", to c", "switchover accepted",
		"b left, candidates: 1", fmt.Sprintf("leader c leads, token %d", last.Token),
		"b joined, candidates: 2",
	}
	checkTable(t, tr.said(live, wants...))
	text := tr.said(asJSON, `"what":"left","identity":"a"`, `"what":"held"`, `"what":"released"`,
		`"event":"switchover","what":"asked"`, `"what":"accepted"`, `"identity":"c"`,
		`"what":"joined","identity":"b"`)
	for line := range strings.Lines(text) {
		checkJSON(t, "watch", line)
	}
	tr.interrupted(live)
	tr.interrupted(asJSON)

	// From the revision at which the first one joined, all is there again.
	past := tr.watch(nil, "--from", strconv.FormatInt(job.Token, 10))
	tr.said(past, slices.Concat([]string{"leader nobody leads"}, wants)...)
	tr.interrupted(past)

	// etcd no longer has what is older than the term of b.
	_, err := tr.etcd.Etcdctl(tr.ctx, "compact", strconv.FormatInt(next.Token, 10))
	tr.must(err)
	for _, from := range []int64{1, job.Token, next.Token} {
		past = tr.watch(nil, "--from", strconv.FormatInt(from, 10))
		tr.said(past, fmt.Sprintf("%d compacted ", next.Token), "hold held by ",
			fmt.Sprintf("leader c leads, token %d", last.Token))
		tr.interrupted(past)
	}
	tr.expectCommand(64, "etcd has only the revision ", "watch", "--from", "9223372036854775807")
	tr.expectCommand(64, "a number from 1 on", "watch", "--from", "0")
	tr.noOverlap()
	tr.stop()
}

// TestWatch_GoesOn: a watch outlasts etcd, and misses nothing, or says what is compacted. It ends
// when nobody reads it.
func TestWatch_GoesOn(t *testing.T) {
	tr := ordinary(t)
	watch := tr.watch(nil)
	tr.said(watch, "leader nobody leads")
	read, write, err := os.Pipe()
	tr.must(err)
	unread := tr.watch(write)
	tr.must(write.Close())
	tr.must(readSome(read))
	tr.must(read.Close())
	// Nothing happens that it could print.
	const sigpipe = 128 + int(syscall.SIGPIPE)
	if code, err := unread.Wait(tr.waitContext(waitTimeout)); err != nil || code != sigpipe {
		t.Errorf("it ended with %d (%v): %s", code, err, unread.Log())
	}

	etcd := tr.etcd
	for _, m := range etcd.Members {
		tr.must(m.Stop(tr.ctx))
	}
	const lost = "it goes on when etcd answers"
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if !strings.Contains(watch.Log(), lost) {
			return fmt.Errorf("it says %q", watch.Log())
		}
		return nil
	}))
	never := tr.watch(nil)
	if code, err := never.Wait(tr.waitContext(waitTimeout)); err != nil || code != 69 {
		t.Errorf("a watch without etcd ended with %d (%v): %s", code, err, never.Log())
	}
	tr.must(watch.Signal(syscall.SIGSTOP)) // what happens next is compacted before it can read it
	for _, m := range etcd.Members {
		tr.must(m.Start())
	}
	tr.must(etcd.WaitHealthy(tr.waitContext(waitTimeout)))
	tr.commands("held", "hold")
	tr.commands("released", "release")
	key, err := tr.etcdClient().Get(tr.ctx, "x")
	tr.must(err)
	_, err = etcd.Etcdctl(tr.ctx, "compact", strconv.FormatInt(key.Header.Revision, 10))
	tr.must(err)
	tr.must(watch.Signal(syscall.SIGCONT))
	tr.said(watch, fmt.Sprintf("%d compacted ", key.Header.Revision))
	tr.commands("held", "hold")
	tr.said(watch, " compacted ", "hold held by ")

	tr.must(watch.Signal(syscall.SIGSTOP)) // now it only has to read what it has missed
	for _, m := range etcd.Members {
		tr.must(m.Restart(tr.waitContext(waitTimeout)))
	}
	tr.must(etcd.WaitHealthy(tr.waitContext(waitTimeout)))
	tr.commands("released", "release")
	tr.commands("held", "hold", "--reason", "again")
	tr.must(watch.Signal(syscall.SIGCONT))
	tr.said(watch, " compacted ", "hold held by ", "hold released", "again")
	losses := strings.Count(watch.Log(), lost) // of one member after the other
	if strings.Count(watch.Output(), "\n") != 5 || losses > 2*len(etcd.Members) {
		t.Errorf("it says\n%s%s", watch.Output(), watch.Log())
	}
	tr.interrupted(watch)
}

// readSome waits for the first byte.
func readSome(from *os.File) error {
	_, err := from.Read(make([]byte, 1))
	return err
}
