package election

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"leasehold/control"
	"leasehold/internal/quote"
)

// mostMoved is how many candidates queue again at a time, for one with a higher priority.
const mostMoved = 8

// priorities is how a leader keeps the queue in order: the next in line has the highest priority.
// Once in a TTL it reads what the candidates say of themselves. It lets those queue again that wait
// ahead of one with a higher priority. So the order is settled while nothing happens, and a
// failover takes no longer. The leader alone does it: then nobody else leads, and no two do it.
//
// A candidate counts only if it has been seen for two TTLs. So one that comes and goes moves
// nobody, and neither does one that was killed, whose lease has not expired yet.
//
// The leader hands over to the next in line if that has a higher priority (Config.Failback), or if
// the leader is unfit: whoever is in the queue is fit.
type priorities struct {
	seen map[int64]time.Duration // by lease: the first look that has shown it
	next time.Duration           // when to look
	done chan priorityLook       // room for one
	back chan plan               // room for one: a fail-back, or errWithdrawn for none
	busy bool
}

// priorityLook is what a look at the queue has shown.
type priorityLook struct {
	at      time.Duration // when it began
	queue   []*mvccpb.KeyValue
	records map[int64]control.Candidate
	err     error
}

func (s *session) newPriorities() *priorities {
	p := &priorities{
		seen: map[int64]time.Duration{},
		done: make(chan priorityLook, 1), back: make(chan plan, 1),
	}
	p.schedule(s)
	return p
}

func (p *priorities) schedule(s *session) {
	p.next = s.cfg.Now() + s.timing.TTL - rand.N(s.timing.RenewInterval()/2)
}

// look looks at the queue if it is time. ctx ends with the session.
func (p *priorities) look(ctx context.Context, s *session) {
	if p.busy || s.cfg.Now() < p.next {
		return
	}
	p.busy = true
	s.running.Go(func() { p.done <- s.lookAtRecords(ctx) })
}

// lookAtRecords reads what the candidates say of themselves. If all of them have the same priority
// and are ready, the queue is in order, and is not read, unless the leader is unfit.
func (s *session) lookAtRecords(ctx context.Context) (l priorityLook) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.requestTimeout())
	defer cancel()
	l.at = s.cfg.Now()
	ranges := wholePrefix(control.Candidates(s.cfg.Election))
	ranges.Serializable = true // one member may answer alone: what follows is checked again
	kvs, err := hedge(ctx, s.members, s.timing.hedgeDelay(),
		func(ctx context.Context, m *member) ([]*mvccpb.KeyValue, error) {
			_, kvs, err := m.readAll(ctx, ranges)
			if err != nil {
				return nil, err
			}
			return kvs[0], nil
		})
	if err != nil {
		return priorityLook{err: err}
	}
	l.records = control.Records(kvs)
	own, unfit := l.records[s.id].Priority, s.candidate.fitness.unfit() != ""
	for _, c := range l.records {
		if c.Priority != own || !c.Ready || unfit {
			l.queue, l.records, l.err = s.readQueue(ctx)
			return l
		}
	}
	return l
}

// settle takes what a look has shown: it lets candidates queue again, or hands over.
func (p *priorities) settle(ctx context.Context, s *session, l priorityLook) {
	p.busy = false
	p.schedule(s)
	if l.err != nil {
		s.log.Debug("the priorities could not be read", "err", s.cfg.explain(l.err))
		return
	}
	now := s.cfg.Now()
	before, settled := p.seen, map[int64]bool{}
	p.seen = map[int64]time.Duration{}
	for lease := range l.records {
		p.seen[lease] = now
		if first, known := before[lease]; known {
			p.seen[lease] = first
		}
		settled[lease] = now-p.seen[lease] >= 2*s.timing.TTL
	}
	h, ok := chooseNext(s.cfg.prefix(), s.key, l.queue, l.records, settled)
	if !ok {
		return
	}
	// If nobody is passed, the target is the next in line, and has confirmed its renewals.
	if back := p.handsOver(s, h, l, now); back.why != "" && len(h.passed) == 0 {
		p.busy = true
		s.running.Go(func() {
			back.refused, back.err = s.whySilent(ctx, h.target)
			p.back <- back
		})
		return
	}
	if len(h.passed) == 0 {
		return
	}
	h.passed = h.passed[:min(len(h.passed), mostMoved)]
	s.log.Info("letting candidates queue again, behind one with a higher priority",
		"candidate", quote.Printable(h.target.identity), "passed", len(h.passed))
	p.busy = true
	s.running.Go(func() {
		defer func() { p.back <- plan{err: errWithdrawn} }()
		ctx, cancel := context.WithTimeout(ctx, s.cfg.requestTimeout())
		defer cancel()
		_, err := hedge(ctx, s.members, s.timing.hedgeDelay(),
			func(ctx context.Context, m *member) (bool, error) {
				return m.pass(ctx, s.key, s.created.Load(), &h, h.passed, nil)
			})
		if err != nil { // the next look tries again
			s.log.Debug("candidates not moved", "err", s.cfg.explain(err))
		}
	})
}

// handsOver returns a plan if the leader is to hand over to the next in line.
func (p *priorities) handsOver(
	s *session, h handover, l priorityLook, now time.Duration,
) (back plan) {
	back.handover = h
	if s.steering.theHold() != nil {
		return back
	}
	if why, leaves := s.candidate.fitness.wantsToLeave(l.at); leaves {
		back.asked.By, back.unfit = "fitness", true
		back.why = "because this candidate is unfit: " + quote.Printable(why)
		return back
	}
	lease := h.target.lease
	own, known := l.records[s.id]
	if s.cfg.Failback >= 0 && known && l.records[lease].Priority > own.Priority &&
		now-p.seen[lease] >= s.cfg.Failback {
		back.asked.By, back.why = "failback", "which has a higher priority"
	}
	return back
}

// isStill reports whether a plan of the leader's own is still right: its job may be stopped.
func (s *session) isStill(p plan) bool {
	return s.steering.theHold() == nil && s.state.get().State == Leading &&
		(!p.unfit || s.candidate.fitness.unfit() != "")
}

// chooseNext returns who should be the next in line: the first of those that are ready and have the
// highest priority, among those that are settled. It reports false if that one can't come to the
// front.
func chooseNext(
	prefix, own string, queue []*mvccpb.KeyValue, records map[int64]control.Candidate,
	settled map[int64]bool,
) (h handover, ok bool) {
	slices.SortFunc(queue, func(a, b *mvccpb.KeyValue) int {
		return cmp.Compare(a.CreateRevision, b.CreateRevision)
	})
	if len(queue) < 2 || string(queue[0].Key) != own {
		return handover{}, false
	}
	type waiting struct {
		queueEntry
		priority int // -1: it is not ready
	}
	var all []waiting
	best := -1
	for _, kv := range queue[1:] {
		e := newQueueEntry(prefix, kv)
		record, known := records[e.lease]
		if !settled[e.lease] || !known || !e.candidate {
			break // it is not moved, so nobody passes it
		}
		w := waiting{e, record.Priority}
		if !record.Ready {
			w.priority = -1
		}
		all = append(all, w)
		if w.priority >= 0 && (best < 0 || w.priority > all[best].priority) {
			best = len(all) - 1
		}
	}
	if best < 0 {
		return handover{}, false
	}
	h.target = all[best].queueEntry
	for _, w := range all[:best] {
		h.passed = append(h.passed, w.key)
	}
	return h, true
}

// pass deletes keys, and puts one, if the leader's own and the target's are there at their create
// revisions. It reports whether it did.
func (m *member) pass(
	ctx context.Context, key string, created int64, h *handover, keys []string, put *pb.PutRequest,
) (bool, error) {
	there := func(key string, created int64) *pb.Compare {
		return &pb.Compare{
			Key: []byte(key), Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL,
			TargetUnion: &pb.Compare_CreateRevision{CreateRevision: created},
		}
	}
	txn := &pb.TxnRequest{
		Compare: []*pb.Compare{there(key, created), there(h.target.key, h.target.created)},
		Success: deleteAndPut(keys, put),
	}
	resp, err := m.txn(ctx, txn)
	return err == nil && resp.Succeeded, err
}
