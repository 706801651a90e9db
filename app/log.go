//go:build linux

package app

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/config"
)

// logWriter writes log lines to standard error, and never makes its callers wait. While standard
// error blocks, it drops lines and counts them. It logs the count when standard error takes lines
// again.
//
// The writer's goroutine also makes the text of the lines, except for what lastLine keeps. In a
// process that has just begun to log that takes a millisecond. The guard's loop would keep others
// waiting meanwhile, because its thread has a high priority.
type logWriter struct {
	fd      int
	lines   chan func() // each writes a line
	flush   chan chan struct{}
	dropped atomic.Int64
	notice  func(dropped int64) []byte
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

// newLogWriter starts a writer. Its goroutine lives as long as the process, because a blocked write
// cannot be cancelled.
func newLogWriter(fd int, notice func(dropped int64) []byte) *logWriter {
	w := &logWriter{
		fd: fd, lines: make(chan func(), 256), flush: make(chan chan struct{}), notice: notice,
	}
	go func() {
		// A terminal with tostop sends SIGTTOU to a process that writes from the background, unless
		// the thread blocks that signal. The guard catches it, and then the kernel would repeat the
		// write for ever.
		runtime.LockOSThread()
		ttou := unix.Sigset_t{}
		ttou.Val[0] = 1 << (unix.SIGTTOU - 1)
		_ = unix.PthreadSigmask(unix.SIG_BLOCK, &ttou, nil)
		for {
			select {
			case write := <-w.lines:
				write()
			case done := <-w.flush:
				for len(w.lines) > 0 {
					(<-w.lines)()
				}
				close(done)
			}
		}
	}()
	return w
}

// Write writes one line. The writer's goroutine calls it.
func (w *logWriter) Write(line []byte) (int, error) {
	length := len(line)
	if n := w.dropped.Swap(0); n > 0 {
		line = append(w.notice(n), line...)
	}
	for len(line) > 0 {
		n, err := unix.Write(w.fd, line)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN: // somebody made it non-blocking
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLOUT}}, -1)
		case err != nil:
			return 0, err // nobody reads any more
		}
		line = line[max(n, 0):]
	}
	return length, nil
}

// later has a line written by the writer's goroutine.
func (w *logWriter) later(write func()) {
	select {
	case w.lines <- write:
	default:
		w.dropped.Add(1)
	}
}

// laterHandler has the goroutine of the writer handle all records.
type laterHandler struct {
	slog.Handler
	writer *logWriter
}

func (h laterHandler) Handle(ctx context.Context, r slog.Record) error {
	h.writer.later(func() { _ = h.Handler.Handle(ctx, r) })
	return nil
}

func (h laterHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return laterHandler{h.Handler.WithAttrs(attrs), h.writer}
}

func (h laterHandler) WithGroup(name string) slog.Handler {
	return laterHandler{h.Handler.WithGroup(name), h.writer}
}

// Flush waits until what was logged is written, for d at most.
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

// A daemonLog is the log of a daemon, on standard error. Each line names the election and the
// candidate.
type daemonLog struct {
	*slog.Logger
	lines *logWriter
	last  *lastLine    // the last error, or why the daemon exits
	final *slog.Logger // keeps its line in last, whatever the level
}

func newLog(cfg config.Config) *daemonLog { return newLogTo(2, cfg) }

func newLogTo(fd int, cfg config.Config) *daemonLog {
	with := func(h slog.Handler) *slog.Logger {
		return slog.New(h).With("election", cfg.Election, "identity", cfg.Identity)
	}
	notice := func(dropped int64) []byte {
		var line bytes.Buffer
		with(cfg.Log.Handler(&line, slog.LevelWarn)).
			Warn("standard error was blocked: log lines are lost", "dropped", dropped)
		return line.Bytes()
	}
	l := &daemonLog{lines: newLogWriter(fd, notice), last: &lastLine{}}
	lines := laterHandler{cfg.Log.Handler(l.lines, cfg.Log.Level.Level), l.lines}
	l.Logger = with(slog.NewMultiHandler(lines, cfg.Log.Handler(l.last, slog.LevelError)))
	l.final = with(slog.NewMultiHandler(lines, cfg.Log.Handler(l.last, slog.LevelInfo)))
	return l
}

// start logs what the daemon was given. Stop-at and kill-by are counted from the sending of a
// renewal.
func (l *daemonLog) start(build Build, cfg config.Config) {
	timing := cfg.Timing()
	killBy := timing.TTL - timing.Margin - timing.PostStop
	l.Info("starting", "version", build.Version,
		"endpoints", strings.Join(cfg.Endpoints, ","), "listen", cfg.Listen,
		"ttl", timing.TTL, "stop_at", killBy-timing.LossGrace, "kill_by", killBy)
}

// exit logs why the daemon ends, unless that was logged. Unless the exit code is 0, it also writes
// the termination message for Kubernetes. It returns the error that carries the exit code.
func (l *daemonLog) exit(err error) *loggedError {
	var logged *loggedError
	if !errors.As(err, &logged) {
		end := endingOf(err)
		logged = &loggedError{end.code}
		l.final.Log(context.Background(), end.level, "exiting: "+end.text, "exit_code", end.code)
	}
	if logged.code != exitOK {
		leaveMessage(terminationLog, l.last.String(), true)
	}
	l.flush()
	return logged
}

// flushTime bounds how long a daemon that ends waits for its log and its messages to be written.
const flushTime = 200 * time.Millisecond

func (l *daemonLog) flush() { l.lines.Flush(flushTime) }
