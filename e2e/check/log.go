//go:build linux

package check

import (
	"regexp"
	"slices"
	"strings"
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
	handover     = regexp.MustCompile(`time=(\S+) .*msg="handing over" .*\btarget=(\S+) by=\S+@`)
	failback     = regexp.MustCompile(
		`time=(\S+) .*msg="handing over" .*\btarget=(\S+) by=failback\b`)
	replacement = regexp.MustCompile(
		`time=(\S+) .*msg="elector .*(exited|killing)\b.* starting another`)
	crashed  = regexp.MustCompile(`msg="elector exited: [^"]*" .*\bexit_code=2\b`)
	jobState = regexp.MustCompile(`time=(\S+) .*msg="job (started|exited|killed)`)
)

// JobStates lists when a daemon wrote that its job "started", "exited" or was "killed".
func JobStates(log string) []Entry { return entries(log, jobState) }

// TermTaken lists when a daemon wrote that etcd had taken its term away.
func TermTaken(log string) []Entry { return entries(log, termTaken) }

// Handovers lists when a leader wrote that it hands over because somebody (user@host) has asked for
// it, and to whom.
func Handovers(log string) []Entry { return entries(log, handover) }

// Failbacks lists when a leader wrote that it hands over by itself to a candidate with a higher
// priority, and to whom.
func Failbacks(log string) []Entry { return entries(log, failback) }

// Replacements lists when a guard wrote that it replaces an elector that "exited" by itself, or one
// that hangs and that it was "killing".
func Replacements(log string) []Entry { return entries(log, replacement) }

// Crashed reports whether a guard wrote that an elector exited as a Go program does after a panic.
func Crashed(log string) bool { return crashed.MatchString(log) }

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

var (
	askedToStop = regexp.MustCompile(
		`^time=(\S+) .*msg="job asked to stop: .* kill_by_in=(\S+)`)
	killBegins = regexp.MustCompile(`^time=(\S+) .* machine=guard from=\S+ to=(killing) `)
	killByOver = regexp.MustCompile(
		`^time=(\S+) .*msg="job killed: .* reason=kill_by .*timer_latency=(\S+)`)
)

// KillByLatencies lists by how much the guard served kill-by late, where the job was killed for it.
// What the guard says by itself is the worst latency of that job, which may be that of stop-at. So
// it counts no more than what lies between kill-by and the kill.
func KillByLatencies(log string) (found []Entry) {
	var killBy, killed time.Time
	for line := range strings.Lines(log) {
		if stop := entries(line, askedToStop); len(stop) > 0 {
			if in, err := time.ParseDuration(stop[0].Match); err == nil {
				killBy = stop[0].At.Add(in)
			}
		}
		if kill := entries(line, killBegins); len(kill) > 0 {
			killed = kill[0].At
		}
		for _, e := range entries(line, killByOver) {
			by, err := time.ParseDuration(e.Match)
			if err == nil && !killBy.IsZero() && !killed.IsZero() { // logged at debug
				by = min(by, max(0, killed.Sub(killBy)))
			}
			found = append(found, Entry{e.At, by.String()})
		}
		if jobState.MatchString(line) {
			killBy = time.Time{}
		}
	}
	return found
}

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
