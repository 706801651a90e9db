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

// writeNow writes all of the text without waiting, or reports that it could not.
func writeNow(conn syscall.RawConn, text []byte) bool {
	written := 0
	err := conn.Write(func(fd uintptr) bool {
		for {
			n, err := syscall.Write(int(fd), text)
			if err != syscall.EINTR {
				written = n
				return true
			}
		}
	})
	return err == nil && written == len(text)
}
