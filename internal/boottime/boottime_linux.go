// Package boottime reads CLOCK_BOOTTIME, the clock of every deadline. It counts the time that the
// machine is suspended, and no change of the wall clock moves it (clock_gettime(2)).
package boottime

import (
	"time"

	"golang.org/x/sys/unix"
)

// Now returns the time since boot.
func Now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("clock_gettime: " + err.Error()) // CLOCK_BOOTTIME exists since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}
