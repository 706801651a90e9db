//go:build linux

package k8s_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// A cluster is that of the current kubectl context, with a namespace of our own in it.
type cluster struct {
	t         *testing.T
	root      string // of the repository
	tree      string // a copy of k8s/, with certificates
	config    string // a kubeconfig whose namespace is ours
	namespace string
	context   string
	old       bool // before Kubernetes 1.21, or OVERLAYS asks for what is for that
	sidecars  bool // 1.29 and newer
	nodes     int
	nodeNames []string
	image     string
	lives     string // a directory of each node: when jobs have lived there
}

// newCluster skips the test where no cluster answers.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	return findCluster(t).enter("")
}

// findCluster returns a cluster without a namespace. It skips the test where none answers.
func findCluster(t *testing.T) *cluster {
	t.Helper()
	if os.Getenv("LEASEHOLD_SHIP") != "1" {
		t.Skip("skipped: LEASEHOLD_SHIP=1 is not set (make e2e-k8s sets it)")
	}
	if _, err := exec.LookPath("kubectl"); err != nil {
		t.Skip("skipped: there is no kubectl here, and so no cluster to ask")
	}
	current, err := exec.Command("kubectl", "config", "current-context").Output()
	if err != nil {
		t.Skip("skipped: no Kubernetes cluster: kubectl has no current context")
	}
	c := &cluster{t: t, context: strings.TrimSpace(string(current)), image: os.Getenv("IMAGE")}
	var version struct {
		ServerVersion struct{ Major, Minor string } `json:"serverVersion"`
	}
	out, err := exec.Command("kubectl", "version", "-o", "json", "--request-timeout=10s").Output()
	if err != nil || json.Unmarshal(out, &version) != nil || version.ServerVersion.Minor == "" {
		t.Skipf("skipped: no Kubernetes cluster answers in the context %s: %v", c.context, err)
	}
	minor, err := strconv.Atoi(strings.TrimRight(version.ServerVersion.Minor, "+"))
	if err != nil {
		t.Fatal(err)
	}
	c.old = minor < 21 || os.Getenv("OVERLAYS") == "1.20"
	c.sidecars = minor >= 29 && !c.old
	if c.root, err = harness.ModuleRoot(); err != nil {
		t.Fatal(err)
	}
	t.Logf("Kubernetes 1.%d in the context %s", minor, c.context)
	return c
}

// enter makes a namespace that is deleted with the test. Its name ends with the given one.
func (c *cluster) enter(name string) *cluster {
	t := c.t
	t.Helper()
	entered := *c
	c = &entered
	dir := t.TempDir()
	c.tree, c.config = filepath.Join(dir, "k8s"), filepath.Join(dir, "config")
	err := errors.Join(copyTree(filepath.Join(c.root, "k8s"), c.tree),
		os.Symlink(filepath.Join(c.root, "charts"), filepath.Join(dir, "charts")))
	if err != nil {
		t.Fatal(err)
	}
	view := exec.Command("kubectl", "config", "view", "--raw", "--minify", "--flatten")
	config, err := view.Output()
	if err == nil {
		err = os.WriteFile(c.config, config, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	old, err := leftovers(c.kubectl("get", "namespaces", "-o", "json"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, namespace := range old {
		c.kubectl("delete", "namespace", namespace, "--wait=false")
	}
	c.namespace = fmt.Sprintf("%s%d", prefix, os.Getpid())
	if name != "" {
		c.namespace += "-" + name
	}
	c.kubectl("config", "set-context", "--current", "--namespace="+c.namespace)
	c.kubectl("create", "namespace", c.namespace)
	t.Cleanup(func() {
		if t.Failed() {
			c.tell()
		}
		// Pods first. Kubernetes waits for half of their time to stop before it looks again whether
		// a namespace is empty.
		if _, err := c.try("delete", "deployments,statefulsets,pods", "--all",
			"--namespace="+c.namespace, "--cascade=foreground", "--timeout=2m"); err != nil {
			t.Log(err)
		}
		c.kubectl("delete", "namespace", c.namespace, "--timeout=5m")
	})
	// Clusters that don't know the label don't mind it.
	c.kubectl("label", "namespace", c.namespace, "pod-security.kubernetes.io/enforce=restricted")
	if c.nodes, err = usableNodes(c.kubectl("get", "nodes", "-o", "json")); err != nil {
		t.Fatal(err)
	}
	c.nodeNames = strings.Fields(
		c.kubectl("get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"))
	t.Logf("namespace %s, nodes: %d", c.namespace, c.nodes)
	return c
}

const prefix = "leasehold-e2e-"

// leftovers returns those of a list of namespaces that a run has left which was killed. A run that
// goes on is not that old.
func leftovers(list string, now time.Time) (names []string, err error) {
	var namespaces struct {
		Items []struct {
			Metadata struct {
				Name              string
				CreationTimestamp time.Time
			}
		}
	}
	if err := json.Unmarshal([]byte(list), &namespaces); err != nil {
		return nil, err
	}
	for _, namespace := range namespaces.Items {
		if m := namespace.Metadata; strings.HasPrefix(m.Name, prefix) &&
			now.Sub(m.CreationTimestamp) > 6*time.Hour {
			names = append(names, m.Name)
		}
	}
	return names, nil
}

// usableNodes counts those of a list that pods of ours may go to. Control planes
// are mostly tainted.
func usableNodes(list string) (count int, err error) {
	var nodes struct {
		Items []struct {
			Spec struct {
				Unschedulable bool
				Taints        []struct{ Effect string }
			}
		}
	}
	if err := json.Unmarshal([]byte(list), &nodes); err != nil {
		return 0, err
	}
	for _, node := range nodes.Items {
		tainted := false
		for _, taint := range node.Spec.Taints {
			tainted = tainted || taint.Effect == "NoSchedule" || taint.Effect == "NoExecute"
		}
		if !tainted && !node.Spec.Unschedulable {
			count++
		}
	}
	return count, nil
}

// copyTree copies what git knows of a folder: nobody's certificates, least of all the authority's
// key, leave their place.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case entry.IsDir():
			return os.MkdirAll(filepath.Join(to, relative), 0o755)
		case slices.Contains([]string{".crt", ".key", ".new"}, filepath.Ext(path)):
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, relative), data, 0o644)
	})
}

// tell says what there is, for whoever has to find out why a test has failed.
func (c *cluster) tell() {
	for _, args := range [][]string{
		{"get", "all", "-o", "wide"}, {"get", "events"}, {"describe", "pods"},
	} {
		out, _ := c.command(context.Background(), args...).CombinedOutput()
		c.t.Logf("kubectl %s:\n%s", strings.Join(args, " "), out)
	}
}

func (c *cluster) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "kubectl", args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.config)
	cmd.Dir = filepath.Dir(c.tree)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func (c *cluster) try(args ...string) (string, error) {
	out, err := c.command(context.Background(), args...).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, exit.Stderr)
	}
	return string(out), err
}

func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// overlay writes a kustomization with what this test changes, and applies it.
func (c *cluster) overlay(name, base, image string, patches ...string) {
	c.t.Helper()
	c.kubectl("apply", "-k", c.write(name, base, image, patches...))
}

func (c *cluster) write(name, base, image string, patches ...string) (dir string) {
	c.t.Helper()
	dir = filepath.Join(c.tree, name)
	text := fmt.Sprintf(`bases: [../%s]
images:
- {name: localhost/leasehold, newName: %s, newTag: "%s"}
- {name: docker.io/library/busybox, newName: %s, newTag: "%s"}
`, base, repository(c.image), tag(c.image), repository(image), tag(image))
	for i := range patches {
		if i == 0 {
			text += "patchesStrategicMerge:\n"
		}
		text += fmt.Sprintf("- patch%d.yaml\n", i)
	}
	err := errors.Join(
		os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o644))
	for i, patch := range patches {
		file := filepath.Join(dir, fmt.Sprintf("patch%d.yaml", i))
		err = errors.Join(err, os.WriteFile(file, []byte(patch), 0o644))
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return dir
}

func repository(image string) string {
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		return image[:i]
	}
	return image
}

func tag(image string) string {
	if rest := strings.TrimPrefix(image[len(repository(image)):], ":"); rest != "" {
		return rest
	}
	return "latest"
}

func (c *cluster) jobImage() string { return repository(c.image) + "-e2e-job" }

// images builds the images and brings them to the nodes. The job's image has these programs of
// tools/kubernetes too.
func (c *cluster) images(programs ...string) (job string) {
	c.t.Helper()
	run := func(dir, name string, args ...string) {
		c.t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			c.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
	}
	run(c.root, "make", "image", "IMAGE="+c.image)
	job = c.jobImage()
	dir := filepath.Dir(buildJob(c.t))
	dockerfile := "FROM scratch\nCOPY job /job\n"
	for _, program := range programs {
		run(filepath.Join(c.root, "tools", "kubernetes"), "env", "CGO_ENABLED=0",
			"go", "build", "-trimpath", "-o", filepath.Join(dir, program), "./"+program)
		dockerfile += fmt.Sprintf("COPY %[1]s /%[1]s\n", program)
	}
	err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644)
	if err != nil {
		c.t.Fatal(err)
	}
	engines := []string{"docker", "podman", "buildah"}
	i := slices.IndexFunc(engines, func(e string) bool {
		return exec.Command(e, "info").Run() == nil
	})
	if i < 0 {
		c.t.Fatal("none of docker, podman and buildah is here and works")
	}
	run(dir, engines[i], "build", "-t", job, ".")
	load := os.Getenv("LOAD")
	switch name, kind := strings.CutPrefix(c.context, "kind-"); {
	case load != "":
	case kind:
		load = "kind load docker-image --name " + name
	case c.context == "minikube":
		load = "minikube image load"
	default:
		return job
	}
	for _, image := range []string{c.image, job} {
		run(c.root, "sh", "-c", load+` "$1"`, "sh", image)
	}
	return job
}

const witnessManifest = `apiVersion: v1
kind: Service
metadata: {name: witness}
spec:
  selector: {app: witness}
  ports: [{port: 4041}]
---
apiVersion: v1
kind: Pod
metadata:
  name: witness
  labels: {app: witness}
spec:
  automountServiceAccountToken: false
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: witness
    image: %s
    imagePullPolicy: IfNotPresent
    command: [/job, witness, ":4041"]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
`

func jobPatch(more string) string {
	return `apiVersion: apps/v1
kind: Deployment
metadata: {name: wrapper}
spec:
  template:
    spec:
      containers:
      - name: job
        command: [/opt/leasehold/leasehold, --, /job]
        args: [run, "witness:4041"]
` + more
}

// The whole life of a Deployment in a cluster: the leader's pod is deleted, its node drained, the
// Deployment rolled; a Service that routes to the leader; a setting that is wrong. In all of it
// a witness sees to it that no two jobs live at once.
func TestCluster(t *testing.T) {
	c := newCluster(t)
	job := c.images()

	etcd, wrapper := c.etcd()

	witness := c.command(context.Background(), "apply", "-f", "-")
	witness.Stdin = strings.NewReader(fmt.Sprintf(witnessManifest, job+":latest"))
	if out, err := witness.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c.kubectl("wait", "--for=condition=Ready", "pod/witness", "--timeout=2m")
	told := newRecord()
	ctx, cancel := context.WithCancel(t.Context())
	logs := c.command(ctx, "logs", "-f", "pod/witness")
	lines, err := logs.StdoutPipe()
	if err == nil {
		err = logs.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	followed := make(chan error, 1)
	go func() { followed <- told.follow(io.TeeReader(lines, testWriter{t})) }()
	defer func() {
		select {
		case err := <-followed:
			t.Errorf("the witness' log has ended before the test: %v", err)
		default:
			cancel()
			<-followed
		}
		_ = logs.Wait() // it was killed
		for _, overlap := range told.overlapped() {
			t.Errorf("two jobs at once: %s", overlap)
		}
	}()
	// next waits for a job after the given one.
	next := func(what, after string, within time.Duration) (string, string) {
		t.Helper()
		begin := time.Now()
		bounded, cancel := context.WithTimeout(ctx, within)
		defer cancel()
		job, pod, err := told.job(bounded, after)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		t.Logf("%s: job %s after %v", what, job, time.Since(begin).Round(time.Millisecond))
		return job, pod
	}

	// Not every cluster enforces NetworkPolicies. That of tools/kubernetes does.
	if os.Getenv("CLUSTER") != "" {
		_, err := c.try("exec", "witness", "--", "/job", "dial", "etcd-0.etcd:2379")
		if err == nil || !strings.Contains(err.Error(), "i/o timeout") {
			t.Errorf("a pod without the label etcd-client asks etcd: %v, want a timeout", err)
		}
	}

	c.overlay("mine", wrapper, job, jobPatch(""))
	c.kubectl("rollout", "status", "deployment/wrapper", "--timeout=5m")
	current, pod := next("the first one", "", time.Minute)
	out := c.kubectl("exec", "deployment/wrapper", "-c", "job", "--",
		"/opt/leasehold/leasehold", "status")
	if !strings.Contains(out, pod) {
		t.Errorf("status does not name %s as the leader:\n%s", pod, out)
	}

	// A planned stop takes the job's own time, which is nothing, and milliseconds. A lease that is
	// not given back takes the TTL, 15 s.
	const planned = 10 * time.Second
	c.kubectl("delete", "pod", pod, "--wait=false")
	current, pod = next("the leader's pod is deleted", current, planned)
	c.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
	current, pod = next("the leader's pod is deleted by force", current, time.Minute)
	c.kubectl("rollout", "status", "deployment/wrapper", "--timeout=5m")

	node := strings.TrimSpace(c.kubectl("get", "pod", pod, "-o", "jsonpath={.spec.nodeName}"))
	uncordon := func() { c.kubectl("uncordon", node) }
	t.Cleanup(uncordon)
	// The PodDisruptionBudget would rightly stop the drain: there is no room for another pod.
	if c.nodes == 1 {
		c.kubectl("delete", "pdb", "wrapper", "--ignore-not-found")
	}
	c.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data",
		"--pod-selector=app.kubernetes.io/name=wrapper", "--timeout=5m")
	if c.nodes == 1 {
		uncordon() // There is nowhere else to go.
	}
	current, _ = next("the leader's node is drained", current, 2*time.Minute)
	uncordon()
	c.kubectl("rollout", "status", "deployment/wrapper", "--timeout=5m")

	told.longestGap() // so far
	c.kubectl("rollout", "restart", "deployment/wrapper")
	c.kubectl("rollout", "status", "deployment/wrapper", "--timeout=5m")
	current, _ = next("the Deployment is rolled", current, planned)
	switch gap := told.longestGap(); {
	case gap == 0:
		t.Error("the Deployment was rolled, and no job ended")
	case gap > planned:
		t.Errorf("the Deployment was rolled, and for %v there was no job", gap)
	default:
		t.Logf("the Deployment is rolled: no job for %v at most", gap.Round(time.Millisecond))
	}

	if !c.old {
		c.routeToLeader(job, func(what string) string {
			current, pod = next(what, current, time.Minute)
			return pod
		})
	}
	c.badSettings(job, wrapper)
	c.failingJob(job, wrapper)
	form := "sidecar/plain"
	switch {
	case c.sidecars:
		form = "sidecar"
	case c.old:
		form = "sidecar/kubernetes-1.20"
	}
	c.sidecar(form)
	c.pages(etcd, wrapper, form)
}

// etcd makes certificates and starts the members, and returns the folders of k8s/ that fit this
// cluster.
func (c *cluster) etcd() (etcd, wrapper string) {
	c.t.Helper()
	certs := exec.Command("go", "run", "./certs", "-dir", filepath.Join(c.tree, "certs"),
		"-namespace", c.namespace)
	certs.Dir = filepath.Join(c.root, "tools", "k8s")
	if out, err := certs.CombinedOutput(); err != nil {
		c.t.Fatalf("make certificates: %v\n%s", err, out)
	}
	etcd, wrapper = "etcd", "wrapper"
	if c.old {
		etcd, wrapper = "etcd/kubernetes-1.20", "wrapper/kubernetes-1.20"
	}
	if c.nodes < 3 {
		etcd = "etcd/one-member"
	}
	c.kubectl("apply", "-k", filepath.Join(c.tree, etcd))
	c.kubectl("rollout", "status", "statefulset/etcd", "--timeout=10m")
	return etcd, wrapper
}

// pages types what the pages tell to type, with the folders that fit this cluster.
func (c *cluster) pages(etcd, wrapper, sidecar string) {
	c.t.Helper()
	for _, page := range []string{"kubernetes-wrapper.md", "kubernetes-sidecar.md"} {
		if err := nameImage(c.tree, filepath.Join(c.root, "docs", page), c.image); err != nil {
			c.t.Fatal(err)
		}
		c.page(page, etcd, wrapper, sidecar)
		c.sentences(page, etcd, wrapper, sidecar)
	}
	if c.nodes >= 3 { // and so three members
		c.loseVolume()
	}
}

// loseVolume takes the volume of an etcd member, waits until the member has seen that it cannot
// begin anew, and types what the page tells to do then.
func (c *cluster) loseVolume() {
	c.t.Helper()
	c.kubectl("delete", "pvc", "data-etcd-2", "--wait=false")
	c.kubectl("delete", "pod", "etcd-2")
	c.until(3*time.Minute, func() error {
		const reason = "jsonpath={.status.containerStatuses[*].lastState.terminated.reason}"
		ended, err := c.try("get", "pod", "etcd-2", "-o", reason)
		if err == nil && ended != "Error" {
			err = fmt.Errorf("etcd-2 has not exited; the last end: %q", ended)
		}
		return err
	})
	c.page("kubernetes-etcd.md", "etcd", "", "")
}

// page types what one page tells to type.
func (c *cluster) page(name, etcd, wrapper, sidecar string) {
	c.t.Helper()
	script, err := pageScript(filepath.Join(c.root, "docs", name), etcd, wrapper, sidecar)
	if err != nil {
		c.t.Fatal(err)
	}
	c.shell("docs/"+name, script)
}

// inSentences are the commands in the sentences of the pages, not in their blocks. This is an order
// in which they work after the blocks of their page. POD is the pod that leads.
var inSentences = map[string][]string{
	"kubernetes-wrapper.md": {
		"kubectl get storageclass",
		"kubectl describe pod",
		"kubectl logs POD -c job",
		"kubectl exec POD -c job -- /opt/leasehold/leasehold reload 1",
		"kubectl delete pdb wrapper",
		"kubectl delete pdb etcd",
		"kubectl apply -k k8s/etcd",
		"kubectl scale deployment/wrapper --replicas=0",
		"kubectl wait --for=delete pod -l app.kubernetes.io/name=wrapper --timeout=2m",
		"kubectl get endpointslice leader",
		"kubectl delete endpointslice leader",
		"kubectl apply -k k8s/mine",
		"kubectl rollout status deployment/wrapper",
		"kubectl delete -k k8s/mine",
		"kubectl wait --for=delete pod -l app.kubernetes.io/name=wrapper --timeout=2m",
	},
	"kubernetes-sidecar.md": {
		"kubectl exec deployment/sidecar -c leasehold -- /leasehold switchover",
		"kubectl delete pdb sidecar",
	},
}

// elsewhere are those that other tests type, or none.
var elsewhere = map[string]string{
	failures:                        "failingJob types it",
	"kubectl delete pod --force":    "TestCluster deletes a pod by force",
	"kubectl rollout undo":          "TestCluster_BadRollouts takes a rollout back",
	"helm template":                 "the tests of tools/k8s render the chart",
	"helm --wait":                   "it is in the blocks, with other words between",
	"make k8s-certs NAMESPACE=mine": "the tests of tools/k8s make these certificates",
	"make bin/helm":                 "make e2e-k8s does",
	"make generate":                 "it needs no cluster",
	"kind load docker-image localhost/leasehold": "this is no cluster of kind",
	"minikube image load localhost/leasehold":    "this is no minikube",
	"kubectl apply -k k8s/etcd/cert-manager":     "TestCluster_CertManager types it",
}

// sentences types what a page has in its sentences, as far as this cluster has it.
func (c *cluster) sentences(page, etcd, wrapper, sidecar string) {
	c.t.Helper()
	var script strings.Builder
	for _, command := range inSentences[page] {
		switch {
		case c.old && (strings.Contains(command, "pdb") || strings.Contains(command, "slice")):
			continue
		case c.nodes < 3 && strings.HasSuffix(command, "pdb etcd"):
			continue
		case strings.Contains(command, "POD"):
			command = strings.ReplaceAll(command, "POD", c.leads())
		}
		fmt.Fprintln(&script, command)
	}
	c.shell("the sentences of docs/"+page, fit(script.String(), etcd, wrapper, sidecar))
}

// leads returns the wrapper's pod that leads.
func (c *cluster) leads() (pod string) {
	c.t.Helper()
	c.until(time.Minute, func() error {
		out, err := c.try("exec", "deployment/wrapper", "-c", "job", "--",
			"/opt/leasehold/leasehold", "status", "--json")
		if err != nil {
			return err
		}
		var status struct{ Leader struct{ Identity string } }
		if err := json.Unmarshal([]byte(out), &status); err != nil {
			return err
		}
		if pod = status.Leader.Identity; pod == "" {
			return fmt.Errorf("nobody leads: %s", out)
		}
		return nil
	})
	return pod
}

// shell runs a script of bash as if it had been typed in the tree.
func (c *cluster) shell(name, script string) {
	c.t.Helper()
	// The image has been made, and the copy of the tree has no Makefile.
	prelude := fmt.Sprintf(`set -euo pipefail
make() {
	[ "$1" = image ] || {
		here=$PWD
		(cd %[1]s/tools/k8s && go run ./certs -dir "$here/k8s/certs")
	}
}
helm() {
	case $1 in
	install|upgrade) %[1]s/bin/helm "$@" --set 'image.repository=%[2]s,image.tag=%[3]s' ;;
	*) %[1]s/bin/helm "$@" ;;
	esac
}
`, c.root, repository(c.image), tag(c.image))
	ctx, cancel := context.WithTimeout(c.t.Context(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", prelude+script)
	cmd.Env, cmd.Dir = append(os.Environ(), "KUBECONFIG="+c.config), filepath.Dir(c.tree)
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Errorf("%s: %v\n%s", name, err, out)
	}
}

var (
	block  = regexp.MustCompile("(?ms)^```sh\n(.*?)^```$")
	named  = regexp.MustCompile("`k8s/([a-z0-9./-]+/kustomization.yaml)`")
	folder = regexp.MustCompile(`(?m)(-k k8s/|\[\.\./)(etcd|wrapper|sidecar)(\]?)$`)
)

// nameImage names leasehold's image where a page says that it is to be named.
func nameImage(tree, page, image string) error {
	text, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	entry := fmt.Sprintf("- name: localhost/leasehold\n  newName: %s\n  newTag: %q\n",
		repository(image), tag(image))
	for _, match := range named.FindAllSubmatch(text, -1) {
		file := filepath.Join(tree, string(match[1]))
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		const latest = "- name: localhost/leasehold\n  newTag: latest\n"
		text = bytes.ReplaceAll(text, []byte(latest), []byte(entry))
		if err := os.WriteFile(file, text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// pageScript is what a page tells to type, with these folders of k8s/ in the place of
// etcd, wrapper and sidecar.
func pageScript(page, etcd, wrapper, sidecar string) (string, error) {
	text, err := os.ReadFile(page)
	if err != nil {
		return "", err
	}
	var script strings.Builder
	if strings.HasSuffix(wrapper, "1.20") { // the page says that it needs a newer one
		text, _, _ = bytes.Cut(text, []byte("## Traffic to the leader only"))
	}
	for _, match := range block.FindAllSubmatch(text, -1) {
		script.Write(match[1])
	}
	return fit(script.String(), etcd, wrapper, sidecar), nil
}

// fit puts these folders of k8s/ in the place of etcd, wrapper and sidecar.
func fit(script, etcd, wrapper, sidecar string) string {
	folders := map[string]string{"etcd": etcd, "wrapper": wrapper, "sidecar": sidecar}
	if sidecar != "sidecar" { // the form of a release
		script = strings.ReplaceAll(script, "form=sidecar", "form=plain-sidecar")
	}
	return folder.ReplaceAllStringFunc(script, func(found string) string {
		m := folder.FindStringSubmatch(found)
		return m[1] + folders[m[2]] + m[3]
	})
}

// routeToLeader shows that a rolling update goes through, because standbys are ready, and that the
// Service routes to the leader alone, and to the next one.
func (c *cluster) routeToLeader(job string, next func(what string) (pod string)) {
	c.t.Helper()
	c.overlay("mine", "wrapper/route-to-leader", job, jobPatch(""))
	c.kubectl("rollout", "status", "deployment/wrapper", "--timeout=5m")
	pod := next("the Deployment is rolled, with a Service that routes to the leader")
	c.routed(pod)
	c.kubectl("delete", "pod", pod, "--wait=false")
	c.routed(next("the leader's pod is deleted, to which the Service routes"))
	c.kubectl("exec", "witness", "--", "/job", "dial", "leader:4040")
}

// routed waits until the Service routes to this pod, and to no other.
func (c *cluster) routed(pod string) {
	c.t.Helper()
	want := c.kubectl("get", "pod", pod, "-o", "jsonpath={.status.podIP}")
	c.until(time.Minute, func() error {
		got, err := c.try("get", "endpointslices", "-l", "kubernetes.io/service-name=leader",
			"-o", "jsonpath={.items[*].endpoints[*].addresses[*]}")
		if err == nil && got != want {
			err = fmt.Errorf("the Service routes to %q, want %s of %s", got, want, pod)
		}
		return err
	})
}

// badSettings shows that the pod's status names every fault.
func (c *cluster) badSettings(job, wrapper string) {
	t := c.t
	t.Helper()
	c.overlay("mine", wrapper, job, jobPatch(`        env:
        - {name: LEASEHOLD_TLL, value: 5s}
        - {name: LEASEHOLD_TTL, value: "15"}
`))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	err := harness.Until(ctx, func() error {
		message := c.kubectl("get", "pods", "-l", "app.kubernetes.io/name=wrapper", "-o",
			"jsonpath={.items[*].status.containerStatuses[*].lastState.terminated.message}")
		if !strings.Contains(message, "LEASEHOLD_TLL: unknown variable") ||
			!strings.Contains(message, "LEASEHOLD_TTL: ") {
			return fmt.Errorf("termination message %q", message)
		}
		return nil
	})
	if err != nil {
		t.Errorf("the pod does not say what is wrong: %v", err)
	}
	c.kubectl("delete", "deployment", "wrapper")
}

// failures is what the page has for a job that fails again and again.
const failures = "kubectl logs -l app.kubernetes.io/name=wrapper -c job --prefix --tail=-1" +
	" | grep 'job exited'"

// failingJob shows where to look for a job that fails: not at the pods, which are ready and were
// never restarted.
func (c *cluster) failingJob(job, wrapper string) {
	c.t.Helper()
	c.overlay("mine", wrapper, job, strings.Replace(jobPatch(""), "run, ", "fail, ", 1))
	c.kubectl("rollout", "status", "deployment/wrapper", "--timeout=5m")
	c.until(time.Minute, func() error {
		cmd := exec.CommandContext(c.t.Context(), "bash", "-c", failures)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+c.config)
		out, err := cmd.CombinedOutput()
		if n := strings.Count(string(out), "exit_code=1"); n < 3 {
			err = errors.Join(fmt.Errorf("%d failures of the job:\n%s", n, out), err)
		}
		return err
	})
	got := c.kubectl("get", "pods", "-l", "app.kubernetes.io/name=wrapper", "-o",
		"jsonpath={range .items[*].status.containerStatuses[*]}{.ready} {.restartCount},{end}")
	if want := strings.Repeat("true 0,", 3); got != want {
		c.t.Errorf("the job fails; the pods are ready and RESTARTS is %q, want %q", got, want)
	}
	c.kubectl("delete", "deployment", "wrapper")
}

// sidecar runs the form that fits this cluster with the example's own image, and
// deletes the leader's pod.
func (c *cluster) sidecar(form string) {
	t := c.t
	t.Helper()
	c.overlay("theirs", form, "docker.io/library/busybox:1.37")
	c.kubectl("rollout", "status", "deployment/sidecar", "--timeout=10m")
	leading := func() (string, error) {
		pods := c.kubectl("get", "pods", "-l", "app.kubernetes.io/name=sidecar", "-o",
			"jsonpath={.items[*].metadata.name}")
		for _, pod := range strings.Fields(pods) {
			_, err := c.try("exec", pod, "-c", "leasehold", "--", "/leasehold", "check", "leader")
			if err == nil {
				return pod, nil
			}
		}
		return "", errors.New("nobody leads")
	}
	wait := func(not string) (leader string) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		err := harness.Until(ctx, func() (err error) {
			if leader, err = leading(); err == nil && leader == not {
				err = fmt.Errorf("%s still leads", not)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return leader
	}
	first := wait("")
	if os.Getenv("CLUSTER") != "" {
		c.killSidecar(first)
	}
	c.kubectl("delete", "pod", first, "--wait=false")
	second := wait(first)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := harness.Until(ctx, func() error {
		if out := c.kubectl("logs", second, "-c", "app"); !strings.Contains(out, second+" leads") {
			return fmt.Errorf("the app says %q", out)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// killSidecar kills leasehold beside the leader's app. Its container is started again, and goes on
// with the lease: the same key leads.
func (c *cluster) killSidecar(pod string) {
	c.t.Helper()
	leader := func() (string, error) {
		out, err := c.try("exec", pod, "-c", "leasehold", "--", "/leasehold", "status", "--json")
		var s struct{ Leader struct{ Key string } }
		if err == nil {
			err = json.Unmarshal([]byte(out), &s)
		}
		return s.Leader.Key, err
	}
	before, err := leader()
	if err != nil {
		c.t.Fatal(err)
	}
	node := c.kubectl("get", "pod", pod, "-o", "jsonpath={.spec.nodeName}")
	c.killIn(pod, node, "/leasehold elect ")
	c.until(time.Minute, func() error {
		_, err := c.try("exec", pod, "-c", "leasehold", "--", "/leasehold", "check", "leader")
		return err
	})
	if after, err := leader(); err != nil || after != before {
		c.t.Errorf("the leader's key is %s (%v), want %s", after, err, before)
	}
	c.until(time.Minute, func() error { // at first it is the log of the container before
		log, err := c.try("logs", pod, "-c", "leasehold")
		if err == nil && !strings.Contains(log, "took over a lease") {
			err = fmt.Errorf("it has taken no lease over:\n%s", log)
		}
		return err
	})
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("witness: %s", bytes.TrimSpace(p))
	return len(p), nil
}
