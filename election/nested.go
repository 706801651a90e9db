package election

import (
	"context"
	"errors"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// Where one election's name is a prefix of another's, as jobs and jobs/backup, the candidates of
// the one wait for those of the other, for ever. So a candidate looks for such elections once,
// before its first key is put, with one request. What that reads is bounded, so it may overlook an
// election; a key that then keeps us waiting shows as a Blocker.

const (
	// nestedLimit is how many keys are read of each range.
	nestedLimit = 50
	// nestedParents is of how many names around ours elections are looked for.
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

// The ranges in which the keys of other elections are looked for. A candidate's key ends with its
// lease in hex, and nearly all leases begin with a digit.

// aroundRanges are ranges of the candidates of elections with these names. Elections beside ours
// have their keys there as well; most of their names begin with another letter.
func aroundRanges(names []string) (ranges []*pb.RangeRequest) {
	for _, name := range names {
		ranges = append(ranges,
			nestedRange(name+"/0", name+"/:"), nestedRange(name+"/a", name+"/g"))
	}
	return ranges
}

// withinRanges are ranges of the keys below the election's prefix. Those of its own candidates, of
// which there may be thousands, are nearly all in the second one.
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

// findNested returns the key of a live candidate of an election within or around ours; of none: the
// zero value.
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
					// That the key is there says that its lease is alive.
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

// refuseNested returns a NestedError where such an election is found, and otherwise once it is
// known that none was. It does not look again in the same run.
func (s *session) refuseNested(ctx context.Context) error {
	if s.run.nestedChecked {
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
