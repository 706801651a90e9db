package simetcd

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// player plays a seeded script against an etcd: three clients make requests, one after the other,
// and watch. Its transcript holds all that etcd has answered, in a form that does not depend on who
// else writes, nor on which etcd it was.
type player struct {
	ctx    context.Context
	rng    *rand.Rand
	conns  []*grpc.ClientConn
	prefix string

	revs    []int64 // of our writes, as far as answers have shown them
	leases  []int64
	streams []*watcher // the first one watches all of the prefix, from the beginning
	lines   []line
}

type line struct {
	client   int
	req      proto.Message
	resp     proto.Message
	err      error
	comments string
}

// waitTimeout is for what etcd does by itself.
const waitTimeout = 30 * time.Second

// compacts reports whether the seed's script compacts, which others must not notice.
func compacts(seed uint64) bool { return seed%40 == 9 }

// isSlow reports whether the seed's script waits for a lease to expire.
func isSlow(seed uint64) bool { return seed%20 == 8 }

// play returns the transcript.
func play(ctx context.Context, seed uint64, conns []*grpc.ClientConn) []string {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &player{
		ctx: ctx, rng: rand.New(rand.NewPCG(seed, 0)), conns: conns,
		prefix: fmt.Sprintf("/script/%d/", seed),
	}
	now := p.get(0)
	all := p.watchAll(now + 1)
	for range 10 + p.rng.IntN(20) {
		p.step()
		if compacts(seed) && p.rng.IntN(8) == 0 && len(p.revs) > 0 {
			p.compact()
		}
	}
	if isSlow(seed) {
		p.expire(all)
		p.keep()
	}
	end := p.put(0, &pb.PutRequest{Key: p.key("~")})
	for _, w := range p.streams {
		p.sync(w, end)
	}
	return p.transcript()
}

func (p *player) key(name string) []byte { return []byte(p.prefix + name) }

func (p *player) someKey() []byte { return p.key(string(rune('a' + p.rng.IntN(6)))) }

// someRange is one key, or a range, which may be empty.
func (p *player) someRange() (key, end []byte) {
	switch p.rng.IntN(4) {
	case 0:
		return p.key(""), []byte(clientv3.GetPrefixRangeEnd(p.prefix))
	case 1:
		return p.someKey(), p.someKey()
	}
	return p.someKey(), nil
}

func (p *player) someRev() int64 {
	if len(p.revs) == 0 || p.rng.IntN(10) == 0 {
		return 0
	}
	return p.revs[p.rng.IntN(len(p.revs))]
}

// ungranted is the id of a lease that no script has granted.
const ungranted = 12345

// someLease is a lease that was granted, one that was not, or none.
func (p *player) someLease() int64 {
	switch n := p.rng.IntN(10); {
	case n == 0:
		return ungranted
	case n < 5 && len(p.leases) > 0:
		return p.leases[p.rng.IntN(len(p.leases))]
	}
	return 0
}

func (p *player) chance(percent int) bool { return p.rng.IntN(100) < percent }

func (p *player) step() {
	client := p.rng.IntN(len(p.conns))
	switch n := p.rng.IntN(100); {
	case n < 25:
		p.put(client, p.somePut())
	case n < 40:
		r := p.someRead()
		// A follower may show an older state, and a real etcd of one member has no follower.
		r.Serializable = client == 0 && p.chance(30)
		p.read(client, r)
	case n < 48:
		p.remove(client, p.someDelete())
	case n < 70:
		p.txn(client)
	case n < 78:
		p.grant(client, &pb.LeaseGrantRequest{
			ID: p.newLease(), TTL: 100 + p.rng.Int64N(20)*p.rng.Int64N(2),
		})
	case n < 82:
		r := &pb.LeaseRevokeRequest{ID: p.someLease()}
		resp, err := pb.NewLeaseClient(p.conns[client]).LeaseRevoke(p.ctx, r)
		p.say(client, r, resp, err)
	case n < 86:
		p.renew(client, p.someLease())
	case n < 90:
		p.timeToLive(client, p.someLease())
	case n < 98:
		p.watch(client)
	default:
		p.cancelWatch()
	}
}

func (p *player) newLease() int64 {
	switch n := p.rng.IntN(10); {
	case n == 0:
		return 0
	case n == 1 && len(p.leases) > 0:
		return p.leases[p.rng.IntN(len(p.leases))]
	}
	return p.rng.Int64()
}

func (p *player) somePut() *pb.PutRequest {
	r := &pb.PutRequest{
		Key: p.someKey(), Value: fmt.Appendf(nil, "v%d", p.rng.IntN(8)),
		PrevKv: p.chance(30), Lease: p.someLease(),
	}
	switch {
	case p.chance(5):
		r.IgnoreValue = true
		r.Value = r.Value[:2*p.rng.IntN(2)]
	case p.chance(5):
		r.IgnoreLease = true
	case p.chance(2):
		r.Key = nil
	}
	return r
}

func (p *player) someRead() *pb.RangeRequest {
	r := &pb.RangeRequest{Limit: p.rng.Int64N(8) - 4}
	r.Key, r.RangeEnd = p.someRange()
	if p.chance(40) {
		r.Key, r.RangeEnd = p.key(""), []byte(clientv3.GetPrefixRangeEnd(p.prefix))
	}
	r.Limit = max(0, r.Limit)
	if p.chance(40) {
		r.SortOrder = pb.RangeRequest_SortOrder(p.rng.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(p.rng.IntN(5))
	}
	r.KeysOnly, r.CountOnly = p.chance(15), p.chance(10)
	for _, f := range []*int64{
		&r.Revision, &r.MinModRevision, &r.MaxModRevision, &r.MinCreateRevision,
		&r.MaxCreateRevision,
	} {
		if p.chance(12) {
			*f = p.someRev()
		}
	}
	if p.chance(2) {
		r.Revision = 1 << 60
	}
	if p.chance(2) {
		r.SortTarget = 7
	}
	return r
}

func (p *player) someDelete() *pb.DeleteRangeRequest {
	r := &pb.DeleteRangeRequest{PrevKv: p.chance(40)}
	r.Key, r.RangeEnd = p.someRange()
	return r
}

func (p *player) someCompare() *pb.Compare {
	c := &pb.Compare{
		Key: p.someKey(), Result: pb.Compare_CompareResult(p.rng.IntN(4)),
		Target: pb.Compare_CompareTarget(p.rng.IntN(5)),
	}
	if p.chance(10) {
		c.Key, c.RangeEnd = p.someRange()
	}
	switch c.Target {
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: p.rng.Int64N(4)}
	case pb.Compare_CREATE:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: p.someRev()}
	case pb.Compare_MOD:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: p.someRev()}
	case pb.Compare_VALUE:
		c.TargetUnion = &pb.Compare_Value{Value: fmt.Appendf(nil, "v%d", p.rng.IntN(8))}
	case pb.Compare_LEASE:
		lease := p.someLease()
		ordered := c.Result == pb.Compare_LESS || c.Result == pb.Compare_GREATER
		if ordered && lease != 0 {
			// The servers choose the ids of most leases, so the order of two is by chance.
			// This one is less than any that a server chooses.
			lease = ungranted
		}
		c.TargetUnion = &pb.Compare_Lease{Lease: lease}
	}
	return c
}

func (p *player) someOps() (ops []*pb.RequestOp) {
	for range p.rng.IntN(4) {
		op := &pb.RequestOp{}
		switch p.rng.IntN(4) {
		case 0:
			op.Request = &pb.RequestOp_RequestRange{RequestRange: p.someRead()}
		case 1:
			r := p.someDelete()
			if r.RangeEnd != nil && string(r.Key) >= string(r.RangeEnd) {
				r.RangeEnd = nil
			}
			op.Request = &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}
		default:
			op.Request = &pb.RequestOp_RequestPut{RequestPut: p.somePut()}
		}
		if p.chance(1) {
			op.Request = nil
		}
		ops = append(ops, op)
	}
	return ops
}

// The requests.

func (p *player) say(client int, req, resp proto.Message, err error) {
	p.lines = append(p.lines, line{client: client, req: req, resp: resp, err: err})
}

func (p *player) comment(format string, args ...any) {
	p.lines = append(p.lines, line{comments: fmt.Sprintf(format, args...)})
}

func (p *player) wrote(rev int64) {
	if !slices.Contains(p.revs, rev) {
		p.revs = append(p.revs, rev)
	}
}

// get reads our first key and returns the present revision. After it the client's member has
// applied all that was committed before.
func (p *player) get(client int) int64 {
	r := &pb.RangeRequest{Key: p.key("a")}
	resp, err := pb.NewKVClient(p.conns[client]).Range(p.ctx, r)
	p.say(client, r, resp, err)
	return resp.GetHeader().GetRevision()
}

func (p *player) put(client int, r *pb.PutRequest) int64 {
	resp, err := pb.NewKVClient(p.conns[client]).Put(p.ctx, r)
	p.say(client, r, resp, err)
	if err == nil {
		p.wrote(resp.Header.Revision)
	}
	return resp.GetHeader().GetRevision()
}

func (p *player) read(client int, r *pb.RangeRequest) {
	resp, err := pb.NewKVClient(p.conns[client]).Range(p.ctx, r)
	p.say(client, r, resp, err)
}

func (p *player) remove(client int, r *pb.DeleteRangeRequest) {
	resp, err := pb.NewKVClient(p.conns[client]).DeleteRange(p.ctx, r)
	p.say(client, r, resp, err)
	if resp.GetDeleted() > 0 {
		p.wrote(resp.Header.Revision)
	}
}

func (p *player) txn(client int) {
	r := &pb.TxnRequest{}
	for range p.rng.IntN(3) {
		r.Compare = append(r.Compare, p.someCompare())
	}
	r.Success, r.Failure = p.someOps(), p.someOps()
	if len(r.Success)+len(r.Failure) == 0 {
		p.get(client) // such a transaction is not linearizable
	}
	resp, err := pb.NewKVClient(p.conns[client]).Txn(p.ctx, r)
	p.say(client, r, resp, err)
	for _, op := range resp.GetResponses() {
		if op.GetResponsePut() != nil || op.GetResponseDeleteRange().GetDeleted() > 0 {
			p.wrote(resp.Header.Revision)
		}
	}
}

func (p *player) grant(client int, r *pb.LeaseGrantRequest) int64 {
	resp, err := pb.NewLeaseClient(p.conns[client]).LeaseGrant(p.ctx, r)
	if err == nil {
		p.leases = append(p.leases, resp.ID)
	}
	p.say(client, r, resp, err)
	return resp.GetID()
}

// renew renews once, over a stream of its own. The header is that of the member before that, which
// may be a follower: a read first.
func (p *player) renew(client int, id int64) {
	p.get(client)
	r := &pb.LeaseKeepAliveRequest{ID: id}
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	stream, err := pb.NewLeaseClient(p.conns[client]).LeaseKeepAlive(ctx)
	var resp *pb.LeaseKeepAliveResponse
	if err == nil {
		_ = stream.Send(r) // a failure shows in Recv
		resp, err = stream.Recv()
	}
	p.say(client, r, resp, err)
}

func (p *player) timeToLive(client int, id int64) {
	p.get(client)
	r := &pb.LeaseTimeToLiveRequest{ID: id, Keys: p.chance(50)}
	resp, err := pb.NewLeaseClient(p.conns[client]).LeaseTimeToLive(p.ctx, r)
	if resp != nil {
		slices.SortFunc(resp.Keys, slices.Compare)
		resp.TTL = min(resp.TTL, 1) // alive
	}
	p.say(client, r, resp, err)
}

// compact lets all watches catch up first. Whether one that is behind is canceled depends on time.
func (p *player) compact() {
	rev := p.put(0, &pb.PutRequest{Key: p.key("~")})
	for _, w := range p.streams {
		p.sync(w, rev)
	}
	r := &pb.CompactionRequest{Revision: p.revs[p.rng.IntN(len(p.revs))]}
	resp, err := pb.NewKVClient(p.conns[0]).Compact(p.ctx, r)
	p.say(0, r, resp, err)
}

// expire lets a lease expire, and looks at what is left.
func (p *player) expire(all *watcher) {
	granted := time.Now()
	id := p.grant(1, &pb.LeaseGrantRequest{ID: p.rng.Int64(), TTL: p.rng.Int64N(3)})
	p.put(2, &pb.PutRequest{Key: p.key("x"), Lease: id})
	p.put(0, &pb.PutRequest{Key: p.key("y"), Lease: id})
	err := all.wait(func() bool {
		n := 0
		for _, resp := range all.got {
			for _, e := range resp.Events {
				if e.Type == mvccpb.Event_DELETE && slices.Contains([]string{"x", "y"},
					strings.TrimPrefix(string(e.Kv.Key), p.prefix)) {
					n++
				}
			}
		}
		return n == 2
	}, waitTimeout)
	took := time.Since(granted)
	p.comment("expired %v, early %t, late %t", err, took < 2*time.Second, took > 20*time.Second)
	p.timeToLive(2, id)
	p.renew(1, id)
	p.put(0, &pb.PutRequest{Key: p.key("x"), Lease: id})
}

// keep renews a lease for longer than its TTL.
func (p *player) keep() {
	id := p.grant(0, &pb.LeaseGrantRequest{ID: p.rng.Int64(), TTL: 4})
	p.put(1, &pb.PutRequest{Key: p.key("z"), Lease: id})
	for client := range p.conns {
		time.Sleep(1500 * time.Millisecond)
		p.renew(client, id)
	}
	p.read(1, &pb.RangeRequest{Key: p.key("z")})
	p.timeToLive(2, id)
}

// watcher is one stream of watches.
type watcher struct {
	client  int
	stream  pb.Watch_WatchClient
	created int // watches that we have asked for
	dropped int // watches that we have canceled because etcd had compacted what they were to show
	mu      sync.Mutex
	got     []*pb.WatchResponse
	changed chan struct{} // room for one
}

func (p *player) newWatcher(client int) *watcher {
	w := &watcher{client: client, changed: make(chan struct{}, 1)}
	stream, err := pb.NewWatchClient(p.conns[client]).Watch(p.ctx)
	if err != nil {
		p.comment("watch: %v", err)
		return nil
	}
	w.stream = stream
	p.streams = append(p.streams, w)
	go func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				return
			}
			w.mu.Lock()
			w.got = append(w.got, resp)
			w.mu.Unlock()
			select {
			case w.changed <- struct{}{}:
			default:
			}
		}
	}()
	return w
}

// wait waits for an answer.
func (w *watcher) wait(until func() bool, timeout time.Duration) error {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	for {
		w.mu.Lock()
		done := until()
		w.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-w.changed:
		case <-timer.C:
			return fmt.Errorf("no answer within %v", timeout)
		}
	}
}

func (w *watcher) count(which func(*pb.WatchResponse) bool) (n int) {
	for _, resp := range w.got {
		if which(resp) {
			n++
		}
	}
	return n
}

func (p *player) watchAll(from int64) *watcher {
	w := p.newWatcher(0)
	p.create(w, &pb.WatchCreateRequest{
		Key: p.key(""), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(p.prefix)),
		StartRevision: from, PrevKv: true,
	})
	return w
}

// watch begins a watch, on a new stream or one of the client's.
func (p *player) watch(client int) {
	p.get(client) // so that a follower has applied all that the watch must not show
	r := &pb.WatchCreateRequest{PrevKv: p.chance(30), Fragment: p.chance(20)}
	r.Key, r.RangeEnd = p.someRange()
	switch p.rng.IntN(4) {
	case 0:
		r.StartRevision = p.someRev()
	case 1:
		if r.StartRevision = p.someRev(); r.StartRevision > 0 {
			r.StartRevision++
		}
	}
	switch p.rng.IntN(10) {
	case 0:
		r.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}
	case 1:
		r.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE}
	case 2:
		r.WatchId = p.rng.Int64N(4)
	}
	if p.chance(3) {
		r.StartRevision = -1
	}
	var on *watcher
	for _, w := range p.streams[1:] {
		if w.client == client && p.chance(60) {
			on = w
		}
	}
	if on == nil {
		on = p.newWatcher(client)
	}
	p.create(on, r)
}

func (p *player) create(w *watcher, r *pb.WatchCreateRequest) {
	if w == nil {
		return
	}
	w.created++
	_ = w.stream.Send(&pb.WatchRequest{
		RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: r},
	})
	err := w.wait(func() bool {
		return w.count((*pb.WatchResponse).GetCreated) == w.created
	}, waitTimeout)
	p.say(w.client, r, nil, err)
}

// cancelWatch cancels one that has caught up, or one that does not exist.
func (p *player) cancelWatch() {
	w := p.streams[p.rng.IntN(len(p.streams))]
	if w == p.streams[0] {
		return
	}
	p.sync(w, 0)
	r := &pb.WatchCancelRequest{WatchId: p.rng.Int64N(3)}
	_ = w.stream.Send(&pb.WatchRequest{
		RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: r},
	})
	// One that does not exist gets no answer.
	p.say(w.client, r, nil, w.wait(func() bool { return !w.has(r.WatchId) }, waitTimeout))
}

// has reports whether the stream has such a watch.
func (w *watcher) has(id int64) (has bool) {
	for _, resp := range w.got {
		if resp.WatchId == id && (resp.Created || resp.Canceled) {
			has = !resp.Canceled || resp.CompactRevision > 0
		}
	}
	return has
}

// sync returns when the watches of the stream have caught up with that revision, or with the
// present one.
func (p *player) sync(w *watcher, rev int64) {
	if rev == 0 {
		// Something must have been written since the watch began, else etcd does not answer.
		rev = p.put(0, &pb.PutRequest{Key: p.key("~")})
	}
	compacted := func(resp *pb.WatchResponse) bool { return resp.CompactRevision > 0 }
	ended := func(resp *pb.WatchResponse) bool { return resp.Canceled && !compacted(resp) }
	caughtUp := func(resp *pb.WatchResponse) bool {
		return resp.WatchId == invalidID && !resp.Created && resp.Header.Revision >= rev
	}
	done := func() bool { return w.count(ended) == w.created || w.count(caughtUp) > 0 }
	for range 500 {
		w.dropCompacted()
		_ = w.stream.Send(&pb.WatchRequest{
			RequestUnion: &pb.WatchRequest_ProgressRequest{
				ProgressRequest: &pb.WatchProgressRequest{},
			},
		})
		if w.wait(done, 20*time.Millisecond) == nil {
			return
		}
	}
	p.comment("client %d: a watch does not catch up", w.client)
}

// dropCompacted cancels the watches that etcd has canceled itself, because of a compaction. Until
// then etcd answers no request for progress on their stream.
func (w *watcher) dropCompacted() {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, resp := range w.got {
		if resp.CompactRevision == 0 {
			continue
		}
		if n++; n > w.dropped {
			w.dropped++
			_ = w.stream.Send(&pb.WatchRequest{
				RequestUnion: &pb.WatchRequest_CancelRequest{
					CancelRequest: &pb.WatchCancelRequest{WatchId: resp.WatchId},
				},
			})
		}
	}
}

// The transcript.

// transcript gives each revision the number of our writes up to it, and each lease a number.
func (p *player) transcript() (text []string) {
	n := normal{prefix: p.prefix, leases: p.leases}
	all := p.streams[0]
	all.mu.Lock()
	defer all.mu.Unlock()
	for _, resp := range all.got {
		for _, e := range resp.Events {
			n.revs = append(n.revs, e.Kv.ModRevision)
		}
	}
	slices.Sort(n.revs)
	n.revs = slices.Compact(n.revs)
	for _, l := range p.lines {
		if l.comments != "" {
			text = append(text, l.comments)
			continue
		}
		answer := n.text(l.resp)
		if l.err != nil {
			answer = status.Convert(l.err).String()
		}
		text = append(text,
			fmt.Sprintf("client %d: %s\n      -> %s", l.client, n.text(l.req), answer))
	}
	text = append(text, all.transcript(n, 0)...)
	for i, w := range p.streams[1:] {
		w.mu.Lock()
		text = append(text, w.transcript(n, i+1)...)
		w.mu.Unlock()
	}
	return text
}

// transcript has what each watch has got. How it was divided into answers, and how those of several
// watches were ordered, depends on time.
func (w *watcher) transcript(n normal, number int) (text []string) {
	byID := map[int64]string{}
	for _, resp := range w.got {
		for _, e := range resp.Events {
			byID[resp.WatchId] += "\n      -> " + n.text(e)
		}
		if resp.Created || resp.Canceled {
			resp = proto.Clone(resp).(*pb.WatchResponse)
			resp.Header = nil
			byID[resp.WatchId] += "\n      -> " + n.text(resp)
		}
	}
	for _, id := range sortedKeys(byID) {
		text = append(text,
			fmt.Sprintf("client %d, stream %d, watch %d:%s", w.client, number, id, byID[id]))
	}
	return text
}

type normal struct {
	prefix string
	revs   []int64
	leases []int64
}

// text is the message without what differs from one etcd to another.
func (n normal) text(m proto.Message) string {
	if m == nil || !m.ProtoReflect().IsValid() {
		return "nothing"
	}
	return n.message(m.ProtoReflect())
}

func (n normal) message(m protoreflect.Message) string {
	var fields []string
	of := m.Descriptor().Fields()
	for i := range of.Len() {
		f := of.Get(i)
		if !m.Has(f) {
			continue
		}
		var values []string
		if f.IsList() {
			for j := range m.Get(f).List().Len() {
				values = append(values, n.value(f, m.Get(f).List().Get(j)))
			}
		} else {
			values = []string{n.value(f, m.Get(f))}
		}
		if text := strings.Join(values, " "); text != "" {
			fields = append(fields, fmt.Sprintf("%s:%s", f.Name(), text))
		}
	}
	return fmt.Sprintf("%s{%s}", m.Descriptor().Name(), strings.Join(fields, " "))
}

func (n normal) value(f protoreflect.FieldDescriptor, v protoreflect.Value) string {
	switch f.Name() {
	case "cluster_id", "member_id", "raft_term", "start_revision":
		return ""
	case "lease", "ID":
		if i := slices.Index(n.leases, v.Int()); i >= 0 {
			return fmt.Sprintf("lease %d", i)
		}
		if v.Int() != 0 {
			return "another lease"
		}
	case "watch_id":
		return fmt.Sprint(v.Int())
	}
	switch {
	case f.Kind() == protoreflect.MessageKind:
		return n.message(v.Message())
	case f.Kind() == protoreflect.BytesKind:
		return fmt.Sprintf("%q", strings.TrimPrefix(string(v.Bytes()), n.prefix))
	case strings.HasSuffix(string(f.Name()), "revision") && v.Int() > 0:
		up, found := slices.BinarySearch(n.revs, v.Int())
		if found {
			up++
		}
		return fmt.Sprint(up)
	}
	return fmt.Sprint(v.Interface())
}
