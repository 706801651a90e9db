//go:build linux

package config

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"leasehold/internal/suggest"
)

// faults gathers what is wrong with the configuration, as far as it matters to the use.
type faults struct {
	use   Use
	names []string // of the variables at fault, without the prefix
	found []error
}

// add notes a fault of a variable. As a convenience to callers it does nothing where the format is
// %w and the error nil.
func (f *faults) add(name, format string, args ...any) {
	if format == "%w" && args[0] == nil {
		return
	}
	f.names = append(f.names, name)
	if f.matters(name) {
		what := fmt.Errorf(format, args...)
		f.found = append(f.found, fmt.Errorf("%s_%s: %w", Prefix, name, what))
	}
}

func (f *faults) has(name string) bool { return slices.Contains(f.names, name) }

// matters reports whether the use looks at the variable.
func (f *faults) matters(name string) bool {
	switch f.use {
	case ForCheck:
		return name == "LISTEN"
	case ForStatus:
		return strings.HasPrefix(name, "TLS_") || slices.Contains([]string{
			"ENDPOINTS", "ELECTION", "USERNAME", "PASSWORD", "PASSWORD_FILE", "DIAL_TIMEOUT",
		}, name)
	default:
		return true
	}
}

// otherNames are names that are no faults although no setting has them: what Kubernetes puts into
// each container for a Service whose name starts with "leasehold", and the job's variables, which a
// daemon started by a job finds.
var otherNames = regexp.MustCompile(`^((.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT|` +
	`PORT_\d+_(TCP|UDP|SCTP)(_.+)?)|KEY|FENCING_TOKEN|LEASE_ID)$`)

// unknown notes the variables that no setting has, for a misspelt one would silently leave the
// default in force.
func (f *faults) unknown(set map[string]bool, known []Variable) {
	if f.use == ForCheck {
		return
	}
	var names []string
	for _, v := range known {
		names = append(names, v.Name)
		delete(set, v.Name)
	}
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for name := range set {
			if !otherNames.MatchString(name) && !yield(name) {
				return
			}
		}
	}) {
		advice := "unset it (leasehold help names all variables)"
		if near := suggest.Nearest(name, names); near != "" {
			advice = "did you mean " + Prefix + "_" + near + "?"
		}
		f.found = append(f.found, fmt.Errorf("%s_%s: unknown variable: %s", Prefix, name, advice))
	}
}
