//go:build linux

package main

import (
	"errors"
	"slices"

	"leasehold/e2e/harness"
)

// roads lays faults over each other: what one of them heals may still be cut by
// another.
type roads struct {
	network *harness.Network
	lossOf  map[int]map[harness.Way]int // by fault; in percent, 100 is cut
}

func newRoads() roads { return roads{lossOf: map[int]map[harness.Way]int{}} }

// set has a fault lose so much of what goes these ways.
func (r roads) set(fault, percent int, ways []harness.Way) error {
	loss := map[harness.Way]int{}
	for _, w := range ways {
		loss[w] = percent
	}
	r.lossOf[fault] = loss
	return r.apply(ways)
}

// clear ends a fault.
func (r roads) clear(fault int) error {
	var ways []harness.Way
	for w := range r.lossOf[fault] {
		ways = append(ways, w)
	}
	delete(r.lossOf, fault)
	return r.apply(ways)
}

func (r roads) apply(ways []harness.Way) error {
	byLoss := map[int][]harness.Way{}
	for _, w := range ways {
		worst := 0
		for _, loss := range r.lossOf {
			worst = max(worst, loss[w])
		}
		byLoss[worst] = append(byLoss[worst], w)
	}
	var err error
	for loss, ways := range byLoss {
		switch loss {
		case 0:
			err = errors.Join(err, r.network.Heal(ways...))
		case 100:
			err = errors.Join(err, r.network.Cut(ways...))
		default:
			err = errors.Join(err, r.network.Lose(loss, ways...))
		}
	}
	return err
}

// touched tells if anything between a node and one of the others is cut or lossy.
func (r roads) touched(node *harness.Node, others []*harness.Node) bool {
	for _, loss := range r.lossOf {
		for w := range loss {
			if w.From == node && slices.Contains(others, w.To) || w.To == node && slices.Contains(others, w.From) {
				return true
			}
		}
	}
	return false
}
