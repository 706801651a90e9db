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
	// SpawnerSignal asks to send the signal Value to the first process of the start with this
	// serial, which is not executed yet: its hook runs.
	SpawnerSignal
	// SpawnerHook asks to run the hook after the job if it is due: the guard hangs, can't be
	// killed, and the spawner has reported that nothing of the job is left. The elector sends it.
	SpawnerHook
	// SpawnerHookDone means that the hook after the job has run, and is not due any more. The
	// spawner sends it too, to the elector, when it has run the hook. Value: the wait status of its
	// runner; 0: it was not due.
	SpawnerHookDone

	// From the spawner.
	SpawnerStarted // Value: pid of the first process; its pidfd comes along
	// SpawnerRefused means that the start has failed. Value: errno, SpawnerTooLate, or that the
	// hook before it has failed. Extra: 1 if no process of the job is left.
	SpawnerRefused
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

// SpawnerHookFailed means that the hook before the start has failed: it is less by its exit code.
const SpawnerHookFailed = int32(-1000)
