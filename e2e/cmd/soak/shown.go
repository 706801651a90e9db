//go:build linux

package main

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/control"
	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// shown is what etcd shows of the election, in the order of its revisions: the queue, and what
// stands beside it. Times are when etcd sent a change, which is later than it was made.
type shown struct {
	revision int64           // up to which all is known
	heard    time.Duration   // when etcd last sent something
	complete time.Duration   // until when all that has happened is known, for certain
	wanted   int64           // the revision of a later moment, not reached yet; 0: none
	wantedAt time.Duration   // that moment
	lags     []time.Duration // when etcd sent something after a silence: what it sends then is old
	missed   []time.Duration // when changes were compacted before they were sent
	queue    map[string]*entry
	entries  []*entry            // all that have been in the queue
	heads    []*entry            // whoever has come to the front of the queue
	records  map[string][]record // by lease
	holds    []*shownHold
	requests map[string]*request // by id
}

// entry is a key in the queue.
type entry struct {
	key, identity string
	token, first  int64         // revisions: its own, and when it came to the front
	from, led     time.Duration // led: when it came to the front; 0: it has not
	to            time.Duration // 0: it is there
	gone          int64         // the revision at which it was deleted; 0: it is there
	exited        bool          // its leader has deleted it, after its job had exited
	next          *entry        // who was at the front then; nil: nobody
}

// record is what a candidate said of itself, from a revision on.
type record struct {
	control.Candidate
	revision int64
	at       time.Duration
}

// shownHold is a hold, as one value of its key.
type shownHold struct {
	control.Hold
	made, gone int64 // revisions; gone 0: it is there
}

// request is a request for a switchover.
type request struct {
	control.Switchover
	asked    time.Duration
	answered time.Duration // 0: it is not
	over     bool          // it is gone from etcd
	served   bool          // the term that it is for has ended
}

const (
	// silence is after what time without an answer what etcd sends may be old. progressEvery is how
	// often it is asked whether it has sent all.
	silence       = 300 * time.Millisecond
	progressEvery = 100 * time.Millisecond
	// settles is how long after a silence it may be.
	settles = time.Second
)

func newShown() shown {
	return shown{
		queue: map[string]*entry{}, records: map[string][]record{},
		requests: map[string]*request{},
	}
}

// lease is that of the key, in hex.
func (e *entry) lease() string { return e.key[strings.LastIndexByte(e.key, '/')+1:] }

// head is who is at the front of the queue, or nil.
func (s *shown) head() (head *entry) {
	for _, e := range s.queue {
		if head == nil || e.token < head.token {
			head = e
		}
	}
	return head
}

// leads notes who is at the front now.
func (s *shown) leads(at time.Duration) (head *entry) {
	if head = s.head(); head != nil && head.led == 0 {
		head.led, head.first = at, s.revision
		s.heads = append(s.heads, head)
	}
	return head
}

// term is the entry that has led with a token, or nil.
func (s *shown) term(token int64) *entry {
	for i := len(s.heads) - 1; i >= 0; i-- {
		if s.heads[i].token == token {
			return s.heads[i]
		}
	}
	return nil
}

// lagged is when etcd last sent something after a silence; 0: never.
func (s *shown) lagged() time.Duration {
	if n := len(s.lags); n > 0 {
		return s.lags[n-1]
	}
	return 0
}

// isLate reports whether what is sent now may be old. A member that is cut off from the others goes
// on answering, and shows nothing new.
func (s *shown) isLate(now time.Duration) bool {
	return len(s.lags) > 0 && now < s.lagged()+settles || s.wanted != 0 && now > s.wantedAt+silence
}

// hasGap reports whether changes of a time may be missing.
func (s *shown) hasGap(from, to time.Duration) bool {
	return slices.ContainsFunc(s.missed, func(at time.Duration) bool {
		return from <= at && at < to
	})
}

// hears notes that etcd has sent all up to a revision.
func (s *shown) hears(now time.Duration, revision int64) {
	lag := s.heard != 0 && now > s.heard+silence
	s.heard, s.revision = now, max(s.revision, revision)
	if s.wanted != 0 && s.revision >= s.wanted {
		lag = lag || now > s.wantedAt+silence
		s.complete, s.wanted = s.wantedAt, 0
	}
	if lag {
		s.lags = append(s.lags, now)
	}
}

// reads notes the revision that a linearizable read has shown, and when that began: all that
// happened before has this revision or an earlier one.
func (s *shown) reads(began time.Duration, revision int64) {
	switch {
	case s.revision >= revision:
		s.complete = max(s.complete, began)
	case s.wanted == 0:
		s.wanted, s.wantedAt = revision, began
	}
}

// followElection follows what etcd shows of the election until ctx ends. One watch has all of it,
// so that it comes in the order of revisions.
func (r *run) followElection(ctx context.Context) {
	first, end := election+"/", clientv3.GetPrefixRangeEnd(control.Prefix(election))
	for ctx.Err() == nil {
		got, err := r.readElection(ctx, first, end)
		if err != nil {
			_ = harness.Wait(ctx, silence)
			continue
		}
		r.check.read(harness.Now(), got.Header.Revision, got.Kvs)
		for next := got.Header.Revision + 1; next != 0 && ctx.Err() == nil; {
			next = r.watchElection(ctx, first, end, next)
		}
	}
}

func (r *run) readElection(
	ctx context.Context, first, end string,
) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, operatorWaits)
	defer cancel()
	return r.Client.Get(ctx, first, clientv3.WithRange(end))
}

// watchElection watches from a revision on, until the watch ends. It returns the next revision; 0:
// etcd does not have that any more.
func (r *run) watchElection(ctx context.Context, first, end string, next int64) int64 {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	watch := r.Client.Watch(ctx, first, clientv3.WithRange(end), clientv3.WithRev(next))
	go func() {
		for harness.Wait(ctx, progressEvery) == nil {
			_ = r.Client.RequestProgress(ctx) // whatever is wrong, the watch shows it
		}
	}()
	for resp := range watch {
		if resp.CompactRevision > 0 {
			return 0
		}
		if resp.Err() != nil {
			break
		}
		if resp.IsProgressNotify() { // etcd has sent all up to there
			r.check.heard(resp.Header.Revision)
			next = max(next, resp.Header.Revision+1)
		}
		now, all := harness.Now(), resp.Events
		for len(all) > 0 {
			n, revision := 1, all[0].Kv.ModRevision
			for n < len(all) && all[n].Kv.ModRevision == revision {
				n++
			}
			r.check.changed(now, revision, all[:n])
			all, next = all[n:], revision+1
		}
	}
	_ = harness.Wait(ctx, silence) // no member leads
	return next
}

// heard is told that etcd has sent all up to a revision.
func (k *checker) heard(revision int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.shown.hears(harness.Now(), revision)
}

// read takes what etcd shows at a revision. Whatever began before, and is not over, is not judged.
func (k *checker) read(now time.Duration, revision int64, kvs []*mvccpb.KeyValue) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &k.shown
	if s.revision != 0 {
		s.missed = append(s.missed, now)
		k.counts.Steered.Missed++
	}
	s.revision, s.heard, s.wanted = revision, now, 0
	s.lags = append(s.lags, now)
	s.queue, s.requests = map[string]*entry{}, map[string]*request{}
	for _, h := range s.holds {
		h.gone = cmp.Or(h.gone, revision)
	}
	for _, e := range s.entries {
		e.to, e.gone = cmp.Or(e.to, now), cmp.Or(e.gone, revision)
	}
	for _, kv := range kvs {
		k.put(now, kv)
	}
	s.leads(now)
}

// changed takes the changes of one revision.
func (k *checker) changed(now time.Duration, revision int64, events []*clientv3.Event) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &k.shown
	s.hears(now, revision)
	before, exited := s.head(), false
	for _, e := range events {
		if e.Type == clientv3.EventTypeDelete {
			k.deleted(now, revision, string(e.Kv.Key))
			continue
		}
		exited = exited || string(e.Kv.Key) == control.JobExitedOf(election)
		k.put(now, e.Kv)
	}
	head := s.leads(now)
	if before != nil && before.gone == revision {
		before.exited, before.next = exited, head
	}
}

// put takes a key that has been put.
func (k *checker) put(now time.Duration, kv *mvccpb.KeyValue) {
	s, key := &k.shown, string(kv.Key)
	if strings.HasPrefix(key, election+"/") {
		if s.queue[key] == nil {
			e := &entry{
				key: key, identity: string(kv.Value), token: kv.CreateRevision, from: now,
			}
			s.queue[key], s.entries = e, append(s.entries, e)
		}
		return
	}
	parsed, err := control.ParseKey(key)
	if err != nil || parsed.Election != election {
		return
	}
	switch parsed.Kind {
	case control.CandidateKey:
		r := record{revision: kv.ModRevision, at: now}
		_ = control.Decode(kv.Value, &r.Candidate)
		lease := key[strings.LastIndexByte(key, '/')+1:]
		s.records[lease] = append(s.records[lease], r)
	case control.HoldKey:
		s.releasedAt(kv.ModRevision)
		h := &shownHold{made: kv.ModRevision}
		_ = control.Decode(kv.Value, &h.Hold)
		s.holds = append(s.holds, h)
	case control.SwitchoverKey:
		var a control.Switchover
		_ = control.Decode(kv.Value, &a)
		k.askedFor(now, a)
	case control.HistoryKey:
		var t control.Term
		_ = control.Decode(kv.Value, &t)
		if !t.Ended.IsZero() {
			k.termEnded(t)
		}
	}
}

// deleted takes a key that has been deleted.
func (k *checker) deleted(now time.Duration, revision int64, key string) {
	s := &k.shown
	if e := s.queue[key]; e != nil {
		e.to, e.gone = now, revision
		delete(s.queue, key)
		return
	}
	switch key {
	case control.HoldOf(election):
		s.releasedAt(revision)
		k.holdGone(now, revision)
	case control.SwitchoverOf(election):
		for _, r := range s.requests {
			r.over = true
		}
	}
}

// releasedAt ends the hold that is there.
func (s *shown) releasedAt(revision int64) {
	if n := len(s.holds); n > 0 && s.holds[n-1].gone == 0 {
		s.holds[n-1].gone = revision
	}
}

// inForce are the records of a lease that were in force at some moment of a time.
func (s *shown) inForce(lease string, during check.Interval) (found []record) {
	for i, r := range s.records[lease] {
		over := i+1 < len(s.records[lease]) && s.records[lease][i+1].at < during.From
		if r.at <= during.To && !over {
			found = append(found, r)
		}
	}
	return found
}
