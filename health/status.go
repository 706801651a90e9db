package health

import (
	"cmp"
	"math"
	"reflect"
	"strconv"
	"time"

	"leasehold/internal/quote"
)

// status is the JSON of /status: a contract. Fields may be added, never renamed, and every one is
// always present. The desc tags go into the reference.
type status struct {
	Name     string  `json:"name" desc:"the leader's identity; \"\" where none is known"`
	Election string  `json:"election" desc:"the election's key prefix"`
	Identity string  `json:"identity" desc:"this candidate's name"`
	State    string  `json:"state" desc:"connecting, standby, leading, suspended or stopping"`
	Reason   *string `json:"reason" desc:"why the candidate is not in the election"`
	Unfit    *string `json:"unfit" desc:"why the candidate must not become leader"`
	Leader   *Leader `json:"leader" desc:"the leader; in a long queue, of some seconds ago"`
	Queue    *Queue  `json:"position" desc:"what is ahead of this candidate's key in the queue"`
	Lease    *lease  `json:"lease" desc:"this candidate's lease"`

	Deadlines *deadlines `json:"deadlines" desc:"of the lease, in seconds of CLOCK_BOOTTIME"`

	Job     jobStatus   `json:"job" desc:"the job of this candidate"`
	Blocker *Blocker    `json:"blocker" desc:"a key ahead of ours that will not go away by itself"`
	Hold    *HoldStatus `json:"hold" desc:"what keeps everybody from becoming leader"`
	Control *string     `json:"control_problem" desc:"why hold and switchover are unusable"`
	Since   *string     `json:"since" desc:"since when the state holds"`
	Version string      `json:"version" desc:"of leasehold"`
}

type lease struct {
	ID       string  `json:"id" desc:"in hex, as etcdctl shows it"`
	TTL      float64 `json:"ttl_seconds" desc:"as etcd granted it"`
	ValidFor float64 `json:"valid_for_seconds" desc:"how long it is sure to last; never negative"`
}

// deadlines are readings of the machine's clock that counts from its boot and that nobody sets.
type deadlines struct {
	Now    float64 `json:"now" desc:"what the clock shows in this moment"`
	StopAt float64 `json:"stop_at" desc:"when a leader stops to lead, unless it renews the lease"`
	KillBy float64 `json:"kill_by" desc:"when the guard kills a job that has not stopped by then"`
	End    float64 `json:"lease_end" desc:"until when the lease is sure to last"`
}

// HoldStatus is the JSON of a hold.
type HoldStatus struct {
	By     string  `json:"by" desc:"who asked for it"`
	Reason string  `json:"reason" desc:"why"`
	Since  *string `json:"since" desc:"when it was made"`
	Until  *string `json:"until" desc:"when it ends by itself; null: it does not"`
	Stop   bool    `json:"stop" desc:"the leader resigns, too"`
}

type jobStatus struct {
	State string `json:"state" desc:"none, starting, running, frozen, stopping, backoff or exited"`

	PID       *int        `json:"pid" desc:"of its first process"`
	StartedAt *string     `json:"started_at" desc:"when it was last started"`
	Restarts  int         `json:"restarts" desc:"how often it was started again"`
	LastExit  *exitStatus `json:"last_exit" desc:"how it last ended"`
	Health    *string     `json:"health" desc:"starting, healthy or unhealthy; null: not checked"`
	Ready     bool        `json:"ready" desc:"whether it runs, is ready, and is healthy"`
}

type exitStatus struct {
	Code   *int    `json:"code" desc:"exit code; null where a signal ended it"`
	Signal *string `json:"signal" desc:"that signal, for example SIGKILL"`
	At     *string `json:"at" desc:"when"`
}

// status renders an updated snapshot.
func (s Snapshot) status(now time.Duration, version string) status {
	st := status{
		Election: s.Election, Identity: s.Identity, State: s.State,
		Reason: orNull(s.Reason), Unfit: orNull(s.Unfit),
		Leader: s.Leader, Queue: s.Queue, Blocker: s.Blocker,
		Since: timestamp(s.Since), Version: version,
		Job: jobStatus{
			State: cmp.Or(s.Job.State, "none"), PID: orNull(s.Job.PID),
			StartedAt: timestamp(s.Job.StartedAt), Restarts: s.Job.Restarts,
			Health: orNull(s.Job.Health), Ready: s.Job.ready(),
		},
	}
	st.Control = orNull(s.ControlProblem)
	st.Hold = s.Hold.Status()
	if s.Leader != nil {
		st.Name = s.Leader.Identity
	}
	if s.LeaseID != 0 {
		id := strconv.FormatUint(uint64(s.LeaseID), 16)
		st.Lease = &lease{ID: id, TTL: s.TTL.Seconds(), ValidFor: seconds(s.validFor(now))}
		st.Deadlines = &deadlines{
			Now: seconds(now), StopAt: seconds(s.StopAt), KillBy: seconds(s.KillBy),
			End: seconds(s.End),
		}
	}
	if e := s.Job.LastExit; e != nil {
		st.Job.LastExit = &exitStatus{Signal: orNull(e.Signal), At: timestamp(e.At)}
		if e.Signal == "" {
			st.Job.LastExit.Code = &e.Code
		}
	}
	return st
}

// Status returns the hold as JSON shows it.
func (h *Hold) Status() *HoldStatus {
	if h == nil {
		return nil
	}
	return &HoldStatus{
		By: h.By, Reason: h.Reason, Since: timestamp(h.Since), Until: timestamp(h.Until),
		Stop: h.Stop,
	}
}

// withoutClock drops what changes with the clock alone.
func (st status) withoutClock() status {
	if st.Lease != nil {
		l, d := *st.Lease, *st.Deadlines
		l.ValidFor, d.Now = 0, 0
		st.Lease, st.Deadlines = &l, &d
	}
	return st
}

// encode renders JSON; without an indent on one line.
func encode[T status | []SeenTerm](v T, indent string) string {
	text, err := quote.JSON(v, indent)
	if err != nil {
		panic(err) // No value of these types can fail.
	}
	return text
}

// seconds are rounded down to milliseconds, so that nothing lasts shorter than we report.
func seconds(d time.Duration) float64 { return math.Floor(d.Seconds()*1000) / 1000 }

func orNull[T comparable](v T) *T {
	var none T
	if v == none {
		return nil
	}
	return &v
}

func timestamp(t time.Time) *string {
	if t.IsZero() {
		return nil
	}
	text := t.UTC().Format(time.RFC3339Nano)
	return &text
}

// A Field is one field of the JSON, by its path, such as lease.id.
type Field struct{ Path, Type, Meaning string }

// StatusFields lists the fields of /status, for the reference.
func StatusFields() []Field { return FieldsOf[status]() }

// FieldsOf lists the fields of a struct that is rendered as JSON, those of the structs in it too.
// Their meaning is what the desc tags say.
func FieldsOf[T any]() []Field { return appendFields(nil, "", reflect.TypeFor[T]()) }

func appendFields(list []Field, prefix string, t reflect.Type) []Field {
	for f := range t.Fields() {
		null := ""
		ft := f.Type
		if ft.Kind() == reflect.Pointer {
			ft, null = ft.Elem(), " or null"
		}
		kind, within := "number", "."
		switch ft.Kind() {
		case reflect.Slice:
			kind, within, ft = "array", "[].", ft.Elem()
		case reflect.String:
			kind = "string"
		case reflect.Bool:
			kind = "boolean"
		case reflect.Struct:
			kind = "object"
		}
		path := prefix + f.Tag.Get("json")
		list = append(list, Field{Path: path, Type: kind + null, Meaning: f.Tag.Get("desc")})
		if ft.Kind() == reflect.Struct {
			list = appendFields(list, path+within, ft)
		}
	}
	return list
}
