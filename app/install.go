//go:build linux

package app

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"leasehold/internal/quote"
)

// install copies the running binary to dest, a directory or a file: a scratch image has no cp for an init container to use.
// Whoever looks at dest sees the old file or the whole new one, also while the old one runs.
func install(dest string) int {
	if err := installTo(dest); err != nil {
		text := fmt.Sprintf("leasehold: install %s: %v\n", quote.Word(dest), err)
		fmt.Fprint(os.Stderr, text)
		leaveMessage(terminationLog, text, false)
		return exitOS
	}
	return 0
}

func installTo(dest string) (err error) {
	// Not the name that it was started by, which another file may have by now.
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
	// Whatever the umask: the user of the container that runs it is another one.
	err = errors.Join(err, to.Chmod(0o755), to.Sync(), to.Close())
	if err != nil {
		return fmt.Errorf("write to %s: %w", filepath.Dir(dest), cause(err))
	}
	return cause(os.Rename(to.Name(), dest))
}

// cause is an error without the name of our temporary file, which tells nobody anything.
func cause(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}
