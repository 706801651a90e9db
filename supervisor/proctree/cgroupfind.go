//go:build linux

package proctree

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// OwnCgroup finds the directory of this process's cgroup v2.
func OwnCgroup() (string, error) {
	cgroups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	return findCgroup(string(cgroups), string(mounts))
}

// findCgroup is OwnCgroup for a process whose /proc has these texts.
func findCgroup(cgroups, mounts string) (string, error) {
	path := ""
	for line := range strings.Lines(cgroups) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			path = p
		}
	}
	if path == "" || path == "/.." || strings.HasPrefix(path, "/../") {
		return "", errors.New("this process is in no cgroup v2 that it can see")
	}
	for m := range eachMount(mounts) {
		root := strings.TrimSuffix(m.root, "/")
		rel, ok := strings.CutPrefix(path, root)
		if m.fsType == "cgroup2" && ok && (rel == "" || rel[0] == '/') {
			return filepath.Join(m.point, rel), nil
		}
	}
	return "", errors.New("no cgroup v2 is mounted where this process's is to be seen")
}
