package election

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/internal/quote"
)

// maxIdentity is how much of a key's value is kept: anybody can write a megabyte there.
const maxIdentity = 256

// place is one key under the election's prefix.
type queueEntry struct {
	key      string
	created  int64 // create revision: the order of the queue
	lease    int64
	identity string
	// candidate: the key is one that a campaign in this election makes, the prefix and its own lease in hex.
	candidate bool
}

func newQueueEntry(prefix string, kv *mvccpb.KeyValue) queueEntry {
	value := kv.Value
	if len(value) > maxIdentity {
		value = value[:maxIdentity]
	}
	return queueEntry{
		key: string(kv.Key), created: kv.CreateRevision, lease: kv.Lease, identity: strings.ToValidUTF8(string(value), "�"),
		candidate: kv.Lease != 0 && string(kv.Key) == fmt.Sprintf("%s%x", prefix, kv.Lease),
	}
}

func (p queueEntry) entry() *Entry { return &Entry{Identity: p.identity, Key: p.key, Token: p.created} }

// blocker says why nothing that takes part in the election will remove the key.
func (p queueEntry) blocker(prefix string) *Blocker {
	b := &Blocker{Key: quote.Printable(p.key), Remedy: "etcdctl del " + quote.Shell(p.key)}
	rest := strings.TrimPrefix(p.key, prefix)
	slash := strings.LastIndexByte(rest, '/')
	switch {
	case p.lease == 0:
		b.Why = "it has no lease, so it will never expire"
	case slash >= 0 && rest[slash+1:] == fmt.Sprintf("%x", p.lease):
		b.Why = fmt.Sprintf("it belongs to the nested election %s and is kept by its candidates", quote.Shell(prefix+rest[:slash]))
	default:
		b.Why = "it is not a candidate's key, and its lease may be kept for ever"
	}
	return b
}

// view is what the queue shows a candidate.
type view struct {
	watched bool        // our key can be put: all that happens to it will be seen
	head    *queueEntry // whoever is first, leader or blocker
	own     *queueEntry // once it is known who is ahead of us
	blocker *Blocker    // the first one ahead of our own key
}

// leader returns the leader: whoever is first, if that is a candidate.
func (v view) leader() *Entry {
	if v.head == nil || !v.head.candidate {
		return nil
	}
	return v.head.entry()
}

// queue keeps in memory who is ahead of us, by one read when our key has been put, and one watch from before that on. Who comes
// later stands behind us and never matters to us, so the watch is of deletions only: that a candidate joins costs the others
// nothing, and a change of leader an event each. etcd's Election.Observe would cost a read and a watch per candidate at each
// change, and it never says that there is no leader.
//
// That one read is the only one of a join for which etcd reads the whole queue, as it does for whatever it sorts or filters.
type queue struct {
	prefix  string // with the slash
	own     string
	members *members
	timing  Timing
	// changed has room for one: somebody has to look at the view again.
	changed chan struct{}
	// lost is called when our key is deleted. It must not block.
	lost func(cause error)
	// suspects has room for one: a member that does not renew our lease.
	suspects chan *member
	// puts has room for one: our key has been put.
	puts chan struct{}
	// first is closed once no key is ahead of ours. None will be again: keys made later are behind.
	first  chan struct{}
	turned *atomic.Int64
	now    func() time.Duration

	mu       sync.Mutex
	watched  bool                  // it has been, at least once
	created  int64                 // our key's create revision; 0: not put yet
	entries  map[string]queueEntry // all that are ahead of our key, and that; nil: not read yet
	revision int64                 // at which entries were read
	err      error                 // why it is not being watched
	leg      *leg                  // serves the watch; nil: none
}

func newQueue(prefix, own string, ms *members, timing Timing, now func() time.Duration, turned *atomic.Int64, lost func(error)) *queue {
	return &queue{
		prefix: prefix, own: own, members: ms, timing: timing, now: now, turned: turned, lost: lost,
		changed: make(chan struct{}, 1), suspects: make(chan *member, 1), puts: make(chan struct{}, 1),
		first: make(chan struct{}),
	}
}

// run follows the queue until ctx ends. A watch that ends is no loss: it is opened again, on another member if need be, and
// meanwhile the lease's deadlines decide.
func (q *queue) run(ctx context.Context) {
	wait := retry{}
	for ctx.Err() == nil {
		started := q.now()
		err := q.follow(ctx)
		q.mu.Lock()
		q.err = err
		q.mu.Unlock()
		// A member that was silent all the time may have too much to do: to come back at once, all of us, would not help.
		if age := q.now() - started; age > q.timing.TTL || age > q.timing.RenewInterval() && !errors.Is(err, errSilent) {
			wait = retry{}
		}
		pause(ctx, q.spread())
		q.turned.Store(int64(q.now()))
		wait.sleep(ctx)
	}
}

// spread is for how long to wait, by chance, before the queue is read again after its watch has ended: those of all others may have
// ended too, and each of them reads as many keys as are ahead of it. The first ones wait for next to nothing.
func (q *queue) spread() time.Duration {
	q.mu.Lock()
	keys := len(q.entries)
	q.mu.Unlock()
	return rand.N(1 + min(time.Duration(keys)*10*time.Millisecond, q.timing.RenewInterval(), HeartbeatInterval/2))
}

// Why a watch is given up.
var (
	errSilent  = errors.New("the watch is not answered")
	errSuspect = errors.New("the member that serves the watch does not renew the lease")
	errBehind  = errors.New("the watch has not told of what others know")
)

// follow watches the queue, until the watch ends or the member is suspect.
func (q *queue) follow(ctx context.Context) error {
	// Both halves of the liveness check take one such interval.
	interval := min(q.timing.RenewInterval(), HeartbeatInterval/2)
	// Whoever answers first serves the watch. Any key will do, but who may not read them all must not join.
	from, answer, err := q.ask(ctx, interval, q.all(&pb.RangeRequest{Limit: 1, KeysOnly: true}))
	if err != nil {
		return err
	}
	leg, err := openLeg(from)
	if err != nil {
		return err
	}
	defer q.members.closing.Go(func() { _ = leg.queue.Close() })
	var looking sync.WaitGroup
	defer looking.Wait()
	wctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	// Watch returns when the member has answered. What is read after that is not older than what the watch begins with.
	answered := time.AfterFunc(interval, cancel)
	events := leg.queue.Watch(wctx, q.prefix, clientv3.WithPrefix(), clientv3.WithFilterPut(), clientv3.WithFragment())
	if !answered.Stop() {
		q.members.reset(from)
		return errSilent
	}
	if err := q.loadAhead(ctx, interval); err != nil {
		return err
	}
	q.mu.Lock()
	q.watched, q.err, q.leg = true, nil, leg
	poke(q.changed)
	q.mu.Unlock()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	quiet := 0        // ticks since the last answer
	behind := false   // our key has been put, and who is ahead of it could not be read
	looked := q.now() // at the head, once in a TTL
	var looks chan queueEntry
	q.mu.Lock()
	seen := max(answer.Header.Revision, q.revision)
	q.mu.Unlock()
	for {
		q.turned.Store(int64(q.now()))
		select {
		case <-ctx.Done():
			return nil
		case m := <-q.suspects:
			// Also where there is no other: an etcd that stops waits for its watches to end.
			if m == leg.member {
				return errSuspect
			}
		case <-q.puts:
			behind = !q.isLoaded() && q.loadAhead(ctx, interval) != nil
		case resp, ok := <-events:
			if !ok {
				return errors.New("the watch has ended")
			}
			if err := resp.Err(); err != nil {
				return fmt.Errorf("watch the queue: %w", err)
			}
			quiet, seen = 0, max(seen, resp.Header.Revision)
			q.apply(resp.Events)
		case <-tick.C:
			select {
			case gone := <-looks:
				if gone != (queueEntry{}) && q.ahead(gone) {
					q.members.reset(leg.member)
					return errBehind
				}
				looked, looks = q.now(), nil
			default:
			}
			switch {
			case behind:
				behind = q.loadAhead(ctx, interval) != nil
			case looks == nil && q.now()-looked > q.timing.TTL:
				// Beside the watch, which must not wait for it.
				found := make(chan queueEntry, 1)
				looks = found
				looking.Go(func() { found <- q.lookAtHead(wctx, interval) })
			}
			q.turned.Store(int64(q.now()))
			if quiet++; quiet > 1 {
				// Etcd answers no request for progress before anything was written since the watch began: from the revision after the
				// read, and so does the client after a broken connection. Then there is nothing to be missed either.
				if q.unchanged(wctx, leg.member, seen, interval) {
					quiet = 0
					continue
				}
				q.members.reset(leg.member)
				return errSilent
			}
			pctx, cancel := context.WithTimeout(wctx, interval)
			_ = leg.queue.RequestProgress(pctx) // an error shows as silence
			cancel()
		}
	}
}

// unchanged tells if the member answers and knows of nothing later than the revision.
func (q *queue) unchanged(ctx context.Context, m *member, revision int64, bound time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	conn, err := m.conn()
	if err != nil {
		return false
	}
	resp, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(q.own), KeysOnly: true, Serializable: true})
	return err == nil && resp.Header.Revision <= revision
}

// lookAtHead reads the key that is first, and our own, over all members. The candidate may have given it another value, and anybody
// may have taken the lease from either by writing to it: then it never goes by itself. None is a deletion, so the watch does not tell. If the
// key is gone it returns its place: the watch will have told of that by the next tick, unless its member does not keep up with the
// others, and answers all the same. An answer that does not come is no harm, for there is another look.
func (q *queue) lookAtHead(ctx context.Context, bound time.Duration) (gone queueEntry) {
	v, _ := q.view()
	if v.own == nil || v.head.key == v.own.key {
		return queueEntry{}
	}
	type answer struct {
		header    *pb.ResponseHeader
		head, own []*mvccpb.KeyValue
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	got, err := hedge(ctx, q.members, q.timing.hedgeDelay(), func(ctx context.Context, m *member) (a answer, err error) {
		a.header, a.head, a.own, err = m.readBoth(ctx, &pb.RangeRequest{Key: []byte(v.head.key)}, &pb.RangeRequest{Key: []byte(q.own)})
		return a, err
	})
	if err != nil {
		return queueEntry{}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(got.own) > 0 && got.own[0].CreateRevision == q.created && !newQueueEntry(q.prefix, got.own[0]).candidate {
		q.lost(ErrKeyOverwritten)
	}
	now, there := q.entries[v.head.key]
	switch {
	case !there || now.created != v.head.created || got.header.Revision < q.revision:
		return queueEntry{}
	case len(got.head) == 0 || got.head[0].CreateRevision != now.created:
		return now
	}
	if found := newQueueEntry(q.prefix, got.head[0]); found != now {
		q.entries[v.head.key] = found
		poke(q.changed)
	}
	return queueEntry{}
}

// ahead tells if the place is one of those that are ahead of us, for all that we know.
func (q *queue) ahead(p queueEntry) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.entries[p.key] == p
}

// all makes it a request for keys of the election.
func (q *queue) all(what *pb.RangeRequest) *pb.RangeRequest {
	what.Key, what.RangeEnd = []byte(q.prefix), []byte(clientv3.GetPrefixRangeEnd(q.prefix))
	return what
}

// ask reads over all members, and says which has answered.
func (q *queue) ask(ctx context.Context, bound time.Duration, what *pb.RangeRequest) (*member, *pb.RangeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	type answer struct {
		from *member
		resp *pb.RangeResponse
	}
	got, err := hedge(ctx, q.members, q.timing.hedgeDelay(), func(ctx context.Context, m *member) (answer, error) {
		conn, err := m.conn()
		if err != nil {
			return answer{}, err
		}
		resp, err := pb.NewKVClient(conn).Range(ctx, what)
		return answer{m, resp}, rpctypes.Error(err)
	})
	q.turned.Store(int64(q.now()))
	if err != nil {
		return nil, nil, fmt.Errorf("read the queue: %w", err)
	}
	return got.from, got.resp, nil
}

// loadAhead reads who is ahead of us, if our key has been put.
func (q *queue) loadAhead(ctx context.Context, bound time.Duration) error {
	q.mu.Lock()
	created := q.created
	q.mu.Unlock()
	if created == 0 {
		return nil
	}
	_, resp, err := q.ask(ctx, bound, q.all(&pb.RangeRequest{MaxCreateRevision: created}))
	if err == nil {
		q.setAhead(resp.Kvs, resp.Header.Revision)
	}
	return err
}

// put says that our key is in etcd, with this create revision.
func (q *queue) put(created int64) {
	q.mu.Lock()
	q.created = created
	q.mu.Unlock()
	poke(q.puts)
}

// isLoaded tells if it was read who is ahead of our key.
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

// signalFirst tells waitUntilFirst if no key is ahead of ours. q.mu is held.
func (q *queue) signalFirst() {
	if own, ok := q.entries[q.own]; !ok || own.created != q.created || len(q.entries) > 1 {
		return
	}
	select {
	case <-q.first:
	default:
		close(q.first)
	}
}

// setAhead takes over what loadAhead has read at that revision.
func (q *queue) setAhead(kvs []*mvccpb.KeyValue, revision int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.revision, q.entries = revision, make(map[string]queueEntry, len(kvs))
	for _, kv := range kvs {
		p := newQueueEntry(q.prefix, kv)
		q.entries[p.key] = p
	}
	switch own := q.entries[q.own]; {
	case own.created != q.created:
		q.lost(ErrKeyDeleted)
	case !own.candidate:
		q.lost(ErrKeyOverwritten)
	}
	q.signalFirst()
	poke(q.changed)
}

// apply takes over what a watch shows: deletions.
func (q *queue) apply(events []*clientv3.Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, e := range events {
		key := string(e.Kv.Key)
		if key == q.own {
			q.lost(ErrKeyDeleted)
		}
		// The key may have been made anew before it was read.
		if _, ahead := q.entries[key]; ahead && e.Kv.ModRevision > q.revision {
			delete(q.entries, key)
			poke(q.changed)
		}
	}
	q.signalFirst()
}

// suspect has the queue followed on another member, if it is that one which it is followed on.
func (q *queue) suspect(m *member) {
	select {
	case q.suspects <- m:
	default:
	}
}

func (q *queue) view() (view, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	v := view{watched: q.watched}
	if own, ok := q.entries[q.own]; ok {
		v.own = &own
	}
	var head, ahead queueEntry
	for _, p := range q.entries {
		if head.created == 0 || p.created < head.created {
			head = p
		}
		if v.own != nil && p.created < v.own.created && (ahead.created == 0 || p.created < ahead.created) && !p.candidate {
			ahead = p
		}
	}
	if head.created != 0 {
		v.head = &head
	}
	if ahead.created != 0 {
		v.blocker = ahead.blocker(q.prefix)
	}
	return v, q.err
}

// leg is a watch of the queue, which one member serves.
type leg struct {
	member *member
	queue  clientv3.Watcher
}

func openLeg(m *member) (*leg, error) {
	client, err := m.open()
	if err != nil {
		return nil, err
	}
	return &leg{member: m, queue: clientv3.NewWatcher(client)}, nil
}
