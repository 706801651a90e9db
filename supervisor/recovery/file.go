//go:build linux

package recovery

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// File is the state file. Its lock is ours, until all processes that have inherited it have exited.
type File struct {
	fd   int
	path string
	id   fileID
}

// localFileSystems are those on which a lock is seen by everybody who can open the file, and where
// an inode is the machine's own.
var localFileSystems = map[int64]bool{
	unix.EXT4_SUPER_MAGIC: true, unix.XFS_SUPER_MAGIC: true, unix.BTRFS_SUPER_MAGIC: true,
	unix.F2FS_SUPER_MAGIC: true, unix.TMPFS_MAGIC: true, unix.OVERLAYFS_SUPER_MAGIC: true,
	0x2fc12fc1: true, // ZFS
	0xca451a4e: true, // bcachefs
}

// Open opens the state file in a directory, makes it if it is not there, and takes the lock. It
// does not wait for the lock: the error wraps ErrHeld then.
func Open(dir string) (*File, error) {
	f := &File{path: filepath.Join(dir, FileName)}
	var err error
	f.fd, err = unix.Open(f.path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW|
		unix.O_NONBLOCK|unix.O_NOCTTY, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: f.path, Err: err}
	}
	if err := f.check(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", f.path, err)
	}
	return f, nil
}

// check finds out whether the file can be bound to its place, and takes the lock.
func (f *File) check() error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(f.fd, &st); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	if !localFileSystems[st.Type] {
		return fmt.Errorf("the directory is not on a local file system (its type is %#x)", st.Type)
	}
	var x unix.Statx_t
	if err := unix.Statx(f.fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_BTIME,
		&x); err != nil {
		return fmt.Errorf("statx: %w", err)
	}
	switch {
	case x.Mode&unix.S_IFMT != unix.S_IFREG:
		return errors.New("it is not a regular file")
	case x.Uid != uint32(unix.Geteuid()), x.Nlink != 1, x.Mode&0o022 != 0:
		return errors.New("another user owns it or may write it, or it has another name")
	case x.Mask&unix.STATX_BTIME == 0:
		return errors.New("the file system knows no times of birth, so a copy would not be noticed")
	}
	f.id = fileID{
		Device: unix.Mkdev(x.Dev_major, x.Dev_minor), Inode: x.Ino,
		Born: x.Btime.Sec*1e9 + int64(x.Btime.Nsec),
	}
	err := unix.Flock(f.fd, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrHeld
	}
	return err
}

// FD is the descriptor, for the processes that have to hold the lock, too.
func (f *File) FD() int { return f.fd }

// Close closes the file. The lock stays with those who have inherited it.
func (f *File) Close() { _ = unix.Close(f.fd) }

// Read returns what the daemon before has left; nil: nothing. It must be called before Claim.
func (f *File) Read(election, identity string) (*Record, error) {
	content, err := read(f.fd)
	if err != nil || len(content) == 0 {
		return nil, err
	}
	r := &Record{}
	err = decode(head, content, r)
	if err == nil {
		err = f.isOf(r.File, r.Election, r.Identity, election, identity)
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// isOf returns an error unless what the file holds is of this very file, election and identity.
func (f *File) isOf(file fileID, itsElection, itsIdentity, election, identity string) error {
	switch {
	case file != f.id:
		return errors.New("it is a copy, or its disk has another number now")
	case itsElection != election:
		return fmt.Errorf("it is of the election %q", itsElection)
	case itsIdentity != identity:
		return fmt.Errorf("it is of the identity %q", itsIdentity)
	}
	return nil
}

// Prove returns what proves that no job under the lease of r is left, or why that is not certain.
func (r *Record) Prove() (string, error) { return r.prove(here()) }

// Claim writes that the daemon of this process has the file now. It must be called before the first
// start. noNewPrivs is whether the job gets it from the daemon. lease is that of the daemon before
// if its job has exited, so that it is not forgotten if this daemon ends early; 0: none. The
// elector writes its own over it (Keeper).
//
// What the job can do is decided here, because nothing in guard or spawner changes its rights
// later. If Claim fails, the file must not be used: see Empty.
func (f *File) Claim(
	election, identity string, noNewPrivs bool, lease int64,
) (*Record, error) {
	r := &Record{
		Place: here(), Election: election, Identity: identity, File: f.id, Lease: fixed(lease),
	}
	if r.CanLeave = canLeave(noNewPrivs); r.CanLeave == "" {
		cgroup, err := r.Place.boundary()
		if err == nil {
			r.Cgroup, r.CgroupIno = cgroup, inode(filepath.Join(r.Place.mount, cgroup))
		}
		switch {
		case err != nil:
			r.CanLeave = err.Error()
		case r.CgroupIno == 0:
			r.Cgroup, r.CanLeave = "", "its cgroup can't be seen"
		}
	}
	return r, write(f.fd, r)
}

// Promise is when the next daemon can prove that a job of this one has exited, or why it can't.
func (r *Record) Promise() (string, error) {
	switch {
	case r.Place.BootID == "":
		return "", errors.New("the boot id is not known")
	case r.Place.PID == 1:
		return "the daemon is process 1 of its pid namespace", nil
	case r.CanLeave != "":
		return "", fmt.Errorf("the job can leave its cgroup: %s", r.CanLeave)
	}
	return "once the cgroup " + r.Cgroup + " is empty", nil
}

// Empty empties the file.
func (f *File) Empty() error {
	if err := unix.Ftruncate(f.fd, 0); err != nil {
		return &os.PathError{Op: "truncate", Path: f.path, Err: err}
	}
	return nil
}

// read reads the file. It returns no more than a byte too much.
func read(fd int) ([]byte, error) {
	content := make([]byte, maxRecord+1)
	n, err := unix.Pread(fd, content, 0)
	if err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	return content[:n], nil
}

// write writes the record in place, because lock and inode have to stay the file's. What is written
// in part has a wrong checksum. Nothing is flushed to the disk: a Record that was lost, or that is
// out of date, names a lease that is gone.
func write(fd int, c content) error {
	content, err := c.encode()
	if err != nil {
		return err
	}
	n, err := unix.Pwrite(fd, content, 0)
	switch {
	case err != nil:
		return fmt.Errorf("write: %w", err)
	case n < len(content):
		return fmt.Errorf("write: %w", unix.ENOSPC)
	}
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		return fmt.Errorf("truncate: %w", err)
	}
	return nil
}
