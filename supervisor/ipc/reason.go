//go:build linux

package ipc

// KillReason is why the job was killed.
type KillReason uint8

// The reasons of a kill.
const (
	NotKilled      KillReason = iota
	KilledGrace               // the grace of a planned stop was over
	KilledKillBy              // kill-by passed
	KilledLost                // the lease or the key is lost
	KilledElector             // the elector is lost
	KilledSignal              // a second signal
	KilledLeftover            // the first process exited and left others behind
	KilledGuard               // the guard is lost: the elector killed the job in its place
	KilledSpawner             // the spawner is lost
	KilledFault               // internal error: an event came in a state that can't have it
	KilledFrozen              // a stop was asked for while it was frozen
	KilledThawed              // somebody else has thawed it
)

// The labels are public.
var reasons = [...]struct{ label, text string }{
	NotKilled:      {"none", "not killed"},
	KilledGrace:    {"grace", "it did not stop within its grace"},
	KilledKillBy:   {"kill_by", "kill-by has passed"},
	KilledLost:     {"lost", "lease lost"},
	KilledElector:  {"elector_gone", "elector lost"},
	KilledSignal:   {"second_signal", "second signal"},
	KilledLeftover: {"left_behind", "what its first process left behind"},
	KilledGuard:    {"guard_gone", "guard lost"},
	KilledSpawner:  {"spawner_gone", "spawner lost"},
	KilledFault:    {"internal_fault", "internal error"},
	KilledFrozen:   {"frozen", "asked to stop while it was frozen"},
	KilledThawed:   {"thawed", "somebody else has thawed it"},
}

// KillReasons returns all reasons but NotKilled.
func KillReasons() (all []KillReason) {
	for r := NotKilled + 1; int(r) < len(reasons); r++ {
		all = append(all, r)
	}
	return all
}

// Label is the reason as leasehold_job_kills_total{reason} and the logs show it.
func (r KillReason) Label() string { return reasons[r.valid()].label }

// String is the reason for the text of a log line.
func (r KillReason) String() string { return reasons[r.valid()].text }

func (r KillReason) valid() KillReason {
	if int(r) >= len(reasons) {
		return NotKilled
	}
	return r
}
