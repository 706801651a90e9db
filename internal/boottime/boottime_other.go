//go:build !linux

package boottime

import "time"

var start = time.Now()

// Now returns the time since this process started. Nothing runs a job here: this is for the build
// alone.
func Now() time.Duration { return time.Since(start) }
