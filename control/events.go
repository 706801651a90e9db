package control

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// EventKind is what an Event is about.
type EventKind string

// The kinds of events.
const (
	LeaderEvent     EventKind = "leader"     // What: Leads, Nobody
	CandidatesEvent EventKind = "candidates" // What: Joined, Left
	HoldEvent       EventKind = "hold"       // What: Held, Released
	SwitchoverEvent EventKind = "switchover" // What: Asked, Accepted, Refused, Gone
	CompactedEvent  EventKind = "compacted"  // What: Resumed
)

// What has happened.
const (
	Leads    = "leads"
	Nobody   = "nobody"
	Joined   = "joined"
	Left     = "left"
	Held     = "held"
	Released = "released"
	Asked    = "asked"
	Gone     = "gone"
	Resumed  = "resumed"
)

// Event is a change of an election.
type Event struct {
	Revision   int64 // of etcd
	Kind       EventKind
	What       string
	Identity   string      // of the leader, or of the candidate
	Token      int64       // its fencing token
	Candidates int         // how many there are now
	Hold       *Hold       // of Held; else nil
	Switchover *Switchover // of a SwitchoverEvent; of Gone, the last one
}

// Watch makes events of the changes of an election. It is an election.Follower.
type Watch struct {
	Election string
	Show     func(Event) error
	LostEtcd func(error)

	queue map[string]queued // all keys under the election's prefix
	now   watched
}

// queued is a key under the election's prefix.
type queued struct {
	identity  string
	created   int64
	candidate bool
}

// watched is an election at one revision.
type watched struct {
	leader        queued // no candidate: nobody leads
	candidates    map[string]queued
	hold          *Hold
	holdMade      int64 // the create revision of its key
	holdMod       int64
	switchover    *Switchover
	switchoverMod int64
}

// Ranges returns the ranges of the keys that are needed: the queue, hold and switchover.
func (w *Watch) Ranges() [][2]string {
	queue := w.Election + "/"
	return [][2]string{
		{queue, clientv3.GetPrefixRangeEnd(queue)},
		{HoldOf(w.Election), SwitchoverOf(w.Election) + "\x00"},
	}
}

// Lost says that etcd does not answer.
func (w *Watch) Lost(err error) { w.LostEtcd(err) }

// State begins with all keys as they were at that revision. The first time, those who are there
// have not joined just now. Later it shows what has changed meanwhile.
func (w *Watch) State(revision int64, gap bool, kvs []*mvccpb.KeyValue) error {
	first, before := w.queue == nil, w.now
	w.queue, w.now = map[string]queued{}, watched{}
	for _, kv := range kvs {
		w.set(kv)
	}
	w.fold()
	if first {
		before.candidates = w.now.candidates
	}
	var events []Event
	if gap {
		events = append(events, Event{Kind: CompactedEvent, What: Resumed})
	}
	events = append(events, between(before, w.now)...)
	if first && !w.now.leader.candidate {
		events = append(events, Event{Kind: LeaderEvent, What: Nobody})
	}
	return w.show(revision, events)
}

// Changed takes the changes of one revision.
func (w *Watch) Changed(revision int64, changes []*mvccpb.Event) error {
	before := w.now
	for _, c := range changes {
		if c.Type == mvccpb.Event_DELETE {
			w.remove(string(c.Kv.Key))
		} else {
			w.set(c.Kv)
		}
	}
	w.fold()
	return w.show(revision, between(before, w.now))
}

func (w *Watch) show(revision int64, events []Event) error {
	for _, e := range events {
		e.Revision, e.Candidates = revision, len(w.now.candidates)
		if err := w.Show(e); err != nil {
			return err
		}
	}
	return nil
}

func (w *Watch) set(kv *mvccpb.KeyValue) {
	switch key := string(kv.Key); key {
	case HoldOf(w.Election):
		w.now.hold, w.now.holdMade, w.now.holdMod = &Hold{}, kv.CreateRevision, kv.ModRevision
		_ = Decode(kv.Value, w.now.hold) // that the key exists is the hold
	case SwitchoverOf(w.Election):
		w.now.switchover, w.now.switchoverMod = &Switchover{}, kv.ModRevision
		_ = Decode(kv.Value, w.now.switchover)
	default:
		if !strings.HasPrefix(key, w.Election+"/") {
			return // between the two others: it stands in no queue
		}
		w.queue[key] = queued{
			identity: sound(string(kv.Value)), created: kv.CreateRevision,
			candidate: kv.Lease != 0 && key == fmt.Sprintf("%s/%x", w.Election, kv.Lease),
		}
	}
}

func (w *Watch) remove(key string) {
	switch key {
	case HoldOf(w.Election):
		w.now.hold, w.now.holdMade, w.now.holdMod = nil, 0, 0
	case SwitchoverOf(w.Election):
		w.now.switchover, w.now.switchoverMod = nil, 0
	default:
		delete(w.queue, key)
	}
}

// fold finds out who leads: the first in the queue, unless it is no candidate, or a hold keeps it
// from that.
func (w *Watch) fold() {
	var head queued
	w.now.candidates = map[string]queued{}
	for key, q := range w.queue {
		if head.created == 0 || q.created < head.created {
			head = q
		}
		if q.candidate {
			w.now.candidates[key] = q
		}
	}
	w.now.leader = queued{}
	if head.candidate && (w.now.hold == nil || w.now.hold.Names(w.now.holdMade, head.created)) {
		w.now.leader = head
	}
}

// between returns what has changed. Whoever leads comes last.
func between(a, b watched) (events []Event) {
	switch {
	case b.holdMod != a.holdMod && b.hold != nil:
		events = append(events, Event{Kind: HoldEvent, What: Held, Hold: b.hold})
	case b.holdMod != a.holdMod:
		events = append(events, Event{Kind: HoldEvent, What: Released})
	}
	switch {
	case b.switchoverMod == a.switchoverMod:
	case b.switchover == nil:
		events = append(events,
			Event{Kind: SwitchoverEvent, What: Gone, Switchover: a.switchover})
	default:
		events = append(events, Event{
			Kind: SwitchoverEvent, What: cmp.Or(string(b.switchover.Answer), Asked),
			Switchover: b.switchover,
		})
	}
	events = append(events, missing(a.candidates, b.candidates, Left)...)
	events = append(events, missing(b.candidates, a.candidates, Joined)...)
	switch {
	case b.leader == a.leader:
	case b.leader.candidate:
		events = append(events, Event{
			Kind: LeaderEvent, What: Leads, Identity: b.leader.identity, Token: b.leader.created,
		})
	default:
		events = append(events, Event{Kind: LeaderEvent, What: Nobody})
	}
	return events
}

// missing returns an event for each of these that is not among the others, the oldest first. A key
// that was made anew is another candidate.
func missing(of, among map[string]queued, what string) (events []Event) {
	all := slices.SortedFunc(maps.Keys(of), func(a, b string) int {
		return cmp.Compare(of[a].created, of[b].created)
	})
	for _, key := range all {
		if q := of[key]; among[key].created != q.created {
			events = append(events, Event{
				Kind: CandidatesEvent, What: what, Identity: q.identity, Token: q.created,
			})
		}
	}
	return events
}
