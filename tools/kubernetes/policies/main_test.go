//go:build linux

package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func pod(namespace, name, node, address string) *core.Pod {
	p := &core.Pod{}
	p.Namespace, p.Name, p.Labels = namespace, name, map[string]string{"app": name}
	p.Spec.NodeName, p.Status.PodIP = node, address
	return p
}

func TestRules(t *testing.T) {
	port, protocol := intstr.FromInt32(2379), core.ProtocolTCP
	policy := &networking.NetworkPolicy{}
	policy.Namespace = "mine"
	policy.Spec = networking.NetworkPolicySpec{
		PodSelector: meta.LabelSelector{MatchLabels: map[string]string{"app": "etcd"}},
		PolicyTypes: []networking.PolicyType{networking.PolicyTypeIngress},
		Ingress: []networking.NetworkPolicyIngressRule{{
			Ports: []networking.NetworkPolicyPort{{Port: &port, Protocol: &protocol}},
			From: []networking.NetworkPolicyPeer{{
				NamespaceSelector: &meta.LabelSelector{},
				PodSelector: &meta.LabelSelector{
					MatchLabels: map[string]string{"app": "job"},
				},
			}},
		}},
	}
	namespace := &core.Namespace{}
	namespace.Name = "mine"
	s := state{
		namespaces: []*core.Namespace{namespace},
		policies:   []*networking.NetworkPolicy{policy},
		pods: []*core.Pod{
			pod("mine", "etcd", "node1", "10.97.1.2"), pod("mine", "job", "node2", "10.97.2.2"),
			pod("mine", "other", "node2", "10.97.2.3"),
		},
	}
	rules, err := s.rules("node1")
	if err != nil {
		t.Fatal(err)
	}
	var in []string
	for line := range strings.Lines(rules) {
		if strings.HasPrefix(line, "ip daddr") {
			in = append(in, strings.TrimSpace(line))
		}
	}
	want := []string{
		"ip daddr 10.97.1.2 ip saddr { 10.97.2.2 } tcp dport 2379 accept",
		"ip daddr 10.97.1.2 counter drop",
	}
	if !slices.Equal(in, want) {
		t.Errorf("%q, want %q", in, want)
	}
	if rules, err := s.rules("node2"); err != nil || strings.Contains(rules, "10.97.") {
		t.Errorf("a node without a selected pod has rules (%v):\n%s", err, rules)
	}
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("skipped: there is no nft here")
	}
	check := exec.Command(nft, "--check", "-f", "-")
	check.Stdin = strings.NewReader(rules)
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("nft: %v\n%s\n%s", err, out, rules)
	}
}
