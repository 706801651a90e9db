//go:build linux

package app

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// terminationLog is the file that Kubernetes makes in each container for a termination message.
	// Kubernetes shows the message beside the exit code. If the file does not exist, nobody reads
	// it.
	terminationLog = "/dev/termination-log"

	// maxTerminationMessage is how much of it Kubernetes reads.
	maxTerminationMessage = 4096
)

// leaveMessage writes a termination message if the file for it exists. It returns no error, because
// standard error has the same text.
//
// With yield it does not replace what the file has already: the job knows better why it failed.
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
