package election

import (
	"context"
	"errors"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// If one election's name is a prefix of another's, such as jobs and jobs/backup, the candidates of
// the first wait for those of the second, for ever. So a candidate looks for such elections once,
// before it puts its first key. It first asks one member, while its lease is being granted. If that
// member shows no such election, that is enough. If it shows one, or does not answer, the candidate
// asks a majority: what one member shows may be long gone. Each request reads a bounded number of
// keys, so it may overlook an election. A key that then keeps us waiting is shown as a Blocker.

const (
	// nestedLimit is how many keys are read of each range. They are few because all candidates of a
	// fleet may start at once, and each of them reads the keys of all elections beside its own.
	nestedLimit = 8
	// nestedParents is how many of the names around ours are looked at.
	nestedParents = 16
)

// parents returns the names around the election's, the nearest first.
func parents(election string) (names []string) {
	for len(names) < nestedParents {
		slash := strings.LastIndexByte(election, '/')
		if slash <= 0 {
			break
		}
		election = election[:slash]
		names = append(names, election)
	}
	return names
}

// The functions that follow make the ranges in which we look for keys of other elections. A
// candidate's key ends with its lease in hex, and nearly all leases begin with a digit.

// aroundRanges are the ranges with the candidates of elections with these names. They also have the
// keys of elections beside ours, but few: most names begin with another letter.
func aroundRanges(names []string) (ranges []*pb.RangeRequest) {
	for _, name := range names {
		ranges = append(ranges,
			nestedRange(name+"/0", name+"/:"), nestedRange(name+"/a", name+"/g"))
	}
	return ranges
}

// withinRanges are the ranges with the keys below the election's prefix. The second range has
// nearly all keys of the election's own candidates, which may be thousands.
func withinRanges(election string) []*pb.RangeRequest {
	return []*pb.RangeRequest{
		nestedRange(election+"/", election+"/0"),
		nestedRange(election+"/0", election+"/:"),
		nestedRange(election+"/:", election+"0"), // "0" follows "/"
	}
}

func nestedRange(from, to string) *pb.RangeRequest {
	return &pb.RangeRequest{Key: []byte(from), RangeEnd: []byte(to), Limit: nestedLimit}
}

// lookForNested looks for such elections once, beside what the session does meanwhile. The channel
// tells whether one member has answered and shows none.
func (s *session) lookForNested(ctx context.Context) <-chan bool {
	none := make(chan bool, 1)
	if s.run.nestedChecked {
		none <- true
		return none
	}
	s.running.Go(func() {
		ranges := append(aroundRanges(parents(s.cfg.Election)), withinRanges(s.cfg.Election)...)
		for _, r := range ranges {
			r.Serializable = true
		}
		found, err := s.findNested(ctx, ranges)
		none <- err == nil && found.key == ""
	})
	return none
}

// findNested returns the key of a live candidate of an election within or around ours, or the zero
// value.
func (s *session) findNested(
	ctx context.Context, ranges []*pb.RangeRequest,
) (queueEntry, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.requestTimeout())
	defer cancel()
	return hedge(ctx, s.members, s.cfg.hedgeDelay(),
		func(ctx context.Context, m *member) (queueEntry, error) {
			_, all, err := m.readAll(ctx, ranges...)
			if err != nil {
				return queueEntry{}, err
			}
			for _, kvs := range all {
				for _, kv := range kvs {
					// The key exists, so its lease is alive (in a linearizable read).
					found := newQueueEntry("", kv)
					other := found.election()
					if other != "" && isNested(s.cfg.Election, other) {
						return found, nil
					}
				}
			}
			return queueEntry{}, nil
		})
}

// isNested reports whether one of the elections lies within the other.
func isNested(a, b string) bool {
	return a != b && (strings.HasPrefix(a+"/", b+"/") || strings.HasPrefix(b+"/", a+"/"))
}

// refuseNested returns a NestedError if there is such an election. It waits for what lookForNested
// tells. Then, if necessary, it tries until a majority has answered. It looks only once in a run.
func (s *session) refuseNested(ctx context.Context, none <-chan bool) error {
	if <-none {
		s.run.nestedChecked = true
		return nil
	}
	within := withinRanges(s.cfg.Election)
	ranges := append(aroundRanges(parents(s.cfg.Election)), within...)
	var found queueEntry
	err := s.keepTrying(ctx, nestedFails, "look for other elections", func() (err error) {
		if s.isLost() {
			return nil // the next session looks again
		}
		found, err = s.findNested(ctx, ranges)
		if errors.Is(err, rpctypes.ErrPermissionDenied) && len(ranges) > len(within) {
			s.log.Debug("elections around this one are not looked for", "err", err)
			ranges = within
			found, err = s.findNested(ctx, ranges)
		}
		s.run.nestedChecked = err == nil
		return err
	})
	switch {
	case err != nil:
		return err
	case found.key != "":
		return &NestedError{Election: s.cfg.Election, Other: found.election(), Key: found.key}
	}
	return nil
}
