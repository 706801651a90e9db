//go:build linux

package app

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"leasehold/control"
	"leasehold/election"
	"leasehold/health"
	"leasehold/supervisor"
)

// recorded are a candidate's callbacks, which a recorder learns of, too.
type recorded struct {
	election.Callbacks
	recorder *control.Recorder
	job      func() health.Job // nil: there is none
	lease    atomic.Int64
	began    time.Time // the term that Lead is called for; zero: in a process before this one
}

// record makes the daemon write what others may know of it.
func record(ec *election.Config, p parts) *control.Recorder {
	recorder := control.NewRecorder(control.RecorderConfig{
		Election: p.cfg.Election,
		Candidate: control.Candidate{
			Identity: p.cfg.Identity, Priority: p.cfg.Priority.N, Leasehold: p.version,
			URL: url(p.cfg.Listen), Ready: p.cfg.Priority.N != 0,
		},
		Logger: p.log, Changed: func() { signalChange(p.changed) },
	})
	ec.Beside = func(ctx context.Context, etcd *election.Client) { recorder.Run(ctx, etcd) }
	ec.Callbacks = &recorded{Callbacks: ec.Callbacks, recorder: recorder, job: p.job}
	if a := ec.Adopt; a != nil && a.Created != 0 && !a.Releasing {
		recorder.Joined(a.LeaseID, true)
	}
	return recorder
}

// url is that of the health endpoint, for others. It is "" if they can't reach it.
func url(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil || host == "localhost" {
		return ""
	}
	switch address, err := netip.ParseAddr(host); {
	case err == nil && address.IsLoopback():
		return ""
	case host == "", err == nil && address.IsUnspecified():
		if host, err = os.Hostname(); err != nil {
			return ""
		}
	}
	return "http://" + net.JoinHostPort(host, port)
}

func (r *recorded) Leased(id int64, ttl time.Duration) {
	r.Callbacks.Leased(id, ttl)
	if id == 0 {
		r.recorder.Left()
	} else {
		r.lease.Store(id)
	}
}

func (r *recorded) Entered(key string, created int64) {
	r.Callbacks.Entered(key, created)
	r.recorder.Joined(r.lease.Load(), false)
}

func (r *recorded) Extended(d election.Deadlines) {
	r.Callbacks.Extended(d)
	r.recorder.Renewed()
}

func (r *recorded) Lead(ctx context.Context, t election.Term) error {
	r.recorder.Began(t.Token, t.Adopted)
	r.began = time.Now()
	if t.Adopted {
		r.began = time.Time{}
	}
	return r.Callbacks.Lead(ctx, t)
}

func (r *recorded) Ended(cause, err error) {
	r.Callbacks.Ended(cause, err)
	var job health.Job
	if r.job != nil {
		job = r.job()
	}
	r.recorder.Ended(termEnd(cause, err), job.Starts, lastExit(job, r.began))
}

// lastExit is how the job exited last in the term that began then; nil: it did not.
func lastExit(job health.Job, began time.Time) *control.Exit {
	if job.Starts == 0 || job.LastExit == nil || job.LastExit.At.Before(began) {
		return nil
	}
	e := &control.Exit{
		Signal: job.LastExit.Signal, At: job.LastExit.At.UTC().Truncate(time.Millisecond),
	}
	if e.Signal == "" {
		e.Code = job.LastExit.Code
	}
	return e
}

// termEnd is why a term has ended, for the history. See election.Callbacks.Ended.
func termEnd(cause, err error) string {
	var resigned *election.Backoff
	var exited *supervisor.ExitError
	switch {
	case errors.Is(cause, errPlannedStop):
		return "stopped"
	case errors.Is(cause, election.ErrHeld):
		return "held"
	case errors.Is(cause, election.ErrSwitchover):
		return "switchover"
	case errors.Is(cause, election.ErrContactLost):
		return "contact lost"
	case errors.Is(cause, election.ErrLeaseLost):
		return "lease lost"
	case errors.Is(cause, election.ErrKeyDeleted):
		return "key deleted"
	case errors.Is(cause, election.ErrKeyOverwritten):
		return "key overwritten"
	case errors.Is(cause, election.ErrEnded):
		return control.Lost // the process before this one knew
	case errors.Is(err, supervisor.ErrGuardLost):
		return "guard lost"
	case errors.As(err, &resigned):
		return "resigned"
	case errors.As(err, &exited) && exited.Refused != "":
		return "job not started"
	case errors.As(err, &exited):
		return "job exited"
	}
	return "internal error"
}
