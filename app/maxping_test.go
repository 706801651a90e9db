//go:build linux

package app

import (
	"testing"
	"time"
)

// TestMaxPing: systemd's watchdog is served in time, whatever its variable holds.
func TestMaxPing(t *testing.T) {
	for usec, want := range map[string]time.Duration{
		"": time.Minute, "x": time.Minute, "-1": time.Minute, "0": time.Minute,
		"30000000": 7500 * time.Millisecond, "1": 10 * time.Millisecond,
		"9223372036854775807": time.Minute, "9223372036854775808": time.Minute,
	} {
		t.Setenv("WATCHDOG_USEC", usec)
		if got := maxPing(); got != want {
			t.Errorf("WATCHDOG_USEC=%s: %v, want %v", usec, got, want)
		}
	}
}
