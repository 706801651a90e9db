//go:build linux

package nofile_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"leasehold/internal/nofile"
)

// TestOriginal starts this test again with another soft limit, which Go raises
// before the test begins.
func TestOriginal(t *testing.T) {
	if os.Getenv("TEST_NOFILE") != "" {
		if nofile.Original.Soft != 123 {
			t.Fatalf("the soft limit was %d, want 123", nofile.Original.Soft)
		}
		return
	}
	cmd := exec.Command("/bin/sh", "-c",
		`ulimit -S -n 123 && exec "$0" -test.run '^TestOriginal$'`, os.Args[0])
	cmd.Env = append(os.Environ(), "TEST_NOFILE=1")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS") {
		t.Errorf("%v: %s", err, out)
	}
}
