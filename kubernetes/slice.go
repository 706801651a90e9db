package kubernetes

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"

	"leasehold/internal/quote"
)

const (
	tokenAnnotation    = "leasehold/fencing-token"
	countAnnotation    = "leasehold/count"
	electionAnnotation = "leasehold/election"
	serviceLabel       = "kubernetes.io/service-name"
	managedByLabel     = "endpointslice.kubernetes.io/managed-by"
	managedBy          = "leasehold"
	sliceAPIVersion    = "discovery.k8s.io/v1"
	sliceResource      = "endpointslices.discovery.k8s.io"
	serviceResource    = "services"
	defaultTransport   = "TCP"
)

// service is what we have to know of a Service.
type service struct {
	Metadata struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	} `json:"metadata"`
	Spec struct {
		Selector map[string]string `json:"selector"`
		Ports    []servicePort     `json:"ports"`
	} `json:"spec"`
}

type servicePort struct {
	Name        string `json:"name"`
	Protocol    string `json:"protocol"`
	AppProtocol string `json:"appProtocol"`
	Port        int    `json:"port"`
	// TargetPort is the number of a port, or the name of a port of a container.
	TargetPort any `json:"targetPort"`
}

// slice is an EndpointSlice, with all that a write must keep.
type slice struct {
	APIVersion  string     `json:"apiVersion"`
	Kind        string     `json:"kind"`
	Metadata    metadata   `json:"metadata"`
	AddressType string     `json:"addressType"`
	Endpoints   []endpoint `json:"endpoints"`
	Ports       []port     `json:"ports"`
}

type metadata struct {
	Name            string            `json:"name"`
	ResourceVersion string            `json:"resourceVersion,omitempty"`
	Labels          map[string]string `json:"labels,omitempty"`
	Annotations     map[string]string `json:"annotations,omitempty"`
	OwnerReferences []owner           `json:"ownerReferences,omitempty"`
	Finalizers      []string          `json:"finalizers,omitempty"`
}

type owner struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Name       string `json:"name"`
	UID        string `json:"uid"`
}

type endpoint struct {
	Addresses  []string   `json:"addresses"`
	Conditions conditions `json:"conditions"`
}

type conditions struct {
	Ready bool `json:"ready"`
}

type port struct {
	Name        string `json:"name"`
	Protocol    string `json:"protocol"`
	Port        int    `json:"port"`
	AppProtocol string `json:"appProtocol,omitempty"`
}

// A claim is what a leader writes.
type claim struct {
	election string
	token    int64
	address  netip.Addr
}

// token is the fencing token of the leader that wrote last; 0: none has.
func (s slice) token() (int64, error) {
	text, written := s.Metadata.Annotations[tokenAnnotation]
	if !written {
		return 0, nil
	}
	token, err := strconv.ParseInt(text, 10, 64)
	if err != nil || token < 0 {
		return 0, fmt.Errorf("the annotation %s of the EndpointSlice is %s, which is no token:"+
			" kubectl delete endpointslice %s", tokenAnnotation, quote.Value(text),
			quote.Shell(s.Metadata.Name))
	}
	return token, nil
}

// routesTo reports whether the address is the one endpoint.
func (s slice) routesTo(address netip.Addr) bool {
	return len(s.Endpoints) == 1 &&
		slices.Equal(s.Endpoints[0].Addresses, []string{address.String()})
}

// of reports whether a leader of that election wrote last, or nobody did that says which.
func (s slice) of(election string) bool {
	written := s.Metadata.Annotations[electionAnnotation]
	return written == "" || written == election
}

// with returns the slice that makes the claim's address the one endpoint of the Service. It returns
// an error if a higher token was written, or by another election, or if that would not route to the
// address.
func (s slice) with(of service, c claim) (slice, error) {
	if len(of.Spec.Selector) > 0 {
		return s, fmt.Errorf("the Service has a selector, so Kubernetes routes to all pods that" +
			" match it: make a Service without one, of another name")
	}
	addressType := "IPv4"
	if c.address.Is6() {
		addressType = "IPv6"
	}
	remedy := "kubectl delete endpointslice " + quote.Shell(of.Metadata.Name)
	written, err := s.token()
	by := s.Metadata.Labels[managedByLabel]
	switch {
	case err != nil:
		return s, err
	case !s.of(c.election):
		other := quote.Value(s.Metadata.Annotations[electionAnnotation])
		return s, fmt.Errorf("the Service is that of the election %s, and this is %s: choose a"+
			" Service of another name, or, if that election is no more, run %s",
			other, quote.Value(c.election), remedy)
	case written > c.token:
		return s, fmt.Errorf("the EndpointSlice has the higher fencing token %d: another pod"+
			" leads, or the tokens began anew, as with a new etcd; then run %s", written, remedy)
	case by != "" && by != managedBy:
		return s, fmt.Errorf("the EndpointSlice is managed by %s: choose a Service of another name",
			quote.Value(by))
	case s.AddressType != "" && s.AddressType != addressType:
		return s, fmt.Errorf("the EndpointSlice is for addresses of the type %s, and the pod has"+
			" %s: run %s", quote.Value(s.AddressType), c.address, remedy)
	}
	ports, err := of.endpointPorts()
	if err != nil {
		return s, err
	}
	s.APIVersion, s.Kind, s.AddressType = sliceAPIVersion, "EndpointSlice", addressType
	s.Ports = ports
	s.Endpoints = []endpoint{{
		Addresses: []string{c.address.String()}, Conditions: conditions{Ready: true},
	}}
	m := &s.Metadata
	m.Name = of.Metadata.Name
	m.Labels = set(m.Labels, serviceLabel, of.Metadata.Name)
	m.Labels = set(m.Labels, managedByLabel, managedBy)
	m.Annotations = set(m.Annotations, tokenAnnotation, strconv.FormatInt(c.token, 10))
	m.Annotations = set(m.Annotations, electionAnnotation, c.election)
	// Kubernetes deletes it with the Service, and not if that is made anew.
	this := owner{APIVersion: "v1", Kind: "Service", Name: of.Metadata.Name, UID: of.Metadata.UID}
	if !slices.Contains(m.OwnerReferences, this) {
		m.OwnerReferences = []owner{this}
	}
	return s, nil
}

// counted returns the slice with another count. Kubernetes makes no new version of an object if a
// write changes nothing in it.
func (s slice) counted() slice {
	m := &s.Metadata
	n, _ := strconv.ParseUint(m.Annotations[countAnnotation], 10, 64) // else it begins anew
	m.Annotations = set(m.Annotations, countAnnotation, strconv.FormatUint(n+1, 10))
	return s
}

// same reports whether the slices say the same.
func (s slice) same(other slice) bool {
	s.APIVersion, s.Kind = other.APIVersion, other.Kind
	return reflect.DeepEqual(s, other)
}

// endpointPorts are the ports of the pod to which those of the Service lead.
func (s service) endpointPorts() ([]port, error) {
	ports := make([]port, 0, len(s.Spec.Ports))
	for _, p := range s.Spec.Ports {
		number := p.Port
		switch target := p.TargetPort.(type) {
		case float64:
			if target != 0 {
				number = int(target)
			}
		case string:
			return nil, fmt.Errorf("the port %d of the Service has the targetPort %s:"+
				" a Service without a selector needs its number", p.Port, quote.Value(target))
		}
		protocol := p.Protocol
		if protocol == "" {
			protocol = defaultTransport
		}
		ports = append(ports, port{
			Name: p.Name, Protocol: protocol, Port: number, AppProtocol: p.AppProtocol,
		})
	}
	return ports, nil
}

// set returns a copy of the map with this entry.
func set(m map[string]string, key, value string) map[string]string {
	m = maps.Clone(m)
	if m == nil {
		m = map[string]string{}
	}
	m[key] = value
	return m
}
