//go:build linux

package config

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"leasehold/internal/quote"
	"leasehold/internal/suggest"
)

// problems collects what is wrong with the configuration, as far as it matters to the use.
type problems struct {
	use   Use
	names []string // of the variables that are wrong, without the prefix
	found []error
}

// add notes a problem of a variable. It does nothing if the format is %w and the error is nil,
// which saves its callers a check.
func (p *problems) add(name, format string, args ...any) {
	if format == "%w" && args[0] == nil {
		return
	}
	p.names = append(p.names, name)
	if p.matters(name) {
		what := fmt.Errorf(format, args...)
		p.found = append(p.found, fmt.Errorf("%s_%s: %w", Prefix, name, what))
	}
}

func (p *problems) has(name string) bool { return slices.Contains(p.names, name) }

// matters reports whether the use looks at the variable.
func (p *problems) matters(name string) bool {
	switch p.use {
	case ForCheck:
		return name == "LISTEN"
	case ForStatus, ForList:
		if name == "ELECTION" {
			return p.use == ForStatus
		}
		return strings.HasPrefix(name, "TLS_") || slices.Contains([]string{
			"ENDPOINTS", "USERNAME", "PASSWORD", "PASSWORD_FILE", "DIAL_TIMEOUT",
		}, name)
	default:
		return true
	}
}

// otherNames are names that are allowed although they are no settings: those that Kubernetes puts
// into each container for a Service whose name starts with "leasehold", and the job's variables,
// which a daemon finds if a job starts it.
var otherNames = regexp.MustCompile(`^((.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT|` +
	`PORT_\d+_(TCP|UDP|SCTP)(_.+)?)|KEY|FENCING_TOKEN|LEASE_ID|REASON)$`)

// unknown notes the variables that are no settings. A misspelt one would silently leave the default
// in force.
func (p *problems) unknown(set map[string]bool, known []Variable) {
	if p.use == ForCheck {
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
		p.found = append(p.found,
			fmt.Errorf("%s_%s: unknown variable: %s", Prefix, quote.Name(name), advice))
	}
}
