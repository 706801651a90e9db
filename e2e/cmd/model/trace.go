//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// event is a line of a trace: @ TICK ACTOR TEXT.
type event struct {
	tick        int
	actor, text string
}

var eventLine = regexp.MustCompile(
	`^@ (\d+) (etcd|operator|world|[ab]\.(?:elector|replaced|guard|spawner|job|next)) (.+)$`)

const longestTrace = 100 // that a reader follows

func (c *checker) readTrace(row row) ([]event, error) {
	all, err := lines(c.kept(row, ".txt"))
	if err != nil {
		return nil, fmt.Errorf("%w; bin/model -update -only %s finds it", err, row.name())
	}
	return parseTrace(all)
}

func parseTrace(all []string) (events []event, err error) {
	for _, line := range all {
		m := eventLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("not a line of a trace: %q", line)
		}
		tick, err := strconv.Atoi(m[1])
		if err != nil {
			return nil, err
		}
		events = append(events, event{tick, m[2], m[3]})
	}
	if len(all) > longestTrace {
		return nil, fmt.Errorf("the trace has %d lines: nobody reads more than %d",
			len(all), longestTrace)
	}
	return events, nil
}

// kept is a file of a switch.
func (c *checker) kept(row row, suffix string) string {
	return filepath.Join(c.dir, "traces", c.key(row)+suffix)
}

// key names the files of a switch: by its name and, if an earlier row has that too, by its model or
// by the property that breaks.
func (c *checker) key(row row) string {
	for _, earlier := range c.switches.rows {
		switch {
		case &earlier.cells[0] == &row.cells[0]:
			return row.name()
		case earlier.name() != row.name():
		case earlier.get("model") != row.get("model"):
			return row.name() + "-" + strings.TrimSuffix(row.get("model"), ".pml")
		default:
			return row.name() + "-" + row.get("breaks")
		}
	}
	return row.name()
}

func (c *checker) keep(row row, r result) error {
	if _, err := parseTrace(r.Trace); err != nil {
		return err
	}
	err := os.WriteFile(c.kept(row, ".txt"), []byte(text(r.Trace)), 0o644)
	if r.Seconds > c.slow {
		return errors.Join(err, os.WriteFile(c.kept(row, ".trail"), r.Trail, 0o644))
	}
	if errTrail := os.Remove(c.kept(row, ".trail")); !errors.Is(errTrail, os.ErrNotExist) {
		err = errors.Join(err, errTrail)
	}
	return err
}

// compare reports the first line in which a trace differs from the kept one.
func (c *checker) compare(row row, found []string) error {
	kept, err := lines(c.kept(row, ".txt"))
	if err != nil {
		return err
	}
	return differ(kept, found)
}

func differ(kept, found []string) error {
	line := func(of []string, i int) string {
		if i < len(of) {
			return of[i]
		}
		return "(the end)"
	}
	for i := range max(len(kept), len(found)) {
		if a, b := line(kept, i), line(found, i); a != b {
			return fmt.Errorf("line %d of the kept trace is not found again:\n"+
				"  kept  %s\n  found %s\n"+
				"after a change of the model run bin/model -update", i+1, a, b)
		}
	}
	return nil
}

// violates reports whether pan has found that the property breaks.
func violates(r result, property string) error {
	switch {
	case r.Violation == "" && r.Cut != "":
		return fmt.Errorf("no violation, but the search is not complete: %s", r.Cut)
	case r.Violation == "":
		return fmt.Errorf("spin finds no violation in all %d states: what the switch turns off is "+
			"superfluous, or not modelled", r.States)
	case r.Property == "":
		return fmt.Errorf("spin finds an error that is no property's: %s", r.Violation)
	case r.Property != property:
		return fmt.Errorf("%s breaks, want %s: %s", r.Property, property, r.Violation)
	}
	return nil
}

// properties are what must not break, by the comment beside its assertion in the model.
var properties = map[string]string{
	"never two jobs":                          "two-jobs",
	"never on two machines":                   "two-machines",
	"never revoked before the hook is over":   "hook-unended",
	"tokens rise":                             "token",
	"never revoked before the job has exited": "early-revoke",
	"never run again in one term":             "run-again",
	"never started after a stop":              "after-stop",
	"never thawed after a stop":               "after-stop",
}

var (
	failedLine = regexp.MustCompile(`(?m)^spin: \S+:(\d+), Error: assertion violated`)
	comment    = regexp.MustCompile(`assert\(.*/\* (.*) \*/`)
)

// property finds the property that breaks at the end of a replay; "", if it is another error.
func (s search) property(replay string) (string, error) {
	if strings.Contains(replay, "START OF CYCLE") {
		return "no-leader", nil
	}
	failed := failedLine.FindStringSubmatch(replay)
	if failed == nil {
		return "", nil
	}
	model, err := lines(s.model)
	if n, _ := strconv.Atoi(failed[1]); n <= len(model) {
		if c := comment.FindStringSubmatch(model[n-1]); c != nil {
			return properties[c[1]], err
		}
	}
	return "", err
}
