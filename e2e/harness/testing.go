//go:build linux

package harness

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// NewTestCluster starts an etcd cluster that ends with the test.
func NewTestCluster(t testing.TB, cfg ClusterConfig) *Cluster {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute) // it may have to be built
	defer cancel()
	if cfg.Etcd == (Etcd{}) {
		etcd, err := FindEtcd(ctx, os.Stderr)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Etcd = etcd
	}
	ctx, cancel = context.WithTimeout(ctx, time.Minute)
	defer cancel()
	c, err := StartCluster(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, m := range c.Members {
				t.Logf("log of etcd member %s:\n%s", m.Name, telling(m.Log()))
			}
		}
		c.Close()
	})
	return c
}

// NewTestProxy starts a proxy in front of a URL's or host:port's server that ends with the test.
func NewTestProxy(t testing.TB, target string) *Proxy {
	t.Helper()
	if _, addr, found := strings.Cut(target, "://"); found {
		target = addr
	}
	p, err := StartProxy("127.0.0.1:0", target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// NewTestWitness starts a witness that ends with the test.
func NewTestWitness(t testing.TB) *Witness {
	t.Helper()
	w, err := NewWitness()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() { // once more where the logs of others end
			for _, l := range w.Lives() {
				if l.Role == "job" {
					t.Logf("the job of %s (token %d) lived from %v to %v",
						l.Candidate, l.Token, l.Started, l.End)
				}
			}
		}
		w.Close()
	})
	return w
}

// NeedsRoot skips a test that needs root and a cgroup v2 tree to write in. With E2E_NO_SKIP=1, as
// CI has it, that is a failure.
func NeedsRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 && cgroup2Writable() {
		return
	}
	if os.Getenv("E2E_NO_SKIP") == "1" {
		t.Fatal("needs root (cgroup v2), and E2E_NO_SKIP=1 forbids to skip")
	}
	t.Skip("skipped: needs root (cgroup v2)")
}

// Cgroup2 is the mount point of the cgroup v2 hierarchy, or "".
func Cgroup2() string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		before, after, found := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if found && strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 {
			return fields[4]
		}
	}
	return ""
}

func cgroup2Writable() bool {
	mount := Cgroup2()
	return mount != "" && unix.Access(filepath.Join(mount, "cgroup.procs"), unix.W_OK) == nil
}

var tellingPattern = regexp.MustCompile(
	`elected leader|became leader|lost leader|revok|"level":"(error|fatal)"|panic`)

// telling picks the lines of etcd's log that tell of leaders, leases and errors.
func telling(log string) string {
	var lines []string
	for line := range strings.Lines(log) {
		if tellingPattern.MatchString(line) {
			lines = append(lines, line)
		}
	}
	return LastLines(strings.Join(lines, ""), 20)
}

// LastLines returns the last n lines: where a log is cut, its end is what counts.
func LastLines(log string, n int) string {
	lines := slices.Collect(strings.Lines(log))
	return strings.Join(lines[max(0, len(lines)-n):], "")
}
