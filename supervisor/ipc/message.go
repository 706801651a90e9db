//go:build linux

// Package ipc has the messages between guard, elector and spawner.
//
// Guard and elector share a pair of non-blocking pipes. A message is small, and the kernel writes
// it whole or not at all. A full pipe counts as a lost peer, so no sender ever waits. Neither
// sending nor receiving allocates, because the guard collects no garbage while a job lives.
package ipc

import (
	"bytes"
	"time"

	"golang.org/x/sys/unix"
)

// Kind tells which message it is.
type Kind uint8

// The kinds of messages, one for each type below.
const (
	// From the elector to the guard.
	KindReady Kind = iota + 1
	KindLease
	KindToken
	KindStart
	KindExtend
	KindStop
	KindPing
	KindStatus
	KindExiting
	KindEntered
	KindRestarts
	KindJobReady

	// From the guard to the elector.
	KindRecord
	KindStarted
	KindRefused
	KindExited
	KindGone
	KindPong
	KindSignal
	KindTimerLatency
	KindFrozen
	KindThawed
	KindEnding
)

// What the elector sends. Moments are readings of CLOCK_BOOTTIME.
type (
	// Ready means that the elector is up and its endpoint listens.
	Ready struct{}
	// Lease is the lease that the guard revokes if no elector follows. It is sent before the grant,
	// and again when the granted TTL is known. ID 0: there is none any more.
	//
	// It is sent once more, with Releasing, before the first request that deletes its key or
	// revokes it. Such a request may arrive long after the elector has exited. So the elector that
	// follows may only finish that. TTL 0: as before.
	Lease struct {
		ID        int64
		TTL       time.Duration
		Releasing bool
	}
	// Entered means that the key of the lease is in etcd, with this create revision.
	Entered struct {
		Key     string
		Created int64
	}
	// Token is etcd's authentication token. An elector sends it for the process that revokes in its
	// place. The guard passes it to the next elector, before the Record. Empty: there is none. A
	// received Value is valid until the next Fill.
	Token struct{ Value []byte }
	// Restarts is what the restart policy knows before the Start that follows.
	Restarts struct {
		Count    int // restarts of the job so far
		Failures int // quick failures in a row
		Backoff  time.Duration
	}
	// JobReady is what is known that makes the job ready. The guard passes it to the next elector.
	JobReady struct {
		Passed   bool // a health check has passed
		Notified bool // the job has sent READY=1
	}
	// Start asks for a start of the job.
	Start struct {
		Key            string
		Token, LeaseID int64
		StopAt, KillBy time.Duration
	}
	// Extend moves the deadlines of the job. One that is frozen is thawed.
	Extend struct{ StopAt, KillBy time.Duration }
	// Stop asks for the end of the job. Grace 0 kills it at once, because the lease is lost and the
	// next leader may be starting. UntilKillBy leaves it the time until kill-by. Unhealthy: the job
	// is stopped because of what it does. That counts as if it exited by itself with an error.
	Stop struct {
		Grace     time.Duration
		Unhealthy bool
	}
	// Ping wants a Pong with its number.
	Ping struct{ Number int64 }
	// Status is what systemd shows.
	Status struct{ Text string }
	// Exiting means that the elector is about to exit as planned. The daemon has to exit with Code.
	Exiting struct {
		Code int
		Why  string
	}
)

// UntilKillBy is the grace of a Stop that only the deadlines bound.
const UntilKillBy time.Duration = -1

// What the guard sends.
type (
	// Started means that the job's first process runs.
	Started struct {
		PID int
		At  time.Duration // since boot
	}
	// Refused means that the job could not be started. Code stands for its exit code.
	Refused struct {
		Code int
		Why  string
	}
	// Exited is how the job's first process exited. Code is as in a shell. Signal is 0 if no signal
	// ended it.
	Exited struct{ Code, Signal int }
	// Gone means that nothing of the job is left.
	Gone struct {
		Elapsed time.Duration // since the stop signal, or the kill where there was none
		Reason  KillReason
		Ordered bool // the guard ended the job: it did not exit by itself
	}
	// Pong answers a Ping.
	Pong struct{ Number int64 }
	// Signal is a signal that the guard received.
	Signal struct{ Signal unix.Signal }
	// TimerLatency is by how much the guard missed a deadline.
	TimerLatency struct{ By time.Duration }
	// Frozen means that the job is frozen. StopAt is that of the last Start, Record or Extend by
	// then. If the elector has sent another Extend since, the job may run again by now.
	Frozen struct{ StopAt time.Duration }
	// Thawed means that the job runs again.
	Thawed struct{}
	// Ending means that the job is being stopped or killed, whoever has asked for that. Gone
	// follows.
	Ending struct{}
)

// Message is a message as it was received. Kind tells which of its methods decodes it.
type Message struct {
	Kind   Kind
	number [4]int64
	text   []byte // in the Inbox, until the next Fill
}

// Clone returns a copy that does not depend on the Inbox.
func (m Message) Clone() Message {
	m.text = bytes.Clone(m.text)
	return m
}

// Lease decodes a KindLease.
func (m Message) Lease() Lease {
	return Lease{
		ID: m.number[0], TTL: time.Duration(m.number[1]), Releasing: m.number[2] != 0,
	}
}

// Entered decodes a KindEntered. It allocates the key.
func (m Message) Entered() Entered {
	return Entered{Key: string(m.text), Created: m.number[0]}
}

// Restarts decodes a KindRestarts.
func (m Message) Restarts() Restarts {
	return Restarts{
		Count: int(m.number[0]), Failures: int(m.number[1]), Backoff: time.Duration(m.number[2]),
	}
}

// JobReady decodes a KindJobReady.
func (m Message) JobReady() JobReady {
	return JobReady{Passed: m.number[0] != 0, Notified: m.number[1] != 0}
}

// Token decodes a KindToken.
func (m Message) Token() Token { return Token{Value: m.text} }

// Start decodes a KindStart. It allocates the key.
func (m Message) Start() Start {
	return Start{
		Key: string(m.text), LeaseID: m.number[0], Token: m.number[1],
		StopAt: time.Duration(m.number[2]), KillBy: time.Duration(m.number[3]),
	}
}

// Extend decodes a KindExtend.
func (m Message) Extend() Extend {
	return Extend{StopAt: time.Duration(m.number[0]), KillBy: time.Duration(m.number[1])}
}

// Stop decodes a KindStop.
func (m Message) Stop() Stop {
	return Stop{Grace: time.Duration(m.number[0]), Unhealthy: m.number[1] != 0}
}

// Ping decodes a KindPing.
func (m Message) Ping() Ping { return Ping{Number: m.number[0]} }

// Status decodes a KindStatus. It allocates the text.
func (m Message) Status() Status { return Status{Text: string(m.text)} }

// Exiting decodes a KindExiting. It allocates the text.
func (m Message) Exiting() Exiting { return Exiting{Code: int(m.number[0]), Why: string(m.text)} }

// Started decodes a KindStarted.
func (m Message) Started() Started {
	return Started{PID: int(m.number[0]), At: time.Duration(m.number[1])}
}

// Refused decodes a KindRefused. It allocates the text.
func (m Message) Refused() Refused { return Refused{Code: int(m.number[0]), Why: string(m.text)} }

// Exited decodes a KindExited.
func (m Message) Exited() Exited {
	return Exited{Code: int(m.number[0]), Signal: int(m.number[1])}
}

// Gone decodes a KindGone.
func (m Message) Gone() Gone {
	return Gone{
		Elapsed: time.Duration(m.number[0]), Reason: KillReason(m.number[1]),
		Ordered: m.number[2] != 0,
	}
}

// Pong decodes a KindPong.
func (m Message) Pong() Pong { return Pong{Number: m.number[0]} }

// Signal decodes a KindSignal.
func (m Message) Signal() Signal { return Signal{Signal: unix.Signal(m.number[0])} }

// TimerLatency decodes a KindTimerLatency.
func (m Message) TimerLatency() TimerLatency {
	return TimerLatency{By: time.Duration(m.number[0])}
}

// Frozen decodes a KindFrozen.
func (m Message) Frozen() Frozen { return Frozen{StopAt: time.Duration(m.number[0])} }

// MaxSilence bounds the elector's silence before the guard's first check, however long the TTL is:
// systemd's watchdog (30 s in our unit) would end the whole daemon, and the job with it.
const MaxSilence = 12 * time.Second

// Silence is for how long the guard lets an elector be silent that has just sent a ping, before it
// checks. The elector has to ping sooner.
func Silence(ttl time.Duration, job bool, untilStopAt time.Duration) time.Duration {
	if job {
		return min(MaxSilence, max(untilStopAt-ttl/3, ttl/10))
	}
	return min(MaxSilence, max(ttl/3, 2*time.Second))
}
