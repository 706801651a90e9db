//go:build linux

package guard

import (
	"fmt"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/reload"
)

// checkAnswer is what the starter says of the process that checks a reload.
type checkAnswer struct {
	pid    int
	result reload.Result
	err    error
}

// askCheck asks for a process that checks a reload. The starter closes settings.
func (s *starter) askCheck(argv []string, settings int) {
	s.checkArgv, s.settings = argv, settings
	s.askFork(askCheck, boottime.Now()+2*time.Second)
}

// forkCheck forks the process. Its binary is opened once, so that electors run the one that was
// checked, whatever is at the path by then.
func (s *starter) forkCheck(cfg ReloadConfig) *checkAnswer {
	a := &checkAnswer{}
	settings := s.settings
	if settings < 0 {
		settings = s.null
	}
	if s.checked.fd, a.err = s.openBinary(cfg.Path); a.err == nil {
		s.result, a.err = unix.MemfdCreate("leasehold-reload", unix.MFD_CLOEXEC)
	}
	if a.err == nil {
		a.pid, a.err = syscall.ForkExec(s.checked.path(), s.checkArgv, &syscall.ProcAttr{
			Env: cfg.Env,
			Files: []uintptr{
				uintptr(s.null), 1, 2, uintptr(s.result), uintptr(settings),
			},
			// With this thread, which ends with the guard.
			Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL},
		})
	}
	closeAll(s.settings)
	s.settings = -1
	if a.err != nil {
		closeAll(s.checked.fd, s.result)
		s.checked, s.result = image{fd: -1}, -1
	}
	return a
}

// openBinary opens a binary that is to be executed by its descriptor. That must be none to which a
// fork copies one of the child's.
func (s *starter) openBinary(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	defer func() { _ = unix.Close(fd) }()
	above := max(128, int(slices.Max(s.files))+64)
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, above)
}

// readCheck reads what the process has left.
func (s *starter) readCheck() *checkAnswer {
	a := &checkAnswer{}
	var st unix.Stat_t
	a.err = unix.Fstat(s.result, &st)
	if a.err == nil && st.Size > reload.MaxResult {
		a.err = unix.EFBIG
	}
	if a.err == nil {
		text := make([]byte, st.Size)
		var n int
		if n, a.err = unix.Pread(s.result, text, 0); a.err == nil {
			a.result, a.err = reload.DecodeResult(text[:n])
		}
	}
	closeAll(s.result)
	s.result = -1
	s.checked.env, s.checked.version = a.result.Env, a.result.Version
	return a
}

// dropChecked forgets a binary that was checked, and is not used. The loop calls it.
func (s *starter) dropChecked() {
	s.close(s.checked.fd)
	s.checked = image{fd: -1}
}
