package election

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"leasehold/control"
)

// view is what the queue shows a candidate.
type view struct {
	watched bool          // the watch is open: our key can be put
	head    *queueEntry   // whoever is first, leader or blocker
	own     *queueEntry   // nil until we know who is ahead of us
	ahead   int           // how many keys are, if own is known
	blocker *Blocker      // the first one ahead of our own key
	unseen  error         // why all of this may be older than a TTL; nil: it is not
	hold    *control.Hold // that keeps whoever is first from leading; nil: there is none
}

// leader returns the leader: whoever is first, if that is a candidate.
func (v view) leader() *Entry {
	if v.head == nil || !v.head.candidate || v.hold != nil {
		return nil
	}
	return v.head.entry()
}

// queue keeps in memory who is ahead of us. It reads that once, after our key has been put, and has
// a watch that was opened before. Candidates that come later are behind us and never matter to us,
// so the watch is only for deletions. So a candidate that joins costs the others nothing. etcd's
// Election.Observe would cost each candidate a read and a watch at each change of leader, and it
// never reports that there is no leader.
//
// If all of a thousand candidates watched the whole queue, a change of leader would be a thousand
// events, and the next in line would get its own somewhere among them. So a candidate with many
// keys ahead of it, which stands in a crowd, watches two keys only: its own, and its marker, which
// is the last key that may be ahead of it without its being near the front. When the marker goes,
// it watches the whole queue, and reads where it stands. Meanwhile it looks now and then who leads:
// it knows the keys ahead of it in their order, so the first one that is still there is the
// leader's.
//
// Only when it joins, and when it comes near the front, does etcd read the whole queue for it, as
// for every request that sorts or filters.
type queue struct {
	cfg queueConfig
	// changed has room for one: the view has changed.
	changed chan struct{}
	// suspects has room for one: a member that does not renew our lease.
	suspects chan *member
	// puts has room for one: our key has been put.
	puts chan struct{}
	// awake has room for one: the process is awake, because the lease was renewed.
	awake chan struct{}
	// first is closed once no key is ahead of ours. That is final: keys made later are behind us.
	// If our key was lost before that, lost has been called by then, unless proven is false.
	first chan struct{}

	mu      sync.Mutex
	watched bool  // it has been, at least once
	created int64 // our key's create revision; 0: not put yet
	// entries are all keys ahead of ours in their order, and our own, the last one; nil: not read
	// yet. In a crowd, some of them may be gone.
	entries  []queueEntry
	left     int           // how many the last look in a crowd has found gone
	blocker  string        // in a crowd: the first one, if the last look has seen it
	unseen   error         // in a crowd: why no look has succeeded for longer than a TTL
	looked   time.Duration // when one did
	revision int64         // at which entries were read
	proven   bool          // when first is closed: no deletion can have been missed
	gone     int64         // see lastGone
	err      error         // why it is not being watched, or not read
	conn     *watchConn    // the watch that is open, or the last one
}

// unseenGone is no revision.
const unseenGone = -1

// Near is how many keys may be ahead of a candidate's that watches the whole queue, by default.
const Near = 8

type queueConfig struct {
	prefix    string // with the slash
	own       string // our key
	near      int    // see Near; 0: by default
	members   *members
	steering  *steering // nil: none
	timing    Timing
	timeout   time.Duration // of reading who is ahead: a long queue takes its time
	now       func() time.Duration
	heartbeat *heartbeat
	// lost is called when our key is lost. It must not block.
	lost func(cause error)
}

func newQueue(cfg queueConfig) *queue {
	cfg.near = cmp.Or(cfg.near, Near)
	return &queue{
		cfg: cfg, changed: make(chan struct{}, 1), suspects: make(chan *member, 1),
		puts: make(chan struct{}, 1), awake: make(chan struct{}, 1), first: make(chan struct{}),
	}
}

// run follows the queue until ctx ends. If the watch ends, the term does not: the watch is opened
// again, on another member if necessary, and meanwhile the lease's deadlines decide.
func (q *queue) run(ctx context.Context) {
	wait := retry{}
	var conn *watchConn // the last one that was opened
	for ctx.Err() == nil {
		started := q.cfg.now()
		err := q.follow(ctx)
		q.mu.Lock()
		q.err = err
		opened := q.conn != conn
		conn = q.conn
		q.mu.Unlock()
		// A member that did not answer may have too much to do. It would not help if all candidates
		// came back at once.
		age := q.cfg.now() - started
		if opened && (age > q.cfg.timing.TTL ||
			age > q.cfg.timing.RenewInterval() && !errors.Is(err, errUnanswered)) {
			wait = retry{}
		}
		wait.most = q.cfg.timing.mostPause(err)
		pauseWith(ctx, q.spread()+wait.next(), q.heartbeat)
	}
}

func (q *queue) heartbeat() { q.cfg.heartbeat.mark(q.cfg.now()) }

// spread returns a random time to wait before the queue is read again after its watch has ended.
// The watches of all others may have ended too. The first ones in the queue hardly wait.
func (q *queue) spread() time.Duration {
	q.mu.Lock()
	keys := len(q.entries)
	q.mu.Unlock()
	most := min(time.Duration(keys)*10*time.Millisecond,
		q.cfg.timing.RenewInterval(), HeartbeatInterval/2)
	return rand.N(1 + most)
}

// ask reads over all members, and returns which has answered.
func (q *queue) ask(
	ctx context.Context, timeout time.Duration, what *pb.RangeRequest,
) (*member, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	from, err := hedge(ctx, q.cfg.members, q.cfg.timing.hedgeDelay(),
		func(ctx context.Context, m *member) (*member, error) {
			conn, err := m.conn()
			if err != nil {
				return nil, err
			}
			_, err = pb.NewKVClient(conn).Range(ctx, what)
			return m, rpctypes.Error(err)
		})
	q.heartbeat()
	if err != nil {
		return nil, fmt.Errorf("read the queue: %w", err)
	}
	return from, nil
}

// loadAhead reads who is ahead of us, if our key has been put. An error is also kept for view.
func (q *queue) loadAhead(ctx context.Context) error {
	q.mu.Lock()
	created := q.created
	q.mu.Unlock()
	if created == 0 {
		return nil
	}
	ahead := wholePrefix(q.cfg.prefix)
	ahead.MaxCreateRevision = created
	ctx, cancel := context.WithTimeout(ctx, q.cfg.timeout)
	defer cancel()
	type answer struct {
		revision int64
		kvs      []*mvccpb.KeyValue
	}
	got, err := hedge(ctx, q.cfg.members, q.cfg.timing.hedgeDelay(),
		func(ctx context.Context, m *member) (answer, error) {
			header, kvs, err := q.cfg.steering.readAll(ctx, m, ahead)
			if err != nil {
				return answer{}, err
			}
			return answer{header.Revision, kvs[0]}, nil
		})
	q.heartbeat()
	if err != nil {
		err = fmt.Errorf("read the queue: %w", err)
		q.mu.Lock()
		q.err = err
		q.mu.Unlock()
		poke(q.changed)
		return err
	}
	q.setAhead(got.kvs, got.revision)
	return nil
}

// put notes that our key is in etcd, with this create revision.
func (q *queue) put(created int64) {
	q.mu.Lock()
	q.created = created
	q.mu.Unlock()
	poke(q.puts)
}

// isLoaded reports whether we have read who is ahead of our key.
func (q *queue) isLoaded() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.entries != nil
}

// waitUntilFirst returns nil once no key is ahead of ours.
func (q *queue) waitUntilFirst(ctx context.Context) error {
	select {
	case <-q.first:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lastGone returns the revision at which the last key ahead of ours went; 0: none was, as far as we
// know; unseenGone: the watch has not shown it.
func (q *queue) lastGone() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.gone
}

// isProven reports whether it is certain that no key is ahead of ours, and that ours was there when
// the last one went. It is asked when waitUntilFirst has returned.
func (q *queue) isProven() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.proven
}

// ownEntry returns our own entry, if it is known who is ahead of it. q.mu is held.
func (q *queue) ownEntry() (own queueEntry, ok bool) {
	if n := len(q.entries); n > 0 {
		own = q.entries[n-1]
	}
	return own, own.key == q.cfg.own && own.created == q.created
}

// ahead returns how many keys are ahead of ours, and the identities of the first n.
func (q *queue) ahead(n int) (count int, first []string, known bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.ownEntry(); !ok {
		return 0, nil, false
	}
	entries := q.entries[:len(q.entries)-1]
	first = []string{}
	for _, e := range entries[:min(n, len(entries))] {
		first = append(first, e.identity)
	}
	return len(entries), first, true
}

// isCrowd reports whether too many keys are ahead of ours to watch the whole queue. q.mu is held.
func (q *queue) isCrowd() bool { return len(q.entries)-1 > q.cfg.near }

// marker returns the key to watch in a crowd; else "".
func (q *queue) marker() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.isCrowd() {
		return ""
	}
	return q.entries[len(q.entries)-1-q.cfg.near].key
}

// fits reports whether what is watched is what has to be: that marker, or "" for the whole queue.
func (q *queue) fits(marker string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.isCrowd() == (marker != "") && (marker == "" || q.index(marker) >= 0)
}

// entry returns the key's entry.
func (q *queue) entry(key string) (e queueEntry, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := q.index(key); i >= 0 {
		return q.entries[i], true
	}
	return e, false
}

// keepLook keeps how a look has ended.
func (q *queue) keepLook(crowd bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch now := q.cfg.now(); {
	case err == nil || !crowd:
		q.looked, q.unseen = now, nil
	case now-q.looked > q.cfg.timing.TTL:
		q.unseen = err
		poke(q.changed)
	}
}

// index returns where in entries the key is, or -1. q.mu is held.
func (q *queue) index(key string) int {
	return slices.IndexFunc(q.entries, func(e queueEntry) bool { return e.key == key })
}

// signalFirst wakes waitUntilFirst if no key is ahead of ours. complete: no deletion was missed.
// q.mu is held.
func (q *queue) signalFirst(complete bool) {
	if _, ok := q.ownEntry(); !ok || len(q.entries) > 1 {
		return
	}
	select {
	case <-q.first:
	default:
		q.proven = complete
		close(q.first)
	}
}

// setAhead keeps what loadAhead has read at that revision.
func (q *queue) setAhead(kvs []*mvccpb.KeyValue, revision int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.entries) > 1 && len(kvs) <= 1 {
		q.gone = unseenGone
	}
	q.err, q.revision, q.entries = nil, revision, make([]queueEntry, 0, len(kvs))
	q.looked, q.unseen = q.cfg.now(), nil
	for _, kv := range kvs {
		q.entries = append(q.entries, newQueueEntry(q.cfg.prefix, kv))
	}
	slices.SortFunc(q.entries,
		func(a, b queueEntry) int { return cmp.Compare(a.created, b.created) })
	switch own, ok := q.ownEntry(); {
	case !ok:
		q.cfg.lost(ErrKeyDeleted)
	case !own.candidate:
		q.cfg.lost(ErrKeyOverwritten)
	}
	if len(q.entries) > 0 {
		q.blocker = q.firstBlocker().key
	}
	poke(q.changed)
	// Last: on one CPU the goroutine that is woken last runs first, and the job is waiting.
	q.signalFirst(true)
}

// apply removes the keys whose deletion the watch shows. complete: it shows all deletions.
func (q *queue) apply(events []*mvccpb.Event, complete bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, event := range events {
		key := string(event.Kv.Key)
		if key == q.cfg.own {
			q.cfg.lost(ErrKeyDeleted)
		}
		// The key may have been deleted and made again before it was read.
		if i := q.index(key); i >= 0 && event.Kv.ModRevision > q.revision {
			q.entries = slices.Delete(q.entries, i, i+1)
			q.gone = event.Kv.ModRevision
			poke(q.changed)
		}
	}
	q.signalFirst(complete)
}

// suspect moves the watch to another member, if that member serves it.
func (q *queue) suspect(m *member) {
	select {
	case q.suspects <- m:
	default:
	}
}

func (q *queue) view() (view, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	v := view{watched: q.watched, unseen: q.unseen}
	if len(q.entries) > 0 {
		head := q.entries[0]
		v.head = &head
	}
	if own, ok := q.ownEntry(); ok {
		v.own, v.ahead = &own, len(q.entries)-1
		b := q.firstBlocker()
		if b.key != own.key && (!q.isCrowd() || b.key == q.blocker) {
			v.blocker = b.blocker()
		}
	}
	return v, q.err
}

// firstBlocker returns the first entry that is no candidate's, or our own if there is none ahead of
// it. q.mu is held, and our own entry is the last one.
func (q *queue) firstBlocker() queueEntry {
	for _, e := range q.entries {
		if !e.candidate {
			return e
		}
	}
	return q.entries[len(q.entries)-1]
}
