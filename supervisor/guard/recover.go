//go:build linux

package guard

import (
	"strconv"

	"leasehold/supervisor/recovery"
)

// state is the state file while the guard starts.
type state struct {
	file *recovery.File   // nil: it is not used
	old  *recovery.Record // of the daemon before; nil: there is nothing to recover
}

// openState takes the lock of the state file and reads what the daemon before has left. If a
// process of that one lives, this daemon does without the file.
func (g *guard) openState() (s state) {
	if g.cfg.StateDir == "" {
		return s
	}
	file, err := recovery.Open(g.cfg.StateDir)
	if err != nil {
		g.log.Warn("the state file is not used: "+notRecovered, "err", err)
		return s
	}
	s.file, g.stateFd = file, file.FD()
	if s.old, err = file.Read(g.cfg.Election, g.cfg.Identity); err != nil {
		g.log.Warn("the state file says nothing of the daemon before: its lease has to expire",
			"err", err)
	}
	return s
}

const notRecovered = "if all processes of the daemon are killed at once, its lease has to expire"

// claimState decides whether the lease of the daemon before is revoked, and claims the state file
// for this one. Only the elector can revoke a lease. It fails only if the file can't be used, and
// still says something: then no job may start.
func (g *guard) claimState(s state) error {
	if s.file == nil {
		return nil
	}
	if s.old != nil && s.old.Lease != 0 {
		lease := strconv.FormatInt(int64(s.old.Lease), 16)
		if proof, err := s.old.Prove(); err == nil {
			g.known.Recovered = int64(s.old.Lease)
			g.log.Info("the job of the daemon before has exited: revoking its lease",
				"lease", lease, "proof", proof)
		} else {
			g.log.Info("the job of the daemon before may run: its lease has to expire",
				"lease", lease, "reason", err.Error())
		}
	}
	own, err := s.file.Claim(g.cfg.Election, g.cfg.Identity, g.noNewPrivs, g.known.Recovered)
	if err != nil {
		g.log.Warn("the state file is not used: "+notRecovered, "err", err)
		err = s.file.Empty()
		s.file.Close()
		g.stateFd = -1
		return err
	}
	if when, err := own.Promise(); err == nil {
		g.log.Info("if all processes of the daemon are killed at once, its lease is revoked when "+
			"it is started again", "proof", when)
	} else {
		g.log.Info(notRecovered, "reason", err.Error())
	}
	return nil
}
