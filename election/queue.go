package election

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// maxIdentity is how much of a key's value is kept: anybody can write a megabyte there.
const maxIdentity = 256

// place is one key under the election's prefix.
type place struct {
	key      string
	created  int64 // create revision: the order of the queue
	lease    int64
	identity string
}

func newPlace(kv *mvccpb.KeyValue) place {
	value := kv.Value
	if len(value) > maxIdentity {
		value = value[:maxIdentity]
	}
	return place{string(kv.Key), kv.CreateRevision, kv.Lease, strings.ToValidUTF8(string(value), "�")}
}

func (p place) entry() *Entry { return &Entry{Identity: p.identity, Key: p.key, Token: p.created} }

// candidate tells whether the key is one that a campaign in this election makes: the prefix and its own lease in hex.
func (p place) candidate(prefix string) bool {
	return p.lease != 0 && p.key == fmt.Sprintf("%s%x", prefix, p.lease)
}

// blocker says why nothing that takes part in the election will remove the key.
func (p place) blocker(prefix string) *Blocker {
	b := &Blocker{Key: printable(p.key), Remedy: "etcdctl del " + quote(p.key)}
	rest := strings.TrimPrefix(p.key, prefix)
	slash := strings.LastIndexByte(rest, '/')
	switch {
	case p.lease == 0:
		b.Why = "it has no lease, so it will never expire"
	case slash >= 0 && rest[slash+1:] == fmt.Sprintf("%x", p.lease):
		b.Why = fmt.Sprintf("it belongs to the nested election %s and is kept by its candidates", quote(prefix+rest[:slash]))
	default:
		b.Why = "it is not a candidate's key, and its lease may be kept for ever"
	}
	return b
}

// quote makes s one word of a shell.
func quote(s string) string {
	if s == printable(s) {
		return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
	}
	var b strings.Builder
	b.WriteString("$'")
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' || c == '\'' || c == '\\' {
			fmt.Fprintf(&b, `\x%02x`, c)
		} else {
			b.WriteByte(c)
		}
	}
	b.WriteString("'")
	return b.String()
}

// printable replaces what a terminal or a log should not see.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '�'
		}
		return r
	}, s)
}

// view is what the queue shows a candidate.
type view struct {
	watched bool   // our key can be put: all that happens to it will be seen
	head    *place // whoever is first, leader or blocker
	own     *place
	blocker *Blocker // the first one ahead of our own key
}

// leader returns the leader: whoever is first, if that is a candidate.
func (v view) leader(prefix string) *Entry {
	if v.head == nil || !v.head.candidate(prefix) {
		return nil
	}
	return v.head.entry()
}

// queue keeps the election's keys in memory, by one watch of the prefix from the revision of one read. etcd's Election.Observe
// would cost a read and a watch per candidate at each change, and it never says that there is no leader.
type queue struct {
	prefix  string // with the slash
	own     string
	members *members
	timing  Timing
	legs    *legs
	// changed has room for one: somebody has to look at the view again.
	changed chan struct{}
	// lost is called when our key is deleted or made anew. It must not block.
	lost func(cause error)
	// suspects has room for one: a member that does not renew our lease.
	suspects chan *member
	turned   *atomic.Int64
	now      func() time.Duration

	mu       sync.Mutex
	watched  bool // it has been, at least once
	places   map[string]place
	created  int64 // our key's create revision once it was seen
	expected int64 // the same as others have seen it
	err      error // why it is not being watched
}

func newQueue(prefix, own string, ms *members, timing Timing, l *legs, now func() time.Duration, turned *atomic.Int64, lost func(error)) *queue {
	return &queue{
		prefix: prefix, own: own, members: ms, timing: timing, legs: l, now: now, turned: turned, lost: lost,
		changed: make(chan struct{}, 1), suspects: make(chan *member, 1),
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
		if q.now()-started > q.timing.RenewInterval() {
			wait = retry{}
		}
		q.turned.Store(int64(q.now()))
		wait.sleep(ctx)
	}
}

// errSilent is why a watch is given up that a member does not serve any more.
var errSilent = errors.New("the watch is not answered")

// follow reads the queue and watches it from there, until the watch ends or the member is suspect.
func (q *queue) follow(ctx context.Context) error {
	// Both halves of the liveness check take one such interval.
	interval := min(q.timing.RenewInterval(), MaxTurn/2)
	rctx, cancel := context.WithTimeout(ctx, interval)
	type read struct {
		from *member
		resp *pb.RangeResponse
	}
	got, err := first(rctx, q.members, q.timing.joinAfter(), func(ctx context.Context, m *member) (read, error) {
		conn, err := m.conn()
		if err != nil {
			return read{}, err
		}
		resp, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(q.prefix), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(q.prefix))})
		return read{m, resp}, rpctypes.Error(err)
	})
	cancel()
	if err != nil {
		return fmt.Errorf("read the queue: %w", err)
	}
	q.turned.Store(int64(q.now()))
	q.reset(got.resp.Kvs, got.resp.Header.Revision)

	leg, err := q.legs.open(got.from)
	if err != nil {
		return err
	}
	defer q.legs.drop(leg)
	wctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	// Watch returns when the member has answered.
	answered := time.AfterFunc(interval, cancel)
	events := leg.queue.Watch(wctx, q.prefix, clientv3.WithPrefix(), clientv3.WithRev(got.resp.Header.Revision+1), clientv3.WithFragment())
	if !answered.Stop() {
		q.members.reset(got.from)
		return errSilent
	}
	q.mu.Lock()
	q.watched, q.err = true, nil
	poke(q.changed)
	q.mu.Unlock()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	quiet := 0 // ticks since the last answer
	for {
		q.turned.Store(int64(q.now()))
		select {
		case <-ctx.Done():
			return nil
		case m := <-q.suspects:
			if m == leg.member {
				return errSilent
			}
		case resp, ok := <-events:
			if !ok {
				return errors.New("the watch has ended")
			}
			if err := resp.Err(); err != nil {
				return fmt.Errorf("watch the queue: %w", err)
			}
			quiet = 0
			q.apply(resp.Events)
		case <-tick.C:
			if quiet++; quiet > 1 {
				q.members.reset(leg.member)
				return errSilent
			}
			pctx, cancel := context.WithTimeout(wctx, interval)
			_ = leg.queue.RequestProgress(pctx) // an error shows as silence
			cancel()
		}
	}
}

// expect tells what the create revision of our key is, should the queue not have seen it yet.
func (q *queue) expect(created int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.expected = created
}

// reset takes over what a read at that revision shows.
func (q *queue) reset(kvs []*mvccpb.KeyValue, revision int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.created == 0 && revision >= q.expected {
		q.created = q.expected
	}
	q.places = make(map[string]place, len(kvs))
	for _, kv := range kvs {
		q.places[string(kv.Key)] = newPlace(kv)
	}
	q.seen()
}

// apply takes over what a watch shows.
func (q *queue) apply(events []*clientv3.Event) {
	if len(events) == 0 {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, e := range events {
		if e.Kv == nil {
			continue
		}
		if e.Type == clientv3.EventTypeDelete {
			delete(q.places, string(e.Kv.Key))
		} else {
			q.places[string(e.Kv.Key)] = newPlace(e.Kv)
		}
		if string(e.Kv.Key) == q.own {
			q.seen() // at each event: it may have been deleted and made anew
		}
	}
	q.seen()
}

// seen looks whether our key is still there, and passes the news on. The mutex is held.
func (q *queue) seen() {
	own, there := q.places[q.own]
	switch {
	case q.created == 0 && there:
		q.created = own.created
	case q.created != 0 && own.created != q.created:
		q.lost(ErrKeyDeleted)
	}
	poke(q.changed)
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
	if own, ok := q.places[q.own]; ok {
		v.own = &own
	}
	var head, ahead place
	for _, p := range q.places {
		if head.created == 0 || p.created < head.created {
			head = p
		}
		if v.own != nil && p.created < v.own.created && (ahead.created == 0 || p.created < ahead.created) && !p.candidate(q.prefix) {
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

// leg is where a session's watches are served: at one member.
type leg struct {
	member *member
	// The queue's watch and the campaign's have a stream each: a stream is bound to the token that it was opened with, and
	// etcd checks that for each new watch on it. The campaign's stream ends with its only watch, and so the token is changed.
	queue, campaign clientv3.Watcher
}

// legs is the watcher of a session's client. The queue's goroutine decides at which member watches are served; when it drops
// one, all of them end there, and a campaign returns with an error although its own context has not ended. Thus it keeps its
// key, and campaigns again in the same session.
type legs struct {
	members *members

	mu      sync.Mutex
	current *leg
	opened  chan struct{} // closed when current is set
}

func newLegs(ms *members) *legs { return &legs{members: ms, opened: make(chan struct{})} }

func (l *legs) open(m *member) (*leg, error) {
	client, err := m.open()
	if err != nil {
		return nil, err
	}
	leg := &leg{member: m, queue: clientv3.NewWatcher(client), campaign: clientv3.NewWatcher(client)}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.current = leg
	close(l.opened)
	return leg, nil
}

// drop ends all watches of the leg, without waiting for it.
func (l *legs) drop(old *leg) {
	l.mu.Lock()
	if l.current == old {
		l.current, l.opened = nil, make(chan struct{})
	}
	l.mu.Unlock()
	l.members.closing.Go(func() {
		_ = old.queue.Close()
		_ = old.campaign.Close()
	})
}

// Watch implements clientv3.Watcher for the campaign.
func (l *legs) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	for {
		l.mu.Lock()
		current, opened := l.current, l.opened
		l.mu.Unlock()
		if current != nil {
			return current.campaign.Watch(ctx, key, opts...)
		}
		select {
		case <-opened:
		case <-ctx.Done():
			ended := make(chan clientv3.WatchResponse)
			close(ended)
			return ended
		}
	}
}

// RequestProgress implements clientv3.Watcher. Nobody calls it.
func (l *legs) RequestProgress(context.Context) error { return errors.ErrUnsupported }

// Close implements clientv3.Watcher. The queue drops its leg itself.
func (l *legs) Close() error { return nil }
