//go:build linux

package config

import (
	"strings"
	"testing"
)

// The settings of a Service are refused unless they could work, each by its name.
func TestConfig_Kubernetes(t *testing.T) {
	const service, pod = "KUBERNETES_SERVICE=leader", "KUBERNETES_POD_IP=10.1.2.3"
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	for settings, want := range map[string]string{
		"":                                     "",
		pod:                                    "",
		service + " " + pod:                    "",
		service + " KUBERNETES_POD_IP=fd00::1": "",
		service:                                "KUBERNETES_POD_IP: missing beside LEASEHOLD_KUB",
		service + " KUBERNETES_POD_IP=pod-0":   `KUBERNETES_POD_IP: "pod-0" is no address of a pod`,
		service + " KUBERNETES_POD_IP=0.0.0.0": `KUBERNETES_POD_IP: "0.0.0.0" is no address`,
		service + " KUBERNETES_POD_IP=::1":     `KUBERNETES_POD_IP: "::1" is no address`,
		service + " KUBERNETES_POD_IP=fe80::1%eth0": "KUBERNETES_POD_IP: ",
		"KUBERNETES_SERVICE=jobs/leader " + pod:     `KUBERNETES_SERVICE: "jobs/leader" is no name`,
		"KUBERNETES_SERVICE=leader.jobs " + pod:     `KUBERNETES_SERVICE: "leader.jobs" is no name`,
		"KUBERNETES_SERVICE=- " + pod:               `KUBERNETES_SERVICE: "-" is no name`,
		"KUBERNETES_SERVICE_NAME=a":                 "KUBERNETES_SERVICE_NAME: unknown variable",
	} {
		for _, use := range []Use{ForRun, ForElect} {
			set := append([]string{"ELECTION=e"}, strings.Fields(settings)...)
			_, err := load(t, use, set...)
			switch {
			case want == "" && err != nil, want != "" && err == nil:
				t.Errorf("%s of %q: %v, want %q", use, settings, err, want)
			case want != "" && !strings.HasPrefix(err.Error(), Prefix+"_"+want):
				t.Errorf("%s of %q: %v, want %q", use, settings, err, want)
			}
		}
	}
	cfg, err := load(t, ForRun, "ELECTION=e", service, "KUBERNETES_POD_IP=::ffff:10.1.2.3")
	address, _ := cfg.Kubernetes.Address()
	if err != nil || address.String() != "10.1.2.3" || cfg.Kubernetes.Server() != "10.96.0.1:443" {
		t.Errorf("address %s, server %s (%v)", address, cfg.Kubernetes.Server(), err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	_, err = load(t, ForRun, "ELECTION=e", service, pod)
	const outside = "LEASEHOLD_KUBERNETES_SERVICE: KUBERNETES_SERVICE_HOST"
	if err == nil || !strings.Contains(err.Error(), outside) {
		t.Errorf("outside of Kubernetes: %v", err)
	}
	// Commands that ask do not need it.
	if _, err := load(t, ForStatus, "ELECTION=e", service); err != nil {
		t.Error(err)
	}
}
