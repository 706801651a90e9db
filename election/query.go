package election

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"leasehold/control"
	"leasehold/internal/quote"
)

// Report is an election as etcd has it at one moment.
type Report struct {
	// Leader is nil when there is none, which includes that a blocker is first, and that a hold
	// keeps the first one from leading.
	Leader *Entry
	// LeaseID, LeaseTTL, as granted, and LeaseLeft, in whole seconds, are of the leader's lease.
	LeaseID   int64
	LeaseTTL  time.Duration
	LeaseLeft time.Duration
	// Queue holds all candidates in their order, the leader first.
	Queue []Entry
	// Records are what the candidates say of themselves, by their keys. Who has just joined, or is
	// another program, has none. Nobody has one if ControlProblem is why they can't be read.
	Records map[string]control.Candidate
	// Hold is what keeps everybody from becoming leader; nil: there is none, or it can't be read.
	Hold *control.Hold
	// ControlProblem is why etcd's roles forbid to read the hold, or the records.
	ControlProblem string
	// Blockers are the keys under the prefix that no candidate made. Candidates behind them wait.
	Blockers []Blocker
}

// queryMembers opens the members for one request, and returns the timeout of the request.
func queryMembers(cfg Config) (*members, time.Duration, error) {
	ms, err := newMembers(cfg)
	if err != nil {
		return nil, 0, err
	}
	return ms, 2 * cfg.DialTimeout, nil
}

// queryDelay is the hedge delay of such a request.
func queryDelay(timeout time.Duration) time.Duration {
	return min(timeout/8, 250*time.Millisecond)
}

// Query reads the election of the client's configuration.
func (c *Client) Query(ctx context.Context) (Report, error) {
	// A member that does not answer costs a fraction of the timeout: the next is asked meanwhile.
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	report, err := hedgeFrom(ctx, c.members, c.current, c.delay,
		func(ctx context.Context, m *member) (Report, error) { return m.query(ctx, c.cfg) })
	if err != nil {
		return Report{}, explained{"query etcd: " + c.cfg.explainFor("read", err), err}
	}
	return report, nil
}

func (m *member) query(ctx context.Context, cfg Config) (Report, error) {
	conn, err := m.conn()
	if err != nil {
		return Report{}, err
	}
	s := newSteering(cfg.Election, func() {})
	queue, records := wholePrefix(cfg.prefix()), wholePrefix(control.Candidates(cfg.Election))
	_, kvs, err := s.readAll(ctx, m, queue, records)
	problem := ""
	if errors.Is(err, rpctypes.ErrPermissionDenied) {
		problem = cfg.explainKeys(err, "read",
			"the prefix "+quote.Value(control.Prefix(cfg.Election)))
		_, kvs, err = s.readAll(ctx, m, queue)
	}
	if err != nil {
		return Report{}, err
	}
	r := newReport(cfg.prefix(), kvs...)
	r.Hold, r.ControlProblem = s.theHold(), problem
	if r.Leader != nil && !s.mayBeLeading(r.Leader.Token) {
		r.Leader, r.LeaseID = nil, 0
	}
	if r.Leader != nil {
		ttl, err := pb.NewLeaseClient(conn).LeaseTimeToLive(ctx,
			&pb.LeaseTimeToLiveRequest{ID: r.LeaseID})
		if err != nil {
			return Report{}, rpctypes.Error(err)
		}
		r.LeaseTTL = time.Duration(ttl.GrantedTTL) * time.Second
		r.LeaseLeft = max(0, time.Duration(ttl.TTL)*time.Second)
	}
	return r, nil
}

// newReport makes a report of all keys with the prefix, and of the candidates' records, if they are
// given.
func newReport(prefix string, all ...[]*mvccpb.KeyValue) (r Report) {
	entries := make([]queueEntry, 0, len(all[0]))
	for _, kv := range all[0] {
		entries = append(entries, newQueueEntry(prefix, kv))
	}
	records := map[int64]control.Candidate{}
	if len(all) > 1 {
		records = control.Records(all[1])
	}
	r.Records = map[string]control.Candidate{}
	slices.SortFunc(entries, func(a, b queueEntry) int { return cmp.Compare(a.created, b.created) })
	for i, e := range entries {
		if !e.candidate {
			r.Blockers = append(r.Blockers, *e.blocker())
			continue
		}
		r.Queue = append(r.Queue, *e.entry())
		if record, found := records[e.lease]; found {
			r.Records[e.key] = record
		}
		if i == 0 {
			r.Leader, r.LeaseID = e.entry(), e.lease
		}
	}
	return r
}

// Revoke removes a candidate's key and revokes its lease. (If somebody has overwritten the key, it
// would stay without the lease.) It asks all members, again and again, until both are gone or ctx
// ends.
func Revoke(ctx context.Context, cfg Config, leaseID int64) error {
	ms, timeout, err := queryMembers(cfg)
	if err != nil {
		return err
	}
	defer ms.close()
	left := &leaving{lease: leaseID, key: cfg.keyOf(leaseID)}
	var wait retry
	for {
		err := left.revoke(ctx, ms, timeout, queryDelay(timeout))
		if err == nil {
			return nil
		}
		wait.sleep(ctx)
		if ctx.Err() != nil {
			return fmt.Errorf("revoke the lease %x: %s", leaseID, cfg.explain(err))
		}
	}
}
