//go:build linux

package check

import (
	"regexp"
	"slices"
	"time"
)

// Entry is a line of a daemon's log that says what was looked for.
type Entry struct {
	At    time.Time
	Match string
}

var (
	timerLatency = regexp.MustCompile(`time=(\S+) .*timer_latency=(\S+)`)
	termTaken    = regexp.MustCompile(`time=(\S+) .*(the lease|the leader's key) is gone from etcd`)
	jobState     = regexp.MustCompile(`time=(\S+) .*msg="job (started|exited|killed)`)
)

// JobStates lists when a daemon wrote that its job "started", "exited" or was "killed".
func JobStates(log string) []Entry { return entries(log, jobState) }

// TermTaken lists when a daemon wrote that etcd had taken its term away.
func TermTaken(log string) []Entry { return entries(log, termTaken) }

func entries(log string, pattern *regexp.Regexp) []Entry {
	var found []Entry
	for _, m := range pattern.FindAllStringSubmatch(log, -1) {
		if at, err := time.Parse(time.RFC3339Nano, m[1]); err == nil {
			found = append(found, Entry{at, m[2]})
		}
	}
	return found
}

// Between keeps the entries written within a time.
func Between(all []Entry, from, to time.Time) []Entry {
	return slices.DeleteFunc(all, func(e Entry) bool {
		return !e.At.After(from) || !e.At.Before(to)
	})
}

// TimerLatencies lists by how much the guard served its deadlines late, by its own account. It
// writes that down when the job has exited.
func TimerLatencies(log string) []Entry { return entries(log, timerLatency) }

// Latency is the worst of TimerLatencies, 0 without any.
func Latency(all []Entry) time.Duration {
	var worst time.Duration
	for _, e := range all {
		if by, err := time.ParseDuration(e.Match); err == nil {
			worst = max(worst, by)
		}
	}
	return worst
}
