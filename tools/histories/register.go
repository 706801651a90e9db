package main

import (
	"fmt"

	"github.com/anishathalye/porcupine"
)

// register is the state of a register that fencing tokens guard.
type register struct {
	value string
	// floor is the lowest token that may still write: the highest that wrote, or one more than the
	// highest that was refused. A key that is gone never comes back with the same create revision.
	floor int64
}

// registerModel: a write is accepted only with a token that is not too low, and a read returns what
// the last accepted write wrote.
var registerModel = porcupine.Model{
	Init: func() any { return register{} },
	Step: func(state, input, _ any) (bool, any) {
		s, o := state.(register), input.(operation)
		switch {
		case o.Kind == read:
			return o.Value == s.value, s
		case o.Answer == refused:
			s.floor = max(s.floor, o.Token+1)
			return true, s
		case o.Token >= s.floor:
			return true, register{o.Value, o.Token}
		}
		return o.Answer != accepted, s // of unknown ones some are refused
	},
	DescribeOperation: func(input, _ any) string { return input.(operation).String() },
	DescribeState: func(state any) string {
		s := state.(register)
		return fmt.Sprintf("%q, tokens from %d on", s.value, s.floor)
	},
}

// registerUntil is the history of a register by what had returned at a moment. A write whose answer
// is not known may have been carried out at any later time, or never. If nobody has read its value,
// the history explains itself without it: such a write allows nothing. If somebody has, it was
// carried out before that read returned.
func registerUntil(all []operation, at int64) []porcupine.Operation {
	seen := map[string]int64{} // when a read of the value first returned
	var kept []operation
	for _, o := range all {
		if o.Kind != read || o.Return == 0 || o.Return > at {
			continue
		}
		kept = append(kept, o)
		if first, known := seen[o.Value]; !known || o.Return < first {
			seen[o.Value] = o.Return
		}
	}
	for _, o := range all {
		switch first, wasRead := seen[o.Value]; {
		case o.Kind != write || o.Call > at:
			continue
		case o.Return != 0 && o.Return <= at:
		case wasRead:
			o.Answer, o.Return = "", max(first, o.Call)
		default:
			continue
		}
		kept = append(kept, o)
	}
	return numbered(kept)
}
