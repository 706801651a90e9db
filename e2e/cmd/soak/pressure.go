//go:build linux

package main

import (
	"os"
	"strconv"
	"strings"
	"time"

	"leasehold/e2e/harness"
)

// pressure is the kernel's account of the time in which some process of the
// machine waited for a processor.
type pressure struct{ samples []sample }

type sample struct {
	at      time.Duration
	stalled time.Duration // since the machine's start
}

const (
	pressureKept   = 30 * time.Second
	pressureAround = 100 * time.Millisecond // more than a tick of the checker
)

// take adds a sample; without the kernel's account there are none.
func (p *pressure) take() {
	data, err := os.ReadFile("/proc/pressure/cpu")
	if err != nil {
		return
	}
	some, _, _ := strings.Cut(string(data), "\n")
	_, total, _ := strings.Cut(some, "total=")
	us, err := strconv.ParseInt(total, 10, 64)
	if err != nil {
		return
	}
	p.samples = append(p.samples, sample{harness.Now(), time.Duration(us) * time.Microsecond})
	for p.samples[0].at < harness.Now()-pressureKept {
		p.samples = p.samples[1:]
	}
}

// stalled is the share of a time, widened to the samples around it.
func (p *pressure) stalled(from, to time.Duration) float64 {
	var first, last sample
	for _, s := range p.samples {
		if s.at <= from || first.at == 0 {
			first = s
		}
		last = s
		if s.at >= to {
			break
		}
	}
	if last.at <= first.at {
		return 0
	}
	return float64(last.stalled-first.stalled) / float64(last.at-first.at)
}

// feel takes a sample, and gives the deeds of just before their share.
func (k *checker) feel(now time.Duration) {
	k.pressure.take()
	for i := range k.deeds {
		if d := &k.deeds[i]; d.stalled < 0 && now > d.at+pressureAround {
			d.stalled = k.pressure.stalled(d.at-pressureAround/2, d.at+pressureAround)
		}
	}
}
