//go:build linux

package check

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"leasehold/e2e/harness"
)

// Machine is one of a daemon's state machines, as its log names it.
type Machine string

// The machines. Each elector has a candidate and a handle of its own. The others are the guard's.
const (
	CandidateMachine Machine = "candidate" // election/state.go
	HandleMachine    Machine = "handle"    // supervisor/job.go: the job, as the elector knows it
	GuardMachine     Machine = "guard"     // supervisor/guard/job.go
	ElectorMachine   Machine = "elector"   // supervisor/guard/elector.go: the process
)

// ofElector reports whether the machine is one of the elector's own.
func (m Machine) ofElector() bool { return m == CandidateMachine || m == HandleMachine }

// machines have their first states here, and those in which they allow a job to live.
var machines = map[Machine]struct {
	first string
	lives []string
}{
	CandidateMachine: {"connecting", []string{"leading", "suspended", "stopping"}},
	HandleMachine:    {"none", []string{"starting", "running", "frozen", "stopping"}},
	GuardMachine: {"idle", []string{
		"forking", "running", "freezing", "frozen", "thawing", "stopping", "killing",
	}},
	ElectorMachine: {"starting", nil},
}

// Transition is a line of a daemon's log that tells of one.
type Transition struct {
	At       time.Time
	Machine  Machine
	From, To string
	// another: it is none, but another elector begins, with the machine in the state To.
	another bool
}

const clock = "15:04:05.000"

func (t Transition) String() string {
	return fmt.Sprintf("%s: %s -> %s at %s",
		t.Machine, t.From, t.To, t.At.Format(clock))
}

// Relation holds the transitions that the model has.
type Relation map[Machine]map[[2]string]bool

// ReadRelation reads the model's transitions: a line for each, "transition MACHINE FROM TO".
func ReadRelation() (Relation, error) {
	root, err := harness.ModuleRoot()
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", "model", "transitions.txt"))
	if err != nil {
		return nil, err
	}
	r, err := parseRelation(string(text))
	if err == nil {
		// To the model, the hook that follows the job is the last part of the kill.
		r[GuardMachine][[2]string{"killing", "post-stop"}] = true
		r[GuardMachine][[2]string{"post-stop", "idle"}] = true
	}
	return r, err
}

func parseRelation(text string) (Relation, error) {
	r := Relation{}
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] == "#" {
			continue
		}
		if len(fields) != 4 || fields[0] != "transition" {
			return nil, fmt.Errorf("read the model's transitions: %q is none", line)
		}
		m := Machine(fields[1])
		if r[m] == nil {
			r[m] = map[[2]string]bool{}
		}
		r[m][[2]string{fields[2], fields[3]}] = true
	}
	for m := range machines {
		if len(r[m]) == 0 {
			return nil, fmt.Errorf("the model has no transition of %s", m)
		}
	}
	return r, nil
}

// messageDelay is by how much two processes' lines may be out of order: a line has milliseconds.
const messageDelay = 5 * time.Millisecond

// noticeDelay is how much later a daemon may write that it lost lines than the next one that it
// keeps: another goroutine writes that.
const noticeDelay = time.Second

// Counts are of transitions.
type Counts map[Machine]int

// Add adds others to them.
func (c Counts) Add(others Counts) {
	for m, n := range others {
		c[m] += n
	}
}

// String lists them by machine.
func (c Counts) String() string {
	var all []string
	for _, m := range slices.Sorted(maps.Keys(c)) {
		all = append(all, fmt.Sprintf("%s %d", m, c[m]))
	}
	return strings.Join(all, ", ")
}

// Complete returns an error if a machine has no transition: then nothing was checked of it.
func (c Counts) Complete() error {
	var found []error
	for m := range machines {
		if c[m] == 0 {
			found = append(found, fmt.Errorf("the %s has logged no transition", m))
		}
	}
	return errors.Join(found...)
}

// Trace checks what a daemon logged at level debug, and counts its transitions. Each must be one of
// the model's, and begin where the machine's last one ended: at its first state before any. A
// killed process may leave out its last lines. An elector that takes the place of another one was
// started by the guard, and begins with what the guard knows of the job. While the guard's job
// lives, the handle knows of it, and while the handle's does, the candidate is in a term.
func (r Relation) Trace(log string) (Counts, error) {
	lines, lost := parseTrace(log)
	counts := Counts{}
	var found []error
	for m, all := range lines {
		machine, known := machines[m]
		if !known {
			found = append(found, fmt.Errorf("%v: the model has no such machine", all[0]))
			continue
		}
		state, since := machine.first, time.Time{}
		for _, t := range all {
			if !t.another {
				counts[m]++
				lineLost := slices.ContainsFunc(lost, func(at time.Time) bool {
					return !at.Before(since) && at.Before(t.At.Add(noticeDelay))
				})
				found = append(found, r.check(t, state, lineLost))
			}
			state, since = t.To, t.At
		}
	}
	if len(lost) == 0 {
		found = append(found, replacements(lines),
			together(lines, GuardMachine, HandleMachine),
			together(lines, HandleMachine, CandidateMachine))
	}
	return counts, errors.Join(found...)
}

// check checks one transition of a machine in a state. That is not known if a line was lost.
func (r Relation) check(t Transition, state string, lineLost bool) error {
	var found []error
	if t.From != t.To && !r[t.Machine][[2]string{t.From, t.To}] {
		found = append(found, fmt.Errorf("%v: the model has no such transition", t))
	}
	if t.From != state && !lineLost {
		found = append(found, fmt.Errorf("%v: it was %s", t, state))
	}
	return errors.Join(found...)
}

// replacements checks that each elector that takes the place of another one is one that the guard
// has started, and not the first.
func replacements(lines map[Machine][]Transition) error {
	before := 0 // the elector that did so last
	for _, t := range lines[HandleMachine] {
		if !t.another {
			continue
		}
		started := -1
		for _, e := range lines[ElectorMachine] {
			if e.To == "running" && !e.At.After(t.At) {
				started++
			}
		}
		if started <= before {
			return fmt.Errorf("an elector takes the place of another one at %s, and the guard has "+
				"started none", t.At.Format(clock))
		}
		before = started
	}
	return nil
}

// together checks that the outer machine allows a job to live as long as the inner one does. It
// goes by what is known for sure: what followed the last line of a killed process is not.
func together(lines map[Machine][]Transition, inner, outer Machine) error {
	with, without := known(lines, inner, true), known(lines, outer, false)
	for _, both := range with.And(without) {
		if both.Length() > messageDelay {
			return fmt.Errorf("from %s on, for %v, the job was alive for the %s, "+
				"and the %s knew of none", time.Unix(0, int64(both.From)).UTC().Format(clock),
				both.Length(), inner, outer)
		}
	}
	return nil
}

// known is when a machine was in a state in which a job lives, or was not, since the Unix epoch.
// The last line of its process is the end of what is known. Of an elector that was replaced,
// nothing is known after the last line of that machine.
func known(lines map[Machine][]Transition, m Machine, lives bool) Intervals {
	end := time.Duration(0)
	for other, all := range lines {
		if len(all) > 0 && other.ofElector() == m.ofElector() {
			end = max(end, sinceEpoch(all[len(all)-1]))
		}
	}
	var all []Interval
	from, state, sure := time.Duration(0), machines[m].first, true
	add := func(to time.Duration) {
		if sure && slices.Contains(machines[m].lives, state) == lives {
			all = append(all, Interval{from, to})
		}
	}
	for _, t := range lines[m] {
		if !t.another { // else the last line was that of a process that was killed
			add(sinceEpoch(t))
		}
		// A new candidate takes a while until it is in the term that its job is in.
		from, state, sure = sinceEpoch(t), t.To, !t.another || m == HandleMachine
	}
	add(end)
	return Merge(all...)
}

func sinceEpoch(t Transition) time.Duration { return time.Duration(t.At.UnixNano()) }

var (
	// begins is where a line begins, also behind what a killed process or the job left unfinished.
	begins     = regexp.MustCompile(`time=\d{4}-\d\d-\d\dT|\{"time":"\d{4}-\d\d-\d\dT`)
	transition = regexp.MustCompile(
		`^time=(\S+) level=\S+ msg=.*? from=(\S+) to=(\S+)(?: .*)?\n$`)
	machineOf = regexp.MustCompile(` machine=(\S+) `)
	linesLost = regexp.MustCompile(`^time=(\S+) .* msg="standard error was blocked: `)
	takeOver  = regexp.MustCompile(`^(?:time=|\{"time":")([^ "]+).*` +
		`(?:msg=|"msg":)"elector takes the place of another one".*[ "]job"?[=:]"?(\w+)`)
)

// parseTrace finds the transitions in a log, in the order of each machine's lines, and when the
// daemon wrote that it had to drop lines.
func parseTrace(log string) (lines map[Machine][]Transition, lost []time.Time) {
	lines = map[Machine][]Transition{}
	for line := range strings.Lines(log) {
		starts := begins.FindAllStringIndex(line, -1)
		if len(starts) == 0 {
			continue
		}
		// Of two in one, the first was cut.
		line = line[starts[len(starts)-1][0]:]
		if t, found := parseTransition(line); found {
			lines[t.Machine] = append(lines[t.Machine], t)
		}
		if m := linesLost.FindStringSubmatch(line); m != nil {
			if at, err := time.Parse(time.RFC3339Nano, m[1]); err == nil {
				lost = append(lost, at)
			}
		}
		if m := takeOver.FindStringSubmatch(line); m != nil {
			if at, err := time.Parse(time.RFC3339Nano, m[1]); err == nil {
				t := Transition{At: at, Machine: HandleMachine, To: m[2], another: true}
				lines[t.Machine] = append(lines[t.Machine], t)
				t.Machine, t.To = CandidateMachine, machines[CandidateMachine].first
				lines[t.Machine] = append(lines[t.Machine], t)
			}
		}
	}
	return lines, lost
}

func parseTransition(line string) (t Transition, found bool) {
	var at string
	if strings.HasPrefix(line, "{") {
		var fields struct{ Time, Machine, From, To string }
		if json.Unmarshal([]byte(line), &fields) != nil {
			return t, false // cut
		}
		at, t.Machine, t.From, t.To = fields.Time, Machine(fields.Machine), fields.From, fields.To
	} else if m := transition.FindStringSubmatch(line); m != nil {
		at, t.From, t.To = m[1], m[2], m[3]
		if m := machineOf.FindStringSubmatch(line); m != nil {
			t.Machine = Machine(m[1])
		}
	}
	// Users read the candidate's lines: they do without the name.
	t.Machine = cmp.Or(t.Machine, CandidateMachine)
	t.At, _ = time.Parse(time.RFC3339Nano, at)
	return t, t.From != "" && t.To != "" && !t.At.IsZero()
}
