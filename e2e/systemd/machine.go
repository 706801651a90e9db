//go:build linux

// Package systemd runs systemd/leasehold@.service as it is handed over: on
// machines whose process 1 is a real systemd, each in namespaces of its own
// and on a node of a network, with etcd on another.
//
// With LEASEHOLD_DEB a machine gets leasehold from that package, and not
// from the tree.
package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// A Machine is a booted systemd. It ends with this program at the latest.
type Machine struct {
	Name string

	pid     int // of its systemd, as we see it
	cmd     *exec.Cmd
	cgroup  string
	dir     string
	node    *harness.Node
	console *console
}

// MachineConfig says what a machine is to be.
type MachineConfig struct {
	Name    string
	Network *harness.Network
	Witness *harness.Witness // hears the jobs on the machine
	// Files are put into the machine's root before it boots: where, from where.
	Files map[string]string
	// Hosts are more names that it knows: what, where.
	Hosts map[string]string
}

// Install lists the files that make up leasehold on a machine: those of the
// package that LEASEHOLD_DEB names, unpacked below dir, else the binary and the
// unit of the tree.
func Install(ctx context.Context, dir, binary string) (map[string]string, error) {
	files := map[string]string{}
	if deb := os.Getenv("LEASEHOLD_DEB"); deb != "" {
		unpack := exec.CommandContext(ctx, "dpkg-deb", "-x", deb, dir)
		if out, err := unpack.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("unpack %s: %w: %s", deb, err, out)
		}
		files["/"] = dir
		return files, nil
	}
	root, err := harness.ModuleRoot()
	if err != nil {
		return nil, err
	}
	files["/usr/bin/leasehold"] = binary
	unit := filepath.Join(root, "systemd", "leasehold@.service")
	files["/etc/systemd/system/leasehold@.service"] = unit
	return files, nil
}

// Boot boots a machine and waits until it is up.
func Boot(ctx context.Context, cfg MachineConfig) (m *Machine, err error) {
	m = &Machine{Name: cfg.Name, console: &console{}}
	defer func() {
		if err != nil {
			err = fmt.Errorf("boot machine %s: %w\n%s", cfg.Name, err, m.console)
			m.Close()
		}
	}()
	root, err := harness.ModuleRoot()
	if err != nil {
		return m, err
	}
	if m.dir, err = harness.TempDir("leasehold-machine-"); err != nil {
		return m, err
	}
	work, files := filepath.Join(m.dir, "work"), filepath.Join(m.dir, "files")
	if err := errors.Join(os.Mkdir(work, 0o755), os.Mkdir(files, 0o755)); err != nil {
		return m, err
	}
	for to, from := range cfg.Files {
		to = filepath.Join(files, to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return m, err
		}
		// -T: a directory's contents go into the one that is there.
		out, err := exec.CommandContext(ctx, "cp", "-rT", from, to).CombinedOutput()
		if err != nil {
			return m, fmt.Errorf("%w: %s", err, out)
		}
	}
	hosts := "127.0.0.1 localhost " + cfg.Name + "\n"
	for name, addr := range cfg.Hosts {
		hosts += addr + " " + name + "\n"
	}
	etc := filepath.Join(files, "etc")
	if err := errors.Join(
		os.MkdirAll(etc, 0o755),
		os.WriteFile(filepath.Join(etc, "hosts"), []byte(hosts), 0o644),
	); err != nil {
		return m, err
	}
	if m.node, err = cfg.Network.Node(cfg.Name); err != nil {
		return m, err
	}
	if cfg.Witness != nil {
		if err := cfg.Witness.ListenOn(m.node); err != nil {
			return m, err
		}
	}
	if m.cgroup, err = os.MkdirTemp(harness.Cgroup2(), cgroupPrefix(os.Getppid())); err != nil {
		return m, err
	}
	// The units' users look into theirs through it.
	if err := os.Chmod(m.cgroup, 0o755); err != nil {
		return m, err
	}
	cgroup, err := os.Open(m.cgroup)
	if err != nil {
		return m, err
	}
	defer func() { _ = cgroup.Close() }()

	cmd := exec.Command(filepath.Join(root, "e2e/systemd/boot.sh"), cfg.Name, work, files)
	cmd.Stdout, cmd.Stderr = m.console, m.console
	cmd.WaitDelay = 100 * time.Millisecond
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UseCgroupFD: true, CgroupFD: int(cgroup.Fd()),
		Pdeathsig: syscall.SIGKILL, Setsid: true,
	}
	if err := m.node.Do(cmd.Start); err != nil {
		return m, err
	}
	m.cmd, m.pid = cmd, cmd.Process.Pid
	return m, harness.Until(ctx, func() error {
		if unix.Kill(m.pid, 0) != nil {
			return errors.New("it has ended")
		}
		out, err := m.Run(ctx, "systemctl", "is-active", "machine.target")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// Close ends the machine at once and removes all that it was.
func (m *Machine) Close() {
	if m.cmd != nil {
		_ = m.cmd.Process.Kill() // with process 1 the kernel kills all the others
		_ = m.cmd.Wait()
	}
	if m.cgroup != "" {
		_ = removeCgroupSoon(m.cgroup) // or later, by the program that started this one
	}
	if m.node != nil {
		m.node.Close()
	}
	if m.dir != "" {
		_ = os.RemoveAll(m.dir)
	}
}

// cgroupPrefix is how the cgroups of machines are named, by the pid of this
// program's parent, which sees to what this one could not remove.
func cgroupPrefix(parent int) string { return fmt.Sprintf("leasehold-machine-%d-", parent) }

// removeCgroupSoon waits for the end of the processes in a cgroup, all of
// which have been killed, and removes it.
func removeCgroupSoon(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return harness.Until(ctx, func() error { return removeCgroup(dir) })
}

// removeCgroup removes a cgroup and those below it.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeCgroup(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(err, os.Remove(dir))
}

// Command is a command on the machine, as root there.
func (m *Machine) Command(ctx context.Context, args ...string) *exec.Cmd {
	args = append([]string{
		"-t", strconv.Itoa(m.pid), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--",
	}, args...)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	cmd.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"LANG=C.UTF-8", "HOME=/root",
	}
	return cmd
}

// Run runs a command on the machine and returns all that it says.
func (m *Machine) Run(ctx context.Context, args ...string) (string, error) {
	out, err := m.Command(ctx, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s on machine %s: %w", strings.Join(args, " "), m.Name, err)
	}
	return string(out), err
}

// Path is where a file of the machine's is for this program.
func (m *Machine) Path(path string) string { return fmt.Sprintf("/proc/%d/root%s", m.pid, path) }

// Write writes a file on the machine, and its directory.
func (m *Machine) Write(path, text string) error {
	path = m.Path(path)
	return errors.Join(os.MkdirAll(filepath.Dir(path), 0o755),
		os.WriteFile(path, []byte(text), 0o644))
}

// Show reads properties of a unit.
func (m *Machine) Show(ctx context.Context, unit string) (map[string]string, error) {
	out, err := m.Run(ctx, "systemctl", "show", unit)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	properties := map[string]string{}
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		properties[name] = value
	}
	return properties, nil
}

// Journal is what the journal has of a unit.
func (m *Machine) Journal(ctx context.Context, unit string) string {
	out, err := m.logged(ctx, "journalctl", "--no-pager", "-o", "short-monotonic", "-u", unit)
	if err != nil {
		return err.Error()
	}
	return out
}

// Status is what systemctl shows of a unit, with the end of its log, whether it runs or not.
func (m *Machine) Status(ctx context.Context, unit string) string {
	out, _ := m.logged(ctx, "systemctl", "status", "--no-pager", "--full", unit)
	return out
}

// logged runs a command that reads the journal. What was logged before may still be in journald's
// sockets, also after the process that has logged it has exited.
func (m *Machine) logged(ctx context.Context, args ...string) (string, error) {
	if out, err := m.Run(ctx, "journalctl", "--sync"); err != nil {
		return out, err
	}
	return m.Run(ctx, args...)
}

// Processes are the pids, as this program sees them, of a unit's guard and
// elector.
func (m *Machine) Processes(ctx context.Context, unit string) (guard, elector int, err error) {
	properties, err := m.Show(ctx, unit)
	if err != nil {
		return 0, 0, err
	}
	main := properties["MainPID"]
	for _, pid := range harness.Children(m.pid) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue // it has just ended
		}
		_, ids, _ := strings.Cut(string(status), "\nNSpid:")
		ids, _, _ = strings.Cut(ids, "\n")
		if fields := strings.Fields(ids); len(fields) > 0 && fields[len(fields)-1] == main {
			guard = pid
		}
	}
	if guard == 0 {
		return 0, 0, fmt.Errorf("%s on machine %s has no guard (main pid %s)", unit, m.Name, main)
	}
	for _, pid := range harness.Children(guard) {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		words := bytes.Split(cmdline, []byte{0})
		if err == nil && len(words) > 1 && string(words[1]) == "elector" {
			elector = pid
		}
	}
	if elector == 0 {
		return 0, 0, fmt.Errorf("%s on machine %s has no elector", unit, m.Name)
	}
	return guard, elector, nil
}

// Cgroup is where a unit's cgroup is for this program.
func (m *Machine) Cgroup(ctx context.Context, unit string) (string, error) {
	properties, err := m.Show(ctx, unit)
	return filepath.Join(m.cgroup, properties["ControlGroup"]), err
}

// console keeps the last of what a machine says.
type console struct {
	mu   sync.Mutex
	text []byte
}

var _ io.Writer = (*console)(nil)

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text = append(c.text, p...)
	c.text = slices.Clone(c.text[max(0, len(c.text)-16<<10):])
	return len(p), nil
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text)
}
