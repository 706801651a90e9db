//go:build linux

package recovery

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// exitTime is how long processes that were killed may take to exit.
const exitTime = 200 * time.Millisecond

// prove returns what proves that no job under the lease of r is left, or why that is not certain.
// The lock of the file is ours.
//
// Another boot id proves nothing. The machine may have been started again, or this may be a clone
// of it, or its disk in another one, while the first runs on. All marks of the file are the same
// then.
//
// Process 1 takes its whole pid namespace with it. The kernel closes its files, and so frees the
// lock, a moment before it kills the rest. So whoever starts the next container has to wait for the
// end of the old one, as podman, kubelet and systemd do.
func (r *Record) prove(now Place) (string, error) {
	was := r.Place
	switch {
	case was.BootID == "" || now.BootID == "":
		return "", errors.New("the boot id is not known")
	case was.BootID != now.BootID:
		return "", errors.New("the boot id is another one: it may run on another machine")
	case was.PID == 1:
		return "the daemon was process 1 of its pid namespace", nil
	case r.CanLeave != "" || r.Cgroup == "":
		return "", fmt.Errorf("the job could leave its cgroup: %s", r.CanLeave)
	case now.PidNS == 0 || now.CgroupNS == 0 || now.CgroupRoot == 0 || was.PidNS != now.PidNS ||
		was.CgroupNS != now.CgroupNS || was.CgroupRoot != now.CgroupRoot:
		return "", errors.New("it ran in other namespaces")
	}
	if err := r.cgroupEmpty(now); err != nil {
		return "", err
	}
	return "its cgroup is empty", nil
}

// cgroupEmpty returns nil if nothing is left in the cgroup that no job could leave. If it is not
// there, or is another one, it was removed, and only an empty cgroup can be removed. We don't kill
// what is in it, because not all of that need be the daemon's. Leftovers of its job are killed
// before (proctree.NewCgroup).
func (r *Record) cgroupEmpty(now Place) error {
	for left := exitTime; ; left -= 5 * time.Millisecond {
		dir := path.Join(now.mount, r.Cgroup)
		var st unix.Stat_t
		switch err := unix.Stat(dir, &st); {
		case errors.Is(err, unix.ENOENT), err == nil && st.Ino != r.CgroupIno:
			return nil
		case err != nil:
			return &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		events, err := os.ReadFile(path.Join(dir, "cgroup.events"))
		removed := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) // stat shows it
		switch {
		case err != nil && !removed:
			return err
		case bytes.Contains(events, []byte("populated 0")):
			return nil
		}
		if left <= 0 || within(now.own, r.Cgroup) {
			return fmt.Errorf("a process is in its cgroup %s", r.Cgroup)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// within reports whether a cgroup is another one, or inside it.
func within(inner, outer string) bool {
	return inner == outer || strings.HasPrefix(inner, strings.TrimSuffix(outer, "/")+"/")
}
