//go:build linux

package proctree

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// OwnCgroup finds the directory of this process's cgroup v2.
func OwnCgroup() (string, error) {
	cgroups, mounts, err := readCgroups()
	if err != nil {
		return "", err
	}
	return findCgroup(cgroups, mounts)
}

// CgroupRoot finds where the root of this process's cgroup namespace is mounted, and which of the
// cgroups from there on is this process's.
func CgroupRoot() (mount, own string, err error) {
	cgroups, mounts, err := readCgroups()
	if err != nil {
		return "", "", err
	}
	if own, err = cgroupPath(cgroups); err != nil {
		return "", "", err
	}
	mount, err = findCgroup("0::/", mounts)
	return mount, own, err
}

func readCgroups() (cgroups, mounts string, err error) {
	c, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", "", err
	}
	m, err := os.ReadFile("/proc/self/mountinfo")
	return string(c), string(m), err
}

// cgroupPath is the path of a process's cgroup from the root of the cgroup namespace.
func cgroupPath(cgroups string) (string, error) {
	path := ""
	for line := range strings.Lines(cgroups) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			path = p
		}
	}
	if path == "" || path == "/.." || strings.HasPrefix(path, "/../") {
		return "", fmt.Errorf("%w: this process is in no cgroup v2 that it can see", ErrUnavailable)
	}
	return path, nil
}

// findCgroup is OwnCgroup for a process whose /proc has these texts.
func findCgroup(cgroups, mounts string) (string, error) {
	path, err := cgroupPath(cgroups)
	if err != nil {
		return "", err
	}
	for m := range eachMount(mounts) {
		root := strings.TrimSuffix(m.root, "/")
		rel, ok := strings.CutPrefix(path, root)
		if m.fsType == "cgroup2" && ok && (rel == "" || rel[0] == '/') {
			return filepath.Join(m.point, rel), nil
		}
	}
	return "", fmt.Errorf("%w: no cgroup v2 is mounted where this process's is to be seen",
		ErrUnavailable)
}
