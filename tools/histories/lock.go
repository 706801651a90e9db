package main

import (
	"fmt"

	"github.com/anishathalye/porcupine"
)

// lockState is that of the lock.
type lockState struct {
	holder int64 // its token; 0: nobody
	last   int64 // the token that was acquired last
	gone   int64 // the highest token that the storage has refused
}

// lockModel: one term at a time, with rising tokens. The storage accepts the writes of the last
// term only, and none once it has refused one: a key that is gone never comes back with the same
// create revision. It refuses none of the holder's: etcd keeps the leader's key until nothing of
// the job is left. A fault or an operator may take a term, that of the named token and no other.
// Then the job has some time to end, which the soak judges.
var lockModel = porcupine.Model{
	Init: func() any { return lockState{} },
	Step: func(state, input, _ any) (bool, any) {
		s, o := state.(lockState), input.(operation)
		switch o.Kind {
		case acquire:
			return s.holder == 0 && o.Token > max(s.last, s.gone),
				lockState{o.Token, o.Token, s.gone}
		case release, take:
			if s.holder == o.Token {
				s.holder = 0
			}
			return true, s
		}
		if o.Answer == accepted {
			return o.Token == s.last && o.Token > s.gone, s
		}
		legal := o.Token != s.holder
		s.gone = max(s.gone, o.Token)
		return legal, s
	},
	DescribeOperation: func(input, _ any) string { return input.(operation).String() },
	DescribeState: func(state any) string {
		s := state.(lockState)
		return fmt.Sprintf("token %d holds; the last was %d; up to %d all are gone",
			s.holder, s.last, s.gone)
	},
}

// lockUntil is the history of the lock by what had returned at a moment. Of a term's writes those
// are enough that bound it: among the accepted ones that which was called last and that which
// returned first, and the refused one that returned first.
func lockUntil(all []operation, at int64) []porcupine.Operation {
	type bounds struct{ first, last, refused *operation }
	writes := map[int64]*bounds{}
	var kept []operation
	for _, o := range all {
		if o.Kind == take && o.Call <= at {
			o.Return = min(o.Return, at+1) // it may be later
			if o.Return == at+1 {
				o.Return = 0
			}
			kept = append(kept, o)
		}
		if o.Kind == take || o.Return == 0 || o.Return > at {
			continue
		}
		if o.Kind != write {
			kept = append(kept, o)
			continue
		}
		b := writes[o.Token]
		if b == nil {
			b = &bounds{}
			writes[o.Token] = b
		}
		switch o.Answer {
		case refused:
			if b.refused == nil || o.Return < b.refused.Return {
				b.refused = &o
			}
		default:
			if b.first == nil || o.Return < b.first.Return {
				b.first = &o
			}
			if b.last == nil || o.Call > b.last.Call {
				b.last = &o
			}
		}
	}
	for _, b := range writes {
		for _, o := range []*operation{b.first, b.last, b.refused} {
			if o != nil && (o != b.last || b.last != b.first) {
				kept = append(kept, *o)
			}
		}
	}
	return numbered(kept)
}

// taken is how many terms may have been taken.
func (h *history) taken() int {
	tokens := map[int64]bool{}
	for _, o := range h.lock {
		if o.Kind == take {
			tokens[o.Token] = true
		}
	}
	return len(tokens)
}
