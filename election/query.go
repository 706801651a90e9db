package election

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Report is an election as etcd has it at one moment.
type Report struct {
	// Leader is nil when there is none, which includes that a blocker is first.
	Leader *Entry
	// LeaseID, LeaseTTL, as granted, and LeaseLeft, in whole seconds, are of the leader's lease.
	LeaseID   int64
	LeaseTTL  time.Duration
	LeaseLeft time.Duration
	// Queue holds all candidates in their order, the leader first.
	Queue []Entry
	// Blockers are the keys under the prefix that no candidate made. Candidates behind them wait for ever.
	Blockers []Blocker
}

// queryMembers opens the members for one question.
func queryMembers(cfg Config) (*members, time.Duration, error) {
	ms, err := newMembers(cfg)
	if err != nil {
		return nil, 0, err
	}
	return ms, 2 * cfg.DialTimeout, nil
}

// Query reads the election from etcd. Of cfg it needs the endpoints, how to reach them and the election.
func Query(ctx context.Context, cfg Config) (Report, error) {
	ms, bound, err := queryMembers(cfg)
	if err != nil {
		return Report{}, err
	}
	defer ms.close()
	prefix := cfg.Election + "/"
	// A member that does not answer costs a fraction of the bound, since the next is asked meanwhile.
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	report, err := hedge(ctx, ms, min(bound/8, 250*time.Millisecond), func(ctx context.Context, m *member) (Report, error) {
		return m.query(ctx, prefix)
	})
	if err != nil {
		return Report{}, fmt.Errorf("query etcd: %s", oneLine(err))
	}
	return report, nil
}

func (m *member) query(ctx context.Context, prefix string) (Report, error) {
	conn, err := m.conn()
	if err != nil {
		return Report{}, err
	}
	resp, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(prefix), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(prefix))})
	if err != nil {
		return Report{}, rpctypes.Error(err)
	}
	entries := make([]queueEntry, 0, len(resp.Kvs))
	for _, kv := range resp.Kvs {
		entries = append(entries, newQueueEntry(prefix, kv))
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].created < entries[j].created })
	var r Report
	for i, p := range entries {
		if !p.candidate {
			r.Blockers = append(r.Blockers, *p.blocker(prefix))
			continue
		}
		r.Queue = append(r.Queue, *p.entry())
		if i == 0 {
			r.Leader, r.LeaseID = p.entry(), p.lease
		}
	}
	if r.Leader != nil {
		ttl, err := pb.NewLeaseClient(conn).LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: r.LeaseID})
		if err != nil {
			return Report{}, rpctypes.Error(err)
		}
		r.LeaseTTL = time.Duration(ttl.GrantedTTL) * time.Second
		r.LeaseLeft = max(0, time.Duration(ttl.TTL)*time.Second)
	}
	return r, nil
}

// Revoke removes a candidate's key, which stays without its lease where somebody has overwritten it, and revokes the lease. It asks all
// members, again and again, until both are gone or ctx ends.
func Revoke(ctx context.Context, cfg Config, leaseID int64) error {
	ms, bound, err := queryMembers(cfg)
	if err != nil {
		return err
	}
	defer ms.close()
	var wait retry
	for {
		rctx, cancel := context.WithTimeout(ctx, bound)
		half, cancelHalf := context.WithTimeout(rctx, bound/2)
		_, keyErr := hedge(half, ms, min(bound/8, 250*time.Millisecond), func(ctx context.Context, m *member) (struct{}, error) {
			return struct{}{}, m.remove(ctx, fmt.Sprintf("%s/%x", cfg.Election, leaseID), 0)
		})
		cancelHalf()
		_, err := hedge(rctx, ms, min(bound/8, 250*time.Millisecond), func(ctx context.Context, m *member) (struct{}, error) {
			return struct{}{}, m.revoke(ctx, leaseID)
		})
		err = errors.Join(keyErr, err)
		cancel()
		if err == nil {
			return nil
		}
		wait.sleep(ctx)
		if ctx.Err() != nil {
			return fmt.Errorf("revoke the lease %x: %s", leaseID, oneLine(err))
		}
	}
}
