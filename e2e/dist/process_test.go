//go:build linux

package dist_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// fenced are the blocks of a page: commands are sh, and the text after them is
// what they say.
var fenced = regexp.MustCompile("(?ms)^```(sh|text)\n(.*?)^```$")

// TestProcessPage types docs/process.md into one shell, in the folder of the
// release, with a home and a network of its own. Each command must succeed.
// Each line of the text that follows a block, where … stands for anything, must
// come out, in this order, of the block or later: jobs speak when they run.
func TestProcessPage(t *testing.T) {
	needs(t, "unshare", "supervisord", "bash")
	t.Parallel()
	etcd, err := harness.FindEtcd(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	server, err := filepath.Abs(etcd.Server)
	if err != nil {
		t.Fatal(err)
	}
	page := read(t, filepath.Join(moduleRoot(t), "docs", "process.md"))
	script := bytes.NewBufferString("set -euo pipefail\nip link set lo up\n")
	var said []string // after each block
	for _, block := range fenced.FindAllStringSubmatch(string(page), -1) {
		if block[1] == "text" {
			said[len(said)-1] = block[2]
			continue
		}
		fmt.Fprintf(script, "echo '== %d'\n%s", len(said), block[2])
		said = append(said, "")
	}
	script.WriteString("echo '== end'\n")
	if len(said) < 8 {
		t.Fatalf("docs/process.md has %d blocks of commands", len(said))
	}

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	// With its first process everything ends that was started: it is process 1 of a namespace.
	cmd := exec.CommandContext(ctx, "unshare", "--net", "--pid", "--fork", "--kill-child",
		"--mount-proc", "bash", "-c", script.String())
	cmd.Dir = filepath.Join(moduleRoot(t), "dist")
	home := t.TempDir()
	// The archive is unpacked where the reader is.
	work := filepath.Join(home, "release")
	run(t, "cp", "-r", cmd.Dir, work)
	cmd.Dir = work
	cmd.Env = []string{
		"HOME=" + home, "TMPDIR=" + t.TempDir(),
		"PATH=" + filepath.Dir(server) + ":" + os.Getenv("PATH"),
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasSuffix(string(out), "== end\n") {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
	for i, lines := range said {
		_, rest, found := strings.Cut(string(out), fmt.Sprintf("== %d\n", i))
		if !found {
			t.Fatalf("block %d did not run", i)
		}
		for line := range strings.Lines(lines) {
			pattern := regexp.QuoteMeta(strings.TrimSuffix(line, "\n"))
			pattern = strings.ReplaceAll(pattern, "…", ".*")
			at := regexp.MustCompile("(?m)^" + pattern + "$").FindStringIndex(rest)
			if at == nil {
				t.Errorf("after block %d there is no line %q in:\n%s", i, line, rest)
				break
			}
			rest = rest[at[1]:]
		}
	}
}
