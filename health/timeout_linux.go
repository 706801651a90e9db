package health

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// setUserTimeout has the kernel end a connection whose client takes nothing for a while: else one
// that has vanished would keep its place for a quarter of an hour.
func setUserTimeout(conn syscall.RawConn) error {
	var err error
	refused := conn.Control(func(fd uintptr) {
		ms := int(vanishedAfter.Milliseconds())
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, ms)
	})
	if refused != nil {
		return refused
	}
	return err
}
