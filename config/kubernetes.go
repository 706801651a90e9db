//go:build linux

package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"

	"leasehold/internal/quote"
)

// serviceName is what Kubernetes takes as the name of a Service (RFC 1035).
var serviceName = regexp.MustCompile(`^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (k Kubernetes) validate(p *problems) {
	if k.Service == "" {
		return
	}
	if !serviceName.MatchString(k.Service) {
		p.add("KUBERNETES_SERVICE", "%s is no name of a Service: write it as kubectl get services"+
			" shows it, without the namespace", quote.Value(k.Service))
	}
	if k.Server() == "" {
		p.add("KUBERNETES_SERVICE", "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not"+
			" set, as they are in each container of Kubernetes: elsewhere, unset it")
	}
	_, err := k.Address()
	p.add("KUBERNETES_POD_IP", "%w", err)
}

// Server is the host:port of the API server, as Kubernetes puts it into each container; "": this is
// none.
func (k Kubernetes) Server() string {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return ""
	}
	return net.JoinHostPort(host, port)
}

// Address is PodIP. Kubernetes refuses endpoints with other addresses.
func (k Kubernetes) Address() (netip.Addr, error) {
	if k.PodIP == "" {
		return netip.Addr{}, errors.New("missing beside LEASEHOLD_KUBERNETES_SERVICE: write" +
			" valueFrom: {fieldRef: {fieldPath: status.podIP}}")
	}
	address, err := netip.ParseAddr(k.PodIP)
	if address = address.Unmap(); err != nil || !address.IsGlobalUnicast() || address.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s is no address of a pod: write"+
			" valueFrom: {fieldRef: {fieldPath: status.podIP}}", quote.Value(k.PodIP))
	}
	return address, nil
}
