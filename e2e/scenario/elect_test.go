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

	"golang.org/x/sys/unix"

	"leasehold/control"
	"leasehold/e2e/harness"
)

// elect is a leader without a job that has a state file, and a standby behind it.
type elect struct {
	*recovery
	standby *candidate
	before  status // of the leader
}

const electGrace = 2 * time.Second

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
	e.first = e.start("a", "", e.keeps)
	e.waitStatus(e.first, "/leader", http.StatusOK)
	e.standby = e.start("b", "", subcommand("elect"))
	e.waitStatus(e.standby, "/standby", http.StatusOK)
	e.before = e.status(e.first)
	// The term is written by a goroutine of its own.
	e.waitFile(`"lease":"` + fmt.Sprintf("%016s", e.before.Lease.ID))
	return e
}

// keeps makes a candidate elect with the state file.
func (e *elect) keeps(cfg *harness.CandidateConfig) {
	subcommand("elect")(cfg)
	cfg.Env = []string{
		"LEASEHOLD_STATE_DIR=" + e.dir, "LEASEHOLD_LOSS_GRACE=" + electGrace.String(),
		"LEASEHOLD_STOP_GRACE=" + electGrace.String(),
	}
}

// again starts the leader again, with the same settings.
func (e *elect) again(changes ...change) {
	e.Helper()
	listen := e.first.Listen
	e.first = e.startOn(e.first.Machine, "", append([]change{
		e.keeps, func(cfg *harness.CandidateConfig) { cfg.Listen = listen },
	}, changes...)...)
}

// killed kills the leader.
func (e *elect) killed() {
	e.Helper()
	e.first.mayExit = true
	e.must(e.first.Signal(syscall.SIGKILL))
	_, err := e.first.Wait(e.waitContext(waitTimeout))
	e.must(err)
}

// waitFile waits until the state file has a text.
func (e *elect) waitFile(text string) {
	e.Helper()
	e.must(harness.Until(e.waitContext(waitTimeout), func() error {
		content, err := os.ReadFile(filepath.Join(e.dir, "leasehold.state"))
		if err == nil && !strings.Contains(string(content), text) {
			err = fmt.Errorf("no %s in %s", text, content)
		}
		return err
	}))
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

// TestElect_GoesOn: elect is killed and started again, and again. The same term goes on, long
// before its lease would have expired, and the standby never leads.
func TestElect_GoesOn(t *testing.T) {
	e := newElect(t)
	history := e.terms()
	for range 2 {
		e.killed()
		began := harness.Now()
		e.again()
		e.must(e.first.WaitStatus(e.waitContext(recoverTTL/4), "/leader", http.StatusOK))
		t.Logf("it leads again %v after its start", (harness.Now() - began).Round(time.Millisecond))
		after := e.status(e.first)
		if *after.Leader != *e.before.Leader || after.Lease.ID != e.before.Lease.ID {
			t.Errorf("%+v, lease %s; want %+v, lease %s",
				after.Leader, after.Lease.ID, e.before.Leader, e.before.Lease.ID)
		}
		e.waitRenewals(e.first, 1)
	}
	if s := e.status(e.standby); s.State != "standby" ||
		strings.Contains(e.standby.Log(), "to=leading") {
		t.Errorf("the standby is %+v:\n%s", s, e.standby.Log())
	}
	began := harness.Now()
	e.must(e.first.Signal(syscall.SIGTERM))
	e.must(e.standby.WaitStatus(e.waitContext(recoverTTL/4), "/leader", http.StatusOK))
	if after := harness.Now() - began; after < electGrace {
		t.Errorf("the standby led %v after the stop, want %v at least", after, electGrace)
	}
	e.waitExit(e.first, 0)
	e.waitFile(`"lease":"0000000000000000"`)
	first := slices.IndexFunc(e.terms(), func(t control.Term) bool {
		return t.Started.Equal(history[0].Started) && t.Why == "stopped"
	})
	if terms := e.terms(); first < 0 {
		t.Errorf("the history is %+v, want one that began as %+v", terms, history)
	}
	e.finish()
}

// TestElect_EndsWithGrace: what ends the term of a process that has just begun to go on with it
// leaves the app its time to stop, as if that process had not been replaced.
func TestElect_EndsWithGrace(t *testing.T) {
	for name, ends := range map[string]func(e *elect){
		"a stop": func(e *elect) {
			e.again()
			e.waitLog(e.first, "took over a lease")
			e.must(e.first.Signal(syscall.SIGTERM))
		},
		"a hold": func(e *elect) {
			e.commands("held", "hold", "--stop")
			e.again()
			e.waitStatus(e.first, "/leader", http.StatusServiceUnavailable)
			e.commands("", "release")
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newElect(t)
			e.killed()
			began := harness.Now()
			ends(e)
			e.must(e.standby.WaitStatus(e.waitContext(recoverTTL/4), "/leader", http.StatusOK))
			if after := harness.Now() - began; after < electGrace {
				t.Errorf("the standby led %v after the kill, want %v at least", after, electGrace)
			}
			e.finish()
		})
	}
}

// TestElect_LeftAlone: where an app may work that does not ask the next elect, or the lease may be
// revoked at any moment, the next elect leaves it alone, and waits behind it.
func TestElect_LeftAlone(t *testing.T) {
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
		before func(e *elect)
		change change
		says   string
	}{
		{
			what: "another network namespace", says: "an app in another network namespace",
			before: edited(`"network_namespace":"...`, `"network_namespace":"fff`),
		},
		{
			what: "another boot", says: "the boot id is another",
			before: edited(`"boot_id":"...`, `"boot_id":"xxx`),
		},
		{
			what: "another identity", says: "it is of the identity",
			before: (*elect).killed, change: variables("LEASEHOLD_IDENTITY=c"),
		},
		{
			what: "another loss grace", says: "other settings were in use",
			before: (*elect).killed, change: variables("LEASEHOLD_LOSS_GRACE=1s"),
		},
		{
			what: "another address", says: "other settings were in use", before: (*elect).killed,
			change: func(cfg *harness.CandidateConfig) { cfg.Listen = "" },
		},
		{
			what: "SIGSTOPped", says: "a process of another daemon holds the lock",
			before: func(e *elect) { e.must(e.first.Signal(syscall.SIGSTOP)) },
			change: func(cfg *harness.CandidateConfig) { cfg.Listen = "" },
		},
		{
			what: "while it gives its lease back", says: "it may be revoked at any moment",
			before: func(e *elect) {
				e.first.SetReachable(false)
				e.must(e.first.Signal(syscall.SIGTERM))
				e.waitFile(`"releasing":"0000000000000001"`)
				e.killed()
				e.first.SetReachable(true)
			},
		},
	} {
		t.Run(c.what, func(t *testing.T) {
			e := newElect(t)
			c.before(e)
			first := e.first.Candidate // the machine has the next one later
			if c.change == nil {
				c.change = func(*harness.CandidateConfig) {}
			}
			e.again(c.change)
			e.waitStatus(e.first, "/standby", http.StatusOK)
			e.waitLogged(e.first, c.says)
			if strings.Contains(e.first.Log(), "took over a lease") {
				t.Error("it has taken a lease over")
			}
			leases, err := e.etcd.Leases(e.ctx)
			e.must(err)
			if id := e.before.Lease.ID; !slices.ContainsFunc(leases, func(lease string) bool {
				return strings.TrimLeft(lease, "0") == id
			}) {
				t.Errorf("the lease %s is gone; there are %q", id, leases)
			}
			first.Kill()
			_, err = e.etcd.Etcdctl(e.ctx, "lease", "revoke", e.before.Lease.ID) // for its end
			e.must(err)
			e.waitStatus(e.standby, "/leader", http.StatusOK)
			e.finish()
		})
	}
}

// TestElect_LeaseGone: the lease of the process before was revoked by somebody. The next one
// campaigns again.
func TestElect_LeaseGone(t *testing.T) {
	e := newElect(t)
	e.killed()
	_, err := e.etcd.Etcdctl(e.ctx, "lease", "revoke", e.before.Lease.ID)
	e.must(err)
	e.waitStatus(e.standby, "/leader", http.StatusOK)
	e.again()
	e.waitStatus(e.first, "/standby", http.StatusOK)
	e.must(e.standby.Signal(syscall.SIGTERM))
	e.must(e.first.WaitStatus(e.waitContext(recoverTTL/4), "/leader", http.StatusOK))
	if s := e.status(e.first); s.Leader.Token <= e.before.Leader.Token {
		t.Errorf("it leads with the token %d again, want more", s.Leader.Token)
	}
	e.finish()
}

// TestElect_FileNotWritten: a release that can't be noted is not sent. The daemon exits with 70,
// and the next one goes on.
func TestElect_FileNotWritten(t *testing.T) {
	e := newElect(t)
	e.must(unix.Prlimit(e.first.Guard(), unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 10, Max: 10}, nil))
	e.must(e.first.Signal(syscall.SIGTERM))
	e.waitExit(e.first, 70)
	e.waitLogged(e.first, "announce the release of the lease")
	e.again()
	e.waitStatus(e.first, "/leader", http.StatusOK)
	if after := e.status(e.first); *after.Leader != *e.before.Leader {
		t.Errorf("%+v leads, want %+v", after.Leader, e.before.Leader)
	}
	e.finish()
}
