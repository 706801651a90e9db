//go:build linux

// Package image_test runs the container image as its users do: read-only, with no capability, no
// privilege to gain and nowhere to write, as process 1, by podman and runc, beside an etcd on
// loopback. e2e/image/prepare.sh installs and makes what it needs; `make test-image` does both.
package image_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// waitTimeout bounds every wait for an event that must come. Nothing here takes a tenth
// of it on a quiet machine.
const waitTimeout = 60 * time.Second

// The images under test. Their storage is ours alone.
const (
	imageLeasehold = "localhost/leasehold"            // what `make image` makes
	imageBoth      = "localhost/leasehold-both"       // the same for both architectures
	imageJob       = "localhost/leasehold-job"        // examples/image: leasehold by COPY --from
	imageDebian    = "localhost/debian:bookworm-slim" // knows nothing of leasehold
)

// built is what the tests share, made when the first test asks for it.
var built struct {
	sync.Once
	root     string
	programs *harness.Programs
	err      error
}

// missing names what keeps these tests from running here, or "".
func missing(root string) string {
	if os.Geteuid() != 0 {
		return "root"
	}
	for _, tool := range []string{"podman", "buildah", "runc", "make"} {
		if _, err := exec.LookPath(tool); err != nil {
			return tool
		}
	}
	if _, err := os.Stat(filepath.Join(root, "bin", ".image", "storage.conf")); err != nil {
		return "the base images, which e2e/image/prepare.sh makes"
	}
	return ""
}

// needImages skips a test unless it was asked for, and builds the images.
func needImages(t *testing.T) {
	t.Helper()
	if os.Getenv("LEASEHOLD_SHIP") != "1" {
		t.Skip("skipped: make test-image runs it")
	}
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	if what := missing(root); what != "" {
		if os.Getenv("E2E_NO_SKIP") == "1" {
			t.Fatalf("needs %s, and E2E_NO_SKIP=1 forbids to skip", what)
		}
		t.Skipf("skipped: needs %s", what)
	}
	built.Do(func() {
		built.root = root
		for name, file := range map[string]string{
			"CONTAINERS_STORAGE_CONF": "storage.conf", "CONTAINERS_CONF": "containers.conf",
		} {
			path := filepath.Join(root, "bin", ".image", file)
			//nolint:usetesting // It holds for the tests after this one too.
			built.err = errors.Join(built.err, os.Setenv(name, path))
		}
		began := time.Now()
		if built.err == nil {
			built.programs, built.err = harness.Build(context.Background(), ".",
				"./e2e/cmd/testjob")
		}
		for _, args := range [][]string{
			// The engine is chosen as it is for anybody, but that docker knows
			// nothing of our base images.
			{"make", "image", "IMAGE=" + imageLeasehold, "ENGINE=podman", buildFlags()},
			{
				"make", "image", "IMAGE=" + imageBoth, "ENGINE=buildah",
				"PLATFORM=linux/amd64,linux/arm64", buildFlags(),
			},
			{
				"podman", "build", "-q", "--isolation", "chroot", "--pull-never",
				"--layers=false", "-t", imageJob, "examples/image",
			},
		} {
			if built.err == nil {
				_, built.err = command(root, args...)
			}
		}
		fmt.Printf("images built in %v\n", time.Since(began).Round(time.Second))
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
}

// buildFlags has the build take this machine's caches of modules and of compiled packages, and
// leave no layers behind.
func buildFlags() string {
	env := func(name string) string {
		out, err := exec.Command("go", "env", name).Output()
		if err != nil {
			panic(err) // the test binary was made by it
		}
		return strings.TrimSpace(string(out))
	}
	return fmt.Sprintf("IMAGE_FLAGS=--isolation chroot --pull-never --layers=false"+
		" -v %s:/go/pkg/mod -v %s:/root/.cache/go-build",
		env("GOMODCACHE"), env("GOCACHE"))
}

// command runs a command in the module's root and returns its standard output.
func command(root string, args ...string) (string, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = root
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w\n%s%s",
			strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

func podman(t testing.TB, args ...string) string {
	t.Helper()
	out, err := command(built.root, append([]string{"podman"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// cgroupParent is where podman puts the containers, for it never removes the parent that it makes.
var cgroupParent = fmt.Sprintf("/leasehold-image-%d", os.Getpid())

// removeCgroups removes what is left of it, in each hierarchy.
func removeCgroups() error {
	var dirs []string
	for _, pattern := range []string{
		"/sys/fs/cgroup" + cgroupParent, "/sys/fs/cgroup/*" + cgroupParent,
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, parent := range found {
			_ = filepath.WalkDir(parent, func(path string, e os.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
		}
	}
	var err error
	for _, dir := range slices.Backward(dirs) { // what is inside comes first
		err = errors.Join(err, os.Remove(dir))
	}
	return err
}

func TestMain(m *testing.M) {
	code := m.Run()
	if err := removeCgroups(); err != nil {
		fmt.Fprintln(os.Stderr, "clean up:", err)
		code = max(code, 1)
	}
	if built.programs != nil {
		built.programs.Remove()
		// The images that builds begin with are kept, for they take a minute to make.
		for _, args := range [][]string{
			{"podman", "rmi", "-f", "-i", imageJob, imageLeasehold},
			{"buildah", "manifest", "rm", imageBoth},
			{"podman", "image", "prune", "-f"},
		} {
			if _, err := command(built.root, args...); err != nil {
				fmt.Fprintln(os.Stderr, "clean up:", err)
				code = max(code, 1)
			}
		}
		run, err := command(built.root, "podman", "info", "--format", "{{.Store.RunRoot}}")
		if err == nil && strings.HasPrefix(run, "/run/leasehold-image-") {
			// No container is left that it could be of use to.
			_ = os.RemoveAll(strings.TrimSpace(run))
		}
	}
	os.Exit(code)
}

// A testbed is an etcd, an election and a witness of its jobs.
type testbed struct {
	*testing.T
	ctx      context.Context
	etcd     *harness.Cluster
	witness  *harness.Witness
	election string
	ttl      time.Duration
}

var numbers atomic.Int64 // keep names apart

func newTestbed(t *testing.T) *testbed {
	t.Helper()
	needImages(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*waitTimeout)
	t.Cleanup(cancel)
	return &testbed{
		T: t, ctx: ctx,
		etcd:     harness.NewTestCluster(t, harness.ClusterConfig{}),
		witness:  harness.NewTestWitness(t),
		election: fmt.Sprintf("jobs/image-%d", numbers.Add(1)), ttl: 5 * time.Minute,
	}
}

// run runs a part of a test, at the end of which its containers are gone.
func (s *testbed) run(name string, part func(s *testbed)) {
	s.Run(name, func(t *testing.T) {
		of := *s
		of.T = t
		part(&of)
	})
}

// A box is a container whose process 1 is leasehold.
type box struct {
	*harness.Candidate
	name string
}

// A plan says what to run in a container.
type plan struct {
	image string
	args  []string // what follows the image
	flags []string // more flags of podman's
	env   []string
}

// start starts a container under all restrictions. Its name for the election is identity.
func (s *testbed) start(identity string, p plan) *box {
	s.Helper()
	b := &box{name: fmt.Sprintf("leasehold-%d-%d", os.Getpid(), numbers.Add(1))}
	args := append([]string{
		"podman", "run", "--name", b.name, "--pull", "never", "--network", "host",
		"--log-driver", "none", "--cgroup-parent", cgroupParent,
		"--ipc", "none", "--read-only", "--read-only-tmpfs=false",
		"--cap-drop", "all", "--security-opt", "no-new-privileges",
		"--timeout", "600", // should this program not live to remove it
		"--env", "LEASEHOLD_*", "--env", harness.WitnessVariable,
		"-v", built.programs.Testjob + ":/testjob:ro",
	}, p.flags...)
	c, err := harness.StartCandidate(harness.CandidateConfig{
		Binary: "podman", Election: s.election, Identity: identity,
		Endpoints: s.etcd.Endpoints(), TTL: s.ttl, Witness: s.witness,
		Env: append([]string{
			"HOME=" + os.Getenv("HOME"), "LEASEHOLD_STOP_GRACE=500ms",
			"CONTAINERS_CONF=" + os.Getenv("CONTAINERS_CONF"),
			"CONTAINERS_STORAGE_CONF=" + os.Getenv("CONTAINERS_STORAGE_CONF"),
		}, p.env...),
		Prepare: func(cmd *exec.Cmd) { cmd.Args = append(append(args, p.image), p.args...) },
	})
	if err != nil {
		s.Fatal(err)
	}
	b.Candidate = c
	s.Cleanup(func() {
		podman(s, "rm", "-f", "-i", "-t", "0", b.name)
		c.Close()
		if s.Failed() {
			s.Logf("log of %s:\n%s%s", identity, c.Log(), c.Output())
		}
	})
	return b
}

// job starts a container whose job is the test job.
func (s *testbed) job(identity, behaviour string) *box {
	s.Helper()
	return s.start(identity, plan{
		image: imageLeasehold,
		args:  append([]string{"--", "/testjob"}, strings.Fields(behaviour)...),
	})
}

func (s *testbed) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *testbed) wait(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeoutCause(s.ctx, d, fmt.Errorf("not within %v", d))
	s.Cleanup(cancel)
	return ctx
}

// waitJob waits for a job of the candidate, other than those with the tokens given.
func (s *testbed) waitJob(b *box, not ...int64) harness.Life {
	s.Helper()
	life, err := s.witness.WaitForJob(s.wait(waitTimeout), func(l harness.Life) bool {
		return l.Candidate == b.Identity && !slices.Contains(not, l.Token)
	})
	s.must(err)
	return life
}

func (s *testbed) waitRoles(l harness.Life, roles ...string) {
	s.Helper()
	s.must(s.witness.Wait(s.wait(waitTimeout), func(lives []harness.Life) bool {
		found := map[string]bool{}
		for _, other := range lives {
			found[other.Role] = found[other.Role] ||
				other.Token == l.Token && other.Candidate == l.Candidate
		}
		return !slices.ContainsFunc(roles, func(r string) bool { return !found[r] })
	}))
}

func (s *testbed) waitDead(l harness.Life) time.Duration {
	s.Helper()
	end, err := s.witness.WaitForDead(s.wait(waitTimeout), l)
	s.must(err)
	return end
}

func (s *testbed) waitStatus(b *box, path string, code int) {
	s.Helper()
	s.must(b.WaitStatus(s.wait(waitTimeout), path, code))
}

func (s *testbed) waitExit(b *box, want int) {
	s.Helper()
	code, err := b.Wait(s.wait(waitTimeout))
	s.must(err)
	if code != want {
		s.Errorf("%s ended with code %d, want %d", b.Identity, code, want)
	}
}

// waitRenewals waits for n more good renewals of a candidate's lease.
func (s *testbed) waitRenewals(b *box, n float64) {
	s.Helper()
	s.must(b.WaitRenewals(s.wait(waitTimeout), n))
}

// waitOutput waits until the container has written the text as often as given to standard output.
func (s *testbed) waitOutput(b *box, text string, times int) {
	s.Helper()
	s.must(harness.Until(s.wait(waitTimeout), func() error {
		if n := strings.Count(b.Output(), text); n < times {
			return fmt.Errorf("%s said %q %d times, want %d; it said %q",
				b.Identity, text, n, times, b.Output())
		}
		return nil
	}))
}

// lease is the one lease that etcd holds.
func (s *testbed) lease() string {
	s.Helper()
	leases, err := s.etcd.Leases(s.ctx)
	s.must(err)
	if len(leases) != 1 {
		s.Fatalf("leases: %q, want one", leases)
	}
	return leases[0]
}

// overlaps fails the test if two jobs ever lived at once.
func (s *testbed) overlaps() {
	s.Helper()
	for _, o := range check.Overlaps(s.witness.Lives()) {
		s.Error(o)
	}
}

// kill sends a signal to a container's process 1, from outside.
func (b *box) kill(t testing.TB, signal string) { podman(t, "kill", "--signal", signal, b.name) }

// pid is the container's process 1, as this machine counts.
func (b *box) pid(t testing.TB) int {
	pid, err := strconv.Atoi(podman(t, "inspect", "--format", "{{.State.Pid}}", b.name))
	if err != nil || pid == 0 {
		t.Fatalf("%s has no process: %v", b.Identity, err)
	}
	return pid
}

// elector is the elector's pid, as this machine counts.
func (b *box) elector(t testing.TB) int {
	for _, pid := range harness.Children(b.pid(t)) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if words := strings.Split(string(cmdline), "\x00"); len(words) > 1 &&
			words[1] == "elector" {
			return pid
		}
	}
	t.Fatalf("%s has no elector", b.Identity)
	return 0
}

// replaceElector kills the elector, and waits until the guard has replaced as many as given.
func (s *testbed) replaceElector(b *box, replaced float64) {
	s.Helper()
	s.must(syscall.Kill(b.elector(s), syscall.SIGKILL))
	s.must(harness.Until(s.wait(waitTimeout), func() error {
		n, err := b.Metric(s.ctx, "leasehold_elector_replacements_total")
		if err == nil && n != replaced {
			err = fmt.Errorf("%v electors of %s were replaced, want %v", n, b.Identity, replaced)
		}
		return err
	}))
}

// loseElectors kills as many as the guard replaces within a minute, and one more.
func (s *testbed) loseElectors(b *box) {
	s.Helper()
	s.replaceElector(b, 1)
	s.replaceElector(b, 2)
	s.must(syscall.Kill(b.elector(s), syscall.SIGKILL))
}
