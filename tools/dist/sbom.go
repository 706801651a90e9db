package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"runtime/debug"
	"strings"
	"time"
)

// The part of CycloneDX 1.5 that a Go binary can fill: https://cyclonedx.org/docs/1.5/json/
type (
	bom struct {
		Format       string       `json:"bomFormat"`
		SpecVersion  string       `json:"specVersion"`
		SerialNumber string       `json:"serialNumber"`
		Version      int          `json:"version"`
		Metadata     metadata     `json:"metadata"`
		Components   []component  `json:"components"`
		Dependencies []dependency `json:"dependencies"`
	}
	metadata struct {
		Timestamp string    `json:"timestamp"`
		Component component `json:"component"`
	}
	component struct {
		Type       string     `json:"type"`
		Ref        string     `json:"bom-ref"`
		Name       string     `json:"name"`
		Version    string     `json:"version"`
		PURL       string     `json:"purl,omitempty"`
		Hashes     []hash     `json:"hashes,omitempty"`
		Licenses   []license  `json:"licenses,omitempty"`
		Properties []property `json:"properties,omitempty"`
	}
	hash struct {
		Alg     string `json:"alg"`
		Content string `json:"content"`
	}
	license struct {
		License struct {
			ID string `json:"id"`
		} `json:"license"`
	}
	property struct {
		Name  string `json:"name"`
		Value string `json:"value"`
	}
	dependency struct {
		Ref       string   `json:"ref"`
		DependsOn []string `json:"dependsOn,omitempty"`
	}
)

// linked lists the modules that a binary says it holds, and the standard library as "std".
func linked(binary string) ([]debug.Module, error) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	modules := []debug.Module{{Path: "std", Version: strings.TrimPrefix(info.GoVersion, "go")}}
	for _, m := range info.Deps {
		if m.Replace != nil {
			return nil, fmt.Errorf("%s is replaced: "+
				"this program does not know whose license that has", m.Path)
		}
		modules = append(modules, *m)
	}
	return modules, nil
}

// sbom lists what the binary is made of, by the word of the binary itself.
func (r *release) sbom(path string, binary []byte) ([]byte, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return nil, err
	}
	modules, err := linked(path)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(binary)
	root := component{
		Type: "application", Ref: "leasehold", Name: "leasehold", Version: r.version,
		Hashes:     []hash{{"SHA-256", fmt.Sprintf("%x", sum)}},
		Licenses:   make([]license, 1),
		Properties: []property{{"commit", r.commit}},
	}
	root.Licenses[0].License.ID = "Apache-2.0"
	for _, s := range info.Settings {
		root.Properties = append(root.Properties, property{"go:build:" + s.Key, s.Value})
	}
	out := bom{
		Format: "CycloneDX", SpecVersion: "1.5", Version: 1, SerialNumber: uuid(sum),
		Metadata:     metadata{Timestamp: r.date.Format(time.RFC3339), Component: root},
		Dependencies: []dependency{{Ref: root.Ref}},
	}
	for _, m := range modules {
		purl := "pkg:golang/" + m.Path + "@" + strings.ReplaceAll(m.Version, "+", "%2B")
		c := component{Type: "library", Ref: purl, Name: m.Path, Version: m.Version, PURL: purl}
		if m.Sum != "" {
			c.Properties = []property{{"go.sum", m.Sum}}
		}
		out.Components = append(out.Components, c)
		out.Dependencies[0].DependsOn = append(out.Dependencies[0].DependsOn, purl)
	}
	text, err := json.MarshalIndent(out, "", "  ")
	return append(text, '\n'), err
}

// uuid makes a UUID of the kind whose bits are its maker's own affair (version 8 of RFC 9562).
func uuid(sum [32]byte) string {
	b := sum[:16]
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}
