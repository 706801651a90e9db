package simetcd

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// serve starts the member's gRPC server. A member that is stopped has no connections; its server
// waits for the next.
func (m *member) serve() {
	l := &listener{conns: make(chan *conn, 1), closed: make(chan struct{})}
	m.accept = l.conns
	m.server = grpc.NewServer(grpc.UnaryInterceptor(m.unary), grpc.WaitForHandlers(true))
	pb.RegisterKVServer(m.server, kvServer{member: m})
	pb.RegisterLeaseServer(m.server, leaseServer{member: m})
	pb.RegisterWatchServer(m.server, watchServer{member: m})
	pb.RegisterMaintenanceServer(m.server, maintenanceServer{member: m})
	go func() { _ = m.server.Serve(l) }()
}

// unary lets the network decide about a request and its answer.
func (m *member) unary(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler,
) (any, error) {
	v, err := m.arrive(ctx, info.FullMethod, req)
	if err != nil {
		return nil, err
	}
	resp, err := handle(ctx, req)
	if v.Duplicate {
		m.again(ctx, func(ctx context.Context) { _, _ = handle(ctx, req) })
	}
	answer := resp
	if err != nil {
		answer = err
	}
	if lost := m.depart(ctx, &v, info.FullMethod, answer); lost != nil {
		return nil, lost
	}
	return resp, err
}

// needsLeader reports whether the client wants to hear at once that there is no leader.
func needsLeader(ctx context.Context) bool {
	md, _ := metadata.FromIncomingContext(ctx)
	need := md[rpctypes.MetadataRequireLeaderKey]
	return len(need) > 0 && need[0] == rpctypes.MetadataHasLeader
}

// header is the member's header of an answer. revision 0 means the member's own.
func (m *member) header(revision int64) *pb.ResponseHeader {
	if revision == 0 {
		revision = m.show().rev
	}
	return &pb.ResponseHeader{
		ClusterId: 1, MemberId: uint64(m.id), Revision: revision, RaftTerm: m.term,
	}
}

// propose has a majority carry out an update. Once this member has applied it, answered is called.
func (m *member) propose(
	ctx context.Context, run func(u *update) error, answered func(),
) error {
	var (
		term  uint64 // in which it was proposed
		index int    // in the log; 0: not yet
		lost  bool
		err   error
	)
	need := needsLeader(ctx) // when the request arrives
	waited := m.wait(ctx, incarnationOf(ctx), requestTimeout, func() (bool, error) {
		refused := need && m.leader == nil
		need = false
		switch {
		case refused:
			return true, rpctypes.ErrGRPCNoLeader
		case index == 0 && m.leader == nil || lost:
			return false, nil
		case index == 0 && term != 0 && m.term != term:
			lost = true // the next leader does not know it
			return false, nil
		case index == 0:
			term = m.term
			if !m.c.follows(m) {
				return false, nil
			}
			index, err = m.c.commit(run)
		}
		if err != nil {
			return true, err
		}
		if m.applied < index {
			return false, nil
		}
		answered()
		return true, nil
	})
	if lost && waited == rpctypes.ErrGRPCTimeout { //nolint:errorlint // our own value
		return rpctypes.ErrGRPCTimeoutDueToLeaderFail
	}
	return waited
}

// read calls show when this member has applied all that was committed when the request arrived. It
// does so at once if the read is serializable.
func (m *member) read(ctx context.Context, serializable bool, show func() error) error {
	heard, index := -1, -1
	return m.wait(ctx, incarnationOf(ctx), requestTimeout, func() (bool, error) {
		if heard < 0 && m.leader == nil && needsLeader(ctx) {
			return true, rpctypes.ErrGRPCNoLeader
		}
		if heard < 0 {
			heard = m.heard
		}
		switch {
		case serializable:
			return true, show()
		case index < 0 && m.heard != heard:
			return true, rpctypes.ErrGRPCLeaderChanged
		case index < 0 && m.c.follows(m):
			index = len(m.c.log)
		}
		if index < 0 || m.applied < index {
			return false, nil
		}
		return true, show()
	})
}

type maintenanceServer struct {
	pb.UnimplementedMaintenanceServer
	*member
}

// Status tells the version, and nothing else. It needs no leader.
func (s maintenanceServer) Status(
	ctx context.Context, _ *pb.StatusRequest,
) (resp *pb.StatusResponse, err error) {
	err = s.read(ctx, true, func() error {
		resp = &pb.StatusResponse{Header: s.header(0), Version: s.c.cfg.Version}
		return nil
	})
	return resp, err
}

type kvServer struct {
	pb.UnimplementedKVServer
	*member
}

func (s kvServer) Range(
	ctx context.Context, r *pb.RangeRequest,
) (resp *pb.RangeResponse, err error) {
	if err := checkRange(r); err != nil {
		return nil, err
	}
	err = s.read(ctx, r.Serializable, func() error {
		resp, err = s.show().rangeKeys(r)
		if err == nil {
			resp.Header = s.header(resp.Header.Revision)
		}
		return err
	})
	return resp, err
}

func (s kvServer) Put(ctx context.Context, r *pb.PutRequest) (resp *pb.PutResponse, err error) {
	if err := checkPut(r); err != nil {
		return nil, err
	}
	err = s.propose(ctx, func(u *update) error {
		if err := u.checkPut(r); err != nil {
			return err
		}
		resp = u.put(r)
		return nil
	}, func() { resp.Header = s.header(resp.Header.Revision) })
	return resp, err
}

func (s kvServer) DeleteRange(
	ctx context.Context, r *pb.DeleteRangeRequest,
) (resp *pb.DeleteRangeResponse, err error) {
	if len(r.Key) == 0 {
		return nil, rpctypes.ErrGRPCEmptyKey
	}
	err = s.propose(ctx, func(u *update) error {
		resp = u.deleteRange(r)
		return nil
	}, func() { resp.Header = s.header(resp.Header.Revision) })
	return resp, err
}

func (s kvServer) Compact(
	ctx context.Context, r *pb.CompactionRequest,
) (resp *pb.CompactionResponse, err error) {
	err = s.propose(ctx, func(u *update) error { return u.compactTo(r.Revision) },
		func() { resp = &pb.CompactionResponse{Header: s.header(0)} })
	return resp, err
}

func (s kvServer) Txn(ctx context.Context, r *pb.TxnRequest) (resp *pb.TxnResponse, err error) {
	if err := checkTxn(r); err != nil {
		return nil, err
	}
	answered := func() { resp.Header = s.header(resp.Header.Revision) }
	onlyReads, serializable := kindOf(r)
	if !onlyReads {
		err = s.propose(ctx, func(u *update) (err error) {
			resp, err = u.txn(r)
			return err
		}, answered)
		return resp, err
	}
	err = s.read(ctx, serializable, func() (err error) {
		shown := s.show()
		at := *s.c.store
		at.rev, at.compact = shown.rev, shown.compact
		resp, err = (&update{store: &at}).txn(r)
		if err == nil {
			answered()
		}
		return err
	})
	return resp, err
}

// kindOf reports whether the transaction only reads, and whether it may read from any member.
func kindOf(r *pb.TxnRequest) (onlyReads, serializable bool) {
	onlyReads, serializable = true, true
	for _, ops := range [][]*pb.RequestOp{r.Success, r.Failure} {
		for _, op := range ops {
			read := op.GetRequestRange()
			onlyReads = onlyReads && read != nil
			serializable = serializable && read.GetSerializable()
		}
	}
	return onlyReads, serializable
}

func checkRange(r *pb.RangeRequest) error {
	_, order := pb.RangeRequest_SortOrder_name[int32(r.SortOrder)]
	_, target := pb.RangeRequest_SortTarget_name[int32(r.SortTarget)]
	switch {
	case len(r.Key) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case !order || !target:
		return rpctypes.ErrGRPCInvalidSortOption
	}
	return nil
}

func checkPut(r *pb.PutRequest) error {
	switch {
	case len(r.Key) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case r.IgnoreValue && len(r.Value) != 0:
		return rpctypes.ErrGRPCValueProvided
	case r.IgnoreLease && r.Lease != 0:
		return rpctypes.ErrGRPCLeaseProvided
	}
	return nil
}

// maxOps is etcd's default of --max-txn-ops.
const maxOps = 128

func checkTxn(r *pb.TxnRequest) error {
	if max(len(r.Compare), len(r.Success), len(r.Failure)) > maxOps {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, c := range r.Compare {
		if len(c.Key) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	}
	for _, ops := range [][]*pb.RequestOp{r.Success, r.Failure} {
		for _, op := range ops {
			if err := checkOp(op); err != nil {
				return err
			}
		}
	}
	for _, ops := range [][]*pb.RequestOp{r.Success, r.Failure} {
		if overlap(ops) {
			return rpctypes.ErrGRPCDuplicateKey
		}
	}
	return nil
}

func checkOp(op *pb.RequestOp) error {
	switch op := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		return checkRange(op.RequestRange)
	case *pb.RequestOp_RequestPut:
		return checkPut(op.RequestPut)
	case *pb.RequestOp_RequestDeleteRange:
		if len(op.RequestDeleteRange.Key) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
		return nil
	}
	return rpctypes.ErrGRPCKeyNotFound
}

// overlap reports whether a key is put twice, or put and deleted.
func overlap(ops []*pb.RequestOp) bool {
	put := map[string]bool{}
	for _, op := range ops {
		if r := op.GetRequestPut(); r != nil {
			if put[string(r.Key)] {
				return true
			}
			put[string(r.Key)] = true
		}
	}
	for _, op := range ops {
		if r := op.GetRequestDeleteRange(); r != nil {
			for key := range put {
				if inRange(key, r.Key, r.RangeEnd) {
					return true
				}
			}
		}
	}
	return false
}
