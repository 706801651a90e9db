// Dist packs the binaries of a release: for each architecture a tar.gz, a deb, an rpm and a
// list of what the binary is made of (SBOM, CycloneDX); the Helm chart; and the checksums of it
// all. It runs in the root of leasehold's module.
//
// The same commit, built with the same Go, gives the same bytes: every date is the commit's, owners
// and modes are set here, and every list has an order.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goreleaser/nfpm/v2"
	"github.com/goreleaser/nfpm/v2/deb"
	"github.com/goreleaser/nfpm/v2/files"
	"github.com/goreleaser/nfpm/v2/rpm"
)

func main() {
	var r release
	flag.StringVar(&r.version, "version", "", "the version, as git describe has it")
	flag.StringVar(&r.commit, "commit", "", "the commit")
	flag.StringVar(&r.maintainer, "maintainer", "",
		"name and address of who answers for the packages")
	flag.StringVar(&r.out, "out", "dist",
		"where the binaries are, as leasehold-linux-ARCH, and all else is put")
	date := flag.Int64("date", 0, "the commit's date, in seconds since 1970")
	flag.Parse()
	r.date = time.Unix(*date, 0).UTC()
	if err := r.pack(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "dist:", err)
		os.Exit(1)
	}
}

type release struct {
	version, commit, maintainer, out string
	date                             time.Time
}

// A file is one of an archive or package.
type file struct {
	path    string
	mode    os.FileMode
	content []byte
}

func (r *release) pack(arches []string) error {
	if r.version == "" || r.commit == "" || r.maintainer == "" || r.date.Unix() == 0 ||
		len(arches) == 0 {
		return errors.New("version, commit, date, maintainer and an architecture are needed")
	}
	for _, arch := range arches {
		if err := r.packArch(arch); err != nil {
			return fmt.Errorf("%s: %w", arch, err)
		}
	}
	if err := r.chart(); err != nil {
		return fmt.Errorf("chart: %w", err)
	}
	return r.sums()
}

// chart packs the Helm chart with the version of the release.
func (r *release) chart() error {
	const dir, undated = "charts/leasehold", "\nversion: 0.0.0\n"
	var content []file
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if entry.Name() == "Chart.yaml" {
			if !bytes.Contains(text, []byte(undated)) {
				return errors.New("there is no line version: 0.0.0 in Chart.yaml")
			}
			version := fmt.Sprintf("\nversion: %s\nappVersion: %q\n", r.chartVersion(), r.version)
			text = bytes.Replace(text, []byte(undated), []byte(version), 1)
		}
		name := strings.TrimPrefix(path, dir+"/")
		content = append(content, file{name, 0o644, text})
		return nil
	})
	if err != nil {
		return err
	}
	return r.tarball("leasehold-"+r.chartVersion()+".tgz", "leasehold", content)
}

func (r *release) packArch(arch string) error {
	base := "leasehold_" + r.version + "_linux_" + arch
	path := filepath.Join(r.out, "leasehold-linux-"+arch)
	binary, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	sbom, err := r.sbom(path, binary)
	if err != nil {
		return err
	}
	copyright, err := copyright(path, arch)
	if err != nil {
		return err
	}
	man, err := r.man()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(r.out, base+".cdx.json"), sbom, 0o644); err != nil {
		return err
	}

	archive := []file{
		{"leasehold", 0o755, binary},
		{"leasehold.1", 0o644, man},
		{"leasehold.cdx.json", 0o644, sbom},
		{"THIRD-PARTY-LICENSES", 0o644, copyright},
	}
	docs, err := filepath.Glob("docs/*.md")
	if err != nil {
		return err
	}
	const (
		unit       = "systemd/leasehold@.service"
		example    = "systemd/example.env"
		completion = "packaging/leasehold.bash"
	)
	for _, source := range append(docs, "LICENSE", unit, example, completion) {
		content, err := os.ReadFile(source)
		if err != nil {
			return err
		}
		archive = append(archive, file{strings.TrimPrefix(source, "packaging/"), 0o644, content})
	}
	if err := r.tarball(base+".tar.gz", base, archive); err != nil {
		return err
	}

	from := func(name string) []byte {
		i := slices.IndexFunc(archive, func(f file) bool { return f.path == name })
		return archive[i].content
	}
	const doc = "/usr/share/doc/leasehold/"
	const license = "leasehold is under the Apache License, version 2.0:\n\n"
	return r.packages(arch, []file{
		{"/usr/bin/leasehold", 0o755, binary},
		{"/usr/lib/systemd/system/leasehold@.service", 0o644, from(unit)},
		{"/usr/share/man/man1/leasehold.1.gz", 0o644, zipped(man)},
		{"/usr/share/bash-completion/completions/leasehold", 0o644, from("leasehold.bash")},
		{doc + "example.env", 0o644, from(example)},
		{doc + "leasehold.cdx.json", 0o644, sbom},
		{doc + "changelog.gz", 0o644, zipped(r.changelog())},
		{
			doc + "copyright", 0o644,
			slices.Concat([]byte(license), from("LICENSE"), []byte("\n"), copyright),
		},
	})
}

// man dates the man page.
func (r *release) man() ([]byte, error) {
	const undated = `.TH LEASEHOLD 1 "" "leasehold"`
	page, err := os.ReadFile("packaging/leasehold.1")
	if err != nil {
		return nil, err
	}
	if !bytes.Contains(page, []byte(undated)) {
		return nil, errors.New("the man page has no line " + undated)
	}
	dated := fmt.Sprintf(`.TH LEASEHOLD 1 "%s" "leasehold %s"`,
		r.date.Format(time.DateOnly), r.version)
	return bytes.Replace(page, []byte(undated), []byte(dated), 1), nil
}

// changelog is what Debian wants each package to have. What changed is in the commits.
func (r *release) changelog() []byte {
	return fmt.Appendf(nil, "leasehold (%s) unstable; urgency=medium\n\n"+
		"  * Built from commit %s.\n\n -- %s  %s\n",
		r.packageVersion(), r.commit, r.maintainer, r.date.Format(time.RFC1123Z))
}

// packageVersion is the version by the rules that deb and rpm share: it starts with a digit, ~
// sorts before the end and + after it.
func (r *release) packageVersion() string {
	described := regexp.MustCompile(
		`^v?(\d+\.\d+\.\d+)(?:-([0-9A-Za-z.]+?))??(?:-(\d+)-g([0-9a-f]+))?(-dirty)?$`)
	parts := described.FindStringSubmatch(r.version)
	if parts == nil { // There is no tag yet, and all that is known is the commit.
		commit := strings.ReplaceAll(r.version, "-", "+")
		return "0~git" + r.date.Format("20060102150405") + "." + commit
	}
	version := parts[1]
	if parts[2] != "" {
		version += "~" + parts[2]
	}
	if parts[3] != "" {
		version += "+" + parts[3] + ".g" + parts[4]
	}
	return version + strings.Replace(parts[5], "-", "+", 1)
}

// chartVersion is the same by the rules of Semantic Versioning, which has one + and no ~.
func (r *release) chartVersion() string {
	version, build, built := strings.Cut(r.packageVersion(), "+")
	version, commit, untagged := strings.Cut(version, "~")
	switch {
	case untagged && version == "0": // the commit may be a number with zeros in front
		version, build, built = "0.0.0", strings.TrimSuffix(commit+"."+build, "."), true
	case untagged:
		version += "-" + commit
	}
	if built {
		version += "+" + strings.ReplaceAll(build, "+", ".")
	}
	return version
}

// tarball writes a file that has the content in one folder.
func (r *release) tarball(name, folder string, content []file) error {
	slices.SortFunc(content, func(a, b file) int { return strings.Compare(a.path, b.path) })
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range content {
		if err := w.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg, Name: folder + "/" + f.path, Mode: int64(f.mode),
			Size: int64(len(f.content)), ModTime: r.date,
			Uname: "root", Gname: "root", Format: tar.FormatUSTAR,
		}); err != nil {
			return err
		}
		if _, err := w.Write(f.content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(r.out, name), zipped(b.Bytes()), 0o644)
}

// zipped is content as gzip -9n has it: neither name nor date.
func zipped(content []byte) []byte {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err == nil {
		_, err = w.Write(content)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		panic(err) // A bytes.Buffer takes everything.
	}
	return b.Bytes()
}

func (r *release) packages(arch string, content []file) error {
	stage, err := os.MkdirTemp("", "leasehold-dist-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(stage) }()
	var contents files.Contents
	// Else rpm would leave them behind.
	for _, own := range []string{"/etc/leasehold", "/usr/share/doc/leasehold"} {
		contents = append(contents, &files.Content{
			Destination: own, Type: files.TypeDir,
			FileInfo: &files.ContentFileInfo{Mode: 0o755, MTime: r.date},
		})
	}
	for i, f := range content {
		source := filepath.Join(stage, strconv.Itoa(i))
		if err := os.WriteFile(source, f.content, 0o600); err != nil {
			return err
		}
		contents = append(contents, &files.Content{
			Source: source, Destination: f.path,
			FileInfo: &files.ContentFileInfo{Mode: f.mode, MTime: r.date},
		})
	}
	for format, packager := range map[string]nfpm.Packager{
		"deb": deb.Default, "rpm": rpm.DefaultRPM,
	} {
		info := nfpm.WithDefaults(&nfpm.Info{
			Name: "leasehold", Arch: arch, Platform: "linux",
			Version: r.packageVersion(), VersionSchema: "none",
			Section: "admin", Priority: "optional", Maintainer: r.maintainer,
			License: "Apache-2.0", MTime: r.date, DisableGlobbing: true,
			Description: "keep a job running on exactly one machine\n" +
				"Each machine runs the daemon. The leader of an election in etcd runs the\n" +
				"job, and kills all of it before its lease can pass to another machine.",
			Overridables: nfpm.Overridables{
				Contents: contents,
				Scripts: nfpm.Scripts{
					PostInstall: "packaging/postinstall.sh",
					PreRemove:   "packaging/preremove.sh",
					PostRemove:  "packaging/postremove.sh",
				},
				RPM: nfpm.RPM{BuildHost: "localhost"}, // Else it is this machine's name.
			},
		})
		if format == "deb" {
			info.License = "" // It belongs into the copyright file; Debian knows no such field.
		}
		if err := nfpm.PrepareForPackager(info, format); err != nil {
			return err
		}
		var b bytes.Buffer
		if err := packager.Package(info, &b); err != nil {
			return fmt.Errorf("%s: %w", format, err)
		}
		name := filepath.Join(r.out, packager.ConventionalFileName(info))
		if err := os.WriteFile(name, b.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// copyright holds the licenses of all that is linked into the binary: they ask for it.
func copyright(binary, arch string) ([]byte, error) {
	modules, err := linked(binary)
	if err != nil {
		return nil, err
	}
	list := exec.CommandContext(context.Background(), "go", "list", "-deps",
		"-tags", "grpcnotrace", "-f", "{{with .Module}}{{.Path}} {{.Dir}}{{end}}", ".")
	list.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	root, err := exec.CommandContext(context.Background(), "go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("go env GOROOT: %w", err)
	}
	folders := map[string]string{"std": strings.TrimSpace(string(root))}
	for line := range strings.Lines(string(out)) {
		if path, dir, found := strings.Cut(strings.TrimSpace(line), " "); found {
			folders[path] = dir
		}
	}
	var texts []string
	holders := map[string][]string{} // Many have the same text.
	for _, m := range modules {
		found := 0
		for _, pattern := range []string{"LICEN[CS]E*", "COPYING*", "NOTICE*"} {
			paths, err := filepath.Glob(filepath.Join(folders[m.Path], pattern))
			if err != nil {
				return nil, err
			}
			for _, path := range paths {
				content, err := os.ReadFile(path)
				if err != nil {
					return nil, err
				}
				text := string(bytes.TrimSpace(content))
				if holders[text] == nil {
					texts = append(texts, text)
				}
				holders[text] = append(holders[text], m.Path+" "+m.Version)
				found++
			}
		}
		if folders[m.Path] == "" || found == 0 {
			return nil, fmt.Errorf("no license of %s is found", m.Path)
		}
	}
	var b bytes.Buffer
	b.WriteString("The binary holds code of others, under these licenses.\n")
	for _, text := range texts {
		fmt.Fprintf(&b, "\n---- %s\n\n%s\n", strings.Join(holders[text], ", "), text)
	}
	return b.Bytes(), nil
}

// sums writes the checksums of all that is there, as sha256sum takes them.
func (r *release) sums() error {
	entries, err := os.ReadDir(r.out)
	if err != nil {
		return err
	}
	var b strings.Builder
	for _, e := range entries {
		content, err := os.ReadFile(filepath.Join(r.out, e.Name()))
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%x  %s\n", sha256.Sum256(content), e.Name())
	}
	return os.WriteFile(filepath.Join(r.out, "SHA256SUMS"), []byte(b.String()), 0o644)
}
