//go:build linux

package scenario_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/control"
	"leasehold/e2e/harness"
)

// elect is a leader without a job that has a state file, and a standby behind it.
type elect struct {
	*recovery
	standby *candidate
	before  status // of the leader
}

func newElect(t *testing.T) *elect {
	t.Helper()
	t.Parallel()
	dir, err := harness.TempDir("leasehold-state-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	e := &elect{recovery: &recovery{trial: newTrial(t, user{}, harness.ClusterConfig{}), dir: dir}}
	e.ttl = recoverTTL
	e.first = e.again()
	e.waitStatus(e.first, "/leader", http.StatusOK)
	e.standby = e.start("b", "", subcommand("elect"))
	e.waitStatus(e.standby, "/standby", http.StatusOK)
	e.before = e.status(e.first)
	return e
}

// again starts the leader.
func (e *elect) again(changes ...change) *candidate {
	e.Helper()
	c := e.start("a", "", append([]change{
		subcommand("elect"), variables("LEASEHOLD_STATE_DIR=" + e.dir),
	}, changes...)...)
	c.mayExit = true
	return c
}

// killed kills the leader.
func (e *elect) killed() {
	e.Helper()
	e.must(e.first.Signal(syscall.SIGKILL))
	_, err := e.first.Wait(e.waitContext(waitTimeout))
	e.must(err)
}

// terms is the history.
func (e *elect) terms() (terms []control.Term) {
	e.Helper()
	e.must(harness.Until(e.waitContext(waitTimeout), func() error {
		out, err := e.etcd.Etcdctl(e.ctx, "get", "--prefix", "--print-value-only",
			control.History(e.election))
		e.must(err)
		terms = nil
		for line := range strings.Lines(out) {
			var t control.Term
			if err := json.Unmarshal([]byte(line), &t); err == nil {
				terms = append(terms, t)
			}
		}
		if len(terms) == 0 {
			return errors.New("there is no history yet")
		}
		return nil
	}))
	return terms
}

// TestElect_GoesOn: elect is killed and started again, and again. It leads under its old lease,
// long before that would have expired. The standby never leads.
func TestElect_GoesOn(t *testing.T) {
	e := newElect(t)
	history := e.terms()
	for range 2 {
		e.killed()
		began := harness.Now()
		e.first = e.again()
		e.must(e.first.WaitStatus(e.waitContext(recoverTTL/4), "/leader", http.StatusOK))
		t.Logf("it leads again %v after its start", (harness.Now() - began).Round(time.Millisecond))
		after := e.status(e.first)
		if *after.Leader != *e.before.Leader || after.Lease.ID != e.before.Lease.ID {
			t.Errorf("%+v, lease %s; want %+v, lease %s",
				after.Leader, after.Lease.ID, e.before.Leader, e.before.Lease.ID)
		}
		e.waitLogged(e.first, "took over a lease")
	}
	e.waitRenewals(e.first, 2) // the records follow the renewals
	if again := e.terms(); len(again) != 1 || !again[0].Started.Equal(history[0].Started) {
		t.Errorf("the history is %+v, want %+v", again, history)
	}
	if s := e.status(e.standby); s.State != "standby" || strings.Contains(e.standby.Log(),
		"to=leading") {
		t.Errorf("the standby is %+v:\n%s", s, e.standby.Log())
	}
	// A planned stop gives that lease back.
	e.must(e.first.Signal(syscall.SIGTERM))
	e.must(e.standby.WaitStatus(e.waitContext(recoverTTL/4), "/leader", http.StatusOK))
	e.waitExit(e.first, 0)
	e.finish()
}

// TestElect_LeftAlone: where an app of another place may work, or the lease may be revoked at any
// moment, the next elect leaves it alone, and waits behind it.
func TestElect_LeftAlone(t *testing.T) {
	file := func(e *elect) string {
		content, err := os.ReadFile(filepath.Join(e.dir, "leasehold.state"))
		e.must(err)
		return string(content)
	}
	edited := func(pattern, text string) func(e *elect) {
		return func(e *elect) {
			e.killed()
			e.edit(func(body []byte) []byte {
				if again := regexp.MustCompile(pattern).ReplaceAll(body,
					[]byte(text)); !bytes.Equal(again, body) {
					return again
				}
				e.Fatalf("%s is not in %s", pattern, body)
				return nil
			})
		}
	}
	for _, c := range []struct {
		what   string
		before func(e *elect) // instead of killing it
		env    string
		says   string
	}{
		{
			"another network namespace", edited(`"network_namespace":.`, `"network_namespace":3`),
			"", "an app in another network namespace",
		},
		{"another boot", edited(`"boot_id":"...`, `"boot_id":"xxx`), "", "the boot id is another"},
		{"another identity", (*elect).killed, "LEASEHOLD_IDENTITY=c", "it is of the identity"},
		{
			"SIGSTOPped", func(e *elect) { e.must(e.first.Signal(syscall.SIGSTOP)) },
			"", "a process of another daemon holds the lock",
		},
		{
			"while it gives its lease back", func(e *elect) {
				e.first.SetReachable(false)
				e.must(e.first.Signal(syscall.SIGTERM))
				e.must(harness.Until(e.waitContext(waitTimeout), func() error {
					if !strings.Contains(file(e), `"releasing":true`) {
						return fmt.Errorf("the file says %s", file(e))
					}
					return nil
				}))
				e.killed()
			}, "", "it may be revoked at any moment",
		},
	} {
		t.Run(c.what, func(t *testing.T) {
			e := newElect(t)
			c.before(e)
			next := e.again(variables(c.env))
			e.waitStatus(next, "/standby", http.StatusOK)
			e.waitLogged(next, c.says)
			if strings.Contains(next.Log(), "took over a lease") {
				t.Error("it has taken a lease over")
			}
			leases, err := e.etcd.Leases(e.ctx)
			e.must(err)
			if id := e.before.Lease.ID; !slices.Contains(leases, id) {
				t.Errorf("the lease %s is gone; there are %q", id, leases)
			}
			if e.first.Running() {
				e.killed()
			}
			_, err = e.etcd.Etcdctl(e.ctx, "lease", "revoke", e.before.Lease.ID) // for its end
			e.must(err)
			e.waitStatus(e.standby, "/leader", http.StatusOK)
			e.finish()
		})
	}
}

// TestElect_LeaseExpired: the lease of a process that was away for too long is gone. The next one
// campaigns again.
func TestElect_LeaseExpired(t *testing.T) {
	e := newElect(t)
	e.killed()
	_, err := e.etcd.Etcdctl(e.ctx, "lease", "revoke", e.before.Lease.ID) // in place of its end
	e.must(err)
	e.waitStatus(e.standby, "/leader", http.StatusOK)
	next := e.again()
	e.waitStatus(next, "/standby", http.StatusOK)
	e.must(e.standby.Signal(syscall.SIGTERM))
	e.must(next.WaitStatus(e.waitContext(recoverTTL/4), "/leader", http.StatusOK))
	if s := e.status(next); s.Leader.Token <= e.before.Leader.Token {
		t.Errorf("it leads with the token %d again, want more", s.Leader.Token)
	}
	e.finish()
}
