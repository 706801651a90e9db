package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"slices"

	"github.com/anishathalye/porcupine"
)

// operation is a line of the record: see package store in e2e. What a client asked is there twice
// if it was answered.
type operation struct {
	Client   string `json:"client"`
	N        int    `json:"n"`
	Kind     string `json:"kind"`
	Register string `json:"register"`
	Token    int64  `json:"token"`
	Value    string `json:"value"`
	Call     int64  `json:"call"`
	Return   int64  `json:"return"` // 0: not answered
	Answer   string `json:"answer"`
	Why      string `json:"why"`
}

// Kinds of operations, and answers.
const (
	write    = "write"
	read     = "read"
	acquire  = "acquire"
	release  = "release"
	take     = "take"
	accepted = "accepted"
	refused  = "refused"
)

func (o operation) String() string {
	switch o.Kind {
	case write:
		return fmt.Sprintf("writes %q to %s with token %d: %s",
			o.Value, o.Register, o.Token, cmp.Or(o.Answer, "unknown"))
	case read:
		return fmt.Sprintf("reads %q from %s", o.Value, o.Register)
	case take:
		return fmt.Sprintf("token %d may be taken (%s)", o.Token, o.Why)
	}
	return fmt.Sprintf("%s %ss with token %d", o.Why, o.Kind, o.Token)
}

// history is all of a record.
type history struct {
	registers map[string][]operation
	lock      []operation // and the writes to any register

	operations, accepted, refused, unknown, terms int
}

func load(path string) (*history, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	type key struct {
		client string
		n      int
	}
	index := map[key]int{}
	var all []operation
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var o operation
		if json.Unmarshal(lines.Bytes(), &o) != nil {
			// A client was killed while it wrote: its request had not left, or the answer is not
			// known. Or the line is empty.
			continue
		}
		if o.Return != 0 && o.Return < o.Call {
			return nil, fmt.Errorf("read %s: an operation returned before it was called: %s",
				path, lines.Text())
		}
		if o.Kind == take && o.Token == 0 {
			return nil, fmt.Errorf("read %s: it is not said which term was taken: %s",
				path, lines.Text())
		}
		if i, known := index[key{o.Client, o.N}]; known {
			all[i] = o
			continue
		}
		index[key{o.Client, o.N}] = len(all)
		all = append(all, o)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return newHistory(all), nil
}

func newHistory(all []operation) *history {
	h := &history{registers: map[string][]operation{}}
	for _, o := range all {
		switch o.Kind {
		case write:
			h.registers[o.Register] = append(h.registers[o.Register], o)
			h.lock = append(h.lock, o)
			h.operations++
			switch o.Answer {
			case accepted:
				h.accepted++
			case refused:
				h.refused++
			default:
				h.unknown++
			}
		case read:
			h.registers[o.Register] = append(h.registers[o.Register], o)
			h.operations++
		case acquire:
			h.terms++
			h.lock = append(h.lock, o)
		default:
			h.lock = append(h.lock, o)
		}
	}
	return h
}

// parts are judged one by one.
func (h *history) parts() []part {
	began := forever
	for _, o := range h.lock {
		if o.Kind == write {
			began = min(began, o.Call)
		}
	}
	var parts []part
	for name, all := range h.registers {
		parts = append(parts, part{"register " + name, registerModel, func(at int64,
		) []porcupine.Operation {
			return registerUntil(all, at)
		}, began})
	}
	slices.SortFunc(parts, func(a, b part) int { return cmp.Compare(a.name, b.name) })
	return append(parts, part{"the lock", lockModel, func(at int64) []porcupine.Operation {
		return lockUntil(h.lock, at)
	}, began})
}

// numbered makes porcupine's operations. The clients get numbers, for the picture's rows.
func numbered(all []operation) []porcupine.Operation {
	slices.SortFunc(all, func(a, b operation) int { return cmp.Compare(a.Call, b.Call) })
	rows := map[string]int{}
	var operations []porcupine.Operation
	for _, o := range all {
		client := cmp.Or(o.Client, "lock")
		if o.Kind == take {
			client = "take" // these overlap
		}
		if _, known := rows[client]; !known {
			rows[client] = len(rows)
		}
		end := o.Return
		if end == 0 {
			end = forever
		}
		operations = append(operations, porcupine.Operation{
			ClientId: rows[client], Input: o, Output: o, Call: o.Call, Return: end,
		})
	}
	return operations
}

func sortedReturns(all []porcupine.Operation) []int64 {
	var returns []int64
	for _, o := range all {
		if o.Return < forever {
			returns = append(returns, o.Return)
		}
	}
	slices.Sort(returns)
	return slices.Compact(returns)
}

// before are the last n operations that were called before another returned, without it.
func before(all []porcupine.Operation, last operation, n int) []operation {
	var earlier []operation
	for _, o := range all {
		if in := o.Input.(operation); in != last && in.Call < last.Return {
			earlier = append(earlier, in)
		}
	}
	slices.SortFunc(earlier, func(a, b operation) int { return cmp.Compare(a.Call, b.Call) })
	return earlier[max(0, len(earlier)-n):]
}
