package sim

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"leasehold/control"
	elect "leasehold/election"
)

// operate lets an operator do something to the lease or key of the fault's daemon. That excuses
// what follows only if the daemon has a job, or the oldest key: nobody else can lead by it.
func (w *world) operate(f *Fault, do func(lease int64, key string) bool, excuse ...deed) {
	d := w.daemon(f)
	w.mu.Lock()
	defer w.mu.Unlock()
	lease := d.guard.lease
	if lease == 0 {
		return
	}
	leads := w.isFirst(keyOf(lease)) || d.job != nil && d.job.lease == lease && d.job.alive()
	if do(lease, keyOf(lease)) {
		w.note("oper", "done to the lease %x of %s", lease, d.name)
		for _, what := range excuse {
			w.check.did(lease, leads, what)
		}
	}
}

// isFirst reports whether the key is the oldest one.
func (w *world) isFirst(key string) bool {
	created := w.cluster.Created(key)
	return created != 0 && !slices.ContainsFunc(w.cluster.Keys(election+"/"),
		func(other string) bool { return w.cluster.Created(other) < created })
}

func keyOf(lease int64) string { return fmt.Sprintf("%s/%x", election, lease) }

func deleteKey(w *world, f *Fault) {
	w.operate(f, func(_ int64, key string) bool { return w.cluster.DeleteKey(key) }, keyDeleted)
}

// leaveInName deletes the key as a leader does whose job has exited. So the next in line starts at
// once.
func leaveInName(w *world, f *Fault) {
	w.operate(f, func(lease int64, key string) bool {
		return w.cluster.Leave(key, control.JobExitedOf(election), lease)
	}, keyDeleted)
}

// overwriteKey writes to the key without its lease. In half of the cases the daemon loses etcd a
// little later, perhaps before it has removed the key.
func overwriteKey(w *world, f *Fault) {
	w.operate(f, func(_ int64, key string) bool { return w.cluster.OverwriteKey(key) })
	if f.Level < 0.5 {
		f.Members = []int{1, 2, 3}
		w.later(time.Duration(f.Level*0.6*float64(w.s.TTL)), func() { downLink(w, f) })
		w.later(w.s.TTL, func() { upLink(w, f) })
	}
}

func revokeLease(w *world, f *Fault) {
	revoke := func(lease int64, _ string) bool { return w.cluster.RevokeLease(lease) }
	w.operate(f, revoke, leaseRevoked)
}

// revokeStandby revokes the lease of any daemon. In most cases it is a standby.
func revokeStandby(w *world, f *Fault) {
	f.Daemon = int(f.Level * Daemons)
	revokeLease(w, f)
}

// fail lets the job exit by itself, too often to be started again here.
func (d *daemon) fail(backoff time.Duration) {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	if j := d.job; j != nil && j.runs() && !j.stopping && !j.killing {
		d.note("job %d fails", j.token)
		j.result = &elect.Backoff{For: backoff}
		j.exitAt = 0
		j.serve()
	}
}

// removeAbandoned follows the advice that standbys log: it deletes keys without a lease that nobody
// is left to delete. A daemon that runs has to remove its own.
func (w *world) removeAbandoned() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, key := range w.cluster.Keys(election + "/") {
		lease, err := strconv.ParseInt(strings.TrimPrefix(key, election+"/"), 16, 64)
		kept := slices.ContainsFunc(w.daemons, func(d *daemon) bool {
			return d.leaving || d.replacing ||
				d.elector != nil && slices.Contains(d.elector.leases, lease)
		})
		if err == nil && !kept && !w.cluster.HasLease(lease) {
			w.note("oper", "deletes %s, which nobody else will", key)
			w.cluster.DeleteKey(key)
		}
	}
}

// head returns the create revision of the oldest key; 0: there is none.
func (w *world) head() (created int64) {
	for _, key := range w.cluster.Keys(election + "/") {
		if c := w.cluster.Created(key); created == 0 || c < created {
			created = c
		}
	}
	return created
}

// holdElection holds the election. In some cases the leader resigns.
func holdElection(w *world, f *Fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hold != nil {
		return
	}
	h := control.Hold{By: "operator", Stop: f.Level < 0.3, Token: w.head()}
	if w.cluster.PutKey(control.HoldOf(election), control.Encode(&h), 0) {
		w.note("oper", "holds, and names %d", h.Token)
		w.hold = &h
	}
}

// releaseElection reports whether there is no hold any more.
func releaseElection(w *world) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hold != nil && w.cluster.DeleteKey(control.HoldOf(election)) {
		w.note("oper", "releases")
		w.hold = nil
	}
	return w.hold == nil
}

// switchOver asks the leader to hand over to a daemon. The operator writes the records, too.
func switchOver(w *world, f *Fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.daemons {
		if lease := d.guard.lease; lease != 0 {
			w.cluster.PutKey(control.CandidateOf(election, lease),
				control.Encode(&control.Candidate{Identity: d.name, Ready: true}), lease)
		}
	}
	asked := control.Switchover{
		ID: f.At.String(), To: w.daemons[int(f.Level*Daemons)].name, Token: w.head(),
	}
	if w.cluster.PutKey(control.SwitchoverOf(election), control.Encode(&asked), 0) {
		w.note("oper", "asks for a switchover to %s", asked.To)
	}
}

// loseSwitchover asks for a switchover, and deletes the leader's key while its job stops.
func loseSwitchover(w *world, f *Fault) {
	switchOver(w, f)
	f.Daemon = -1
	w.later(time.Duration(f.Level*0.05*float64(w.s.TTL)), func() { deleteKey(w, f) })
}

// withdraw ends what is left of a request.
func withdraw(w *world, _ *Fault) { w.cluster.DeleteKey(control.SwitchoverOf(election)) }
