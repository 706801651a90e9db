//go:build linux

package ipc

import "unsafe"

// SpawnerMessage is a message between the spawner and the guard or the elector, over a
// SOCK_SEQPACKET socket. It has no pointers and needs no encoding: the spawner runs without Go's
// runtime, and all three are the same binary.
type SpawnerMessage struct{ Kind, Serial, Value, Extra int32 }

// SpawnerMessageLen is the length of a message in bytes.
const SpawnerMessageLen = int(unsafe.Sizeof(SpawnerMessage{}))

// Bytes is the memory of the message.
func (m *SpawnerMessage) Bytes() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(m)), SpawnerMessageLen)
}

// The kinds of a SpawnerMessage.
const (
	// To the spawner.
	SpawnerPrepare = int32(iota + 1) // make the cgroup for the next start
	SpawnerStart                     // start the job; Serial: of this start
	// SpawnerKill from the guard asks to kill the job with this serial. From the elector it asks to
	// kill every job, and to start nothing any more.
	SpawnerKill
	// SpawnerShow asks to send the elector a SpawnerStarted of the job's first process again: it is
	// another elector.
	SpawnerShow

	// From the spawner.
	SpawnerStarted // Value: pid of the first process; its pidfd comes along
	SpawnerRefused // Value: errno, or SpawnerTooLate
	// SpawnerExited means that the first process has exited. Value: its wait status, Extra: 1 if no
	// other process of the job is left.
	SpawnerExited
	// SpawnerGone means that nothing of the job is left after a SpawnerKill. To the elector it also
	// means that nothing will be started.
	SpawnerGone
)

// SpawnerTooLate means that stop-at has passed, the start was cancelled, or the spawner starts
// nothing any more.
const SpawnerTooLate = int32(-1)
