package simetcd

import (
	"bytes"
	"cmp"
	"slices"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// store holds every version of every key. All members share it: each shows it as it was at the
// revision up to which the member has applied the log. So nothing is ever removed; a compaction is
// a number in the log.
type store struct {
	rev     int64
	compact int64
	keys    map[string][]version // in the order of their revisions
	sorted  []string             // the keys
	leases  map[int64]*lease     // those that exist
	leaseOf map[string]int64     // by key
}

type version struct {
	rev int64
	kv  *mvccpb.KeyValue // nil: deleted
}

type lease struct {
	ttl  int64
	keys map[string]bool
}

func newStore() *store {
	return &store{
		rev: 1, compact: -1, keys: map[string][]version{},
		leases: map[int64]*lease{}, leaseOf: map[string]int64{},
	}
}

// get returns the key as it was at that revision, or nil.
func (s *store) get(key string, rev int64) *mvccpb.KeyValue {
	versions := s.keys[key]
	for i := len(versions) - 1; i >= 0; i-- {
		if versions[i].rev <= rev {
			return versions[i].kv
		}
	}
	return nil
}

// between returns the keys of the range that exist at that revision, in order.
func (s *store) between(key, end []byte, rev int64) (kvs []*mvccpb.KeyValue) {
	if len(end) == 0 {
		if kv := s.get(string(key), rev); kv != nil {
			kvs = append(kvs, kv)
		}
		return kvs
	}
	first, _ := slices.BinarySearch(s.sorted, string(key))
	for _, k := range s.sorted[first:] {
		if !inRange(k, key, end) {
			break
		}
		if kv := s.get(k, rev); kv != nil {
			kvs = append(kvs, kv)
		}
	}
	return kvs
}

// inRange reports whether the range has the key. The end "\0" stands for all keys from the first.
func inRange(k string, key, end []byte) bool {
	switch {
	case len(end) == 0:
		return k == string(key)
	case len(end) == 1 && end[0] == 0:
		return k >= string(key)
	}
	return k >= string(key) && k < string(end)
}

// snapshot is what a member shows: the store at a revision.
type snapshot struct {
	*store
	rev, compact int64
}

func (s snapshot) rangeKeys(r *pb.RangeRequest) (*pb.RangeResponse, error) {
	rev := r.Revision
	switch {
	case rev > s.rev:
		return nil, rpctypes.ErrGRPCFutureRev
	case rev <= 0:
		rev = s.rev
	case rev < s.compact:
		return nil, rpctypes.ErrGRPCCompacted
	}
	kvs := s.between(r.Key, r.RangeEnd, rev)
	resp := &pb.RangeResponse{
		Header: &pb.ResponseHeader{Revision: s.rev}, Count: int64(len(kvs)),
	}
	if r.CountOnly {
		return resp, nil
	}
	// etcd forgets here that without an order it sorts too, if not by key.
	filters := r.MaxModRevision | r.MinModRevision | r.MaxCreateRevision | r.MinCreateRevision
	if r.SortOrder == pb.RangeRequest_NONE && filters == 0 && r.Limit > 0 {
		kvs = kvs[:min(int64(len(kvs)), r.Limit+1)]
	}
	kvs = slices.DeleteFunc(kvs, func(kv *mvccpb.KeyValue) bool {
		return r.MaxModRevision != 0 && kv.ModRevision > r.MaxModRevision ||
			r.MinModRevision != 0 && kv.ModRevision < r.MinModRevision ||
			r.MaxCreateRevision != 0 && kv.CreateRevision > r.MaxCreateRevision ||
			r.MinCreateRevision != 0 && kv.CreateRevision < r.MinCreateRevision
	})
	sortKeys(kvs, r)
	if r.Limit > 0 && int64(len(kvs)) > r.Limit {
		kvs, resp.More = kvs[:r.Limit], true
	}
	for _, kv := range kvs {
		if r.KeysOnly {
			kv = withoutValue(kv, r.SortTarget)
		}
		resp.Kvs = append(resp.Kvs, kv)
	}
	return resp, nil
}

// withoutValue is how etcd shows a key when only keys are asked for. From 3.7 on it takes them from
// its index, which does not know the lease, unless they are sorted by value.
func withoutValue(kv *mvccpb.KeyValue, sorted pb.RangeRequest_SortTarget) *mvccpb.KeyValue {
	only := &mvccpb.KeyValue{
		Key: kv.Key, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision,
		Version: kv.Version,
	}
	if sorted == pb.RangeRequest_VALUE {
		only.Lease = kv.Lease
	}
	return only
}

// sortKeys uses the same algorithm as etcd: it is not stable.
func sortKeys(kvs []*mvccpb.KeyValue, r *pb.RangeRequest) {
	order := r.SortOrder
	if order == pb.RangeRequest_NONE && r.SortTarget != pb.RangeRequest_KEY {
		order = pb.RangeRequest_ASCEND
	}
	by := byTarget{kvs, r.SortTarget}
	switch {
	case order == pb.RangeRequest_DESCEND:
		sort.Sort(sort.Reverse(by))
	case order == pb.RangeRequest_ASCEND && r.SortTarget != pb.RangeRequest_KEY:
		sort.Sort(by)
	}
}

type byTarget struct {
	kvs    []*mvccpb.KeyValue
	target pb.RangeRequest_SortTarget
}

func (b byTarget) Len() int      { return len(b.kvs) }
func (b byTarget) Swap(i, j int) { b.kvs[i], b.kvs[j] = b.kvs[j], b.kvs[i] }
func (b byTarget) Less(i, j int) bool {
	x, y := b.kvs[i], b.kvs[j]
	switch b.target {
	case pb.RangeRequest_VERSION:
		return x.Version < y.Version
	case pb.RangeRequest_CREATE:
		return x.CreateRevision < y.CreateRevision
	case pb.RangeRequest_MOD:
		return x.ModRevision < y.ModRevision
	case pb.RangeRequest_VALUE:
		return bytes.Compare(x.Value, y.Value) < 0
	}
	return bytes.Compare(x.Key, y.Key) < 0
}

// update is one entry of the log while it is carried out. All that it writes has one revision.
type update struct {
	*store
	events  []*mvccpb.Event
	granted int64 // the lease that it grants
	ttl     int64 // of that lease
	revoked int64 // the lease that it revokes
}

// now is the revision that a read within the update sees.
func (u *update) now() int64 {
	if len(u.events) > 0 {
		return u.rev + 1
	}
	return u.rev
}

func (u *update) header() *pb.ResponseHeader { return &pb.ResponseHeader{Revision: u.now()} }

func (u *update) write(key string, v version, event *mvccpb.Event) {
	if _, known := u.keys[key]; !known {
		at, _ := slices.BinarySearch(u.sorted, key)
		u.sorted = slices.Insert(u.sorted, at, key)
	}
	u.keys[key] = append(u.keys[key], v)
	u.events = append(u.events, event)
}

// bind binds the key to the lease, and to no other; 0: to none.
func (u *update) bind(key string, id int64) {
	if old := u.leases[u.leaseOf[key]]; old != nil {
		delete(old.keys, key)
	}
	delete(u.leaseOf, key)
	if id != 0 {
		u.leases[id].keys[key] = true
		u.leaseOf[key] = id
	}
}

// checkPut returns why the key can't be put.
func (u *update) checkPut(r *pb.PutRequest) error {
	switch {
	case r.Lease != 0 && u.leases[r.Lease] == nil:
		return rpctypes.ErrGRPCLeaseNotFound
	case (r.IgnoreValue || r.IgnoreLease) && u.get(string(r.Key), u.now()) == nil:
		return rpctypes.ErrGRPCKeyNotFound
	}
	return nil
}

func (u *update) put(r *pb.PutRequest) *pb.PutResponse {
	key := string(r.Key)
	before := u.get(key, u.now())
	rev := u.rev + 1
	kv := &mvccpb.KeyValue{
		Key: r.Key, Value: r.Value, Lease: r.Lease,
		CreateRevision: rev, ModRevision: rev, Version: 1,
	}
	resp := &pb.PutResponse{}
	if before != nil {
		kv.CreateRevision, kv.Version = before.CreateRevision, before.Version+1
		if r.IgnoreValue {
			kv.Value = before.Value
		}
		if r.IgnoreLease {
			kv.Lease = before.Lease
		}
		if r.PrevKv {
			resp.PrevKv = before
		}
	}
	u.write(key, version{rev, kv}, &mvccpb.Event{Type: mvccpb.Event_PUT, Kv: kv})
	u.bind(key, kv.Lease)
	resp.Header = u.header()
	return resp
}

func (u *update) deleteRange(r *pb.DeleteRangeRequest) *pb.DeleteRangeResponse {
	kvs := u.between(r.Key, r.RangeEnd, u.now())
	for _, kv := range kvs {
		u.delete(string(kv.Key))
	}
	resp := &pb.DeleteRangeResponse{Header: u.header(), Deleted: int64(len(kvs))}
	if r.PrevKv {
		resp.PrevKvs = kvs
	}
	return resp
}

func (u *update) delete(key string) {
	rev := u.rev + 1
	u.write(key, version{rev: rev}, &mvccpb.Event{
		Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev},
	})
	u.bind(key, 0)
}

// grant returns the TTL that is granted.
func (u *update) grant(id, ttl int64) (int64, error) {
	switch {
	case ttl > maxTTL:
		return 0, rpctypes.ErrGRPCLeaseTTLTooLarge
	case u.leases[id] != nil:
		return 0, rpctypes.ErrGRPCLeaseExist
	}
	ttl = max(ttl, minTTL)
	u.leases[id] = &lease{ttl: ttl, keys: map[string]bool{}}
	u.granted, u.ttl = id, ttl
	return ttl, nil
}

func (u *update) revoke(id int64) error {
	l := u.leases[id]
	if l == nil {
		return rpctypes.ErrGRPCLeaseNotFound
	}
	for _, key := range sortedKeys(l.keys) {
		u.delete(key)
	}
	delete(u.leases, id)
	u.revoked = id
	return nil
}

func (u *update) compactTo(rev int64) error {
	switch {
	case rev <= u.compact:
		return rpctypes.ErrGRPCCompacted
	case rev > u.rev:
		return rpctypes.ErrGRPCFutureRev
	}
	u.compact = rev
	return nil
}

// txn carries out a transaction, all of it or nothing. Transactions within it are not supported.
func (u *update) txn(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	s := snapshot{u.store, u.rev, u.compact}
	resp := &pb.TxnResponse{Succeeded: s.holds(r.Compare)}
	ops := r.Success
	if !resp.Succeeded {
		ops = r.Failure
	}
	for _, op := range ops {
		var err error
		switch op := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			_, err = s.rangeKeys(op.RequestRange)
		case *pb.RequestOp_RequestPut:
			err = u.checkPut(op.RequestPut)
		}
		if err != nil {
			return nil, err
		}
	}
	for _, op := range ops {
		answer := &pb.ResponseOp{}
		switch op := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			s.rev = u.now()
			got, err := s.rangeKeys(op.RequestRange)
			if err != nil {
				return nil, err
			}
			answer.Response = &pb.ResponseOp_ResponseRange{ResponseRange: got}
		case *pb.RequestOp_RequestPut:
			answer.Response = &pb.ResponseOp_ResponsePut{ResponsePut: u.put(op.RequestPut)}
		case *pb.RequestOp_RequestDeleteRange:
			answer.Response = &pb.ResponseOp_ResponseDeleteRange{
				ResponseDeleteRange: u.deleteRange(op.RequestDeleteRange),
			}
		}
		resp.Responses = append(resp.Responses, answer)
	}
	resp.Header = u.header()
	return resp, nil
}

func (s snapshot) holds(compares []*pb.Compare) bool {
	return !slices.ContainsFunc(compares, func(c *pb.Compare) bool {
		kvs := s.between(c.Key, c.RangeEnd, s.rev)
		if len(kvs) == 0 {
			// A key that does not exist has no value, not even an empty one.
			return c.Target == pb.Compare_VALUE || !compare(c, &mvccpb.KeyValue{})
		}
		return slices.ContainsFunc(kvs, func(kv *mvccpb.KeyValue) bool { return !compare(c, kv) })
	})
}

func compare(c *pb.Compare, kv *mvccpb.KeyValue) bool {
	var order int
	switch c.Target {
	case pb.Compare_VALUE:
		order = bytes.Compare(kv.Value, c.GetValue())
	case pb.Compare_CREATE:
		order = cmp.Compare(kv.CreateRevision, c.GetCreateRevision())
	case pb.Compare_MOD:
		order = cmp.Compare(kv.ModRevision, c.GetModRevision())
	case pb.Compare_VERSION:
		order = cmp.Compare(kv.Version, c.GetVersion())
	case pb.Compare_LEASE:
		order = cmp.Compare(kv.Lease, c.GetLease())
	}
	switch c.Result {
	case pb.Compare_EQUAL:
		return order == 0
	case pb.Compare_NOT_EQUAL:
		return order != 0
	case pb.Compare_GREATER:
		return order > 0
	case pb.Compare_LESS:
		return order < 0
	}
	return true
}
