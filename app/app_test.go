//go:build linux

package app

import (
	"os"
	"strings"
	"testing"

	"leasehold/config"
)

// load sets NAME=value pairs (without the prefix) in an environment that has no other settings, and
// reads it.
func load(t *testing.T, use config.Use, settings ...string) config.Config {
	t.Helper()
	for _, entry := range os.Environ() {
		if name, _, _ := strings.Cut(entry, "="); strings.HasPrefix(name, config.Prefix+"_") {
			t.Setenv(name, "") // nothing counts as unset
		}
	}
	for _, setting := range settings {
		name, value, _ := strings.Cut(setting, "=")
		t.Setenv(config.Prefix+"_"+name, value)
	}
	cfg, err := config.Load(use)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}
