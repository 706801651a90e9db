//go:build linux

package app

import (
	"leasehold/election"
	"leasehold/supervisor"
	"leasehold/supervisor/ipc"
)

// adopt makes the candidate go on with the lease of the elector before this one.
func (j *jobCallbacks) adopt(ec *election.Config) {
	r := j.supervisor.Record()
	ec.Recovered = r.Recovered
	ec.Authenticated, ec.AuthToken = j.supervisor.Token, j.supervisor.AuthToken()
	ec.Adopt = adoption(*ec, r)
	changed := ec.Changed
	ec.Changed = func() { // at each change of the candidate's snapshot, so after each renewal too
		changed()
		j.supervisor.Awake()
	}
	if ec.Adopt != nil {
		timing := ec.Timing(ec.Adopt.TTL)
		j.margin.Store(int64(timing.Margin))
	}
	if r.StartedAt != 0 {
		ec.Wait = -1 // the daemon was elected in time
	}
}

// adoption is what the candidate needs of the guard's Record; nil: there is no lease.
func adoption(ec election.Config, r ipc.Record) *election.Adoption {
	if r.Lease.ID == 0 {
		return nil
	}
	a := &election.Adoption{
		LeaseID: r.Lease.ID, TTL: r.Lease.TTL, Created: r.Entered.Created,
		Releasing: r.Lease.Releasing, Leading: r.Job != ipc.JobIdle,
	}
	if a.Leading {
		timing := ec.Timing(a.TTL)
		a.Deadlines = election.Deadlines{
			StopAt: r.StopAt, KillBy: r.KillBy, End: r.KillBy + timing.PostStop + timing.Margin,
		}
		a.Ending = r.Ordered
	}
	return a
}

// ended is why the daemon has to exit although another elector has only begun: the one before it
// was lost between the job's end and its own. Else it is nil.
func (j *jobCallbacks) ended() error {
	if err := j.supervisor.Ended(); err != nil {
		return err
	}
	r := j.supervisor.Record()
	never := j.cfg.Restart == string(supervisor.RestartNever)
	if never && r.StartedAt != 0 && r.Job == ipc.JobIdle && r.StopSignals == 0 {
		return errLost
	}
	return nil
}
