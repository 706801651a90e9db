//go:build unix

package health

import "syscall"

// openFiles is how many files this process may have open at once.
func openFiles() uint64 {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 256
	}
	return uint64(limit.Cur) //nolint:unconvert // It is signed on some systems.
}

// sendNow writes all of the text without waiting. It reports whether it could, and whether the
// client has neither closed its side nor sent anything.
func sendNow(conn syscall.RawConn, text []byte) bool {
	written := 0
	err := conn.Write(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		if err != syscall.EAGAIN { // bytes, the end, or an error
			return true
		}
		for {
			if written, err = syscall.Write(int(fd), text); err != syscall.EINTR {
				return true
			}
		}
	})
	return err == nil && written == len(text)
}
