package election

import (
	"context"
	"errors"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// look is what a look at the queue has shown, beside what it has changed there.
type look struct {
	from  *member    // that has answered; nil: none
	gone  queueEntry // the first key, if it is gone and the watch should show that; else zero
	alone bool       // the member has answered without asking the others
	lost  bool       // in a crowd: so many keys have gone that all have to be read
	err   error
}

const (
	// mostLook bounds how many of the first keys are read at once, and mostBlockers how many of the
	// blockers. etcd allows 128 requests in a transaction.
	mostLook     = 64
	mostBlockers = 32
)

// errPast: an old etcd may do that.
var errPast = errors.New("etcd shows the past")

// look reads the first key and our own, over all members. The leader may have given its key another
// value. And anybody may have written to either key without its lease: such a key never goes by
// itself. The watch shows neither, because it shows only deletions. (Old versions of etcd do not
// even show all of these.)
//
// If the first key is gone, look returns its entry. The watch should show the deletion by the next
// tick. If it does not, its member lags behind the others although it answers.
//
// In a crowd the watch shows little. There, look removes what is gone. It looks for the first key
// that is still there, which is the leader's. It begins with as many keys as had gone at the last
// look, and some more, and tries that twice. It also reads the marker and the blockers.
//
// alone: the member may answer by itself, which costs etcd less. It may lag behind the others.
func (q *queue) look(
	ctx context.Context, timeout time.Duration, marker string, alone bool,
) (look, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	l := look{alone: alone}
	crowd, n := q.beginLook()
	var asked, gone []queueEntry
	if crowd {
		defer func() { q.endLook(asked, gone) }() // also with what an error has left
	}
	after := int64(0)
	for range 2 {
		first, others := q.toLookAt(after, n, marker, crowd)
		if len(first) == 0 {
			return l, nil
		}
		these := slices.Concat(first, others)
		got, err := q.check(ctx, these, alone)
		if err != nil {
			return l, err
		}
		l.from = got.from
		if !crowd {
			if len(got.gone) > 0 {
				l.gone = got.gone[0]
			}
			return l, nil
		}
		asked, gone = append(asked, these...), append(gone, got.gone...)
		for _, e := range first {
			if !slices.Contains(got.gone, e) {
				return l, nil
			}
		}
		after, n = first[len(first)-1].created, mostLook
	}
	l.lost = true
	return l, nil
}

// beginLook returns whether we stand in a crowd, and how many of the first keys to read then.
func (q *queue) beginLook() (crowd bool, n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.isCrowd(), min(1+2*q.left, mostLook)
}

// toLookAt returns the first keys that follow that create revision and, at the beginning of a look
// in a crowd, the others. If nobody is ahead of us, or what the look began with is not true any
// more, it returns nothing.
func (q *queue) toLookAt(
	after int64, n int, marker string, crowd bool,
) (first, others []queueEntry) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.ownEntry(); !ok || q.isCrowd() != crowd {
		return nil, nil
	}
	blockers := 0
	for _, e := range q.entries[:len(q.entries)-1] {
		switch {
		case e.created <= after:
		case len(first) < n:
			first = append(first, e)
		case after > 0:
			return first, nil
		case e.key == marker:
			others = append(others, e)
		case !e.candidate && blockers < mostBlockers:
			others = append(others, e)
			blockers++
		}
	}
	return first, others
}

// endLook removes what is gone of what a look in a crowd has asked for. It wakes no campaign: to be
// the first one of all that we know is not enough there.
func (q *queue) endLook(asked, gone []queueEntry) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.isCrowd() {
		return
	}
	q.left = len(gone)
	is := map[queueEntry]bool{}
	for _, e := range gone {
		is[e] = true
	}
	q.entries = slices.DeleteFunc(q.entries, func(e queueEntry) bool { return is[e] })
	before := q.blocker
	q.blocker = ""
	if b := q.firstBlocker(); slices.ContainsFunc(asked,
		func(e queueEntry) bool { return e.key == b.key }) {
		q.blocker = b.key
	}
	if len(gone) > 0 || q.blocker != before {
		poke(q.changed)
	}
}

// checked is what etcd has of some keys.
type checked struct {
	from     *member
	revision int64
	gone     []queueEntry
}

// check reads our own key and those of the entries, over all members. It returns which of them are
// gone, and keeps what others have become.
func (q *queue) check(
	ctx context.Context, entries []queueEntry, alone bool,
) (checked, error) {
	ranges := []*pb.RangeRequest{{Key: []byte(q.cfg.own), Serializable: alone}}
	for _, e := range entries {
		ranges = append(ranges, &pb.RangeRequest{Key: []byte(e.key), Serializable: alone})
	}
	type answer struct {
		checked
		kvs [][]*mvccpb.KeyValue
	}
	got, err := hedge(ctx, q.cfg.members, q.cfg.timing.hedgeDelay(),
		func(ctx context.Context, m *member) (answer, error) {
			header, kvs, err := q.cfg.steering.readAll(ctx, m, ranges...)
			if err != nil {
				return answer{}, err
			}
			return answer{checked{from: m, revision: header.Revision}, kvs}, nil
		})
	if err != nil {
		return checked{}, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	switch own := got.kvs[0]; {
	case got.revision < q.revision:
		return checked{}, errPast
	case len(own) == 0 || own[0].CreateRevision != q.created:
		q.cfg.lost(ErrKeyDeleted)
	case !newQueueEntry(q.cfg.prefix, own[0]).candidate:
		q.cfg.lost(ErrKeyOverwritten)
	}
	for i, e := range entries {
		kvs, at := got.kvs[1+i], q.index(e.key)
		switch {
		case at < 0 || q.entries[at].created != e.created: // it is known by now to be gone
		case len(kvs) == 0 || kvs[0].CreateRevision != e.created:
			got.gone = append(got.gone, q.entries[at])
		default:
			if found := newQueueEntry(q.cfg.prefix, kvs[0]); found != q.entries[at] {
				q.entries[at] = found
				poke(q.changed)
			}
		}
	}
	return got.checked, nil
}

// isAhead reports whether the entry is still ahead of us, as far as we know.
func (q *queue) isAhead(e queueEntry) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Contains(q.entries, e)
}
