//go:build linux

package dist_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// TestProcessPage types docs/process.md into one shell, in the folder of the
// release, with a home and a network of its own.
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
	commands := harness.ReadPage(string(page))
	if commands.Len() < 8 {
		t.Fatalf("docs/process.md has %d blocks of commands", commands.Len())
	}

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	// With its first process everything ends that was started: it is process 1 of a namespace.
	cmd := exec.CommandContext(ctx, "unshare", "--net", "--pid", "--fork", "--kill-child",
		"--mount-proc", "bash", "-c", commands.Script("ip link set lo up"))
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
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
	if err := commands.Check(string(out)); err != nil {
		t.Error(err)
	}
}
