//go:build linux

package scenario_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"leasehold/control"
	"leasehold/e2e/harness"
)

// reported is what status --json says.
type reported struct {
	Name  string
	Queue []struct {
		Identity string
		Priority *int
		Ready    *bool
		Version  *string
	}
	Lease *struct {
		ValidFor float64 `json:"valid_for_seconds"`
	}
}

// TestStatus_Records: status shows what the candidates say of themselves, and stays a table of a
// terminal's width whatever others have written.
func TestStatus_Records(t *testing.T) {
	tr := ordinary(t)
	etcd := tr.etcdClient()
	a := tr.start("a", "", variables("LEASEHOLD_PRIORITY=90"))
	tr.waitJob(a)
	tr.start("b \"'\u202e", "")
	tr.waitRecords(etcd, "a b \"'\u202e", `a "" 0`)
	long := strings.Repeat("ü\x1b[2J\"\n", 2<<10)
	lease, err := etcd.Grant(tr.ctx, 60)
	tr.must(err)
	for key, value := range map[string]string{
		fmt.Sprintf("%s/%x", tr.election, lease.ID): long,
		control.CandidateOf(tr.election, int64(lease.ID)): string(control.Encode(
			&control.Candidate{Identity: "other", Priority: 1 << 40, Leasehold: long, URL: long})),
	} {
		_, err := etcd.Put(tr.ctx, key, value, clientv3.WithLease(lease.ID))
		tr.must(err)
	}
	said := tr.commands(`leader is "a"`, "status")
	_, queue, _ := strings.Cut(said, "\n")
	checkTable(t, queue)
	if n := strings.Count(said, "\n"); n != 5 {
		t.Errorf("status has %d lines:\n%s", n, said)
	}
	for _, want := range []string{
		`1 a `, " 90 yes ", `2 $'b`, " 50 yes ", `3 $'\xc3`, " no ",
	} {
		if words := strings.Join(strings.Fields(queue), " "); !strings.Contains(words, want) {
			t.Errorf("status has no %q:\n%s", want, said)
		}
	}
	said = tr.commands(`"queue"`, "status", "--json")
	checkJSON(t, "status", said)
	var r reported
	tr.must(json.Unmarshal([]byte(said), &r))
	if len(r.Queue) != 3 || r.Queue[0].Priority == nil || *r.Queue[0].Priority != 90 ||
		!*r.Queue[0].Ready || *r.Queue[0].Version == "" {
		t.Errorf("status --json: %s", said)
	}
	tr.commands("held", "hold", "--for", "1h", "--reason", "new disk")
	if said := tr.commands(" until 20", "status"); !strings.Contains(said, ": new disk\n") {
		t.Errorf("status: %s", said)
	}
	tr.commands("released", "release")
	_, err = etcd.Revoke(tr.ctx, lease.ID)
	tr.must(err)
	tr.stop()
}

// TestStatus_Watch: status --watch shows each change, goes on without etcd, and ends when nobody
// reads it, or at Ctrl-C.
func TestStatus_Watch(t *testing.T) {
	tr := ordinary(t)
	text := tr.follow("status", nil, "--watch")
	asJSON := tr.follow("status", nil, "--watch", "--json")
	tr.said(text, tr.election+": no leader")
	read, write, err := os.Pipe()
	tr.must(err)
	unread := tr.follow("status", write, "--watch")
	tr.must(write.Close())
	tr.must(readSome(read))
	tr.must(read.Close())
	const sigpipe = 128 + int(syscall.SIGPIPE)
	if code, err := unread.Wait(tr.waitContext(waitTimeout)); err != nil || code != sigpipe {
		t.Errorf("it ended with %d (%v): %s", code, err, unread.Log())
	}

	all, _ := tr.startAll("ab")
	tr.waitRecords(tr.etcdClient(), "a b", `a "" 0`)
	tr.said(text, `leader is "a"`, "1 a ", " 50 yes ", "2 b ", " 50 yes ")
	tr.commands("held", "hold", "--reason", "new disk")
	tr.said(text, "the election is held by ", ": new disk", "1 a ")
	before := strings.Count(text.Output(), "\n")
	tr.waitRenewals(all[0], 10) // only the lease's time changes
	if n := strings.Count(text.Output(), "\n"); n != before {
		t.Errorf("it has printed %d more lines:\n%s", n-before, text.Output())
	}

	for _, m := range tr.etcd.Members {
		tr.must(m.Stop(tr.ctx))
	}
	for _, child := range []*harness.Child{text, asJSON} {
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if strings.Count(child.Log(), "it goes on when etcd answers") != 1 {
				return errors.New(child.Log())
			}
			return nil
		}))
	}
	for _, m := range tr.etcd.Members {
		tr.must(m.Start())
	}
	tr.must(tr.etcd.WaitHealthy(tr.waitContext(waitTimeout)))
	tr.commands("released", "release")
	tr.said(text, "the election is held by ", `leader is "`)
	lines := tr.said(asJSON, `"leader":null`, `"identity":"a"`, `"reason":"new disk"`,
		`"hold":null`)
	for line := range strings.Lines(lines) {
		checkJSON(t, "status", line)
	}
	tr.interrupted(text)
	tr.interrupted(asJSON)
	tr.stop()

	for _, m := range tr.etcd.Members {
		tr.must(m.Stop(tr.ctx))
	}
	never := tr.follow("status", nil, "--watch")
	if code, err := never.Wait(tr.waitContext(waitTimeout)); err != nil || code != 69 {
		t.Errorf("it ended with %d (%v): %s", code, err, never.Log())
	}
}

// TestStatus_Terminal: on a terminal it stays in one place, and is no longer than the terminal.
func TestStatus_Terminal(t *testing.T) {
	tr := ordinary(t)
	terminal, other := newTerminal(t)
	tr.must(unix.IoctlSetWinsize(int(other.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 3, Col: 80}))
	tr.startAll("abc")
	watch := tr.follow("status", other, "--watch")
	tr.must(other.Close())
	var screen bytes.Buffer
	for strings.Count(screen.String(), "\x1b[H") < 3 {
		part := make([]byte, 4096)
		n, err := terminal.Read(part)
		tr.must(err)
		screen.Write(part[:n])
	}
	for frame := range strings.SplitSeq(strings.TrimPrefix(screen.String(), "\x1b[H"), "\x1b[H") {
		if n := strings.Count(frame, "\n"); n > 2 {
			t.Errorf("%d lines on a terminal of 3: %q", n+1, frame)
		}
	}
	tr.interrupted(watch)
	tr.stop()
}
