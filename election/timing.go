package election

import (
	"fmt"
	"time"
)

// Deadlines are moments in time since boot (CLOCK_BOOTTIME), which counts suspend and ignores jumps
// of the wall clock.
type Deadlines struct {
	StopAt time.Duration // the end of the term: ask the job to stop
	KillBy time.Duration // the job is killed
	End    time.Duration // the lease holds at least until here
}

// Timing is how a lease's life is divided:
//
//	s                                     StopAt        KillBy                    End
//	|---- renewals every RenewInterval ------|- LossGrace -|- PostStop -|- Margin -|
//
// Without a hook after the job's exit, PostStop is 0.
type Timing struct{ TTL, LossGrace, PostStop, Margin time.Duration }

// minMargin is the least default margin: what a busy kernel may need to kill a job, however short
// the TTL.
const minMargin = 200 * time.Millisecond

// NewTiming returns the timing of a lease granted for that long. A negative loss grace means a
// fifth of it, a negative margin a tenth, at least 200 ms, and a negative time for the hook a
// tenth.
func NewTiming(granted, lossGrace, margin, postStop time.Duration) Timing {
	if lossGrace < 0 {
		lossGrace = granted / 5
	}
	if margin < 0 {
		margin = max(granted/10, minMargin)
	}
	if postStop < 0 {
		postStop = granted / 10
	}
	return Timing{TTL: granted, LossGrace: lossGrace, PostStop: postStop, Margin: margin}
}

// Timing returns the timing of the candidate's lease if it is granted for that long.
func (c *Config) Timing(granted time.Duration) Timing {
	return NewTiming(granted, c.LossGrace, c.Margin, c.PostStop)
}

// RenewInterval is the time between the sending of two renewals if nothing fails. It may be up to a
// fifth shorter.
func (t Timing) RenewInterval() time.Duration { return t.TTL / 5 }

// hedgeDelay is for how long a request goes unanswered before another endpoint is asked as well. It
// is a second at most, however long the TTL is: a candidate that has won waits for the renewal that
// confirms it.
func (t Timing) hedgeDelay() time.Duration {
	return min(max(t.TTL/20, 50*time.Millisecond), time.Second)
}

// repeatAfter is the pause before a failed request is repeated.
func (t Timing) repeatAfter() time.Duration { return min(t.TTL/20, time.Second) }

// exitWait is for how long the next in line waits if the last key ahead of it went, and the leader
// has not said that its job has exited: a busy machine may need that to learn of it and to kill.
func (t Timing) exitWait() time.Duration { return min(t.Margin/10, time.Second) }

// mostPause bounds the pause before a request is made again that has failed with this error. If
// etcd refuses connections, or has no leader, an attempt costs it little, and the first one that
// succeeds should come soon. If it does not answer in time, it may have too much to do, because all
// candidates want something at once: then they leave it more time, as far as a renewal interval.
func (t Timing) mostPause(err error) time.Duration {
	if !isOverload(err) {
		return time.Second
	}
	return min(max(t.RenewInterval(), time.Second), 10*time.Second)
}

// Validate refuses a timing in which losing two renewals in a row would end the term.
func (t Timing) Validate() error {
	if sum := t.LossGrace + t.PostStop + t.Margin + 3*t.RenewInterval(); sum > t.TTL {
		hook := ""
		if t.PostStop > 0 {
			hook = fmt.Sprintf("post-stop timeout %v + ", t.PostStop)
		}
		return fmt.Errorf("loss grace %v + %smargin %v + 3 × renewal interval %v = %v is more "+
			"than the TTL %v", t.LossGrace, hook, t.Margin, t.RenewInterval(), sum, t.TTL)
	}
	return nil
}

// From returns the deadlines of a renewal that was sent at that moment.
func (t Timing) From(sent time.Duration) Deadlines {
	end := sent + t.TTL
	killBy := end - t.Margin - t.PostStop
	return Deadlines{StopAt: killBy - t.LossGrace, KillBy: killBy, End: end}
}
