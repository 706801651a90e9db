package simetcd

import (
	"context"
	"errors"
	"io"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
)

// resyncInterval is how often etcd serves the watches that begin in the past.
const resyncInterval = 100 * time.Millisecond

// invalidID is the watch id of an answer that is about no watch, or about all of a stream.
const invalidID = -1

type watchServer struct {
	pb.UnimplementedWatchServer
	*member
}

// watchStream is one stream of watches. The cluster's lock guards it.
type watchStream struct {
	m       *member
	watches []*watch
	nextID  int64
	answers []*pb.WatchResponse // to be sent
	ready   chan struct{}       // room for one: there are answers
	end     chan error          // room for one: the member ends it
	need    bool                // that there is a leader
}

// watch is one watch of a stream.
type watch struct {
	id     int64
	r      *pb.WatchCreateRequest
	next   int64 // the revision from which on it wants events
	synced bool  // it has been sent all that the member has applied
	// compacted says that it was canceled because of a compaction. etcd keeps it, as one that is
	// behind, until the client cancels it too.
	compacted bool
}

func (s watchServer) Watch(
	stream grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse],
) error {
	ctx := stream.Context()
	ws := &watchStream{
		m: s.member, ready: make(chan struct{}, 1), end: make(chan error, 1),
		need: needsLeader(ctx),
	}
	err := s.wait(ctx, incarnationOf(ctx), requestTimeout, func() (bool, error) {
		if ws.need && s.leader == nil {
			return true, rpctypes.ErrGRPCNoLeader
		}
		s.streams = append(s.streams, ws)
		return true, nil
	})
	if err != nil {
		return err
	}
	defer func() {
		s.c.mu.Lock()
		defer s.c.mu.Unlock()
		s.streams = slices.DeleteFunc(s.streams, func(o *watchStream) bool { return o == ws })
	}()
	failed := make(chan error, 1)
	s.c.background.Go(func() {
		if err := ws.receive(stream); err != nil {
			failed <- err
		}
	})
	return ws.send(stream, failed)
}

// receive returns nil when the client has nothing more to ask.
func (s *watchStream) receive(
	stream grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse],
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
		if _, err := s.m.arrive(ctx, pb.Watch_Watch_FullMethodName, r); err != nil {
			return err
		}
		err = s.m.wait(ctx, incarnationOf(ctx), requestTimeout, func() (bool, error) {
			s.handle(r)
			return true, nil
		})
		if err != nil {
			return err
		}
	}
}

func (s *watchStream) send(
	stream grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse], failed <-chan error,
) error {
	ctx := stream.Context()
	for {
		s.m.c.mu.Lock()
		var answer *pb.WatchResponse
		if len(s.answers) > 0 {
			answer, s.answers = s.answers[0], s.answers[1:]
		}
		s.m.c.mu.Unlock()
		if answer == nil {
			select {
			case <-s.ready:
			case err := <-s.end:
				lost := s.m.depart(ctx, &Verdict{}, pb.Watch_Watch_FullMethodName, err)
				if lost != nil {
					return lost
				}
				return err
			case err := <-failed:
				return canceled(err)
			case <-ctx.Done():
				return canceled(ctx.Err())
			}
			continue
		}
		if err := s.m.depart(ctx, nil, pb.Watch_Watch_FullMethodName, answer); err != nil {
			return canceled(err)
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
	}
}

func canceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return rpctypes.ErrGRPCWatchCanceled
	}
	return err
}

func (s *watchStream) answer(resp *pb.WatchResponse) {
	if resp.Header == nil {
		resp.Header = s.m.header(0)
	}
	s.answers = append(s.answers, resp)
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

func (s *watchStream) handle(r *pb.WatchRequest) {
	switch r := r.RequestUnion.(type) {
	case *pb.WatchRequest_CreateRequest:
		s.create(r.CreateRequest)
	case *pb.WatchRequest_CancelRequest:
		id := r.CancelRequest.WatchId
		before := len(s.watches)
		s.watches = slices.DeleteFunc(s.watches, func(w *watch) bool { return w.id == id })
		if len(s.watches) < before {
			s.answer(&pb.WatchResponse{WatchId: id, Canceled: true})
		}
	case *pb.WatchRequest_ProgressRequest:
		rev := s.m.show().rev
		behind := func(w *watch) bool { return !w.synced || rev < w.r.StartRevision }
		if len(s.watches) > 0 && !slices.ContainsFunc(s.watches, behind) {
			s.answer(&pb.WatchResponse{WatchId: invalidID})
		}
	}
}

func (s *watchStream) create(r *pb.WatchCreateRequest) {
	if len(r.Key) == 0 {
		r.Key = []byte{0}
	}
	refuse := ""
	toTheEnd := len(r.RangeEnd) == 1 && r.RangeEnd[0] == 0
	switch {
	case r.StartRevision < 0:
		refuse = rpctypes.ErrCompacted.Error()
	case len(r.RangeEnd) > 0 && !toTheEnd && string(r.Key) >= string(r.RangeEnd):
		refuse = "mvcc: watcher range is empty"
	case r.WatchId != 0 && s.has(r.WatchId):
		refuse = "mvcc: duplicate watch ID provided on the WatchStream"
	}
	if refuse != "" {
		s.answer(&pb.WatchResponse{
			WatchId: invalidID, Created: true, Canceled: true, CancelReason: refuse,
		})
		return
	}
	rev := s.m.show().rev
	w := &watch{id: r.WatchId, r: r, next: max(r.StartRevision, rev+1), synced: true}
	if w.id == 0 {
		for s.has(s.nextID) {
			s.nextID++
		}
		w.id = s.nextID
		s.nextID++
	}
	if r.StartRevision != 0 && r.StartRevision <= rev {
		w.next, w.synced = r.StartRevision, false
		s.m.after(s.m.c.jitter(resyncInterval, "resync", s.m.name, string(r.Key)), s.resync)
	}
	s.watches = append(s.watches, w)
	s.answer(&pb.WatchResponse{WatchId: w.id, Created: true})
}

func (s *watchStream) has(id int64) bool {
	return slices.ContainsFunc(s.watches, func(w *watch) bool { return w.id == id })
}

// resync sends the watches that began in the past what they have missed.
func (s *watchStream) resync() {
	shown := s.m.show()
	for _, w := range s.watches {
		if w.synced || w.compacted {
			continue
		}
		if w.next < shown.compact {
			s.answer(&pb.WatchResponse{
				Header: &pb.ResponseHeader{
					ClusterId: 1, MemberId: uint64(s.m.id), RaftTerm: s.m.term,
				},
				WatchId: w.id, Canceled: true, CompactRevision: shown.compact,
			})
			w.compacted = true
			continue
		}
		var events []*mvccpb.Event
		for i := range s.m.c.log[:s.m.applied] {
			events = append(events, w.wanted(&s.m.c.log[i], shown.compact)...)
		}
		w.next, w.synced = shown.rev+1, true
		if len(events) > 0 {
			s.answer(&pb.WatchResponse{WatchId: w.id, Events: events})
		}
	}
}

// notify tells the watches what an entry has changed that the member has just applied.
func (s *watchStream) notify(e *entry) {
	for _, w := range s.watches {
		if !w.synced {
			continue
		}
		if events := w.wanted(e, s.m.show().compact); len(events) > 0 {
			s.answer(&pb.WatchResponse{WatchId: w.id, Events: events})
		}
	}
}

// wanted returns the events of an entry that the watch asks for. The values before them may be gone
// by a compaction.
func (w *watch) wanted(e *entry, compact int64) (events []*mvccpb.Event) {
	if e.rev < w.next {
		return nil
	}
	for _, event := range e.events {
		switch {
		case !inRange(string(event.Kv.Key), w.r.Key, w.r.RangeEnd),
			event.Type == mvccpb.Event_PUT &&
				slices.Contains(w.r.Filters, pb.WatchCreateRequest_NOPUT),
			event.Type == mvccpb.Event_DELETE &&
				slices.Contains(w.r.Filters, pb.WatchCreateRequest_NODELETE):
			continue
		}
		if w.r.PrevKv && e.rev > compact {
			event = &mvccpb.Event{
				Type: event.Type, Kv: event.Kv, PrevKv: e.get(string(event.Kv.Key), e.rev-1),
			}
		}
		events = append(events, event)
	}
	return events
}

// endStreams ends all streams of watches, or those that need a leader.
func (m *member) endStreams(err error, all bool) {
	for _, s := range m.streams {
		if s.need || all {
			select {
			case s.end <- err:
			default:
			}
		}
	}
}
