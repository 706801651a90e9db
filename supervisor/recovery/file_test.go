//go:build linux

package recovery

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain plays a daemon's process that inherits the file: it holds the lock until its standard
// input ends. As another user it says what its job could do.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("TEST_HOLD") != "":
		_, _ = os.Stdin.Read(make([]byte, 1))
		return
	case os.Getenv("TEST_RIGHTS") != "":
		_, _ = os.Stdout.WriteString(canLeave(os.Getenv("TEST_RIGHTS") == "nnp"))
		return
	}
	os.Exit(m.Run())
}

func open(t *testing.T, dir string) *File {
	t.Helper()
	f, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

// claimed is the file of a daemon that has the lease, and is gone.
func claimed(t *testing.T, dir string, lease int64) {
	t.Helper()
	f, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Claim("election", "identity", true, 0); err != nil {
		t.Fatal(err)
	}
	k, err := Keep(f.FD(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	k.Lease(lease + 1)
	k.Lease(lease)
	k.Close(time.Minute)
}

// TestFile: the next daemon reads what the one before has written.
func TestFile(t *testing.T) {
	dir := t.TempDir()
	if r, err := open(t, t.TempDir()).Read("election", "identity"); r != nil || err != nil {
		t.Errorf("a new file: %+v, %v", r, err)
	}
	claimed(t, dir, 0xabc)
	f := open(t, dir)
	r, err := f.Read("election", "identity")
	if err != nil || r.Lease != 0xabc || r.Place.PID != os.Getpid() {
		t.Fatalf("%+v, %v", r, err)
	}
	// A claim names no lease, and a longer Record leaves nothing behind.
	if _, err := f.Claim("e", "i", true, 0); err != nil {
		t.Fatal(err)
	}
	if r, err := f.Read("e", "i"); err != nil || r.Lease != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if err := f.Empty(); err != nil {
		t.Fatal(err)
	}
	if r, err := f.Read("e", "i"); r != nil || err != nil {
		t.Errorf("emptied: %+v, %v", r, err)
	}
}

// TestFile_NotUsed: a file that is of somebody else, is a copy, or is damaged says nothing.
func TestFile_NotUsed(t *testing.T) {
	dir := t.TempDir()
	claimed(t, dir, 7)
	content, err := os.ReadFile(filepath.Join(dir, FileName))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		election, identity string
		content            []byte
		says               string
	}{
		{"other", "identity", content, "copy"},
		{"election", "identity", content[:50], "not a state file"},
		{"election", "identity", content[:len(content)-9], "checksum"},
		{"election", "identity", bytes.Repeat([]byte("x"), 3*maxRecord), "not a state file"},
		{"election", "identity", append(bytes.Clone(content), 0), "checksum"},
	} {
		other := t.TempDir()
		if err := os.WriteFile(filepath.Join(other, FileName), c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := open(t, other).Read(c.election, c.identity)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%.60q: %+v, %v, want %q", c.content, r, err, c.says)
		}
	}
	f := open(t, dir)
	if r, err := f.Read("other", "identity"); err == nil || !strings.Contains(err.Error(),
		"election") {
		t.Errorf("another election: %+v, %v", r, err)
	}
	if r, err := f.Read("election", "other"); err == nil || !strings.Contains(err.Error(),
		"identity") {
		t.Errorf("another identity: %+v, %v", r, err)
	}
}

// TestFile_Lock: the lock is held until the last process that has inherited it has exited.
func TestFile_Lock(t *testing.T) {
	dir := t.TempDir()
	f, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrHeld) {
		t.Errorf("held by this process: %v", err)
	}
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), "TEST_HOLD=1")
	child.ExtraFiles = []*os.File{os.NewFile(uintptr(dup(t, f.FD())), "state")}
	stdin, err := child.StdinPipe()
	if err == nil {
		err = child.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = child.ExtraFiles[0].Close()
	f.Close()
	if _, err := Open(dir); !errors.Is(err, ErrHeld) {
		t.Errorf("held by a child: %v", err)
	}
	_ = stdin.Close()
	_ = child.Wait()
	open(t, dir)
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	other, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	return other
}

// TestOpen_Refused: where the file can't be made, or can't be bound to its place, there is none.
func TestOpen_Refused(t *testing.T) {
	dir := t.TempDir()
	for name, makeIt := range map[string]func(path string) error{
		"a link":      func(path string) error { return os.Symlink("/etc/passwd", path) },
		"a pipe":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		"a directory": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		in := filepath.Join(dir, name)
		err := errors.Join(os.Mkdir(in, 0o700), makeIt(filepath.Join(in, FileName)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(in); err == nil {
			t.Errorf("%s is taken for the state file", name)
		}
	}
	if _, err := Open(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	if os.Geteuid() != 0 {
		return
	}
	// It stands for a network file system: it is not in the list either.
	ramfs := t.TempDir()
	if err := unix.Mount("ramfs", ramfs, "ramfs", 0, ""); err != nil {
		t.Logf("not mounted: %v", err)
		return
	}
	defer func() { _ = unix.Unmount(ramfs, 0) }()
	if _, err := Open(ramfs); err == nil || !strings.Contains(err.Error(), "local file system") {
		t.Errorf("a file system that is not known to be local: %v", err)
	}
}

// TestWrite_Fails: a disk that takes nothing is noticed.
func TestWrite_Fails(t *testing.T) {
	full, err := unix.Open("/dev/full", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := &File{fd: full, path: "/dev/full"}
	defer f.Close()
	if _, err := f.Claim("election", "identity", true, 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("claim: %v", err)
	}
	if err := f.Empty(); err == nil {
		t.Error("a device is emptied")
	}
}

// TestCanLeave: who may leave a cgroup.
func TestCanLeave(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("skipped: needs root, to be another user")
	}
	if why := canLeave(true); !strings.Contains(why, "root") {
		t.Errorf("root: %q", why)
	}
	exe := filepath.Join(t.TempDir(), "test")
	image, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(exe, image, 0o755)
	}
	for dir := filepath.Dir(exe); dir != "/" && err == nil; dir = filepath.Dir(dir) {
		if strings.HasPrefix(dir, os.TempDir()+"/") {
			err = os.Chmod(dir, 0o755)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		rights  string
		ambient []uintptr
		want    string
	}{
		{"nnp", nil, ""},
		{"none", nil, "it runs without no_new_privs"},
		{"nnp", []uintptr{unix.CAP_KILL}, ""},
		{"nnp", []uintptr{unix.CAP_SYS_ADMIN}, "it has capabilities"},
		{"nnp", []uintptr{unix.CAP_DAC_OVERRIDE}, "it has capabilities"},
		{"nnp", []uintptr{unix.CAP_BPF}, "it has capabilities"},
	} {
		cmd := exec.Command(exe)
		cmd.Dir, cmd.Env = "/", append(os.Environ(), "TEST_RIGHTS="+c.rights)
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: c.ambient,
		}
		out, err := cmd.Output()
		if err != nil || string(out) != c.want {
			t.Errorf("%s %v: %q, %v, want %q", c.rights, c.ambient, out, err, c.want)
		}
	}
}
