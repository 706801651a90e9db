//go:build linux

// Policies enforces the NetworkPolicies of the test cluster. The network plugins ptp and portmap
// do not.
//
//	policies KUBECONFIG DIR
//
// DIR has a network namespace for each node, by the node's name. In it policies keeps the nft table
// "policies": what a policy does not let through on the way from or to a pod is dropped there.
// Traffic between a pod and its own node is never looked at, as Kubernetes has it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: policies KUBECONFIG DIR")
		os.Exit(64)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "policies:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kubeconfig, dir string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	namespaces := factory.Core().V1().Namespaces()
	pods := factory.Core().V1().Pods()
	policies := factory.Networking().V1().NetworkPolicies()
	changed := make(chan struct{}, 1)
	change := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	for _, informer := range []cache.SharedIndexInformer{
		namespaces.Informer(), pods.Informer(), policies.Informer(),
	} {
		if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(any) { change() },
			UpdateFunc: func(any, any) { change() },
			DeleteFunc: func(any) { change() },
		}); err != nil {
			return err
		}
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	now := map[string]string{} // the rules of each node
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
		var s state
		if s.namespaces, err = namespaces.Lister().List(labels.Everything()); err != nil {
			return err
		}
		if s.pods, err = pods.Lister().List(labels.Everything()); err != nil {
			return err
		}
		// The lister has no order, and the same rules are not to be written again.
		slices.SortFunc(s.pods, func(a, b *core.Pod) int { return strings.Compare(a.Name, b.Name) })
		if s.policies, err = policies.Lister().List(labels.Everything()); err != nil {
			return err
		}
		slices.SortFunc(s.policies, func(a, b *networking.NetworkPolicy) int {
			return strings.Compare(a.Name, b.Name)
		})
		nodes, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, node := range nodes {
			rules, err := s.rules(node.Name())
			if err != nil {
				return err
			}
			if now[node.Name()] == rules {
				continue
			}
			if err := apply(ctx, filepath.Join(dir, node.Name()), rules); err != nil {
				return fmt.Errorf("%s: %w\n%s", node.Name(), err, rules)
			}
			now[node.Name()] = rules
			fmt.Println(time.Now().UTC().Format(time.RFC3339Nano), node.Name(), "has new rules")
		}
	}
}

func apply(ctx context.Context, namespace, rules string) error {
	nft := exec.CommandContext(ctx, "nsenter", "--net="+namespace, "nft", "-f", "-")
	nft.Stdin = strings.NewReader(rules)
	if out, err := nft.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, out)
	}
	return nil
}

// A state is all that the rules depend on.
type state struct {
	namespaces []*core.Namespace
	pods       []*core.Pod
	policies   []*networking.NetworkPolicy
}

// rules returns what nft has to read in a node's network namespace: the table as it was is replaced
// at once.
func (s state) rules(node string) (string, error) {
	var out, in []string
	for _, pod := range s.pods {
		if pod.Spec.NodeName != node || !hasAddress(pod) {
			continue
		}
		egress, ingress, err := s.ofPod(pod)
		if err != nil {
			return "", err
		}
		out, in = append(out, egress...), append(in, ingress...)
	}
	chain := func(name string, priority int, rules []string) string {
		return fmt.Sprintf("chain %s {\ntype filter hook forward priority %d;\n"+
			"ct state established,related accept\n%s\n}\n", name, priority,
			strings.Join(rules, "\n"))
	}
	return "table ip policies\ndelete table ip policies\ntable ip policies {\n" +
		chain("egress", 10, out) + chain("ingress", 11, in) + "}\n", nil
}

func hasAddress(pod *core.Pod) bool {
	return pod.Status.PodIP != "" && !pod.Spec.HostNetwork &&
		pod.Status.Phase != core.PodSucceeded && pod.Status.Phase != core.PodFailed
}

// ofPod returns the rules of one pod, each way. A pod that no policy selects has none.
func (s state) ofPod(pod *core.Pod) (egress, ingress []string, err error) {
	isolated := map[networking.PolicyType]bool{}
	for _, policy := range s.policies {
		selector, err := meta.LabelSelectorAsSelector(&policy.Spec.PodSelector)
		if err != nil {
			return nil, nil, err
		}
		if policy.Namespace != pod.Namespace || !selector.Matches(labels.Set(pod.Labels)) {
			continue
		}
		for _, way := range policy.Spec.PolicyTypes {
			isolated[way] = true
		}
		for _, rule := range policy.Spec.Ingress {
			peers, err := s.peers(policy.Namespace, rule.From, "saddr")
			if err != nil {
				return nil, nil, err
			}
			ingress = append(ingress, lines("ip daddr "+pod.Status.PodIP, peers, rule.Ports)...)
		}
		for _, rule := range policy.Spec.Egress {
			peers, err := s.peers(policy.Namespace, rule.To, "daddr")
			if err != nil {
				return nil, nil, err
			}
			egress = append(egress, lines("ip saddr "+pod.Status.PodIP, peers, rule.Ports)...)
		}
	}
	if isolated[networking.PolicyTypeEgress] {
		egress = append(egress, "ip saddr "+pod.Status.PodIP+" counter drop")
	}
	if isolated[networking.PolicyTypeIngress] {
		ingress = append(ingress, "ip daddr "+pod.Status.PodIP+" counter drop")
	}
	return egress, ingress, nil
}

// lines lets through each of the peers on each of the ports.
func lines(own string, peers []string, ports []networking.NetworkPolicyPort) (rules []string) {
	services := []string{""}
	if len(ports) > 0 {
		services = nil
	}
	for _, port := range ports {
		protocol := "tcp"
		if port.Protocol != nil {
			protocol = strings.ToLower(string(*port.Protocol))
		}
		switch {
		case port.Port == nil:
			services = append(services, "meta l4proto "+protocol)
		case port.Port.Type == intstr.String:
			// A name means another number in each pod. No manifest here has one: it stays shut.
		default:
			services = append(services, fmt.Sprintf("%s dport %d", protocol, port.Port.IntVal))
		}
	}
	for _, peer := range peers {
		for _, service := range services {
			rules = append(rules, strings.Join([]string{own, peer, service, "accept"}, " "))
		}
	}
	return rules
}

// peers returns who is let through, as conditions of nft: everybody if none is named.
func (s state) peers(own string, named []networking.NetworkPolicyPeer, field string) (
	conditions []string, err error,
) {
	if len(named) == 0 {
		return []string{""}, nil
	}
	for _, peer := range named {
		if peer.IPBlock != nil {
			condition := "ip " + field + " " + peer.IPBlock.CIDR
			if len(peer.IPBlock.Except) > 0 {
				condition += fmt.Sprintf(" ip %s != { %s }",
					field, strings.Join(peer.IPBlock.Except, ", "))
			}
			conditions = append(conditions, condition)
			continue
		}
		among := []string{own}
		if peer.NamespaceSelector != nil {
			selector, err := meta.LabelSelectorAsSelector(peer.NamespaceSelector)
			if err != nil {
				return nil, err
			}
			among = nil
			for _, namespace := range s.namespaces {
				if selector.Matches(labels.Set(namespace.Labels)) {
					among = append(among, namespace.Name)
				}
			}
		}
		selector := labels.Everything()
		if peer.PodSelector != nil {
			if selector, err = meta.LabelSelectorAsSelector(peer.PodSelector); err != nil {
				return nil, err
			}
		}
		var addresses []string
		for _, pod := range s.pods {
			if hasAddress(pod) && slices.Contains(among, pod.Namespace) &&
				selector.Matches(labels.Set(pod.Labels)) {
				addresses = append(addresses, pod.Status.PodIP)
			}
		}
		if len(addresses) > 0 {
			slices.Sort(addresses)
			conditions = append(conditions,
				fmt.Sprintf("ip %s { %s }", field, strings.Join(addresses, ", ")))
		}
	}
	return conditions, nil
}
