//go:build linux

package ipc

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"
)

// TermVariables is how many entries a term adds to the environment of the job.
const TermVariables = 5

// Environment is the part of the job's environment that depends on the term. The hooks have it too.
func (m Start) Environment(election, identity string) []string {
	return []string{
		"LEASEHOLD_ELECTION=" + election,
		"LEASEHOLD_IDENTITY=" + identity,
		"LEASEHOLD_KEY=" + m.Key,
		"LEASEHOLD_FENCING_TOKEN=" + strconv.FormatInt(m.Token, 10),
		"LEASEHOLD_LEASE_ID=" + strconv.FormatInt(m.LeaseID, 16),
	}
}

// Why a hook runs, for its environment.
const (
	ReasonStart   = "LEASEHOLD_REASON=start"   // before a start of the job
	ReasonStop    = "LEASEHOLD_REASON=stop"    // nothing of the job is left
	ReasonStartup = "LEASEHOLD_REASON=startup" // the daemon is started
)

// Refusal is why a start has failed, by the spawner's Value, and the exit code that stands for it,
// as a shell has it. 71 is EX_OSERR of sysexits.h.
func Refusal(value int32) (code int, why string) {
	if value <= SpawnerHookFailed {
		code = int(SpawnerHookFailed - value)
		return code, fmt.Sprintf("LEASEHOLD_PRE_START has failed: exit code %d", code)
	}
	switch err := unix.Errno(value); {
	case errors.Is(err, unix.ENOENT):
		return 127, err.Error()
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return 71, err.Error()
	default:
		return 126, err.Error()
	}
}
