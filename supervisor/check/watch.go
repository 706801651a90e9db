//go:build linux

package check

import (
	"context"
	"errors"
	"time"
)

// Watch makes a check again and again, until ctx ends. The time between two is interval. It reports
// each change: nil when a check passes again, and why one has failed when that many (retries) have
// failed in a row. At the beginning the check counts as passed. With unknown set, the first result
// is reported, whatever it is. A check that could not be made changes nothing.
func Watch(
	ctx context.Context, probe Probe, interval time.Duration, retries int, unknown bool,
	report func(failed error),
) {
	passes, failures := !unknown, 0
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		err := probe(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, ErrNoResult):
		case err == nil:
			if failures = 0; !passes || unknown {
				report(nil)
			}
			passes, unknown = true, false
		default:
			if failures++; unknown || passes && failures >= retries {
				passes = false
				report(err)
			}
			unknown = false
		}
		timer.Reset(interval)
	}
}
