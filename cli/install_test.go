//go:build linux

package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInstall(t *testing.T) {
	binary, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, dest := range []string{
		dir, dir + "/", filepath.Join(dir, "leasehold"), filepath.Join(dir, "other"),
	} {
		if err := installTo(dest); err != nil {
			t.Errorf("%s: %v", dest, err)
		}
	}
	for _, name := range []string{"leasehold", "other"} {
		path := filepath.Join(dir, name)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || info.Mode() != 0o755 ||
			!bytes.Equal(got, binary) {
			t.Errorf("%s: %v, mode %v, %d bytes, want %d",
				name, err, info.Mode(), len(got), len(binary))
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "sub", "leasehold"), 0o755); err != nil {
		t.Fatal(err)
	}
	for dest, want := range map[string]string{
		dir + "/none/":         "no such file or directory",
		dir + "/none/x":        "write to " + dir + "/none: no such file or directory",
		dir + "/other/x":       "not a directory",
		dir + "/other/":        "not a directory",
		dir + "/sub":           dir + "/sub/leasehold is a directory",
		dir + "/sub/leasehold": "",
	} {
		err := installTo(dest)
		if want == "" && err != nil ||
			want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", dest, err, want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}
