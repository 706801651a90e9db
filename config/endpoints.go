//go:build linux

package config

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"leasehold/internal/quote"
)

// validateEndpoints checks the endpoints and makes full URLs of them.
func (c *Config) validateEndpoints(p *problems) {
	withTLS := c.TLS != TLS{}
	var urls, schemes []string
	sound := true
	for i, entry := range c.Endpoints {
		scheme, address, err := parseEndpoint(entry, withTLS)
		if err != nil {
			// The entry may hold a password. So the message has its number, and its text only where
			// parseEndpoint has found that harmless.
			p.add("ENDPOINTS", "entry %d %w", i+1, err)
			sound = false
			continue
		}
		if slices.Contains(urls, scheme+"://"+address) {
			p.add("ENDPOINTS", "entry %d names %s again: name each endpoint once", i+1, address)
		}
		urls = append(urls, scheme+"://"+address)
		schemes = append(schemes, scheme)
	}
	slices.Sort(schemes)
	switch schemes = slices.Compact(schemes); {
	case len(c.Endpoints) == 0:
		p.add("ENDPOINTS", "blank: write for example http://127.0.0.1:2379")
	case len(schemes) == 2:
		p.add("ENDPOINTS", "http and https are mixed: write one of them for all")
	case sound && withTLS && schemes[0] == "http":
		p.add("ENDPOINTS", "http goes without TLS, but LEASEHOLD_TLS_* is set:"+
			" write https, or unset LEASEHOLD_TLS_*")
	}
	c.Endpoints = urls
}

// parseEndpoint takes an endpoint apart. The error never holds a password.
func parseEndpoint(entry string, withTLS bool) (scheme, address string, err error) {
	const example = "write host:port, http://host:port or https://host:port"
	switch {
	case entry == "":
		return "", "", errors.New("is empty: write endpoints with one comma between two")
	case strings.ContainsFunc(entry, unicode.IsSpace):
		return "", "", errors.New("has a space: write endpoints with commas alone between them")
	case strings.Contains(entry, "@"):
		return "", "", errors.New("has a user name in it:" +
			" set LEASEHOLD_USERNAME and LEASEHOLD_PASSWORD instead")
	}
	scheme, address, full := strings.Cut(strings.TrimSuffix(entry, "/"), "://")
	if !full {
		address = scheme
		if scheme = "http"; withTLS {
			scheme = "https"
		}
	}
	if scheme = strings.ToLower(scheme); scheme != "http" && scheme != "https" {
		return "", "", fmt.Errorf("%s has an unknown scheme: %s", quote.Value(entry), example)
	}
	if strings.ContainsAny(address, "/?#") {
		return "", "", fmt.Errorf("%s has more than host and port: %s", quote.Value(entry), example)
	}
	host, port, err := parseAddress(address, 1)
	if err == nil && host == "" {
		err = fmt.Errorf("%s has no host", quote.Value(entry))
	}
	if err != nil {
		return "", "", fmt.Errorf("%w: %s", err, example)
	}
	return scheme, net.JoinHostPort(host, port), nil
}

// parseAddress takes a host:port apart. The host may be empty.
func parseAddress(address string, lowestPort uint64) (host, port string, err error) {
	host, port, err = net.SplitHostPort(address)
	if err != nil {
		if strings.Count(address, ":") > 1 && !strings.Contains(address, "/") {
			return "", "", fmt.Errorf("%s is not host:port"+
				" (an IPv6 address needs brackets and a port, as in [::1]:4040)",
				quote.Value(address))
		}
		return "", "", fmt.Errorf("%s is not host:port", quote.Value(address))
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n < lowestPort {
		return "", "", fmt.Errorf("%s has no port number from %d to 65535",
			quote.Value(address), lowestPort)
	}
	notInNames := func(r rune) bool {
		letter := 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9'
		return !letter && r != '.' && r != '-' && r != '_'
	}
	if net.ParseIP(host) == nil && strings.ContainsFunc(host, notInNames) {
		return "", "", fmt.Errorf("%s is no address: the host must be a name or an IP address",
			quote.Value(address))
	}
	return host, port, nil
}
