//go:build linux

package image_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// maxImage is how large an image may be, unpacked.
const maxImage = 18_000_000

// layout reads a file of an OCI image layout.
func layout(t *testing.T, dir, digest string, into any) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "blobs", strings.Replace(digest, ":", "/", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if into != nil {
		if err := json.Unmarshal(data, into); err != nil {
			t.Fatal(err)
		}
	}
	return data
}

type descriptor struct{ MediaType, Digest string }

// images lists the manifests that an index leads to.
func images(t *testing.T, dir string, list []descriptor) []descriptor {
	var all []descriptor
	for _, d := range list {
		if !strings.Contains(d.MediaType, "index") {
			all = append(all, d)
			continue
		}
		var index struct{ Manifests []descriptor }
		layout(t, dir, d.Digest, &index)
		all = append(all, images(t, dir, index.Manifests)...)
	}
	return all
}

// TestImage: what is in the image of each architecture, and what its labels say.
func TestImage(t *testing.T) {
	needImages(t)
	dir := t.TempDir()
	_, err := command(built.root,
		"buildah", "manifest", "push", "-q", "--all", imageBoth, "oci:"+dir)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index struct{ Manifests []descriptor }
	if err := json.Unmarshal(data, &index); err != nil {
		t.Fatal(err)
	}
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	for _, d := range images(t, dir, index.Manifests) {
		var manifest struct {
			Config descriptor
			Layers []descriptor
		}
		layout(t, dir, d.Digest, &manifest)
		var config struct {
			Architecture, OS string
			Config           struct {
				User            string
				Entrypoint, Cmd []string
				Labels          map[string]string
				Volumes         map[string]any
			}
		}
		layout(t, dir, manifest.Config.Digest, &config)
		machine, known := machines[config.Architecture]
		if !known || config.OS != "linux" {
			t.Errorf("an image for %s/%s, which was not asked for or is there twice",
				config.OS, config.Architecture)
			continue
		}
		delete(machines, config.Architecture)

		if c := config.Config; c.User != "65532:65532" ||
			!slices.Equal(c.Entrypoint, []string{"/leasehold"}) || len(c.Cmd) > 0 ||
			len(c.Volumes) > 0 {
			t.Errorf("%s: %+v", config.Architecture, c)
		}
		labels := config.Config.Labels
		for name, want := range map[string]string{
			"title": "leasehold", "description": "exactly one machine", "licenses": "Apache-2.0",
			"version":  git(t, "describe", "--tags", "--always", "--dirty"),
			"revision": git(t, "rev-parse", "HEAD"),
		} {
			if got := labels["org.opencontainers.image."+name]; !strings.Contains(got, want) {
				t.Errorf("%s: label %s is %q, want %q", config.Architecture, name, got, want)
			}
		}
		created, err := time.Parse(time.RFC3339, labels["org.opencontainers.image.created"])
		if want := git(t, "log", "-1", "--format=%cI"); err != nil || !sameTime(created, want) {
			t.Errorf("%s: created %v, %v, want %s", config.Architecture, created, err, want)
		}

		files := map[string][]byte{}
		var size int64
		for _, l := range manifest.Layers {
			unpack(t, layout(t, dir, l.Digest, nil), func(h *tar.Header, body []byte) {
				size += h.Size
				if h.Typeflag != tar.TypeDir {
					files["/"+strings.TrimPrefix(h.Name, "/")] = body
				}
			})
		}
		const bundle = "/etc/ssl/certs/ca-certificates.crt"
		names := slices.Sorted(maps.Keys(files))
		if !slices.Equal(names, []string{bundle, "/leasehold"}) {
			t.Errorf("%s: files %q", config.Architecture, names)
		}
		if size > maxImage {
			t.Errorf("%s: %d bytes, want %d at most", config.Architecture, size, maxImage)
		}
		t.Logf("%s: %.1f MB, %.1f MB of it the binary",
			config.Architecture, float64(size)/1e6, float64(len(files["/leasehold"]))/1e6)
		checkStatic(t, files["/leasehold"], machine)
		checkBundle(t, files[bundle])
	}
	for machine := range machines {
		t.Errorf("there is no image for %s", machine)
	}
}

func sameTime(at time.Time, text string) bool {
	other, err := time.Parse(time.RFC3339, text)
	return err == nil && at.Equal(other)
}

func unpack(t *testing.T, layer []byte, file func(*tar.Header, []byte)) {
	t.Helper()
	var in io.Reader = bytes.NewReader(layer)
	if zipped, err := gzip.NewReader(bytes.NewReader(layer)); err == nil {
		in = zipped
	}
	for files := tar.NewReader(in); ; {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(files)
		if err != nil {
			t.Fatal(err)
		}
		file(header, body)
	}
}

func checkStatic(t *testing.T, binary []byte, machine elf.Machine) {
	t.Helper()
	file, err := elf.NewFile(bytes.NewReader(binary))
	if err != nil {
		t.Error(err)
		return
	}
	if file.Machine != machine {
		t.Errorf("the binary is for %v, want %v", file.Machine, machine)
	}
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("%v: the binary is not static: %v", machine, p.Type)
		}
	}
}

// checkBundle: Go's TLS finds the bundle at this place, and it holds certificates.
func checkBundle(t *testing.T, bundle []byte) {
	t.Helper()
	n := 0
	for block, rest := pem.Decode(bundle); block != nil; block, rest = pem.Decode(rest) {
		if _, err := x509.ParseCertificate(block.Bytes); err == nil {
			n++
		}
	}
	if n < 50 {
		t.Errorf("%d certificates of authorities, want some 140", n)
	}
}

func git(t *testing.T, args ...string) string {
	t.Helper()
	out, err := command(built.root, append([]string{"git"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// TestImage_Version: the binary inside says what the labels say.
func TestImage_Version(t *testing.T) {
	s := newTestbed(t)
	b := s.start("a", plan{image: imageLeasehold, args: []string{"version"}})
	s.waitExit(b, 0)
	want := regexp.MustCompile(`^leasehold ` +
		regexp.QuoteMeta(git(t, "describe", "--tags", "--always", "--dirty")) +
		` \(commit ` + git(t, "rev-parse", "HEAD") + `, \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\)\n$`)
	if !want.MatchString(b.Output()) {
		t.Errorf("%q, want %s", b.Output(), want)
	}
}
