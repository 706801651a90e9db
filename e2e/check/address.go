//go:build linux

package check

import (
	"cmp"
	"fmt"
	"time"

	"leasehold/e2e/harness"
)

// AddressTwice is a time in which two machines had the virtual address at once.
type AddressTwice struct {
	First, Second string // machines; the first had it earlier
	During        Interval
}

func (a AddressTwice) String() string {
	return fmt.Sprintf("%s and %s both had the address for %v", a.First, a.Second,
		a.During.Length())
}

// AddressesTwice lists when two machines had the address at once, until now.
func AddressesTwice(stays []harness.Stay, now time.Duration) (found []AddressTwice) {
	for i, second := range stays {
		for _, first := range stays[:i] {
			to := min(cmp.Or(first.To, now), cmp.Or(second.To, now))
			both := Interval{From: second.From, To: to} // the stays are in order
			if first.Machine != second.Machine && both.Length() > 0 {
				found = append(found, AddressTwice{first.Machine, second.Machine, both})
			}
		}
	}
	return found
}
