//go:build linux

package app

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// terminationLog is the file that Kubernetes makes in each container for its last words, and
	// shows where it shows the exit code. It is there already, or nobody reads it.
	terminationLog = "/dev/termination-log"

	// maxTerminationMessage is how much of it Kubernetes reads.
	maxTerminationMessage = 4096
)

// leaveMessage writes a termination message if the file for it exists. It returns no error: the
// same was said on standard error.
//
// With yield it leaves alone what the file holds already: a job's own account of why it failed is
// better than ours.
func leaveMessage(path, text string, yield bool) {
	// It opens no link, and waits for no reader of a pipe.
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	file := os.NewFile(uintptr(fd), path)
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() || yield && info.Size() > 0 {
		return
	}
	const cut = "…\n"
	if text = strings.TrimRight(text, "\n") + "\n"; len(text) > maxTerminationMessage {
		text = strings.ToValidUTF8(text[:maxTerminationMessage-len(cut)], "") + cut
	}
	if file.Truncate(0) == nil {
		_, _ = file.WriteString(text)
	}
}
