//go:build linux

package scenario_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// command runs a subcommand of leasehold, and returns its exit code and what it says.
func (tr *trial) command(args ...string) (code int, said string) {
	tr.Helper()
	var out bytes.Buffer
	cmd := tr.newCommand(args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		tr.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

// newCommand is a subcommand about the election.
func (tr *trial) newCommand(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(tr.ctx, tr.programs.Leasehold, args...)
	cmd.Env = slices.Concat([]string{
		"PATH=" + os.Getenv("PATH"), "LEASEHOLD_ELECTION=" + tr.election,
		"LEASEHOLD_ENDPOINTS=" + strings.Join(tr.etcd.Endpoints(), ","),
	}, tr.asking)
	return cmd
}

// commands runs a subcommand that has to succeed, and to say this.
func (tr *trial) commands(want string, args ...string) string {
	tr.Helper()
	code, said := tr.command(args...)
	if code != 0 || !strings.Contains(said, want) {
		tr.Fatalf("leasehold %q: %d, %s; want %q", args, code, said, want)
	}
	return said
}

// candidates starts one after the other. The first one leads.
func (tr *trial) startAll(identities string) (all []*candidate, job harness.Life) {
	tr.Helper()
	for identity := range strings.SplitSeq(identities, "") {
		c := tr.start(identity, "")
		if len(all) == 0 {
			job = tr.waitJob(c)
		}
		tr.waitStatus(c, "/readyz", http.StatusOK)
		all = append(all, c)
	}
	return all, job
}

// heldStatus is what /status and status show of a hold.
type heldStatus struct {
	Name    string
	State   string
	Leader  *struct{ Identity string }
	Hold    *holdStatus
	Problem *string `json:"control_problem"`
}

type holdStatus struct {
	By, Reason   string
	Since, Until *time.Time
	Stop         bool
}

// expectSameHold waits until a candidate knows a hold, and fails if that is another one.
func (tr *trial) expectSameHold(c *candidate, want holdStatus) {
	tr.Helper()
	if got := tr.waitHeld(c, true).Hold; !reflect.DeepEqual(*got, want) {
		tr.Errorf("%s knows the hold %+v, want %+v", c.Identity, *got, want)
	}
}

// toSecond is a time as the log begins it.
const toSecond = "2006-01-02T15:04:05"

// expectHeldLog fails unless the log of a candidate says who holds, since when and why.
func (tr *trial) expectHeldLog(c *candidate, want holdStatus) {
	tr.Helper()
	for line := range strings.Lines(c.Log()) {
		if strings.Contains(line, "election held: nobody new becomes leader") &&
			strings.Contains(line, "by="+want.By+" since="+want.Since.Format(toSecond)) &&
			strings.Contains(line, "reason="+strconv.Quote(want.Reason)) {
			return
		}
	}
	tr.Errorf("the log of %s does not say %+v", c.Identity, want)
}

// watchReady has /readyz of candidates asked all the time. The function that it returns ends that,
// and fails if one of them was not ready.
func (tr *trial) watchReady(all ...*candidate) (end func()) {
	ctx, cancel := context.WithCancel(tr.ctx)
	var running sync.WaitGroup
	for _, c := range all {
		running.Go(func() {
			asked := 0
			for ; ctx.Err() == nil; asked++ {
				code, said, err := c.Get(ctx, "/readyz")
				if ctx.Err() == nil && (err != nil || code != http.StatusOK) {
					tr.Errorf("/readyz of %s: %d, %s, %v", c.Identity, code, said, err)
					return
				}
				_ = harness.Wait(ctx, 5*time.Millisecond)
			}
			tr.Logf("%s was ready %d times", c.Identity, asked)
		})
	}
	return func() { cancel(); running.Wait() }
}

// waitHeld waits until a candidate is a standby that knows the hold, or that there is none.
func (tr *trial) waitHeld(c *candidate, held bool) (s heldStatus) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		s = heldStatus{}
		_, body, err := c.Get(tr.ctx, "/status")
		if err == nil {
			err = json.Unmarshal([]byte(body), &s)
		}
		if err == nil && (s.Hold != nil != held || held && s.State != "standby") {
			err = fmt.Errorf("%s: %s", c.Identity, body)
		}
		return err
	}))
	return s
}

// expectNoJob fails if a job is alive, or one has been started after the given one.
func (tr *trial) expectNoJob(after harness.Life) {
	tr.Helper()
	for _, l := range tr.witness.Lives() {
		if l.Token > after.Token || l.Alive() {
			tr.Errorf("a job of %s runs, token %d", l.Candidate, l.Token)
		}
	}
}

// Nobody becomes leader while the election is held: whatever happens to the leader, to every
// daemon, and to etcd. When the hold is gone, somebody does.
func TestHold(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 10 * time.Second // etcd restarts well within
	all, job := tr.startAll("abc")
	tr.commands(`held; "a" leads and goes on, token `+fmt.Sprint(job.Token),
		"hold", "--reason", "new disk")
	var hold holdStatus
	for _, c := range all[1:] {
		s := tr.waitHeld(c, true)
		if s.Hold.Reason != "new disk" || s.Hold.By == "" || s.Hold.Since == nil || s.Hold.Stop ||
			s.Name != "a" {
			t.Errorf("%s: %+v", c.Identity, s.Hold)
		}
		hold = *s.Hold
		tr.waitStatus(c, "/readyz", http.StatusOK)
	}
	said := tr.commands("leader is \"a\"", "status")
	if !strings.Contains(said, "the election is held by ") || !strings.Contains(said, "new disk") {
		t.Errorf("status says %s", said)
	}
	tr.waitRenewals(all[0], 1)
	if !job.Alive() {
		t.Error("the leader's job has ended")
	}

	// A failover: nobody starts.
	ready := tr.watchReady(all[1:]...)
	tr.must(all[0].Signal(syscall.SIGTERM))
	tr.waitExit(all[0], 0)
	tr.waitDead(job)
	tr.waitRenewals(all[1], 1)
	tr.expectNoJob(job)
	for _, c := range all[1:] {
		if s := tr.waitHeld(c, true); s.Leader != nil {
			t.Errorf("%s names a leader: %+v", c.Identity, s.Leader)
		}
		tr.waitStatus(c, "/leader", http.StatusServiceUnavailable)
	}
	ready()
	if code, said := tr.command("status"); code != 1 || !strings.Contains(said, "no leader") {
		t.Errorf("status: %d, %s", code, said)
	}

	// A restart of every daemon, the last one without any.
	tr.must(all[1].Signal(syscall.SIGTERM))
	tr.must(all[2].Signal(syscall.SIGTERM))
	tr.waitExit(all[1], 0)
	tr.waitExit(all[2], 0)
	d, e := tr.start("d", ""), tr.start("e", "")
	for _, c := range []*candidate{d, e} {
		tr.expectSameHold(c, hold)
		tr.waitStatus(c, "/readyz", http.StatusOK)
	}
	tr.expectNoJob(job)

	// A restart of etcd.
	ready = tr.watchReady(d, e)
	tr.must(tr.etcd.Members[0].Restart(tr.ctx))
	for _, c := range []*candidate{d, e} {
		tr.waitRenewals(c, 1)
		tr.expectSameHold(c, hold)
	}
	ready()
	tr.expectNoJob(job)

	tr.commands("released; it was held by ", "release")
	next := tr.waitNext(job, waitTimeout)
	tr.commands("there was no hold", "release")
	tr.waitHeld(d, false)
	for _, c := range append(all, d, e) {
		tr.expectHeldLog(c, hold)
	}
	if !strings.Contains(d.Log()+e.Log(), "hold released") {
		t.Error("the logs do not say that it was released")
	}
	t.Log(next)
	tr.finish()
}

// The leader resigns in order, and nobody follows.
func TestHold_Stop(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 10 * time.Second // etcd restarts well within
	a := tr.start("a", "ignore-term", variables("LEASEHOLD_STOP_GRACE=2s"))
	job := tr.waitJob(a)
	all := []*candidate{a}
	for _, name := range []string{"b", "c"} {
		c := tr.start(name, "")
		tr.waitStatus(c, "/standby", http.StatusOK)
		all = append(all, c)
	}
	tr.commands(`held; "a" is asked to stop its job, token `, "hold", "--stop")
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error { // an operator waits like this
		if code, said := tr.command("status"); code != 1 {
			return fmt.Errorf("status: %d, %s", code, said)
		}
		return nil
	}))
	if tr.expectNoJob(job); t.Failed() {
		t.Error("the job is alive, and status says that nobody leads")
	}
	tr.waitDead(job)
	for _, c := range all {
		tr.waitHeld(c, true)
		tr.waitStatus(c, "/readyz", http.StatusOK)
	}
	tr.waitRenewals(all[1], 2)
	tr.expectNoJob(job)
	hold := *tr.waitHeld(all[1], true).Hold
	if !hold.Stop {
		t.Error("it does not say that the leader resigns")
	}

	// A restart of every daemon.
	for _, c := range all {
		tr.must(c.Signal(syscall.SIGTERM))
		tr.waitExit(c, 0)
	}
	var restarted []*candidate
	for _, name := range []string{"d", "e", "f"} {
		c := tr.start(name, "")
		tr.expectSameHold(c, hold)
		tr.waitStatus(c, "/readyz", http.StatusOK)
		restarted = append(restarted, c)
	}
	// A restart of etcd.
	ready := tr.watchReady(restarted...)
	tr.must(tr.etcd.Members[0].Restart(tr.ctx))
	for _, c := range restarted {
		tr.waitRenewals(c, 1)
		tr.expectSameHold(c, hold)
	}
	ready()
	tr.expectNoJob(job)
	tr.commands("released", "release")
	if next := tr.waitNext(job, waitTimeout); next.Candidate != "d" {
		t.Errorf("%s leads next, want d", next.Candidate)
	}
	tr.finish()
}

// A hold ends by itself, and not before its time, also if every daemon and etcd have been restarted
// meanwhile. When etcd is restarted the time begins again.
func TestHold_For(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = 10 * time.Second // etcd restarts well within
	all, job := tr.startAll("ab")
	const lasts = 20 * time.Second
	began := harness.Now()
	tr.commands("held until ", "hold", "--for", lasts.String())
	hold := *tr.waitHeld(all[1], true).Hold
	if hold.Until == nil || hold.Until.Sub(*hold.Since) != lasts {
		t.Errorf("the hold is %+v, want one of %v", hold, lasts)
	}
	tr.must(all[0].Signal(syscall.SIGKILL))
	tr.waitDead(job)
	tr.expectNoJob(job)
	tr.must(all[1].Signal(syscall.SIGTERM))
	tr.waitExit(all[1], 0)
	all[0].mayExit = true

	c, d := tr.start("c", ""), tr.start("d", "")
	tr.expectSameHold(c, hold)
	tr.expectSameHold(d, hold)
	ready := tr.watchReady(c, d)
	tr.must(tr.etcd.Members[0].Restart(tr.ctx))
	for _, c := range []*candidate{c, d} {
		tr.waitRenewals(c, 1)
		tr.expectSameHold(c, hold)
	}
	ready()
	next := tr.waitNext(job, waitTimeout)
	if took := next.Started - began; took < lasts {
		t.Errorf("%s leads %v after the hold began, want %v", next.Candidate, took, lasts)
	}
	tr.finish()
}

// Where etcd's roles forbid to read a hold, the election works as without one, and says so.
func TestHold_Forbidden(t *testing.T) {
	tr := ordinary(t)
	tr.must(tr.etcd.EnableAuth(tr.ctx, "user", "secret", tr.election))
	auth := []string{"LEASEHOLD_USERNAME=user", "LEASEHOLD_PASSWORD=secret"}
	a := tr.start("a", "", variables(auth...))
	job := tr.waitJob(a)
	b := tr.start("b", "", variables(auth...))
	tr.waitStatus(b, "/standby", http.StatusOK)
	tr.asking = auth
	code, said := tr.command("hold")
	if code != 69 ||
		!strings.Contains(said, "needs a role with readwrite permission on the prefix") {
		t.Errorf("hold: %d, %s", code, said)
	}
	tr.asking = []string{"LEASEHOLD_USERNAME=root", "LEASEHOLD_PASSWORD=root-secret"}
	tr.commands("held", "hold")
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		s := heldStatus{}
		_, body, err := b.Get(tr.ctx, "/status")
		if err == nil {
			err = json.Unmarshal([]byte(body), &s)
		}
		if err == nil && (s.Problem == nil ||
			!strings.Contains(*s.Problem, "needs a role with readwrite permission")) {
			err = errors.New(body)
		}
		return err
	}))
	tr.waitRenewals(b, 3)
	tr.must(a.Signal(syscall.SIGTERM))
	tr.waitExit(a, 0)
	if next := tr.waitNext(job, waitTimeout); next.Candidate != "b" {
		t.Errorf("%s leads next, want b", next.Candidate)
	}
	tr.stop()
}
