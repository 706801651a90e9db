package simetcd

import (
	"cmp"
	"context"
	"errors"
	"io"
	"math"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
)

// lessor is what a member knows of the leases: those granted as far as it has applied the log, and,
// if it is the leader's, when they expire by its own clock.
type lessor struct {
	primary bool
	leases  map[int64]*expiry
}

type expiry struct {
	ttl int64
	at  time.Time // zero: never
}

func newLessor() lessor { return lessor{leases: map[int64]*expiry{}} }

// in is the time in which that many seconds pass on the member's clock.
func (m *member) in(seconds float64) time.Duration {
	rate := 1.0
	if m.c.cfg.Rate != nil {
		rate = m.c.cfg.Rate(m.id)
	}
	return time.Duration(min(seconds*float64(time.Second)/rate, math.MaxInt64/2))
}

func (l *lessor) granted(m *member, id, ttl int64) {
	e := &expiry{ttl: ttl}
	if l.primary {
		e.at = time.Now().Add(m.in(float64(ttl)))
	}
	l.leases[id] = e
}

func (l *lessor) promote(m *member) {
	l.primary = true
	for _, e := range l.leases {
		e.at = time.Now().Add(m.in(electionTimeout.Seconds() + float64(e.ttl)))
	}
}

func (l *lessor) demote() {
	l.primary = false
	for _, e := range l.leases {
		e.at = time.Time{}
	}
}

// tick revokes what has expired, if the member is the leader and a majority follows it.
func (m *member) tick() {
	m.after(m.in(expiryInterval.Seconds()), m.tick)
	if !m.lessor.primary || !m.c.follows(m) {
		return
	}
	for _, id := range m.lessor.byExpiry() {
		// A revocation may bring the member to apply others.
		if e := m.lessor.leases[id]; e != nil && !e.at.After(time.Now()) {
			_, _ = m.c.commit(func(u *update) error { return u.revoke(id) })
		}
	}
}

// byExpiry returns the leases, the one that expires next first.
func (l *lessor) byExpiry() []int64 {
	return slices.SortedFunc(slices.Values(sortedKeys(l.leases)), func(a, b int64) int {
		return cmp.Or(l.leases[a].at.Compare(l.leases[b].at), cmp.Compare(a, b))
	})
}

// atLeader calls ask at the lessor of the leader that this member believes in. A request that was
// passed on stays with that leader, however long it takes, unless the leader's process ends.
func (m *member) atLeader(
	ctx context.Context, ask func(leader *member) (done bool, err error),
) error {
	var asked *member
	incarnation := 0
	err := m.wait(ctx, incarnationOf(ctx), requestTimeout, func() (bool, error) {
		if asked == nil || asked.incarnation != incarnation || !asked.running {
			asked = m.leader
		}
		if asked == nil {
			return false, nil
		}
		incarnation = asked.incarnation
		if asked != m && (!asked.running || asked.paused || asked.isolated || m.isolated) {
			return false, nil
		}
		if !asked.lessor.primary {
			asked = nil // it is asked again, or its successor
			return false, nil
		}
		return ask(asked)
	})
	if errors.Is(err, rpctypes.ErrGRPCTimeout) && asked == nil {
		return rpctypes.ErrGRPCNoLeader
	}
	return err
}

// renew renews the lease and returns its TTL, or 0 if there is no such lease.
func (m *member) renew(ctx context.Context, id int64) (ttl int64, err error) {
	err = m.atLeader(ctx, func(leader *member) (bool, error) {
		e := leader.lessor.leases[id]
		switch {
		case e == nil:
			// The grant may be in the log, and not applied.
			return !m.c.follows(leader) || leader.applied == len(m.c.log), nil
		case !e.at.After(time.Now()):
			return false, nil // it is being revoked
		}
		e.at = time.Now().Add(leader.in(float64(e.ttl)))
		ttl = e.ttl
		return true, nil
	})
	return ttl, err
}

type leaseServer struct {
	pb.UnimplementedLeaseServer
	*member
}

func (s leaseServer) LeaseGrant(
	ctx context.Context, r *pb.LeaseGrantRequest,
) (resp *pb.LeaseGrantResponse, err error) {
	err = s.propose(ctx, func(u *update) error {
		if r.ID == 0 {
			r.ID = int64(s.c.hash("lease", s.name, time.Now().String()) >> 1)
		}
		ttl, err := u.grant(r.ID, r.TTL)
		resp = &pb.LeaseGrantResponse{ID: r.ID, TTL: ttl}
		return err
	}, func() { resp.Header = s.header(0) })
	return resp, err
}

func (s leaseServer) LeaseRevoke(
	ctx context.Context, r *pb.LeaseRevokeRequest,
) (resp *pb.LeaseRevokeResponse, err error) {
	err = s.propose(ctx, func(u *update) error { return u.revoke(r.ID) },
		func() { resp = &pb.LeaseRevokeResponse{Header: s.header(0)} })
	return resp, err
}

func (s leaseServer) LeaseTimeToLive(
	ctx context.Context, r *pb.LeaseTimeToLiveRequest,
) (resp *pb.LeaseTimeToLiveResponse, err error) {
	err = s.atLeader(ctx, func(leader *member) (bool, error) {
		resp = &pb.LeaseTimeToLiveResponse{Header: s.header(0), ID: r.ID, TTL: -1}
		e := leader.lessor.leases[r.ID]
		if e == nil {
			return true, nil
		}
		resp.TTL, resp.GrantedTTL = int64(time.Until(e.at).Seconds()), e.ttl
		if l := s.c.store.leases[r.ID]; l != nil && r.Keys {
			for _, key := range sortedKeys(l.keys) {
				resp.Keys = append(resp.Keys, []byte(key))
			}
		}
		return true, nil
	})
	return resp, err
}

func (s leaseServer) LeaseLeases(
	ctx context.Context, _ *pb.LeaseLeasesRequest,
) (resp *pb.LeaseLeasesResponse, err error) {
	err = s.wait(ctx, incarnationOf(ctx), requestTimeout, func() (bool, error) {
		resp = &pb.LeaseLeasesResponse{Header: s.header(0)}
		for _, id := range s.lessor.byExpiry() {
			resp.Leases = append(resp.Leases, &pb.LeaseStatus{ID: id})
		}
		return true, nil
	})
	return resp, err
}

func (s leaseServer) LeaseKeepAlive(
	stream grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse],
) error {
	ctx := stream.Context()
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		v, err := s.arrive(ctx, pb.Lease_LeaseKeepAlive_FullMethodName, r)
		if err != nil {
			return err
		}
		resp, err := s.keepAlive(ctx, r.ID)
		if v.Duplicate {
			s.again(ctx, func(ctx context.Context) { _, _ = s.keepAlive(ctx, r.ID) })
		}
		if err != nil {
			return err
		}
		if err := s.depart(ctx, &v, pb.Lease_LeaseKeepAlive_FullMethodName, resp); err != nil {
			return err
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}

// keepAlive takes the header before the renewal, as etcd does: the raft term may be too old, but
// never too new.
func (s leaseServer) keepAlive(ctx context.Context, id int64) (*pb.LeaseKeepAliveResponse, error) {
	resp := &pb.LeaseKeepAliveResponse{ID: id}
	err := s.wait(ctx, incarnationOf(ctx), requestTimeout, func() (bool, error) {
		resp.Header = s.header(0)
		return true, nil
	})
	if err == nil {
		resp.TTL, err = s.renew(ctx, id)
	}
	return resp, err
}
