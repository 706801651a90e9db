//go:build linux

package ipc

import (
	"encoding/binary"
	"time"
)

// RecordVersion is that of the messages between guard and elector, and of what the guard passes to
// the internal commands of the binary: after a reload that may be another one.
const RecordVersion = 5

// JobPhase is what the job does when an elector begins.
type JobPhase int

// The phases of a job.
const (
	JobIdle    JobPhase = iota // nothing of a job is left
	JobForking                 // a start is under way
	JobRunning
	JobEnding // it is stopped or killed, or its first process has exited
	JobFrozen // it runs no instruction until new deadlines come
)

// Record is the guard's first message to each elector, after a Token. It is what the guard knows of
// the daemon, and all that an elector may know of the one before it. For the first elector only
// Version and Recovered are set. Moments are readings of CLOCK_BOOTTIME.
type Record struct {
	Version int
	Lease   Lease
	Entered Entered // of that lease; zero: its key is not known to be put

	Job            JobPhase
	PID            int           // of the job's first process; 0: none
	StartedAt      time.Duration // of the last job; 0: none was started
	StopAt, KillBy time.Duration // of the job
	// Due is when the guard kills a job that it has asked to stop. Then Ordered is set, too: the
	// job does not exit by itself.
	Due     time.Duration
	Ordered bool
	// Unhealthy: the job, or the last one, is stopped because of that.
	Unhealthy bool
	// Serial is that of the job's start, or of the next one. The spawner's messages with a lower
	// one are out of date.
	Serial int32

	JobReady JobReady // of the last job

	Starts   int // of the job under this lease
	Restarts Restarts
	LastExit RecordedExit // of the job's first process; zero: none has exited

	StopSignals int // TERM and INT that the guard has received
	// Electors that were replaced, by reason.
	Exited, Silent, Reloaded int

	// Recovered is the lease of a daemon before this one, whose job has exited: it is to be
	// revoked. 0: there is none.
	Recovered int64
}

// RecordedExit is how a job ended.
type RecordedExit struct {
	Exited
	Errno   int           // why it could not be started, see Refusal; 0: it was
	At      time.Duration // 0: no job has ended
	Ran     time.Duration
	Ordered bool // it did not exit by itself
}

// recordLen is the length of a Record without the key, which follows.
const recordLen = 31 * 8

// encode writes the record without the key.
func (r *Record) encode(b []byte) int {
	numbers := [recordLen / 8]int64{
		int64(r.Version), r.Lease.ID, int64(r.Lease.TTL), flag(r.Lease.Releasing),
		r.Entered.Created, int64(r.Job), int64(r.PID), int64(r.StartedAt), int64(r.StopAt),
		int64(r.KillBy), int64(r.Due), flag(r.Ordered), int64(r.Serial), int64(r.Starts),
		int64(r.Restarts.Count), int64(r.Restarts.Failures), int64(r.Restarts.Backoff),
		int64(r.LastExit.Code), int64(r.LastExit.Signal), int64(r.LastExit.Errno),
		int64(r.LastExit.At), int64(r.LastExit.Ran), flag(r.LastExit.Ordered),
		int64(r.StopSignals), int64(r.Exited), int64(r.Silent), r.Recovered,
		int64(r.Reloaded), flag(r.JobReady.Passed), flag(r.JobReady.Notified),
		flag(r.Unhealthy),
	}
	for i, v := range numbers {
		binary.LittleEndian.PutUint64(b[8*i:], uint64(v))
	}
	return recordLen
}

// Record decodes a KindRecord. It allocates the key. What is missing is zero.
func (m Message) Record() Record {
	var numbers [recordLen]byte
	key := m.text[copy(numbers[:], m.text):]
	n := func(i int) int64 { return int64(binary.LittleEndian.Uint64(numbers[8*i:])) }
	return Record{
		Version: int(n(0)),
		Lease:   Lease{ID: n(1), TTL: time.Duration(n(2)), Releasing: n(3) != 0},
		Entered: Entered{Key: string(key), Created: n(4)},
		Job:     JobPhase(n(5)), PID: int(n(6)), StartedAt: time.Duration(n(7)),
		StopAt: time.Duration(n(8)), KillBy: time.Duration(n(9)), Due: time.Duration(n(10)),
		Ordered: n(11) != 0, Serial: int32(n(12)), Starts: int(n(13)),
		Restarts: Restarts{
			Count: int(n(14)), Failures: int(n(15)), Backoff: time.Duration(n(16)),
		},
		LastExit: RecordedExit{
			Exited: Exited{Code: int(n(17)), Signal: int(n(18))}, Errno: int(n(19)),
			At: time.Duration(n(20)), Ran: time.Duration(n(21)), Ordered: n(22) != 0,
		},
		StopSignals: int(n(23)), Exited: int(n(24)), Silent: int(n(25)),
		Recovered: n(26), Reloaded: int(n(27)),
		JobReady:  JobReady{Passed: n(28) != 0, Notified: n(29) != 0},
		Unhealthy: n(30) != 0,
	}
}
