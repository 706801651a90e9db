//go:build linux

// Package dist_test checks what `make dist` has put into dist/ as its users
// would meet it: archives, packages in a clean Debian and on a booted systemd,
// the arm64 binary under qemu, and docs/process.md typed into a shell. `make
// test-dist` runs it, after `make dist`.
package dist_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// needs skips a test that can't run here. With E2E_NO_SKIP=1, as CI has it,
// that is a failure.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	if os.Getenv("LEASEHOLD_SHIP") != "1" {
		t.Skip("skipped: checks a release, which make test-dist does (LEASEHOLD_SHIP=1)")
	}
	harness.NeedsRoot(t)
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("E2E_NO_SKIP") == "1" {
				t.Fatalf("needs %s, and E2E_NO_SKIP=1 forbids to skip", program)
			}
			t.Skipf("skipped: needs %s (e2e/dist/prepare.sh installs it)", program)
		}
	}
}

func moduleRoot(t *testing.T) string {
	t.Helper()
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// artifact is the one file of the release that a pattern names.
func artifact(t *testing.T, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(moduleRoot(t), "dist", pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("dist/%s is %q, want one file: run make dist (%v)", pattern, found, err)
	}
	return found[0]
}

func binary(t *testing.T, arch string) string { return artifact(t, "leasehold-linux-"+arch) }

// versionLine is what `leasehold version` says.
func versionLine(t *testing.T) string {
	t.Helper()
	git := func(args ...string) string {
		return strings.TrimSpace(run(t, "git", append([]string{"-C", moduleRoot(t)}, args...)...))
	}
	date, err := time.Parse(time.RFC3339, git("show", "-s", "--format=%cI", "HEAD"))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("leasehold %s (commit %s, %s)",
		version(t), git("rev-parse", "HEAD"), date.UTC().Format(time.RFC3339))
}

// version is the release's, as the names of its files have it.
func version(t *testing.T) string {
	return strings.Split(filepath.Base(artifact(t, "leasehold_*_linux_amd64.tar.gz")), "_")[1]
}

// run runs a command that must succeed, and returns what it says.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// commitDate is the date that everything in a release bears.
func commitDate(t *testing.T) time.Time {
	t.Helper()
	shown := strings.TrimSpace(run(t, "git", "show", "-s", "--format=%ct", "HEAD"))
	seconds, err := strconv.ParseInt(shown, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return time.Unix(seconds, 0)
}

// TestRelease: dist/ holds what it should, with a checksum of each.
func TestRelease(t *testing.T) {
	needs(t)
	sums := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(read(t, artifact(t, "SHA256SUMS"))))
	for lines.Scan() {
		sum, name, _ := strings.Cut(lines.Text(), "  ")
		sums[name] = sum
	}
	var want []string
	for arch, rpmArch := range map[string]string{"amd64": "x86_64", "arm64": "aarch64"} {
		for _, pattern := range []string{
			"leasehold-linux-%s", "leasehold_*_linux_%s.tar.gz", "leasehold_*_linux_%s.cdx.json",
			"leasehold_*_%s.deb",
		} {
			want = append(want, filepath.Base(artifact(t, fmt.Sprintf(pattern, arch))))
		}
		want = append(want, filepath.Base(artifact(t, "leasehold-*."+rpmArch+".rpm")))
	}
	want = append(want, filepath.Base(artifact(t, "leasehold-*.tgz")))
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(sums)); !slices.Equal(got, want) {
		t.Errorf("checksums of %q, want %q", got, want)
	}
	entries, err := os.ReadDir(filepath.Join(moduleRoot(t), "dist"))
	if err != nil || len(entries) != len(want)+1 {
		t.Errorf("dist/ has %d files, want %d and SHA256SUMS (%v)", len(entries), len(want), err)
	}
	for name, sum := range sums {
		if got := fmt.Sprintf("%x", sha256.Sum256(read(t, artifact(t, name)))); got != sum {
			t.Errorf("%s has the checksum %s, want %s", name, got, sum)
		}
	}
}

// TestBinary: each is static, of its architecture, and says its version.
func TestBinary(t *testing.T) {
	needs(t, "qemu-aarch64-static")
	for arch, machine := range machines {
		t.Run(arch, func(t *testing.T) {
			file, err := elf.Open(binary(t, arch))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = file.Close() }()
			if file.Machine != machine {
				t.Errorf("it is for %v", file.Machine)
			}
			for _, p := range file.Progs {
				if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
					t.Errorf("it is not static: it has %v", p.Type)
				}
			}
			command := []string{binary(t, arch)}
			if arch == "arm64" {
				command = append([]string{"qemu-aarch64-static"}, command...)
			}
			leasehold := func(env []string, args ...string) (string, int) {
				args = slices.Concat(command[1:], args)
				cmd := exec.CommandContext(t.Context(), command[0], args...)
				cmd.Env = env
				out, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				if err != nil && !errors.As(err, &exit) {
					t.Fatal(err)
				}
				return string(out), cmd.ProcessState.ExitCode()
			}
			if out, code := leasehold(nil, "version"); out != versionLine(t)+"\n" || code != 0 {
				t.Errorf("version: %d, %q", code, out)
			}
			out, code := leasehold(nil, "help")
			if !strings.Contains(out, "LEASEHOLD_ELECTION") || code != 0 {
				t.Errorf("help: %d, %q", code, out)
			}
			out, code = leasehold([]string{"LEASEHOLD_TTL=15"}, "--", "true")
			if !strings.Contains(out, "LEASEHOLD_TTL: ") ||
				!strings.Contains(out, "LEASEHOLD_ELECTION: ") || code != 78 {
				t.Errorf("with two wrong settings: %d, %q", code, out)
			}
			if out, code := leasehold(nil, "--ttl", "5s"); code != 64 {
				t.Errorf("with a wrong command line: %d, %q", code, out)
			}
		})
	}
}

// TestBinary_ARM64Leads has the arm64 binary win an election in etcd. A job
// it can't run here: qemu runs one process, and that starts others of its own
// kind.
func TestBinary_ARM64Leads(t *testing.T) {
	needs(t, "qemu-aarch64-static")
	network, err := harness.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(network.Close)
	etcd := harness.NewTestCluster(t, harness.ClusterConfig{Network: network})
	node, err := network.Node("arm64")
	if err != nil {
		t.Fatal(err)
	}
	c, err := harness.StartCandidate(harness.CandidateConfig{
		Node:   node,
		Binary: "qemu-aarch64-static", Args: []string{binary(t, "arm64"), "elect"},
		Election: "jobs/emulated", Identity: "arm64", Endpoints: etcd.Endpoints(),
		TTL: 10 * time.Second,
		Env: []string{"LEASEHOLD_STOP_GRACE=0s"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := c.WaitStatus(ctx, "/leader", http.StatusOK); err != nil {
		t.Fatalf("%v\n%s", err, c.Log())
	}
}

// TestTarball: all of it bears the commit's date, and belongs to root.
func TestTarball(t *testing.T) {
	needs(t)
	date := commitDate(t)
	for arch := range machines {
		name := artifact(t, "leasehold_*_linux_"+arch+".tar.gz")
		unzipped, err := gzip.NewReader(bytes.NewReader(read(t, name)))
		if err != nil {
			t.Fatal(err)
		}
		found := map[string][]byte{}
		for archive := tar.NewReader(unzipped); ; {
			header, err := archive.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			content, err := io.ReadAll(archive)
			if err != nil {
				t.Fatal(err)
			}
			folder, file, _ := strings.Cut(header.Name, "/")
			found[file] = content
			mode := int64(0o644)
			if file == "leasehold" {
				mode = 0o755
			}
			if folder+".tar.gz" != filepath.Base(name) || header.Mode != mode ||
				header.Uname != "root" || header.Uid != 0 || !header.ModTime.Equal(date) {
				t.Errorf("%s: %s has mode %o, owner %s, date %s",
					arch, header.Name, header.Mode, header.Uname, header.ModTime)
			}
		}
		for file, source := range map[string]string{
			"leasehold":                  binary(t, arch),
			"leasehold.cdx.json":         artifact(t, "leasehold_*_linux_"+arch+".cdx.json"),
			"LICENSE":                    "LICENSE",
			"leasehold.bash":             "packaging/leasehold.bash",
			"systemd/leasehold@.service": "systemd/leasehold@.service",
			"systemd/example.env":        "systemd/example.env",
			"docs/reference.md":          "docs/reference.md",
			"docs/process.md":            "docs/process.md",
			"docs/systemd.md":            "docs/systemd.md",
		} {
			if !filepath.IsAbs(source) {
				source = filepath.Join(moduleRoot(t), source)
			}
			if !bytes.Equal(found[file], read(t, source)) {
				t.Errorf("%s: %s is missing, or is not %s", arch, file, source)
			}
		}
		for _, module := range []string{
			"std 1.", "go.etcd.io/etcd/client/v3 v",
			"Redistribution and use in source and binary forms",
		} {
			if !strings.Contains(string(found["THIRD-PARTY-LICENSES"]), module) {
				t.Errorf("%s: THIRD-PARTY-LICENSES does not hold %q", arch, module)
			}
		}
	}
}

// TestManual: groff finds no fault in the page, and it bears version and date.
func TestManual(t *testing.T) {
	needs(t, "groff")
	page := filepath.Join(t.TempDir(), "leasehold.1")
	run(t, "tar", "-xzf", artifact(t, "leasehold_*_linux_amd64.tar.gz"), "-C", filepath.Dir(page),
		"--strip-components=1", "--wildcards", "*/leasehold.1")
	if complaint := run(t, "groff", "-man", "-Tutf8", "-ww", "-z", page); complaint != "" {
		t.Error(complaint)
	}
	shown := run(t, "groff", "-man", "-Tutf8", "-P-cbou", page)
	for _, want := range []string{
		"leasehold " + version(t), commitDate(t).UTC().Format(time.DateOnly),
		"leasehold status [ELECTION] [--json]", "LEASEHOLD_TTL (15s)",
		"check [live|ready|leader|standby]",
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("it does not show %q:\n%s", want, shown)
		}
	}
}

// TestSBOM: it lists the modules that the binary itself says it holds.
func TestSBOM(t *testing.T) {
	needs(t)
	for arch := range machines {
		var bom struct {
			BOMFormat, SpecVersion, SerialNumber string
			Metadata                             struct {
				Timestamp time.Time
				Component struct {
					Name, Version string
					Hashes        []struct{ Alg, Content string }
					Properties    []struct{ Name, Value string }
				}
			}
			Components []struct{ Type, Name, Version, PURL string }
		}
		err := json.Unmarshal(read(t, artifact(t, "leasehold_*_linux_"+arch+".cdx.json")), &bom)
		if err != nil {
			t.Fatal(err)
		}
		serial := regexp.MustCompile(`^urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
		if bom.BOMFormat != "CycloneDX" || bom.SpecVersion != "1.5" ||
			!serial.MatchString(bom.SerialNumber) {
			t.Errorf("%s: it is %s %s %s", arch, bom.BOMFormat, bom.SpecVersion, bom.SerialNumber)
		}
		of := bom.Metadata.Component
		sum := fmt.Sprintf("%x", sha256.Sum256(read(t, binary(t, arch))))
		if of.Name != "leasehold" || of.Version != version(t) || len(of.Hashes) != 1 ||
			of.Hashes[0].Alg != "SHA-256" || of.Hashes[0].Content != sum {
			t.Errorf("%s: it is about %+v, want the binary with the checksum %s", arch, of, sum)
		}
		if !bom.Metadata.Timestamp.Equal(commitDate(t)) {
			t.Errorf("%s: its date is %s", arch, bom.Metadata.Timestamp)
		}
		var want, got []string
		said := run(t, "go", "version", "-m", binary(t, arch))
		std := regexp.MustCompile(`: go(\S+)`).FindStringSubmatch(said)[1]
		want = append(want, "library pkg:golang/std@"+std)
		dep := regexp.MustCompile(`(?m)^\tdep\t(\S+)\t(\S+)`)
		for _, m := range dep.FindAllStringSubmatch(said, -1) {
			want = append(want, "library pkg:golang/"+m[1]+"@"+m[2])
		}
		for _, c := range bom.Components {
			got = append(got, c.Type+" "+c.PURL)
		}
		slices.Sort(want)
		slices.Sort(got)
		if len(want) < 10 || !slices.Equal(got, want) {
			t.Errorf("%s: it lists %q, and the binary %q", arch, got, want)
		}
		setting := regexp.MustCompile(`(?m)^\tbuild\t([^=]+)=(.*)$`)
		for _, m := range setting.FindAllStringSubmatch(said, -1) {
			property := struct{ Name, Value string }{"go:build:" + m[1], m[2]}
			if !slices.Contains(of.Properties, property) {
				t.Errorf("%s: the build's setting %s=%s is missing", arch, m[1], m[2])
			}
		}
	}
}

// TestReproducible makes the release of HEAD in two clones, in folders of
// other names, of one with nothing but the modules in its caches, and under
// another umask, time zone, language and home. Every byte must be the same; and
// dist/ itself, where the tree is clean.
func TestReproducible(t *testing.T) {
	needs(t)
	t.Parallel()
	root := moduleRoot(t)
	dir := t.TempDir()
	makeDist := func(where, umask string, env ...string) map[string]string {
		run(t, "git", "clone", "-q", root, where)
		cmd := exec.CommandContext(t.Context(), "sh", "-c", "umask "+umask+"; exec nice make dist")
		cmd.Dir = where
		cmd.Env = append(os.Environ(), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make dist: %v\n%s", err, out)
		}
		return checksums(t, filepath.Join(where, "dist"))
	}
	modules := strings.TrimSpace(run(t, "go", "env", "GOMODCACHE"))
	one := makeDist(filepath.Join(dir, "one"), "022")
	other := makeDist(filepath.Join(dir, "another", "name of a folder"), "077",
		"GOCACHE="+filepath.Join(dir, "cache"), "GOMODCACHE="+modules, "HOME="+dir,
		"TZ=Asia/Kolkata", "LC_ALL=C", "GOFLAGS=-tags=other", "GOAMD64=v3", "GOFIPS140=latest",
		"SOURCE_DATE_EPOCH=1", "VERSION=9.9.9", "COMMIT=none", "DATE=never")
	if differ := differing(one, other); len(differ) > 0 || len(one) != 12 {
		t.Errorf("of %d files, these differ between two clones: %q", len(one), differ)
	}
	if run(t, "git", "status", "--porcelain", "--untracked-files=no") == "" {
		if differ := differing(one, checksums(t, filepath.Join(root, "dist"))); len(differ) > 0 {
			t.Errorf("these differ between a clone and here (is dist/ of this commit?): %q", differ)
		}
	} else {
		t.Log("the tree has changes: dist/ was not compared")
	}
}

func checksums(t *testing.T, dir string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		sums[e.Name()] = fmt.Sprintf("%x", sha256.Sum256(read(t, filepath.Join(dir, e.Name()))))
	}
	return sums
}

// differing are the names that don't have the same sum in both.
func differing(a, b map[string]string) (names []string) {
	for name := range a {
		if a[name] != b[name] {
			names = append(names, name)
		}
	}
	for name := range b {
		if a[name] == "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// packaged are the files of both kinds of package.
var packaged = []string{
	"/etc/leasehold", "/usr/bin/leasehold", "/usr/lib/systemd/system/leasehold@.service",
	"/usr/share/bash-completion/completions/leasehold", "/usr/share/doc/leasehold",
	"/usr/share/doc/leasehold/changelog.gz", "/usr/share/doc/leasehold/copyright",
	"/usr/share/doc/leasehold/example.env", "/usr/share/doc/leasehold/leasehold.cdx.json",
	"/usr/share/man/man1/leasehold.1.gz",
}

// TestDeb_Content looks at both packages from outside.
func TestDeb_Content(t *testing.T) {
	needs(t, "dpkg-deb", "lintian")
	for arch := range machines {
		deb := artifact(t, "leasehold_*_"+arch+".deb")
		for field, want := range map[string]string{
			"Package": "leasehold", "Architecture": arch, "Depends": "",
		} {
			if got := strings.TrimSpace(run(t, "dpkg-deb", "-f", deb, field)); got != want {
				t.Errorf("%s: %s is %q, want %q", arch, field, got, want)
			}
		}
		var got []string
		for line := range strings.Lines(run(t, "dpkg-deb", "-c", deb)) {
			fields := strings.Fields(line)
			mode, owner, file := fields[0], fields[1], fields[5]
			name := path.Clean("/" + file)
			if mode[0] == '-' || strings.HasSuffix(name, "/leasehold") {
				got = append(got, name)
			}
			want := map[byte]string{'d': "drwxr-xr-x", '-': "-rw-r--r--"}[mode[0]]
			if mode != want && file != "./usr/bin/leasehold" || owner != "root/root" {
				t.Errorf("%s: %s", arch, line)
			}
		}
		if slices.Sort(got); !slices.Equal(got, packaged) {
			t.Errorf("%s: it holds %q", arch, got)
		}
		if arch != "amd64" {
			continue // It is slow, and would say the same.
		}
		// Suppressed: Go's binaries are static; the licenses of all that is linked are the ones
		// that an rpm needs too; and prerm stops the instances of a unit, which Debian's own helper
		// does not know by name. It leaves files where it takes room.
		run(t, "env", "TMPDIR="+t.TempDir(), "lintian", "--allow-root",
			"--fail-on", "error,warning", "--suppress-tags", strings.Join([]string{
				"statically-linked-binary",
				"copyright-file-contains-full-apache-2-license",
				"copyright-not-using-common-license-for-apache2",
				"maintainer-script-calls-systemctl",
			}, ","), deb)
	}
}

// inDebian runs a script in a clean Debian that has what is given at /srv, and
// returns what it says. What it changes is gone afterwards.
func inDebian(t *testing.T, files, script string) string {
	t.Helper()
	root := filepath.Join(moduleRoot(t), "bin", "debian")
	if _, err := os.Stat(root); err != nil {
		t.Fatalf("needs a clean Debian, which e2e/dist/prepare.sh makes: %v", err)
	}
	mounts := `set -e
		mount -t tmpfs tmpfs "$1" && mkdir "$1/upper" "$1/work" "$1/root"
		mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
		mount --bind "$3" "$1/root/srv" && mount -t proc proc "$1/root/proc"
		mount --rbind /dev "$1/root/dev"
		exec chroot "$1/root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin \
			/bin/bash -euc "$4"`
	return run(t, "unshare", "--mount", "--pid", "--net", "--fork", "--kill-child",
		"sh", "-c", mounts, "sh", t.TempDir(), root, files, script)
}

// section returns what a script said after a line "== name".
func section(out, name string) string {
	_, rest, _ := strings.Cut("\n"+out, "\n== "+name+"\n")
	text, _, _ := strings.Cut("\n"+rest, "\n== ")
	return text
}

// TestDeb_Install puts the package into a clean Debian and takes it away
// again. Nothing but what its owner wrote into /etc/leasehold is left.
func TestDeb_Install(t *testing.T) {
	needs(t, "unshare", "chroot")
	deb := artifact(t, "leasehold_*_amd64.deb")
	out := inDebian(t, filepath.Dir(deb), `
		all() {
			find / -xdev -not -path '/var/lib/dpkg/*' -not -path '/var/log/*' \
				-not -path '/var/cache/*' | sort
		}
		all >/run/before
		dpkg -i /srv/`+filepath.Base(deb)+`
		echo "== verify"; dpkg -V leasehold
		echo "== version"; leasehold version
		echo "== enabled"; find /etc/systemd -name 'leasehold*'
		echo "== same"
		cmp /usr/bin/leasehold /srv/`+filepath.Base(binary(t, "amd64"))+` && echo same
		echo "== removal"
		echo JOB=true >/etc/leasehold/mine.env
		dpkg -r leasehold
		all >/run/after
		echo "== left"; diff /run/before /run/after || true
		rm /etc/leasehold/mine.env
		dpkg -i /srv/`+filepath.Base(deb)+`
		dpkg -P leasehold
		all >/run/after
		echo "== purged"; diff /run/before /run/after | grep -v /run/after || true
		echo "== end"`)
	for name, want := range map[string]string{
		"verify": "", "version": versionLine(t), "enabled": "", "same": "same", "purged": "",
	} {
		got := strings.TrimSpace(section(out, name))
		if name == "purged" && strings.Contains(got, ">") || name != "purged" && got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	var left []string
	differs := regexp.MustCompile(`(?m)^([<>] .*)$`)
	for _, m := range differs.FindAllStringSubmatch(section(out, "left"), -1) {
		left = append(left, m[1])
	}
	want := []string{"> /etc/leasehold", "> /etc/leasehold/mine.env", "> /run/after"}
	if !slices.Equal(left, want) {
		t.Errorf("after removal: %q, want %q\n%s", left, want, out)
	}
}

// TestRPM_Content looks at both packages from outside, and unpacks them.
func TestRPM_Content(t *testing.T) {
	needs(t, "rpm", "rpm2cpio", "cpio")
	for arch, rpmArch := range map[string]string{"amd64": "x86_64", "arm64": "aarch64"} {
		rpm := artifact(t, "leasehold-*."+rpmArch+".rpm")
		if got := strings.Fields(run(t, "rpm", "-qlp", rpm)); !slices.Equal(got, packaged) {
			t.Errorf("%s: it holds %q", arch, got)
		}
		const format = "%{NAME} %{ARCH} %{LICENSE} %{BUILDTIME} %{BUILDHOST}"
		said := run(t, "rpm", "-qp", "--queryformat", format, rpm)
		date := commitDate(t).Unix()
		if said != fmt.Sprintf("leasehold %s Apache-2.0 %d localhost", rpmArch, date) {
			t.Errorf("%s: it says %q", arch, said)
		}
		if got := run(t, "rpm", "-K", "--nosignature", rpm); !strings.Contains(got, "digests OK") {
			t.Errorf("%s: %s", arch, got)
		}
		dir := t.TempDir()
		// The names in an rpm made by nfpm are absolute
		// (https://github.com/goreleaser/nfpm/issues/1122). That is all the same to rpm; but a bare
		// cpio would unpack into this machine.
		run(t, "sh", "-c",
			`cd "$1" && rpm2cpio "$2" | cpio -id --quiet --no-absolute-filenames`, "sh", dir, rpm)
		unpacked := filepath.Join(dir, "usr/bin/leasehold")
		if !bytes.Equal(read(t, unpacked), read(t, binary(t, arch))) {
			t.Errorf("%s: it holds another binary", arch)
		}
		if arch == "amd64" {
			if got := run(t, unpacked, "version"); got != versionLine(t)+"\n" {
				t.Errorf("%s: version says %q", arch, got)
			}
		}
	}
}

// TestRPM_Install has rpm install the package, with its scripts, and erase it.
func TestRPM_Install(t *testing.T) {
	needs(t, "rpm", "unshare")
	rpm := artifact(t, "leasehold-*.x86_64.rpm")
	root := filepath.Join(moduleRoot(t), "bin", "debian")
	out := run(t, "unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-ec", `
		mount -t tmpfs tmpfs "$1" && mkdir "$1/upper" "$1/work" "$1/root"
		mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
		rpm="rpm --root=$1/root --force-debian"
		$rpm --nodeps -i "$3" # what Debian has of /bin/sh rpm does not know
		echo "== verify"; $rpm -V --nodeps leasehold
		echo "== version"; chroot "$1/root" leasehold version
		echo JOB=true >"$1/root/etc/leasehold/mine.env"
		$rpm -e leasehold
		echo "== left"
		find "$1/root" -xdev -path '*leasehold*' -not -path '*/var/lib/*' -printf '/%P\n' | sort
		echo "== end"`, "sh", t.TempDir(), root, rpm)
	for name, want := range map[string]string{
		"verify": "", "version": versionLine(t),
		"left": "/etc/leasehold\n/etc/leasehold/mine.env",
	} {
		if got := strings.TrimSpace(section(out, name)); got != want {
			t.Errorf("%s: %q, want %q\n%s", name, got, want, out)
		}
	}
}
