//go:build linux

package proctree

import (
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// KillEach sends SIGKILL to each process in the cgroup and in those inside it. It is for what
// KillAll leaves: cgroup.kill signals the main thread of each process, and if that has exited while
// other threads run, the process goes on (seen with Linux 6.18). A pidfd signals the whole process.
//
// It is no replacement for KillAll: what forks meanwhile is seen at the next call only. It is not
// for the guard's kill path, because it allocates. That path kills by descent, too.
func (c *Cgroup) KillEach() {
	_ = filepath.WalkDir(c.Dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && filepath.Base(path) == "cgroup.procs" {
			for pids := cgroupProcs(path); len(pids) > 0; {
				n := min(len(pids), mostOpened)
				killIn(path, pids[:n])
				pids = pids[n:]
			}
		}
		return nil // what can't be read may have been removed
	})
}

// mostOpened bounds how many pidfds are open at a time.
const mostOpened = 64

// killIn kills those of the processes that are still in the cgroup when their pidfds are open: a
// pid may be a stranger's by then.
func killIn(procs string, pids []int) {
	pidfds := make(map[int]int, len(pids))
	for _, pid := range pids {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			pidfds[pid] = fd
		}
	}
	for _, pid := range cgroupProcs(procs) {
		if fd, ok := pidfds[pid]; ok {
			SignalPidfd(fd, unix.SIGKILL)
		}
	}
	for _, fd := range pidfds {
		_ = unix.Close(fd)
	}
}

// cgroupProcs reads the pids in a cgroup.procs, except those of processes that this pid namespace
// does not show (0). If a main thread has exited, its process is there for as long as another
// thread of it lives.
func cgroupProcs(procs string) (pids []int) {
	text, _ := os.ReadFile(procs)
	for _, f := range strings.Fields(string(text)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}
