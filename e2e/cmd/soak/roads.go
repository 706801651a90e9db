//go:build linux

package main

import "leasehold/e2e/harness"

// roads keeps the losses of faults.
type roads struct {
	network *harness.Network
	lossOf  map[int]*harness.Loss // by fault
}

func newRoads() roads { return roads{lossOf: map[int]*harness.Loss{}} }

// set has a fault lose so much of what goes on these links.
func (r roads) set(fault, percent int, links []harness.Link) error {
	loss, err := r.network.Lose(percent, links...)
	r.lossOf[fault] = loss
	return err
}

// clear ends a fault.
func (r roads) clear(fault int) error {
	loss := r.lossOf[fault]
	if loss == nil {
		return nil
	}
	delete(r.lossOf, fault)
	return loss.End()
}

// touched reports whether anything between a node and one of the others is cut or lossy.
func (r roads) touched(node *harness.Node, others []*harness.Node) bool {
	return r.network.Lossy(node, others...)
}
