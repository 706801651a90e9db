//go:build linux

// Package recovery keeps the state file: what the next daemon needs to know if all processes of
// this one are killed at once.
//
// Then nobody is left to revoke the lease, and without the file the next daemon has to wait until
// it expires. With it, the next daemon takes the file's lock, proves that the old job has exited,
// and only then has the old lease revoked.
//
// The lock: guard, electors, spawner, and the forked child until its exec inherit one open file
// description, and with it the lock (flock(2)). So whoever gets the lock knows that no process of
// the daemon before is left, and that no start of a job is under way. It may know nothing of the
// job itself. That takes a proof (Record.prove).
//
// `leasehold elect` keeps such a file, too (elect.go). Apps may work on after its end, so the next
// process revokes nothing: it goes on with the term.
//
// What is not certain is not proven, and the lease expires: a file that can't be read, that is a
// copy, or of another election or identity.
//
// Where to look: file.go has the lock, record.go what the file holds, place.go where this process
// runs and what its job may do, prove.go the proof, keeper.go how the elector writes the lease,
// elect.go the file of elect.
package recovery

import "errors"

// FileName is the name of the state file in its directory.
const FileName = "leasehold.state"

// ErrHeld means that a process of another daemon holds the lock.
var ErrHeld = errors.New("a process of another daemon holds the lock")
