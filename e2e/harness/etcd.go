//go:build linux

package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Etcd names the two programs of etcd that a cluster is made of.
type Etcd struct {
	Server string // etcd
	Ctl    string // etcdctl
}

// FindEtcd takes $ETCD and $ETCDCTL, else bin/etcd and bin/etcdctl of this
// module, else builds those two there, once, and says so on announce first:
// it takes minutes. Test packages run at the same time, so a file lock lets
// one of them build while the others wait.
func FindEtcd(ctx context.Context, announce io.Writer) (Etcd, error) {
	server, err := findTool(ctx, announce, "ETCD", "etcd", "go.etcd.io/etcd/server/v3")
	if err != nil {
		return Etcd{}, err
	}
	ctl, err := findTool(ctx, announce, "ETCDCTL", "etcdctl", "go.etcd.io/etcd/etcdctl/v3")
	if err != nil {
		return Etcd{}, err
	}
	return Etcd{Server: server, Ctl: ctl}, nil
}

// EtcdOnPath returns the server on PATH if it is at least 3.5, the first with
// which leasehold is used; otherwise "".
func EtcdOnPath(ctx context.Context) string {
	path, err := exec.LookPath("etcd")
	if err != nil {
		return ""
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return ""
	}
	_, rest, found := strings.Cut(string(out), "etcd Version: ")
	if !found {
		return ""
	}
	parts := strings.SplitN(strings.Fields(rest)[0], ".", 3)
	if len(parts) < 2 {
		return ""
	}
	major, errMajor := strconv.Atoi(parts[0])
	minor, errMinor := strconv.Atoi(parts[1])
	if errMajor != nil || errMinor != nil || major < 3 || major == 3 && minor < 5 {
		return ""
	}
	return path
}

// FindEtcdServer is FindEtcd for those who need no etcdctl: $ETCD, an etcd of
// 3.5 or newer on PATH, bin/etcd, or one built there.
func FindEtcdServer(ctx context.Context, announce io.Writer) (etcd Etcd, err error) {
	if os.Getenv("ETCD") == "" {
		if etcd.Server = EtcdOnPath(ctx); etcd.Server != "" {
			return etcd, nil
		}
	}
	etcd.Server, err = findTool(ctx, announce, "ETCD", "etcd", "go.etcd.io/etcd/server/v3")
	return etcd, err
}

func findTool(ctx context.Context, announce io.Writer, variable, name, pkg string) (string, error) {
	if path := os.Getenv(variable); path != "" {
		if err := unix.Access(path, unix.X_OK); err != nil {
			return "", fmt.Errorf("run $%s %s: %w", variable, path, err)
		}
		return path, nil
	}
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, "bin", name)
	if unix.Access(path, unix.X_OK) == nil {
		return path, nil
	}
	if err := buildTool(ctx, announce, root, path, pkg); err != nil {
		return "", fmt.Errorf("build bin/%s: %w", name, err)
	}
	return path, nil
}

func buildTool(ctx context.Context, announce io.Writer, root, path, pkg string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(filepath.Dir(path), ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }() // closing gives the lock back
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", lock.Name(), err)
		}
	}
	if unix.Access(path, unix.X_OK) == nil {
		return nil // someone else built it while we waited
	}
	_, _ = fmt.Fprintf(announce,
		"building bin/%s from tools/etcd, once; it takes about two minutes\n", filepath.Base(path))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", path+".new", pkg)
	cmd.Dir = filepath.Join(root, "tools", "etcd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return os.Rename(path+".new", path)
}

// ModuleRoot finds the directory of leasehold's go.mod at or above the working
// directory.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		data, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && strings.HasPrefix(string(data), "module leasehold\n") {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("no go.mod of leasehold at or above %s", dir)
		}
	}
}
