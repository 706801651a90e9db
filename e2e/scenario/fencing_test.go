//go:build linux

package scenario_test

import (
	"bytes"
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

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"leasehold/e2e/harness"
)

// A writer is a job that counts in etcd without a pause.
type writer struct {
	name   string
	job    func(tr *trial) []string // to which the counter's key is added
	fenced bool
}

// tokenCheck is the one line of the shell example that makes the difference.
const tokenCheck = `c("$LEASEHOLD_KEY") = "$LEASEHOLD_FENCING_TOKEN"` + "\n"

func writers() []writer {
	return []writer{
		{"go", func(tr *trial) []string {
			p, err := harness.Build(tr.ctx, "./examples/fencing")
			tr.must(err)
			tr.Cleanup(p.Remove)
			return []string{filepath.Join(filepath.Dir(p.Leasehold), "fencing")}
		}, true},
		{"shell", func(tr *trial) []string {
			return []string{tr.script(func(s string) string { return s })}
		}, true},
		// What makes the test worth something: the same script without the check.
		{"shell without the check", func(tr *trial) []string {
			return []string{tr.script(func(s string) string {
				if strings.Count(s, tokenCheck) != 1 {
					tr.Fatalf("fencing.sh does not check the token with %q", tokenCheck)
				}
				return strings.Replace(s, tokenCheck, "", 1)
			})}
		}, false},
	}
}

// script copies the shell example to where any user may be.
func (tr *trial) script(change func(string) string) string {
	tr.Helper()
	text, err := os.ReadFile(exampleFile(tr, "fencing.sh"))
	tr.must(err)
	dir, err := harness.TempDir("leasehold-fencing-")
	tr.must(err)
	tr.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "fencing.sh")
	tr.must(os.WriteFile(path, []byte(change(string(text))), 0o755))
	return path
}

func exampleFile(t testing.TB, name string) string {
	t.Helper()
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, "examples", "fencing", name)
}

// TestFencing freezes a candidate with all of its processes, as a suspended
// host does, until another leads and writes. Then the old job alone goes on,
// while nobody is there to kill it: the worst that can happen.
func TestFencing(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	const freezes = 6
	for _, w := range writers() {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			who := users()[1]
			if os.Geteuid() == 0 {
				who = users()[0]
			}
			tr := newTrial(t, who, harness.ClusterConfig{})
			tr.ttl = 2 * time.Second
			h := tr.newHistory("counters/" + strings.ReplaceAll(w.name, " ", "-"))
			change := func(cfg *harness.CandidateConfig) {
				cfg.Job = append(w.job(tr), h.counter)
				cfg.Env = append(cfg.Env, "PATH="+filepath.Dir(etcdctl(tr))+":"+os.Getenv("PATH"),
					"ETCDCTL_ENDPOINTS="+tr.etcd.Members[0].ClientURL,
					"ETCDCTL_COMMAND_TIMEOUT=1m", // a freeze is not to end the writer's patience
					"LEASEHOLD_RESTART_LIMIT=0")
			}
			leader := tr.start("a", "", change)
			h.waitWrites(tr, 0, 5)
			standby := tr.start("b", "", change)
			tr.waitStatus(standby, "/standby", http.StatusOK)
			stale, prepared := 0, 0
			for range freezes {
				token := h.last().token
				job := tr.freeze(leader)
				h.waitWrites(tr, token+1, 3)
				seen, before := len(h.writes), h.last()
				tr.thaw(job...)
				if w.fenced {
					count := tr.waitRefusal(leader, token)
					stale++
					if count <= before.count {
						prepared++ // from what it had read before the freeze
					}
				} else {
					h.wait(tr, func() bool {
						return slices.ContainsFunc(h.writes[seen:], func(w write) bool {
							return w.token == token
						})
					})
				}
				elector, err := leader.Elector()
				tr.must(err)
				tr.thaw(elector, leader.Guard())
				tr.waitStatus(leader, "/standby", http.StatusOK)
				h.follow(tr)
				h.waitWrites(tr, token+1, 3) // the other's go on
				leader, standby = standby, leader
			}
			tr.finish()
			h.follow(tr)
			behind, lost := h.judge()
			t.Logf("%d writes under %d tokens; "+
				"%d frozen writers went on and were refused, %d with what they had read before; "+
				"accepted behind a higher token: %d; counts lost: %d",
				len(h.writes), len(h.tokens()), stale, prepared, len(behind), lost)
			switch {
			case len(h.tokens()) < freezes+1:
				t.Errorf("%d tokens, want one a term, %d", len(h.tokens()), freezes+1)
			case w.fenced && (len(behind) > 0 || lost > 0):
				t.Errorf("stale writes were accepted: %+v; counts lost: %d", behind, lost)
			case !w.fenced && len(behind) < freezes:
				t.Errorf("without the check %d stale writes were accepted, "+
					"want one for each of %d freezes: this test can't tell", len(behind), freezes)
			}
		})
	}
}

// freeze stops all processes of a candidate, those first that could kill, and
// returns those of the job.
func (tr *trial) freeze(c *candidate) (job []int) {
	tr.Helper()
	elector, err := c.Elector()
	tr.must(err)
	tr.must(c.Signal(syscall.SIGSTOP))
	tr.must(syscall.Kill(elector, syscall.SIGSTOP))
	// Looks in a row at which all were stopped: what was forked before one shows at the next.
	clean, asked := 0, map[int]bool{}
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		job = slices.DeleteFunc(harness.Descendants(c.Guard()), func(pid int) bool {
			return pid == elector
		})
		var running error
		for _, pid := range append([]int{c.Guard(), elector}, job...) {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil {
				running = errors.Join(running, err) // it has just ended
				continue
			}
			// The name, in parentheses, may hold anything; the state follows. Whoever waits for a
			// child that vfork(2) has made, which is stopped, stops before it goes on.
			state := stat[bytes.LastIndexByte(stat, ')')+2]
			if state != 'T' && state != 'Z' && (state != 'D' || !asked[pid]) {
				_ = syscall.Kill(pid, syscall.SIGSTOP)
				asked[pid] = true
				running = errors.Join(running,
					fmt.Errorf("pid %d of candidate %s is not stopped", pid, c.Identity))
			}
		}
		if clean++; running != nil {
			clean = 0
		} else if clean < 2 {
			running = errors.New("one look is not enough")
		}
		return running
	}))
	if len(job) == 0 {
		tr.Fatalf("candidate %s has no job", c.Identity)
	}
	return job
}

func (tr *trial) thaw(pids ...int) {
	tr.Helper()
	for _, pid := range pids {
		// A process that had ended in the freeze is reaped as soon as its parent goes on.
		if err := syscall.Kill(pid, syscall.SIGCONT); !errors.Is(err, syscall.ESRCH) {
			tr.must(err)
		}
	}
}

var refusal = regexp.MustCompile(
	`refused: the term is over: count (\d+) with token (\d+) is not written`)

// waitRefusal waits until the job of a token has said that a write of its was
// refused, and returns what it would have written.
func (tr *trial) waitRefusal(c *candidate, token int64) (count int64) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		for _, m := range refusal.FindAllStringSubmatch(c.Log(), -1) {
			var of int64
			if _, err := fmt.Sscan(m[1], &count); err != nil {
				return err
			}
			if _, err := fmt.Sscan(m[2], &of); err != nil {
				return err
			}
			if of == token {
				return nil
			}
		}
		return fmt.Errorf("no write with token %d was refused", token)
	}))
	return count
}

// history is every write of a counter that etcd accepted, in etcd's order.
type history struct {
	counter string
	client  *clientv3.Client
	watch   clientv3.WatchChan
	writes  []write
}

type write struct{ revision, count, token int64 }

func (tr *trial) newHistory(counter string) *history {
	tr.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: tr.etcd.Endpoints(), Logger: zap.NewNop(),
	})
	tr.must(err)
	tr.Cleanup(func() { _ = client.Close() })
	watch := client.Watch(tr.ctx, counter, clientv3.WithRev(1))
	return &history{counter: counter, client: client, watch: watch}
}

func (h *history) last() write {
	if len(h.writes) == 0 {
		return write{}
	}
	return h.writes[len(h.writes)-1]
}

// wait takes in writes until ok says that it is enough.
func (h *history) wait(tr *trial, ok func() bool) {
	tr.Helper()
	bound := tr.waitContext(waitTimeout)
	for !ok() {
		select {
		case resp, open := <-h.watch:
			if !open || resp.Err() != nil {
				tr.Fatalf("the watch of the counter has ended: %v", resp.Err())
			}
			for _, e := range resp.Events {
				w := write{revision: e.Kv.ModRevision}
				if _, err := fmt.Sscan(string(e.Kv.Value), &w.count, &w.token); err != nil {
					tr.Fatalf("%q was written to the counter: %v", e.Kv.Value, err)
				}
				h.writes = append(h.writes, w)
			}
		case <-bound.Done():
			tr.Fatalf("the writes of the counter that are waited for do not come; "+
				"the last of %d: %+v", len(h.writes), h.last())
		}
	}
}

// waitWrites waits for n more writes with that token or a higher one.
func (h *history) waitWrites(tr *trial, token int64, n int) {
	tr.Helper()
	from := len(h.writes)
	h.wait(tr, func() bool {
		found := 0
		for _, w := range h.writes[from:] {
			if w.token >= token {
				found++
			}
		}
		return found >= n
	})
}

// follow takes in all that was written.
func (h *history) follow(tr *trial) {
	tr.Helper()
	resp, err := h.client.Get(tr.ctx, h.counter)
	tr.must(err)
	h.wait(tr, func() bool { return h.last().revision >= resp.Kvs[0].ModRevision })
}

func (h *history) tokens() map[int64]bool {
	tokens := map[int64]bool{}
	for _, w := range h.writes {
		tokens[w.token] = true
	}
	return tokens
}

// judge returns the writes that were accepted although one with a higher token
// had been, and how many times the count did not go up by one.
func (h *history) judge() (behind []write, lost int) {
	var before write
	highest := int64(0)
	for _, w := range h.writes {
		if w.token < highest {
			behind = append(behind, w)
		}
		if w.count != before.count+1 {
			lost++
		}
		highest, before = max(highest, w.token), w
	}
	return behind, lost
}

func etcdctl(tr *trial) string {
	tr.Helper()
	etcd, err := harness.FindEtcd(tr.ctx, os.Stderr)
	tr.must(err)
	path, err := filepath.Abs(etcd.Ctl)
	tr.must(err)
	return path
}

// TestFencingDocs: the code in docs/fencing.md is that of the examples.
func TestFencingDocs(t *testing.T) {
	doc, err := os.ReadFile(
		filepath.Join(filepath.Dir(exampleFile(t, "")), "..", "docs", "fencing.md"))
	if err != nil {
		t.Fatal(err)
	}
	for language, name := range map[string]string{"go": "main.go", "sh": "fencing.sh"} {
		source, err := os.ReadFile(exampleFile(t, name))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, found := strings.Cut(string(doc), "```"+language+"\n")
		code, _, closed := strings.Cut(rest, "```")
		if !found || !closed || !strings.Contains(string(source), code) {
			t.Errorf("the first %s code of docs/fencing.md is not in examples/fencing/%s",
				language, name)
		}
	}
}
