package election

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"leasehold/control"
	"leasehold/internal/quote"
)

// ErrHeld is the cause with which a term ends because of a hold: it asks the leader to stop, or it
// is older than the win.
var ErrHeld = errors.New("a hold keeps everybody from leading")

// steering is what people have written beside the election, as far as one session knows: a hold,
// and a request for a switchover. Reads and a watch show it. None of it decides who leads: it only
// keeps a candidate from starting, or ends a term as planned.
//
// A hold must not be missed by a candidate that starts without a read. So its watch is on the same
// stream as that of the queue, on which etcd sends the events in the order of revisions.
type steering struct {
	// changed is called after each change, without the lock. It must not block.
	changed    func()
	exitedName string // of the key by which a leader says that its job has exited

	mu       sync.Mutex
	holdKey  steeringKey
	hold     *control.Hold // nil: there is none
	askedKey steeringKey
	asked    *control.Switchover // nil: nobody has asked
	denied   error               // why etcd does not let us read them; nil: it does
	// exited is the last revision at which we know a leader to have left after its job had exited.
	exited int64
}

// steeringKey is a key, as it was at a revision.
type steeringKey struct {
	name    string // never changes, and is read without the lock
	asOf    int64
	created int64 // create revision; 0: it is not there
	mod     int64 // mod revision
}

func newSteering(election string, changed func()) *steering {
	hold, asked := control.HoldOf(election), control.SwitchoverOf(election)
	return &steering{
		exitedName: control.JobExitedOf(election),
		changed:    changed,
		holdKey:    steeringKey{name: hold}, askedKey: steeringKey{name: asked},
	}
}

// bounds are those of the range of both keys. Only the key that a leader leaves lies between them.
func (s *steering) bounds() (first, end string) { return s.holdKey.name, s.askedKey.name + "\x00" }

// readAll reads the ranges, and in the same transaction what people have written. It makes no
// further request, unless it finds that etcd's roles forbid the second part: then that counts as
// empty.
func (s *steering) readAll(
	ctx context.Context, m *member, ranges ...*pb.RangeRequest,
) (*pb.ResponseHeader, [][]*mvccpb.KeyValue, error) {
	if s == nil || s.whyDenied() != nil {
		return m.readAll(ctx, ranges...)
	}
	first, end := s.bounds()
	both := &pb.RangeRequest{
		Key: []byte(first), RangeEnd: []byte(end), Serializable: ranges[0].Serializable,
	}
	header, kvs, err := m.readAll(ctx, append(slices.Clip(ranges), both)...)
	if errors.Is(err, rpctypes.ErrPermissionDenied) {
		header, kvs, forbidden := m.readAll(ctx, ranges...)
		if forbidden == nil {
			s.deny(err)
		}
		return header, kvs, forbidden
	}
	if err != nil {
		return nil, nil, err
	}
	n := len(ranges)
	s.learn(header.Revision, kvs[n])
	return header, kvs[:n], nil
}

// learn takes what a read of both keys has shown at that revision.
func (s *steering) learn(revision int64, kvs []*mvccpb.KeyValue) {
	s.update(func() (changed bool) {
		for _, kv := range kvs {
			changed = s.learnExit(kv) || changed
		}
		for _, k := range []*steeringKey{&s.holdKey, &s.askedKey} {
			i := slices.IndexFunc(kvs, func(kv *mvccpb.KeyValue) bool {
				return string(kv.Key) == k.name
			})
			var kv *mvccpb.KeyValue
			if i >= 0 {
				kv = kvs[i]
			}
			changed = s.set(k, revision, kv) || changed
		}
		return changed
	})
}

// learnExit takes a key that has been put, and reports whether it is the one by which a leader says
// that its job has exited. s.mu is held.
func (s *steering) learnExit(kv *mvccpb.KeyValue) bool {
	if string(kv.Key) != s.exitedName || kv.ModRevision <= s.exited {
		return false
	}
	s.exited = kv.ModRevision
	return true
}

// hasExited reports whether the leader whose key was deleted at that revision has left after its
// job had exited.
func (s *steering) hasExited(revision int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exited == revision
}

// learnAsked takes what a read of the request has shown at that revision.
func (s *steering) learnAsked(revision int64, kv *mvccpb.KeyValue) {
	s.update(func() bool { return s.set(&s.askedKey, revision, kv) })
}

// observe takes what the watch shows.
func (s *steering) observe(events []*mvccpb.Event) {
	s.update(func() (changed bool) {
		for _, e := range events {
			if e.Type == mvccpb.Event_PUT {
				changed = s.learnExit(e.Kv) || changed
			}
			for _, k := range []*steeringKey{&s.holdKey, &s.askedKey} {
				if string(e.Kv.Key) != k.name {
					continue
				}
				kv := e.Kv
				if e.Type == mvccpb.Event_DELETE {
					kv = nil
				}
				changed = s.set(k, e.Kv.ModRevision, kv) || changed
			}
		}
		return changed
	})
}

func (s *steering) update(change func() bool) {
	s.mu.Lock()
	changed := change()
	s.mu.Unlock()
	if changed {
		s.changed()
	}
}

// set keeps the key as it was at that revision, unless a later one is known. It reports whether
// that changes anything. s.mu is held.
func (s *steering) set(k *steeringKey, asOf int64, kv *mvccpb.KeyValue) bool {
	if asOf <= k.asOf || s.denied != nil {
		return false
	}
	k.asOf = asOf
	created, mod := int64(0), int64(0)
	if kv != nil {
		created, mod = kv.CreateRevision, kv.ModRevision
	}
	if mod == k.mod {
		return false
	}
	k.created, k.mod = created, mod
	// That the key exists is the hold, whatever its value is.
	switch {
	case k == &s.holdKey && kv == nil:
		s.hold = nil
	case k == &s.holdKey:
		s.hold = &control.Hold{}
		_ = control.Decode(kv.Value, s.hold)
	case kv == nil:
		s.asked = nil
	default:
		s.asked = &control.Switchover{}
		_ = control.Decode(kv.Value, s.asked)
	}
	return true
}

// deny notes that etcd's roles forbid us to read them. From now on nobody tells us of their end, so
// they count as gone.
func (s *steering) deny(err error) {
	s.update(func() bool {
		changed := s.denied == nil
		s.denied = err
		s.hold, s.asked = nil, nil
		for _, k := range []*steeringKey{&s.holdKey, &s.askedKey} {
			k.asOf, k.created, k.mod = 0, 0, 0
		}
		return changed
	})
}

// tryAgain forgets that etcd's roles forbade it.
func (s *steering) tryAgain() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.denied = nil
}

func (s *steering) whyDenied() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.denied
}

// isKnown reports whether we have read, or been forbidden to read, what people have written.
func (s *steering) isKnown() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holdKey.asOf > 0 || s.denied != nil
}

func (s *steering) isDenied() bool { return s != nil && s.whyDenied() != nil }

// theHold returns the hold; nil: there is none.
func (s *steering) theHold() *control.Hold {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hold
}

// mayStart reports whether the candidate whose key has that create revision may begin to lead. A
// hold names who led when it was made: that one goes on, also if it was just about to start.
func (s *steering) mayStart(created int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hold == nil || !s.hold.Stop && s.hold.Token == created
}

// mayLead reports whether the candidate whose key has that create revision may go on leading.
func (s *steering) mayLead(created int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hold == nil || !s.hold.Stop && s.names(created)
}

// mayBeLeading reports whether whoever is first in the queue may be leading, for those who look. A
// leader that a hold asks to stop is shown until its key is gone: its job is alive until then.
func (s *steering) mayBeLeading(created int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hold == nil || s.names(created)
}

// names reports whether the hold says that the candidate whose key has that create revision led
// when it was made. If a stranger has made it, nobody knows, and any older key will do. s.mu is
// held.
func (s *steering) names(created int64) bool {
	return s.hold.Names(s.holdKey.created, created)
}

// heldFor returns the hold that keeps whoever is first in the queue from leading; nil: there is
// none.
func (s *session) heldFor(v view) *control.Hold {
	hold := s.steering.theHold()
	switch {
	case hold == nil, v.head == nil:
		return hold
	case v.head.key == s.key && !s.steering.mayStart(v.head.created):
		return hold // it is us, and we wait
	case s.steering.mayBeLeading(v.head.created):
		return nil
	}
	return hold
}

// publishHold publishes the hold, once it is known whether there is one.
func (s *session) publishHold() {
	if s.steering.isKnown() {
		s.state.held(s.steering.theHold(), s.cfg.controlProblem(s.steering))
	}
}

// controlProblem returns why we can't read what people have written; "": we can. A candidate needs
// more than that permission.
func (cfg *Config) controlProblem(s *steering) string {
	err := s.whyDenied()
	if err == nil {
		return ""
	}
	return cfg.explainKeys(err, "readwrite",
		"the prefix "+quote.Value(control.Prefix(cfg.Election)))
}

// HoldText says in one line who holds the election, since when, until when and why.
func HoldText(h *control.Hold) string {
	text := "the election is held"
	if h.By != "" {
		text += " by " + quote.Printable(h.By)
	}
	if !h.Since.IsZero() {
		text += " since " + h.Since.UTC().Format(time.RFC3339)
	}
	if !h.Until.IsZero() {
		text += " until " + h.Until.UTC().Format(time.RFC3339)
	}
	if h.Reason != "" {
		text += ": " + quote.Printable(h.Reason)
	}
	return text
}

// steered is a member that reads what people have written with each key, so that a leader learns of
// a hold at the latest when it confirms a renewal.
type steered struct {
	*member
	steering *steering
}

func (s steered) read(ctx context.Context, key string) (reading, error) {
	header, kvs, err := s.steering.readAll(ctx, s.member, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		return reading{}, err
	}
	return newReading(header, kvs[0]), nil
}
