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
	from     *member    // that has answered; nil: none
	revision int64      // of the answer
	gone     queueEntry // the first key, if it is gone and the watch should show that; else zero
	alone    bool       // the member has answered without asking the others
}

// mostLook bounds how many keys are read at once. etcd allows 128 requests in a transaction.
const mostLook = 64

var errPast = errors.New("etcd shows the past")

// look reads the first key and our own, over all members. The leader may have given its key another
// value. And anybody may have written to either key without its lease: such a key never goes by
// itself. The watch shows neither, because it shows only deletions. (Old versions of etcd do not
// even show all of these.)
//
// If the first key is gone, look returns its entry. The watch should show the deletion by the next
// tick. If it does not, its member lags behind the others although it answers.
//
// In a crowd the watch shows little. There, look goes on until it has found the first key that is
// still there, which is the leader's. It also reads the marker and the blocker, and removes what is
// gone. It begins with as many keys as have gone since the last look, and some more.
//
// alone: the member may answer by itself, which costs etcd less. It may lag behind the others.
func (q *queue) look(
	ctx context.Context, timeout time.Duration, marker string, alone bool,
) (look, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	l := look{alone: alone}
	var gone []queueEntry
	for skip, n := 0, q.firstLook(); ; skip, n = skip+n, min(4*n, mostLook) {
		asked := q.toLookAt(skip, n, marker)
		if len(asked.first) == 0 {
			break
		}
		var ranges []*pb.RangeRequest
		for _, key := range asked.keys(q.cfg.own) {
			ranges = append(ranges, &pb.RangeRequest{Key: []byte(key), Serializable: alone})
		}
		got, err := hedge(ctx, q.cfg.members, q.cfg.timing.hedgeDelay(),
			func(ctx context.Context, m *member) (lookAnswer, error) {
				header, kvs, err := m.readAll(ctx, ranges...)
				if err != nil {
					return lookAnswer{}, err
				}
				return lookAnswer{m, header.Revision, kvs}, nil
			})
		if err != nil {
			return look{alone: alone}, err
		}
		missing, err := q.compare(asked, got)
		if err != nil {
			return look{alone: alone}, err
		}
		l.from, l.revision = got.from, got.revision
		switch {
		case asked.crowd:
			gone = append(gone, missing...)
		case len(missing) > 0:
			l.gone = missing[0]
		}
		if !asked.crowd || slices.ContainsFunc(asked.first,
			func(e queueEntry) bool { return !slices.Contains(missing, e) }) {
			break
		}
	}
	q.remove(gone)
	return l, nil
}

type lookAnswer struct {
	from     *member
	revision int64
	kvs      [][]*mvccpb.KeyValue // our own key, and those that were asked for
}

// lookedAt are the entries to look at, beside our own.
type lookedAt struct {
	first, others []queueEntry
	crowd         bool
}

// keys returns the keys to read.
func (l lookedAt) keys(own string) []string {
	keys := []string{own}
	for _, e := range slices.Concat(l.first, l.others) {
		keys = append(keys, e.key)
	}
	return keys
}

// firstLook returns how many keys a look in a crowd begins with.
func (q *queue) firstLook() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return min(1+2*q.left, mostLook)
}

// toLookAt returns what to look at: in a crowd, the first n keys that follow those to be skipped.
// If nobody is ahead of us, it returns nothing.
func (q *queue) toLookAt(skip, n int, marker string) lookedAt {
	q.mu.Lock()
	defer q.mu.Unlock()
	asked, ahead := lookedAt{crowd: q.isCrowd()}, len(q.entries)-1
	if _, ok := q.ownEntry(); !ok || skip >= ahead {
		return lookedAt{}
	}
	if !asked.crowd {
		n = 1
	}
	end := min(skip+n, ahead)
	asked.first = slices.Clone(q.entries[skip:end])
	if !asked.crowd || skip > 0 {
		return asked
	}
	for _, key := range []string{marker, q.firstBlocker().key} {
		if i := q.index(key); i >= end && i < ahead {
			asked.others = append(asked.others, q.entries[i])
		}
	}
	return asked
}

// compare returns which of the entries are gone. It keeps what others have become.
func (q *queue) compare(asked lookedAt, got lookAnswer) (gone []queueEntry, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch own := got.kvs[0]; {
	case got.revision < q.revision: // an old etcd may do that
		return nil, errPast
	case len(own) == 0 || own[0].CreateRevision != q.created:
		q.cfg.lost(ErrKeyDeleted)
	case !newQueueEntry(q.cfg.prefix, own[0]).candidate:
		q.cfg.lost(ErrKeyOverwritten)
	}
	for i, e := range slices.Concat(asked.first, asked.others) {
		kvs, at := got.kvs[1+i], q.index(e.key)
		switch {
		case at < 0 || q.entries[at].created != e.created: // it is known by now to be gone
		case len(kvs) == 0 || kvs[0].CreateRevision != e.created:
			gone = append(gone, q.entries[at])
		default:
			if found := newQueueEntry(q.cfg.prefix, kvs[0]); found != q.entries[at] {
				q.entries[at] = found
				poke(q.changed)
			}
		}
	}
	return gone, nil
}

// remove removes entries in a crowd. It wakes no campaign: to be the first one of all that we know
// is not enough there.
func (q *queue) remove(gone []queueEntry) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.left = len(gone)
	if len(gone) == 0 || !q.isCrowd() {
		return
	}
	q.entries = slices.DeleteFunc(q.entries,
		func(e queueEntry) bool { return slices.Contains(gone, e) })
	poke(q.changed)
}

// isAhead reports whether the entry is still ahead of us, as far as we know.
func (q *queue) isAhead(e queueEntry) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Contains(q.entries, e)
}
