//go:build linux

package app

import (
	"log/slog"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/config"
)

// logWriter writes log lines to standard error without ever holding up who logs: when standard error blocks, lines are
// dropped and counted, and the count is told once it takes lines again.
type logWriter struct {
	lines   chan []byte
	flush   chan chan struct{}
	dropped atomic.Int64
	notice  func(dropped int64) []byte
	lastErr lastLine // of what was logged
}

// A lastLine keeps the last line that was written to it.
type lastLine struct{ line atomic.Pointer[string] }

// Write takes one line.
func (l *lastLine) Write(line []byte) (int, error) {
	text := string(line)
	l.line.Store(&text)
	return len(line), nil
}

func (l *lastLine) String() string {
	if line := l.line.Load(); line != nil {
		return *line
	}
	return ""
}

// newLogWriter starts a writer. Its goroutine lives as long as the process, for a blocked write can't be called off.
func newLogWriter(fd int, notice func(dropped int64) []byte) *logWriter {
	w := &logWriter{lines: make(chan []byte, 256), flush: make(chan chan struct{}), notice: notice}
	go func() {
		// A terminal with tostop asks who writes from the background to stop, unless the thread blocks that signal. The guard
		// catches it, which would have the kernel try the write again for ever.
		runtime.LockOSThread()
		ttou := unix.Sigset_t{}
		ttou.Val[0] = 1 << (unix.SIGTTOU - 1)
		_ = unix.PthreadSigmask(unix.SIG_BLOCK, &ttou, nil)
		for {
			select {
			case line := <-w.lines:
				w.write(fd, line)
			case done := <-w.flush:
				for len(w.lines) > 0 {
					w.write(fd, <-w.lines)
				}
				close(done)
			}
		}
	}()
	return w
}

func (w *logWriter) write(fd int, line []byte) {
	if n := w.dropped.Swap(0); n > 0 {
		line = append(w.notice(n), line...)
	}
	for len(line) > 0 {
		n, err := unix.Write(fd, line)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN: // somebody made it non-blocking
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, -1)
		case err != nil:
			return // nobody reads any more
		}
		line = line[max(n, 0):]
	}
}

// Write takes one line.
func (w *logWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- append([]byte(nil), line...):
	default:
		w.dropped.Add(1)
	}
	return len(line), nil
}

// Flush waits for what was logged to be written, for as long as d.
func (w *logWriter) Flush(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	done := make(chan struct{})
	select {
	case w.flush <- done:
	case <-timer.C:
		return
	}
	select {
	case <-done:
	case <-timer.C:
	}
}

// end flushes what was logged when the process that the user started ends, and leaves the last error where Kubernetes shows it.
func (w *logWriter) end(code int) {
	if code != 0 {
		leaveMessage(terminationLog, w.lastErr.String(), true)
	}
	w.Flush(flushTime)
}

// newLogger makes the daemon's logger on standard error. The writer keeps the last error as well.
func newLogger(cfg config.Log) (*slog.Logger, *logWriter) {
	notice := func(n int64) []byte {
		text := strconv.FormatInt(n, 10)
		if cfg.Format == "json" {
			return []byte(`{"level":"WARN","msg":"standard error was blocked: log lines are lost","dropped":` + text + "}\n")
		}
		return []byte(`level=WARN msg="standard error was blocked: log lines are lost" dropped=` + text + "\n")
	}
	w := newLogWriter(2, notice)
	options, errorsOnly := &slog.HandlerOptions{Level: cfg.Level.Level}, &slog.HandlerOptions{Level: slog.LevelError}
	if cfg.Format == "json" {
		return slog.New(slog.NewMultiHandler(slog.NewJSONHandler(w, options), slog.NewJSONHandler(&w.lastErr, errorsOnly))), w
	}
	return slog.New(slog.NewMultiHandler(slog.NewTextHandler(w, options), slog.NewTextHandler(&w.lastErr, errorsOnly))), w
}
