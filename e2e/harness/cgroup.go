//go:build linux

package harness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// Cgroup is a cgroup (version 2) that holds a program with all that it starts.
type Cgroup struct {
	Path string

	dir *os.File
}

var cgroups atomic.Int64 // keeps their names apart

// NewCgroup makes a cgroup at the top of the hierarchy. Its name holds the prefix and this
// program's pid: see RemoveLeftovers.
func NewCgroup(prefix string) (*Cgroup, error) {
	mount := Cgroup2()
	if mount == "" {
		return nil, errors.New("no cgroup v2 is mounted")
	}
	name := fmt.Sprintf("%s-%d-%d", prefix, os.Getpid(), cgroups.Add(1))
	return CgroupAt(filepath.Join(mount, name))
}

// CgroupAt is the cgroup at a path. It makes it unless it is there.
func CgroupAt(path string) (*Cgroup, error) {
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &Cgroup{Path: path, dir: dir}, nil
}

// fresh makes a new cgroup below, and removes what is empty there.
func (c *Cgroup) fresh() (*Cgroup, error) {
	for _, path := range slices.Backward(c.Children()) {
		_ = os.Remove(path) // it fails while something runs there
	}
	return CgroupAt(filepath.Join(c.Path, fmt.Sprintf("run-%d", cgroups.Add(1))))
}

// RemoveLeftovers removes the cgroups that programs have left which were killed before they could
// call Remove.
func RemoveLeftovers(ctx context.Context, prefix string) error {
	found, err := filepath.Glob(filepath.Join(Cgroup2(), prefix+"-*-*"))
	for _, path := range found {
		owner := strings.Split(strings.TrimPrefix(filepath.Base(path), prefix+"-"), "-")[0]
		if _, gone := os.Stat("/proc/" + owner); gone == nil {
			continue
		}
		c, errOpen := CgroupAt(path)
		if errOpen == nil {
			errOpen = c.Remove(ctx)
		}
		err = errors.Join(err, errOpen)
	}
	return err
}

// Enter has a command start in the cgroup.
func (c *Cgroup) Enter(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(c.dir.Fd())
}

// Freeze stops every process of the cgroup at once. A process that is started in it meanwhile waits
// for Thaw, and so does its parent.
func (c *Cgroup) Freeze(ctx context.Context) error {
	if err := c.write("cgroup.freeze", "1"); err != nil {
		return err
	}
	return c.waitFor(ctx, "frozen 1")
}

// Thaw ends a freeze.
func (c *Cgroup) Thaw(ctx context.Context) error {
	if err := c.write("cgroup.freeze", "0"); err != nil {
		return err
	}
	return c.waitFor(ctx, "frozen 0")
}

// FreezeAsked reports whether the cgroup itself is to be frozen, and not one above it. What was
// frozen stays so until then, or until SIGKILL reaches it.
func (c *Cgroup) FreezeAsked() bool {
	asked, _ := os.ReadFile(filepath.Join(c.Path, "cgroup.freeze")) // it may just have gone
	return string(asked) == "1\n"
}

// Frozen reports whether the cgroup itself was frozen, and nothing in it runs.
func (c *Cgroup) Frozen() bool { return c.FreezeAsked() && c.has("frozen 1") == nil }

// Killed reports whether SIGKILL has reached all that is in the cgroup: see Killed.
func (c *Cgroup) Killed() bool {
	return !slices.ContainsFunc(c.Processes(), func(pid int) bool { return !Killed(pid) })
}

// WaitEmpty waits until no process is in the cgroup. Its error names those that are.
func (c *Cgroup) WaitEmpty(ctx context.Context) error {
	err := c.waitFor(ctx, "populated 0")
	if err == nil {
		return nil
	}
	var left []string
	for _, pid := range c.Processes() {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // it may just have ended
		words := strings.ReplaceAll(string(cmdline), "\x00", " ")
		left = append(left, fmt.Sprintf("%d (%s)", pid, words))
	}
	return fmt.Errorf("processes are left: %s: %w", strings.Join(left, ", "), err)
}

// Processes are the pids of all that live in the cgroup and below.
func (c *Cgroup) Processes() []int {
	var pids []int
	for _, dir := range c.tree() {
		text, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")) // it may just have gone
		for _, word := range strings.Fields(string(text)) {
			if pid, err := strconv.Atoi(word); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// Children are the paths of the cgroups below.
func (c *Cgroup) Children() []string { return c.tree()[1:] }

// Kill sends SIGKILL to everything in the cgroup and below.
func (c *Cgroup) Kill() error { return c.write("cgroup.kill", "1") }

// Remove kills all that is in the cgroup and removes it.
func (c *Cgroup) Remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, WaitTimeout)
	defer cancel()
	_ = c.dir.Close()
	return Until(ctx, func() error {
		err := c.Kill()
		for _, d := range slices.Backward(c.tree()) {
			err = errors.Join(err, os.Remove(d))
		}
		return err
	})
}

func (c *Cgroup) write(file, text string) error {
	return os.WriteFile(filepath.Join(c.Path, file), []byte(text), 0)
}

// waitFor waits until the cgroup's events hold a line.
func (c *Cgroup) waitFor(ctx context.Context, line string) error {
	return Until(ctx, func() error { return c.has(line) })
}

// has returns an error unless the cgroup's events hold a line.
func (c *Cgroup) has(line string) error {
	events, err := os.ReadFile(filepath.Join(c.Path, "cgroup.events"))
	if err == nil && !slices.Contains(strings.Split(string(events), "\n"), line) {
		err = fmt.Errorf("%s is not %q but %q", c.Path, line, events)
	}
	return err
}

// tree lists the cgroup and all below, the outer ones first.
func (c *Cgroup) tree() []string {
	dirs := []string{c.Path}
	_ = filepath.WalkDir(c.Path, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && path != c.Path {
			dirs = append(dirs, path)
		}
		return nil // what has just gone is not there
	})
	return dirs
}
