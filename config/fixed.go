//go:build linux

package config

import (
	"cmp"
	"fmt"
	"strings"

	"leasehold/internal/quote"
)

// Fixed lists the settings that only a new start of the daemon can change, as NAME=value, with
// values that can be compared. Most are of the guard.
func (c *Config) Fixed() []string {
	duration := func(d Duration) string {
		if !d.given {
			return ""
		}
		return d.String()
	}
	words := func(command Command) string {
		if command.Argv == nil {
			return ""
		}
		return fmt.Sprintf("%q", command.Argv)
	}
	return []string{
		"ELECTION=" + c.Election,
		"IDENTITY=" + c.Identity,
		"TTL=" + c.TTL.String(),
		"MARGIN=" + duration(c.Margin),
		"CONTACT_LOSS=" + c.ContactLoss,
		"STOP_SIGNAL=" + c.StopSignal.String(),
		"STOP_GRACE=" + c.StopGrace.String(),
		"NO_NEW_PRIVS=" + c.NoNewPrivs,
		"NOTIFY=" + c.Notify,
		"PRE_START=" + words(c.PreStart),
		"POST_STOP=" + words(c.PostStop),
		"POST_STOP_TIMEOUT=" + duration(c.PostStopTimeout),
		"WATCHDOG=" + c.Watchdog.String(),
		"LISTEN=" + c.Listen,
		"STATE_DIR=" + c.StateDir,
		"LOG_FORMAT=" + c.Log.Format,
		// The elector has these. But the last one would leave its address in the Service.
		"KUBERNETES_SERVICE=" + c.Kubernetes.Service,
		"KUBERNETES_POD_IP=" + c.Kubernetes.PodIP,
	}
}

// FixedNames are the names of these settings, without the prefix.
func FixedNames() (names []string) {
	for _, entry := range new(Config).Fixed() {
		name, _, _ := strings.Cut(entry, "=")
		names = append(names, name)
	}
	return names
}

// CompareFixed returns an *Error that names each of those settings that the configuration has with
// another value, or nil. It ignores those that it does not know.
func (c *Config) CompareFixed(fixed []string) error {
	now := map[string]string{}
	for _, entry := range c.Fixed() {
		name, value, _ := strings.Cut(entry, "=")
		now[name] = value
	}
	var wrong []error
	for _, entry := range fixed {
		name, value, _ := strings.Cut(entry, "=")
		if other, known := now[name]; known && other != value {
			wrong = append(wrong, fmt.Errorf("%s_%s can't be changed by a reload, from %s to %s:"+
				" restart the daemon", Prefix, name, shownFixed(value), shownFixed(other)))
		}
	}
	if len(wrong) > 0 {
		return &Error{Problems: wrong}
	}
	return nil
}

func shownFixed(value string) string { return quote.Word(cmp.Or(value, "unset")) }
