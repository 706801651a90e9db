//go:build linux

// Package reload is what `leasehold reload` and a guard say to each other, and what the process
// says that checks a reload.
//
// The asker listens on an abstract socket whose name both can derive, and sends the guard a signal.
// Whether it may do that is the kernel's decision. The guard listens on nothing. It connects to the
// asker, who sends a request, and in the end it answers with an outcome. It does so only if the
// asker is root or the guard's own user: anybody can listen there. If nobody else does (a plain
// kill, or an asker in another network namespace), the outcome is only in the log.
package reload

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Signal asks a guard for a reload: SIGRTMIN+1, as the C library and kill(1) count. Its default
// action ends a process. Go's runtime catches it in every process, so an older guard drops it.
const Signal = unix.Signal(35)

// Address is the socket on which the asker listens. pid is that of the guard in its own namespace,
// and started is its start time, as in /proc/PID/stat.
func Address(pid int, started string) string {
	return fmt.Sprintf("@leasehold-reload/%d/%s", pid, started)
}

// OwnAddress is the Address at which this process, a guard, is asked.
func OwnAddress() (string, error) {
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return "", err
	}
	started, err := startTime(stat)
	return Address(os.Getpid(), started), err
}

// startTime is the field starttime of proc_pid_stat(5).
func startTime(stat []byte) (string, error) {
	// The name, in parentheses, may hold anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return "", fmt.Errorf("/proc/PID/stat is %q", stat)
	}
	return fields[19], nil
}

// requestText is a request. Settings may come with it, as a descriptor.
const requestText = "reload"

// IsRequest reports whether a message is a request.
func IsRequest(message []byte) bool { return string(message) == requestText }

// seals keep what the asker passes from being changed.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// newSettings puts entries of the environment into a sealed memfd.
func newSettings(entries []string) (fd int, err error) {
	fd, err = unix.MemfdCreate("leasehold-settings", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, err
	}
	text := []byte(strings.Join(append(entries, ""), "\x00"))
	if n, errWrite := unix.Write(fd, text); errWrite != nil || n != len(text) {
		err = fmt.Errorf("write the settings: %d bytes, %w", n, errWrite)
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// ReadSettings reads what newSettings has made, and only that.
func ReadSettings(fd int) ([]string, error) {
	set, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("they are in no memfd: %w", err)
	}
	if set&seals != seals {
		return nil, errors.New("they are not sealed")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Size > MaxResult {
		return nil, unix.EFBIG
	}
	text := make([]byte, st.Size)
	if n, err := unix.Pread(fd, text, 0); err != nil || n != len(text) {
		return nil, fmt.Errorf("read the settings: %d bytes, %w", n, err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00"), nil
}

// An Outcome is how a reload ended, in one message.
type Outcome struct {
	Done bool
	Text string // the version that runs now, or why nothing was done, in one line
}

// maxOutcome bounds the length of an outcome, in bytes.
const maxOutcome = 4096

// Encode returns the message. It cuts a text that is too long.
func (o Outcome) Encode() []byte {
	mark := "-"
	if o.Done {
		mark = "+"
	}
	return []byte(mark + o.Text[:min(len(o.Text), maxOutcome-1)])
}

func decodeOutcome(message []byte) (o Outcome, ok bool) {
	if len(message) == 0 || message[0] != '+' && message[0] != '-' {
		return o, false
	}
	return Outcome{Done: message[0] == '+', Text: string(message[1:])}, true
}

// A Result is what the process has found that checks a reload.
type Result struct {
	Refused string   // why there can be no reload, in one line; "": there can
	Version string   // of the binary
	Env     []string // of its electors
}

// The first word of an encoded Result.
const (
	passed  = "leasehold: the check has passed"
	refused = "leasehold: the check has not passed"
)

// MaxResult bounds the length of an encoded Result, in bytes. The kernel takes no environment of
// that length.
const MaxResult = 8 << 20

// ErrNoResult means that the process has left no whole Result: it was killed, or the binary is
// something else.
var ErrNoResult = errors.New("no result")

// Encode returns the result as it is left in a file: words that end with a NUL each, the last one
// empty.
func (r Result) Encode() []byte {
	words := []string{refused, r.Refused, ""}
	if r.Refused == "" {
		words = append([]string{passed, r.Version}, r.Env...)
		words = append(words, "")
	}
	return []byte(strings.Join(words, "\x00") + "\x00")
}

// DecodeResult is the inverse of Encode. The error is ErrNoResult.
func DecodeResult(text []byte) (Result, error) {
	words := strings.Split(string(text), "\x00")
	n := len(words)
	if n < 4 || words[n-1] != "" || words[n-2] != "" {
		return Result{}, ErrNoResult
	}
	switch words = words[:n-2]; {
	case words[0] == refused && len(words) == 2 && words[1] != "":
		return Result{Refused: words[1]}, nil
	case words[0] == passed:
		return Result{Version: words[1], Env: words[2:]}, nil
	}
	return Result{}, ErrNoResult
}
