//go:build linux

package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"leasehold/internal/quote"
)

// ErrInstall ends install: the copy can't be made.
var ErrInstall = errors.New("install")

// install copies the running binary to dest, a directory or a file: an image built from scratch has
// no cp for an init container. At every moment dest is the old file or the whole new one, also
// while the old one runs.
func install(dest string) error {
	if err := installTo(dest); err != nil {
		return fmt.Errorf("%w %s: %w", ErrInstall, quote.Word(dest), err)
	}
	return nil
}

func installTo(dest string) (err error) {
	// Not the path that it was started by: another file may have that path by now.
	from, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("open the running binary: %w", err)
	}
	defer func() { _ = from.Close() }()

	info, err := os.Stat(dest)
	switch {
	case err == nil && info.IsDir():
		dest = filepath.Join(dest, "leasehold")
		if info, err = os.Lstat(dest); err == nil && info.IsDir() {
			return fmt.Errorf("%s is a directory", dest)
		}
	case err != nil && os.IsPathSeparator(dest[len(dest)-1]):
		return cause(err) // It names a directory, and is none.
	}
	to, err := os.CreateTemp(filepath.Dir(dest), ".leasehold-*")
	if err != nil {
		return fmt.Errorf("write to %s: %w", filepath.Dir(dest), cause(err))
	}
	defer func() {
		if err != nil {
			_ = os.Remove(to.Name())
		}
	}()
	_, err = io.Copy(to, from)
	// Whatever the umask is: another container's user runs the copy.
	err = errors.Join(err, to.Chmod(0o755), to.Sync(), to.Close())
	if err != nil {
		return fmt.Errorf("write to %s: %w", filepath.Dir(dest), cause(err))
	}
	return cause(os.Rename(to.Name(), dest))
}

// cause is an error without the name of our temporary file, which helps nobody.
func cause(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}
