package election

import (
	"log/slog"
	"sync"
	"time"
)

// outage logs a time in which etcd can't be used: when it begins, when its reason changes, every
// minute while it lasts, and when it is over.
type outage struct {
	log *slog.Logger
	now func() time.Duration

	mu       sync.Mutex
	what     failing // 0: there is no outage
	since    time.Duration
	logged   bool          // this one
	reason   string        // that was logged last, maybe of an earlier outage
	loggedAt time.Duration // when that was
}

// failing is what fails, in bits.
type failing uint8

const (
	leaseFails  failing = 1 << iota // the lease is not granted or not renewed
	queueFails                      // the queue can't be joined
	nestedFails                     // nested elections can't be looked for
)

const (
	// repeatEvery is the time after which an outage is logged again.
	repeatEvery = time.Minute
	// reasonEvery is the least time between two logged reasons of one outage, and between two
	// outages with the same reason: on a link that loses packets they come and go. An outage with a
	// new reason is logged at once.
	reasonEvery = 10 * time.Second

	notInElection = "not in the election, trying again"
)

// fails notes that an attempt has failed. The message is for the beginning of an outage.
func (o *outage) fails(what failing, message, reason string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := o.now()
	if o.what == 0 {
		o.since, o.logged = now, false
	}
	o.what |= what
	age, isNew := now-o.loggedAt, o.reason != reason
	switch {
	case !o.logged && (isNew || age >= reasonEvery):
		o.log.Warn(message, "reason", reason)
	case o.logged && (age >= repeatEvery || isNew && age >= reasonEvery):
		o.log.Warn("etcd still can't be used, trying again",
			"reason", reason, "elapsed", (now - o.since).Round(time.Millisecond).String())
	default:
		return
	}
	o.logged, o.reason, o.loggedAt = true, reason, now
}

// over notes that an attempt has succeeded.
func (o *outage) over(what failing) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.what == 0 {
		return
	}
	if o.what &^= what; o.what == 0 && o.logged {
		o.log.Info("etcd can be used again",
			"elapsed", (o.now() - o.since).Round(time.Millisecond).String())
	}
}
