//go:build !linux

package health

import "syscall"

// setUserTimeout does nothing: only Linux has such a time-out.
func setUserTimeout(syscall.RawConn) error { return nil }
