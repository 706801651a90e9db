//go:build linux

package recovery

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"leasehold/supervisor/proctree"
)

// Place is where a guard runs.
type Place struct {
	BootID   string `json:"boot_id"`
	PID      int    `json:"pid"` // in its pid namespace
	PidNS    uint64 `json:"pid_namespace"`
	CgroupNS uint64 `json:"cgroup_namespace"`
	// CgroupRoot is the inode of the root that the cgroup namespace shows; 0: not to be seen. The
	// number of a namespace is used again for another one. That of a cgroup is not, while the
	// machine runs.
	CgroupRoot uint64 `json:"cgroup_root"`

	mount string // where that root is mounted
	own   string // this process's cgroup, from there
}

const bootIDFile = "/proc/sys/kernel/random/boot_id"

// here is the place of this process. What can't be found out is zero, and proves nothing.
func here() Place {
	p := Place{
		BootID:   readLine(bootIDFile),
		PID:      unix.Getpid(),
		PidNS:    inode("/proc/self/ns/pid"),
		CgroupNS: inode("/proc/self/ns/cgroup"),
	}
	if mount, own, err := proctree.CgroupRoot(); err == nil && utf8.ValidString(own) {
		p.mount, p.own, p.CgroupRoot = mount, own, inode(mount)
	}
	return p
}

func readLine(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

func inode(file string) uint64 {
	var st unix.Stat_t
	if unix.Stat(file, &st) != nil {
		return 0
	}
	return st.Ino
}

// boundary returns the innermost cgroup that holds this process and that a process with our rights
// can't leave. To move a process takes the right to write to cgroup.procs of the cgroup that holds
// both the old and the new one. So it is our own cgroup, or the outermost above that for which we
// have this right. The cgroup that we make for the job is never it: the job has our rights, so it
// can move from there to where we are.
func (p *Place) boundary() (string, error) {
	if p.CgroupRoot == 0 {
		return "", errors.New("the cgroup namespace can't be seen")
	}
	found := p.own
	for dir := p.own; ; dir = path.Dir(dir) {
		err := unix.Access(path.Join(p.mount, dir, "cgroup.procs"), unix.W_OK)
		switch {
		case err == nil:
			found = dir
		case !errors.Is(err, unix.EACCES): // on a read-only mount, others may be writable
			return "", fmt.Errorf("%s: %w", path.Join(dir, "cgroup.procs"), err)
		}
		if dir == "/" || dir == "." {
			break
		}
	}
	if found == "/" {
		return "", errors.New("it is in no cgroup but the root")
	}
	return found, nil
}

// canLeave is why a job with the rights of this process may leave its cgroup, "" if it can't.
func canLeave(noNewPrivs bool) string {
	ruid, euid, suid := unix.Getresuid()
	rgid, egid, sgid := unix.Getresgid()
	set, _ := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	switch {
	case ruid == 0 || euid == 0 || suid == 0:
		return "it runs as root"
	case ruid != euid || euid != suid || rgid != egid || egid != sgid:
		return "it can become another user"
	case !noNewPrivs && set == 0:
		return "it runs without no_new_privs"
	case !harmless():
		return "it has capabilities"
	}
	return ""
}

// harmless reports whether this process has no capability but those that don't help to leave a
// cgroup. With no_new_privs, nothing that it starts has more.
func harmless() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&hdr, &data[0]) != nil {
		return false
	}
	const allowed = 1<<unix.CAP_KILL | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_IPC_LOCK |
		1<<unix.CAP_SYS_NICE
	return data[0].Permitted&^allowed == 0 && data[1].Permitted == 0
}
