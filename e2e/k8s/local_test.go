//go:build linux

package k8s_test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// What the cluster's test rests on, without a cluster: the witness sees jobs begin and end, and
// sees it when two live at once.
func TestWitness_SeesOverlap(t *testing.T) {
	if os.Getenv("LEASEHOLD_SHIP") != "1" {
		t.Skip("skipped: LEASEHOLD_SHIP=1 is not set (make e2e-k8s sets it)")
	}
	program := buildJob(t)
	address, err := harness.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	start := func(out io.Writer, env []string, args ...string) *exec.Cmd {
		cmd := exec.Command(program, args...)
		cmd.Stdout, cmd.Stderr, cmd.Env = out, os.Stderr, env
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		return cmd
	}
	lines, out := io.Pipe()
	defer out.Close()
	listening, told := make(chan struct{}), newRecord()
	start(writer(func(p []byte) (int, error) {
		if strings.HasPrefix(string(p), "listening") {
			close(listening)
		}
		return out.Write(p)
	}), nil, "witness", address)
	go func() { _ = told.follow(lines) }()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	select {
	case <-listening:
	case <-ctx.Done():
		t.Fatal("the witness does not listen")
	}

	run := func(name, token string) *exec.Cmd {
		return start(io.Discard, []string{
			"LEASEHOLD_IDENTITY=" + name, "LEASEHOLD_FENCING_TOKEN=" + token,
		}, "run", address)
	}
	wait := func(after, want string) string {
		t.Helper()
		job, pod, err := told.job(ctx, after)
		if err != nil || job != want || !strings.HasPrefix(job, pod+" ") {
			t.Fatalf("job %q of pod %q (%v), want %q", job, pod, err, want)
		}
		return job
	}
	gone := func() {
		t.Helper()
		if err := harness.Until(ctx, func() error {
			told.mu.Lock()
			defer told.mu.Unlock()
			if len(told.alive) > 0 {
				return context.DeadlineExceeded
			}
			return nil
		}); err != nil {
			t.Fatal("a dead job is still alive to the witness")
		}
	}
	first := run("a", "1")
	job := wait("", "a 1")
	if gap := told.longestGap(); gap != 0 {
		t.Errorf("no job has ended, and for %v there was none", gap)
	}
	_ = first.Process.Kill()
	gone()
	began := time.Now()
	second := run("b", "2")
	job = wait(job, "b 2")
	// It can't be less than nothing, nor more than the time since the first one was
	// seen to be dead and a little.
	if gap, most := told.longestGap(), time.Since(began)+5*time.Second; gap <= 0 || gap > most {
		t.Errorf("for %v there was no job, want more than nothing and less than %v", gap, most)
	}
	if gap := told.longestGap(); gap != 0 {
		t.Errorf("a gap of %v is told twice", gap)
	}
	if found := told.overlapped(); len(found) > 0 {
		t.Errorf("one after the other, and yet: %v", found)
	}
	run("c", "3")
	wait(job, "c 3")
	if found := told.overlapped(); len(found) != 1 || found[0] != "c 3 began while b 2 lived" {
		t.Errorf("two lived at once, and the witness says %q", found)
	}
	_ = second.Process.Signal(syscall.SIGTERM)
}

// Where no cluster answers the test says so and is skipped.
func TestCluster_SkipsWithoutOne(t *testing.T) {
	t.Setenv("LEASEHOLD_SHIP", "1")
	for name, config := range map[string]string{
		"no context": "",
		"nobody answers": `apiVersion: v1
kind: Config
clusters: [{name: dead, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: dead, context: {cluster: dead}}]
current-context: dead
`,
	} {
		path := filepath.Join(t.TempDir(), "config")
		if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("KUBECONFIG", path)
		skipped := false
		t.Run(name, func(t *testing.T) {
			defer func() { skipped = t.Skipped() }()
			newCluster(t)
		})
		if !skipped {
			t.Errorf("%s: not skipped", name)
		}
	}
}

// Only nodes that take pods count: with two of them and a control plane, an etcd of
// three would wait for ever.
func TestCluster_UsableNodes(t *testing.T) {
	count, err := usableNodes(`{"items": [
		{"spec": {"taints": [
			{"effect": "NoSchedule", "key": "node-role.kubernetes.io/control-plane"}
		]}},
		{"spec": {"taints": [{"effect": "NoExecute", "key": "node.kubernetes.io/unreachable"}]}},
		{"spec": {"unschedulable": true, "taints": [
			{"effect": "NoSchedule", "key": "node.kubernetes.io/unschedulable"}
		]}},
		{"spec": {"taints": [{"effect": "PreferNoSchedule", "key": "spot"}]}},
		{"spec": {"podCIDR": "10.244.0.0/24"}}
	]}`)
	if err != nil || count != 2 {
		t.Errorf("%d nodes (%v), want 2", count, err)
	}
}

// A run that was killed leaves its namespace; nobody else's is touched, nor that of
// a run that goes on.
func TestCluster_Leftovers(t *testing.T) {
	names, err := leftovers(`{"items": [
		{"metadata": {"name": "default", "creationTimestamp": "2026-01-01T00:00:00Z"}},
		{"metadata": {"name": "leasehold", "creationTimestamp": "2026-01-01T00:00:00Z"}},
		{"metadata": {"name": "leasehold-e2e-17", "creationTimestamp": "2026-01-01T00:00:00Z"}},
		{"metadata": {"name": "leasehold-e2e-18", "creationTimestamp": "2026-01-02T09:00:00Z"}}
	]}`, time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC))
	if err != nil || !slices.Equal(names, []string{"leasehold-e2e-17"}) {
		t.Errorf("%v (%v), want leasehold-e2e-17 alone", names, err)
	}
}

// The user's own certificates stay where they are.
func TestCluster_CopiesNoCertificates(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "k8s")
	for _, file := range []string{
		"kustomization.yaml", "certs/kustomization.yaml", "certs/ca.crt", "certs/ca.key",
		"certs/ca.key.new",
	} {
		path := filepath.Join(from, file)
		err := errors.Join(
			os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(file), 0o600))
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := copyTree(from, to); err != nil {
		t.Fatal(err)
	}
	var copied []string
	for _, pattern := range []string{"*.*", "certs/*"} {
		found, err := filepath.Glob(filepath.Join(to, pattern))
		if err != nil {
			t.Fatal(err)
		}
		copied = append(copied, found...)
	}
	want := []string{
		filepath.Join(to, "kustomization.yaml"), filepath.Join(to, "certs/kustomization.yaml"),
	}
	if !slices.Equal(copied, want) {
		t.Errorf("copied %v, want %v", copied, want)
	}
}

// What the cluster's test applies is what it means to apply.
func TestCluster_OverlaysRender(t *testing.T) {
	kubectl, err := exec.LookPath("kubectl")
	if err != nil {
		t.Skip("skipped: there is no kubectl here")
	}
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{
		t: t, tree: filepath.Join(t.TempDir(), "k8s"), image: "example.com:5000/leasehold:v1",
	}
	if err := copyTree(filepath.Join(root, "k8s"), c.tree); err != nil {
		t.Fatal(err)
	}
	for base, patches := range map[string][]string{
		"wrapper":                 {jobPatch("")},
		"wrapper/kubernetes-1.20": {jobPatch("")},
		"wrapper/route-to-leader": {
			jobPatch("        env:\n        - {name: LEASEHOLD_TLL, value: 5s}\n"),
		},
	} {
		dir := c.write("mine", base, "job-image", patches...)
		text, err := exec.Command(kubectl, "kustomize", dir).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", base, err, text)
		}
		wanted := []string{
			"image: example.com:5000/leasehold:v1", "image: job-image:latest", "- /job",
			"witness:4041", "LEASEHOLD_ELECTION",
		}
		if base == "wrapper/route-to-leader" {
			wanted = append(wanted, "LEASEHOLD_TLL", "LEASEHOLD_KUBERNETES_SERVICE",
				"automountServiceAccountToken: true")
		}
		for _, want := range wanted {
			if !strings.Contains(string(text), want) {
				t.Errorf("%s: no %q in\n%s", base, want, text)
			}
		}
	}
}

// The files in which the pages have leasehold's image named are those that name it in
// everything that is applied.
func TestCluster_PagesNameTheImage(t *testing.T) {
	kubectl, err := exec.LookPath("kubectl")
	if err != nil {
		t.Skip("skipped: there is no kubectl here")
	}
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	for page, overlays := range map[string][]string{
		"kubernetes-wrapper.md": {"wrapper", "wrapper/kubernetes-1.20", "wrapper/route-to-leader"},
		"kubernetes-sidecar.md": {"sidecar", "sidecar/plain", "sidecar/kubernetes-1.20"},
	} {
		tree := filepath.Join(t.TempDir(), "k8s")
		if err := copyTree(filepath.Join(root, "k8s"), tree); err != nil {
			t.Fatal(err)
		}
		const image = "example.com:5000/leasehold:v1"
		if err := nameImage(tree, filepath.Join(root, "docs", page), image); err != nil {
			t.Fatal(err)
		}
		for _, overlay := range overlays {
			dir := filepath.Join(tree, overlay)
			text, err := exec.Command(kubectl, "kustomize", dir).CombinedOutput()
			if err != nil || !strings.Contains(string(text), "image: "+image+"\n") ||
				strings.Contains(string(text), "localhost/leasehold") {
				t.Errorf("docs/%s: k8s/%s does not have the image that was named: %v\n%s",
					page, overlay, err, text)
			}
		}
	}
}

// The pages' commands, for an old cluster of one node, are of the folders that serve it.
func TestCluster_PagesFitTheCluster(t *testing.T) {
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	for page, wanted := range map[string][]string{
		"kubernetes-wrapper.md": {
			"-k k8s/etcd/one-member\n", "-k k8s/wrapper/kubernetes-1.20\n",
			"bases: [../wrapper/kubernetes-1.20]\n", "-k k8s/mine\n",
		},
		"kubernetes-sidecar.md": {
			"-k k8s/etcd/one-member\n", "-k k8s/sidecar/kubernetes-1.20\n", "form=plain-sidecar ",
		},
	} {
		script, err := pageScript(filepath.Join(root, "docs", page), "etcd/one-member",
			"wrapper/kubernetes-1.20", "sidecar/kubernetes-1.20")
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range wanted {
			if !strings.Contains(script, want) {
				t.Errorf("%s: no %q in\n%s", page, want, script)
			}
		}
		for _, not := range []string{
			"-k k8s/etcd\n", "-k k8s/wrapper\n", "-k k8s/sidecar\n", "route-to-leader",
		} {
			if strings.Contains(script, not) {
				t.Errorf("%s: still %q", page, not)
			}
		}
		if out, err := exec.Command("bash", "-n", "-c", script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", page, err, out)
		}
	}
}

// Each command of the pages is typed in the cluster, or it is known where else, or why not.
func TestCluster_TypesEveryCommand(t *testing.T) {
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob(filepath.Join(root, "docs", "kubernetes-*.md"))
	if err != nil || len(pages) < 4 {
		t.Fatalf("the pages are %v (%v)", pages, err)
	}
	var blocks, sentences strings.Builder
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		script, err := pageScript(page, "etcd", "wrapper", "sidecar")
		if err != nil {
			t.Fatal(err)
		}
		blocks.WriteString(script)
		sentences.Write(block.ReplaceAll(text, nil))
	}
	var typed []string
	for page, lines := range inSentences {
		typed = append(typed, lines...)
		if !slices.Contains(pages, filepath.Join(root, "docs", page)) {
			t.Errorf("there is no docs/%s", page)
		}
	}
	found := map[string]bool{}
	command := regexp.MustCompile("`((?:kubectl|helm|make|kind|minikube) [^`]+)`")
	for _, match := range command.FindAllStringSubmatch(sentences.String(), -1) {
		line := strings.Join(strings.Fields(match[1]), " ")
		found[line] = true
		if !slices.Contains(typed, line) && elsewhere[line] == "" &&
			!strings.Contains(blocks.String(), line) {
			t.Errorf("no test types what the pages have: %s", line)
		}
	}
	for line := range elsewhere {
		if !found[line] {
			t.Errorf("no page has: %s", line)
		}
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

func buildJob(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "job")
	build := exec.Command("go", "build", "-trimpath", "-o", path, "./job")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the job: %v\n%s", err, out)
	}
	return path
}
