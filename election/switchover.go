package election

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"leasehold/control"
	"leasehold/internal/quote"
)

// ErrSwitchover is the cause with which a term ends because people asked for that.
var ErrSwitchover = errors.New("switchover")

// mostPassed is how many candidates a switchover may pass. etcd allows 128 requests in a
// transaction.
const mostPassed = 100

// handover is to whom a leader hands over.
type handover struct {
	target queueEntry
	// passed are the keys between ours and the target's. Their candidates queue again.
	passed []string
}

// plan is what becomes of a request for a switchover.
type plan struct {
	handover
	asked   request
	why     string // the leader itself asks for it, for this reason; "": people do
	unfit   bool   // it does because it is unfit
	refused string // why; "": it is carried out
	err     error  // why that could not be found out
}

// request is a request for a switchover, as it was at a mod revision.
type request struct {
	control.Switchover
	mod int64
}

// requested returns the request that waits for the answer of the leader with that token. If the
// process before us has accepted it, it waits to be served.
func (s *steering) requested(token int64, adopted bool) (r request, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked == nil || s.asked.Token != token {
		return request{}, false
	}
	ok = s.asked.Answer == "" || adopted && s.asked.Answer == control.Accepted
	return request{*s.asked, s.askedKey.mod}, ok
}

// isTarget reports whether the leader is about to hand over to the candidate with that key.
func (s *steering) isTarget(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked != nil && s.asked.Answer == control.Accepted && s.asked.Key == key
}

// planSwitchover finds out whether to serve the request, and answers it. A plan is carried out only
// if the answer has replaced the request: nobody has withdrawn it, or knows another answer.
func (s *session) planSwitchover(ctx context.Context, asked request) (p plan) {
	p.asked = asked
	p.handover, p.refused, p.err = s.findTarget(ctx, asked.Switchover)
	if p.err != nil || asked.Answer == control.Accepted {
		return p
	}
	if p.refused == "" {
		p.refused, p.err = s.whySilent(ctx, p.target)
	}
	if p.err != nil {
		return p
	}
	answer := asked.Switchover
	answer.Answer, answer.Why, answer.Key = control.Accepted, p.refused, p.target.key
	if p.refused != "" {
		answer.Answer = control.Refused
	}
	for {
		// An answer may have come through although we did not learn that. So we try until we know.
		p.err = s.answer(ctx, asked.mod, answer)
		if p.err == nil || errors.Is(p.err, errWithdrawn) || !MayPass(p.err) || ctx.Err() != nil {
			return p
		}
		pause(ctx, s.timing.repeatAfter())
	}
}

// whySilent returns why nobody should be stopped for this candidate: it has not renewed its lease
// for half a TTL. Its daemon may have been killed. (etcd rounds what is left down to seconds. So
// this takes up to half a second more, and always more than half a TTL.)
func (s *session) whySilent(ctx context.Context, target queueEntry) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.requestTimeout())
	defer cancel()
	left, err := hedge(ctx, s.members, s.timing.hedgeDelay(),
		func(ctx context.Context, m *member) (*pb.LeaseTimeToLiveResponse, error) {
			conn, err := m.conn()
			if err != nil {
				return nil, err
			}
			resp, err := pb.NewLeaseClient(conn).LeaseTimeToLive(ctx,
				&pb.LeaseTimeToLiveRequest{ID: target.lease})
			return resp, rpctypes.Error(err)
		})
	switch {
	case errors.Is(err, rpctypes.ErrPermissionDenied): // it may have other keys
		return "", nil
	case err != nil:
		return "", err
	case 2*(left.TTL+1) <= left.GrantedTTL:
		return quote.Value(target.identity) + " has not renewed its lease for a while", nil
	}
	return "", nil
}

// errWithdrawn: somebody else has changed the request for a switchover.
var errWithdrawn = errors.New("the request has changed meanwhile")

// answer writes the answer into the request, unless that has changed.
func (s *session) answer(ctx context.Context, mod int64, answer control.Switchover) error {
	key := control.SwitchoverOf(s.cfg.Election)
	read := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{
		RequestRange: &pb.RangeRequest{Key: []byte(key)},
	}}
	txn := &pb.TxnRequest{
		Compare: []*pb.Compare{{
			Key: []byte(key), Target: pb.Compare_MOD, Result: pb.Compare_EQUAL,
			TargetUnion: &pb.Compare_ModRevision{ModRevision: mod},
		}},
		Success: []*pb.RequestOp{
			{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{
				Key: []byte(key), Value: control.Encode(&answer), IgnoreLease: true,
			}}},
			read,
		},
		Failure: []*pb.RequestOp{read},
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.requestTimeout())
	defer cancel()
	resp, err := hedge(ctx, s.members, s.timing.hedgeDelay(),
		func(ctx context.Context, m *member) (*pb.TxnResponse, error) { return m.txn(ctx, txn) })
	if err != nil {
		return err
	}
	// The request may have been sent to two members: what is there now counts.
	kvs := resp.Responses[len(resp.Responses)-1].GetResponseRange().Kvs
	var now control.Switchover
	if len(kvs) > 0 {
		s.steering.learnAsked(resp.Header.Revision, kvs[0])
		_ = control.Decode(kvs[0].Value, &now)
	}
	if now.ID != answer.ID || now.Answer != answer.Answer || now.Key != answer.Key {
		return errWithdrawn
	}
	return nil
}

// findTarget reads who waits, and chooses whom to hand over to: the first that is ready or, with
// an identity, the first of that name. If the request was accepted, it is who was chosen then.
// Nobody gets the lead unnamed that may be another program: it would not run the job.
func (s *session) findTarget(
	ctx context.Context, asked control.Switchover,
) (h handover, refused string, err error) {
	queue, records, err := s.readQueue(ctx)
	if err != nil {
		return handover{}, "", err
	}
	if hold := s.steering.theHold(); hold != nil && asked.Answer == "" {
		return handover{}, HoldText(hold), nil
	}
	h, refused = chooseTarget(s.cfg.prefix(), s.key, asked, queue, records)
	return h, refused, nil
}

// readQueue reads the whole queue, and what the candidates say of themselves.
func (s *session) readQueue(
	ctx context.Context,
) ([]*mvccpb.KeyValue, map[int64]control.Candidate, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.requestTimeout())
	defer cancel()
	type answer struct{ queue, records []*mvccpb.KeyValue }
	got, err := hedge(ctx, s.members, s.timing.hedgeDelay(),
		func(ctx context.Context, m *member) (answer, error) {
			_, kvs, err := s.steering.readAll(ctx, m, wholePrefix(s.cfg.prefix()),
				wholePrefix(control.Candidates(s.cfg.Election)))
			if err != nil {
				return answer{}, err
			}
			return answer{kvs[0], kvs[1]}, nil
		})
	return got.queue, control.Records(got.records), err
}

// chooseTarget chooses among those behind the key own. Whoever stands between must be a leasehold:
// another program would not notice that its key has gone, and later believe that it leads.
func chooseTarget(
	prefix, own string, asked control.Switchover,
	queue []*mvccpb.KeyValue, records map[int64]control.Candidate,
) (h handover, refused string) {
	to := asked.To
	slices.SortFunc(queue, func(a, b *mvccpb.KeyValue) int {
		return cmp.Compare(a.CreateRevision, b.CreateRevision)
	})
	if len(queue) == 0 || string(queue[0].Key) != own {
		return handover{}, "this candidate is not the first in the queue"
	}
	var strangers []string
	for _, kv := range queue[1:] {
		e := newQueueEntry(prefix, kv)
		record, known := records[e.lease]
		chosen := e.candidate && e.identity == to
		switch {
		case asked.Key != "":
			chosen = e.key == asked.Key
		case to == "":
			chosen = e.candidate && (!known || record.Ready)
		}
		switch {
		case chosen && !known && asked.Key == "" && to == "":
			return handover{}, "the next in line, " + quote.Value(e.identity) + ", has no record:" +
				" it has joined just now, may not write one, or is another program, such as" +
				" etcdctl elect; to let it lead, name it with --to"
		case chosen && known && !record.Ready:
			return handover{}, quote.Value(to) + " is not ready"
		case chosen && len(strangers) > 0:
			return handover{}, "ahead of " + quote.Value(e.identity) +
				" wait others that can't be passed, because they are no candidates of" +
				" leasehold's: " + strings.Join(strangers, ", ")
		case chosen && len(h.passed) > mostPassed:
			return handover{}, quote.Value(e.identity) + " has more than " +
				strconv.Itoa(mostPassed) + " others ahead of it"
		case chosen:
			h.target = e
			return h, ""
		}
		h.passed = append(h.passed, e.key)
		if !e.candidate || !known {
			strangers = append(strangers, quote.Value(cmp.Or(e.identity, e.key)))
		}
	}
	switch {
	case len(queue) == 1:
		return handover{}, "nobody waits"
	case to != "":
		return handover{}, "there is no candidate " + quote.Value(to) + " that waits"
	}
	return handover{}, "nobody that waits is ready"
}

// serve ends the term if the plan says so. It reports whether it did.
func (s *session) serve(p plan) (served bool) {
	switch accepted := p.asked.Answer == control.Accepted; {
	case errors.Is(p.err, errWithdrawn):
		return false
	case p.why != "" && (p.refused != "" || p.err != nil): // the next look tries again
		s.log.Debug("not handed over", "reason", p.refused, "err", p.err)
		return false
	case p.err != nil: // the next renewal wakes us again
		s.log.Warn("request for a switchover not answered yet", "err", s.cfg.explain(p.err))
		return false
	case p.refused != "" && accepted: // who was chosen has gone since: whoever is next leads
	case p.refused != "":
		s.log.Info("switchover refused", "by", quote.Printable(p.asked.By), "reason", p.refused)
		return false
	}
	if p.refused == "" {
		s.handover = &p.handover
	}
	s.log.Info("handing over", "target", quote.Printable(p.target.identity),
		"by", quote.Printable(p.asked.By), "passed", len(p.passed))
	why := cmp.Or(p.why, "asked for by "+quote.Value(p.asked.By))
	s.state.termEnded(fmt.Errorf("%w to %s, %s", ErrSwitchover,
		quote.Value(p.target.identity), why))
	return true
}

// handOver deletes the key, and those of the candidates that are passed, in one transaction. It
// does so only if the key is there at its create revision, so that none of the others has led, and
// if the target is there. It reports whether it did, or has before.
func (m *member) handOver(
	ctx context.Context, key string, created int64, h *handover, put *pb.PutRequest,
) (bool, error) {
	return m.pass(ctx, key, created, h, append([]string{key}, h.passed...), put)
}
