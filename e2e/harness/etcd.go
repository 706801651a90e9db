//go:build linux

package harness

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// Etcd names the two programs of etcd that a cluster is made of.
type Etcd struct {
	Server string // etcd
	Ctl    string // etcdctl
}

// FindEtcd takes $ETCD and $ETCDCTL, else bin/etcd and bin/etcdctl of this module, else builds
// those two there, once, and says so on announce first: it takes minutes.
func FindEtcd(ctx context.Context, announce io.Writer) (etcd Etcd, err error) {
	etcd.Server, err = findTool(ctx, announce, "ETCD", "etcd", "go.etcd.io/etcd/server/v3")
	if err == nil {
		etcd.Ctl, err = findTool(ctx, announce, "ETCDCTL", "etcdctl", "go.etcd.io/etcd/etcdctl/v3")
	}
	return etcd, err
}

// goodVersion is that of an etcd of at least 3.4, the first with which leasehold is tested.
var goodVersion = regexp.MustCompile(`etcd Version: (3\.([4-9]|\d\d)|[4-9]|\d\d)`)

// FindEtcdServer is FindEtcd for those who need no etcdctl: $ETCD, an etcd on PATH that is new
// enough, bin/etcd, or one built there.
func FindEtcdServer(ctx context.Context, announce io.Writer) (etcd Etcd, err error) {
	if path, err := exec.LookPath("etcd"); err == nil && os.Getenv("ETCD") == "" {
		version, err := exec.CommandContext(ctx, path, "--version").Output()
		if err == nil && goodVersion.Match(version) {
			return Etcd{Server: path}, nil
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
	if err := buildTool(ctx, announce, root, path, pkg); err != nil {
		return "", fmt.Errorf("build bin/%s: %w", name, err)
	}
	return path, nil
}

// buildTool builds a program unless it is there. Test packages run at the same time, so a file lock
// lets one of them build while the others wait.
func buildTool(ctx context.Context, announce io.Writer, root, path, pkg string) error {
	if unix.Access(path, unix.X_OK) == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	lock, err := os.Create(filepath.Join(filepath.Dir(path), ".lock"))
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }() // closing gives the lock back
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
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

// ModuleRoot finds the directory of leasehold's go.mod at or above the working directory.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	for d := dir; err == nil; d = filepath.Dir(d) {
		data, _ := os.ReadFile(filepath.Join(d, "go.mod")) // of most directories there is none
		if strings.HasPrefix(string(data), "module leasehold\n") {
			return d, nil
		}
		if d == "/" {
			err = fmt.Errorf("no go.mod of leasehold at or above %s", dir)
		}
	}
	return "", err
}
