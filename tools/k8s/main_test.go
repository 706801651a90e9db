//go:build linux

package k8s_test

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	"leasehold/e2e/harness"
)

// What the tests share: a copy of the tree with certificates, what each kustomization renders to,
// and the programs.
var shared struct {
	root      string // of the repository
	tree      string // a copy of k8s/
	leasehold string
	certs     string // what make k8s-certs runs
	old       string // Kubernetes 1.20's view of manifests
	rendered  map[string][]object
}

func TestMain(m *testing.M) { os.Exit(run(m)) }

// What is shared is made before the tests go where there is no road to anywhere:
// into a network of their own.
const dirVariable = "LEASEHOLD_K8S_TEST"

func run(m *testing.M) int {
	dir := os.Getenv(dirVariable)
	if dir == "" {
		var err error
		if dir, err = harness.TempDir("leasehold-k8s-"); err == nil {
			defer func() { _ = os.RemoveAll(dir) }()
			err = prepare(dir)
		}
		if err == nil && os.Geteuid() == 0 {
			if err = os.Setenv(dirVariable, dir); err == nil {
				_, code := harness.EnterNetwork()
				return code
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	if err := load(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if os.Geteuid() == 0 {
		network, err := harness.NewNetwork() // it brings up the loopback device
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer network.Close()
	}
	return m.Run()
}

// prepare makes a copy of the manifests with certificates, and builds the programs.
func prepare(dir string) error {
	root, err := harness.ModuleRoot()
	if err != nil {
		return err
	}
	for program, source := range map[string]string{
		"leasehold": ".", "certs": "tools/k8s/certs", "k8s-1.20": "tools/k8s-1.20",
	} {
		binary := filepath.Join(dir, program)
		build := exec.Command("go", "build", "-tags", "grpcnotrace", "-o", binary, ".")
		build.Dir = filepath.Join(root, source)
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", source, err, out)
		}
	}
	if err := copyTree(filepath.Join(root, "k8s"), filepath.Join(dir, "k8s")); err != nil {
		return err
	}
	return runCerts(filepath.Join(dir, "certs"), filepath.Join(dir, "k8s", "certs"), "default")
}

func load(dir string) (err error) {
	if shared.root, err = harness.ModuleRoot(); err != nil {
		return err
	}
	shared.tree, shared.leasehold = filepath.Join(dir, "k8s"), filepath.Join(dir, "leasehold")
	shared.certs, shared.old = filepath.Join(dir, "certs"), filepath.Join(dir, "k8s-1.20")
	shared.rendered = map[string][]object{}
	for overlay := range overlays {
		if shared.rendered[overlay], err = render(filepath.Join(shared.tree, overlay)); err != nil {
			return fmt.Errorf("render k8s/%s: %w", overlay, err)
		}
	}
	return nil
}

// copyTree copies what git knows of a folder, so that nobody's certificates take part.
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

// makeCerts does what `make k8s-certs` does, elsewhere.
func makeCerts(dir, namespace string) error { return runCerts(shared.certs, dir, namespace) }

func runCerts(program, dir, namespace string) error {
	out, err := exec.Command(program, "-dir", dir, "-namespace", namespace).CombinedOutput()
	if err != nil {
		return fmt.Errorf("make certificates: %w\n%s", err, out)
	}
	return nil
}

// An object is one of the documents that a kustomization renders to.
type object struct {
	yaml []byte
	kind string
	name string
}

func (o object) String() string { return o.kind + " " + o.name }

// render is `kubectl kustomize` of a kubectl of today.
func render(dir string) ([]object, error) {
	kustomize := krusty.MakeKustomizer(krusty.MakeDefaultOptions())
	result, err := kustomize.Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return nil, err
	}
	text, err := result.AsYaml()
	if err != nil {
		return nil, err
	}
	return split(text)
}

func split(text []byte) ([]object, error) {
	var objects []object
	for document := range bytes.SplitSeq(text, []byte("\n---\n")) {
		var head struct {
			Kind     string `json:"kind"`
			Metadata struct {
				Name string `json:"name"`
			} `json:"metadata"`
		}
		if err := yaml.Unmarshal(document, &head); err != nil {
			return nil, err
		}
		if head.Kind == "Secret" {
			// kustomize of today breaks base64 into lines. Kubernetes reads that;
			// kubectl-validate does not.
			var secret map[string]any
			if err := yaml.Unmarshal(document, &secret); err != nil {
				return nil, err
			}
			data, _ := secret["data"].(map[string]any)
			for key, value := range data {
				data[key] = strings.ReplaceAll(fmt.Sprint(value), "\n", "")
			}
			var err error
			if document, err = yaml.Marshal(secret); err != nil {
				return nil, err
			}
		}
		if head.Kind != "" {
			objects = append(objects, object{document, head.Kind, head.Metadata.Name})
		}
	}
	if len(objects) == 0 {
		return nil, fmt.Errorf("there is no object")
	}
	return objects, nil
}

// find decodes the one object of the type's kind and that name, which must be there.
func find[T any](t testing.TB, objects []object, name string) *T {
	t.Helper()
	kind := reflect.TypeFor[T]().Name()
	i := slices.IndexFunc(objects, func(o object) bool { return o.kind == kind && o.name == name })
	if i < 0 {
		t.Fatalf("there is no %s %s among %v", kind, name, objects)
	}
	into := new(T)
	if err := yaml.UnmarshalStrict(objects[i].yaml, into); err != nil {
		t.Fatalf("%v: %v", objects[i], err)
	}
	return into
}

// leaseholdIn returns the container that runs the daemon. The init container that copies it does
// not.
func leaseholdIn(spec corev1.PodSpec) *corev1.Container {
	for _, list := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for i, c := range list {
			if slices.ContainsFunc(c.Env, func(v corev1.EnvVar) bool {
				return strings.HasPrefix(v.Name, "LEASEHOLD_")
			}) {
				return &list[i]
			}
		}
	}
	return nil
}

// environment is what the kubelet makes of a container's env in a pod of that name.
// What k8s/etcd is asked for is there.
func environment(t testing.TB, c corev1.Container, pod string, etcd []object) map[string]string {
	t.Helper()
	env := map[string]string{
		"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443",
	}
	for _, v := range c.Env {
		switch from := v.ValueFrom; {
		case from == nil:
			env[v.Name] = expand(v.Value, env)
		case from.FieldRef != nil && from.FieldRef.FieldPath == "metadata.name":
			env[v.Name] = pod
		case from.FieldRef != nil && from.FieldRef.FieldPath == "status.podIP":
			env[v.Name] = "10.1.2.3"
		case from.ConfigMapKeyRef != nil:
			ref := from.ConfigMapKeyRef
			value, found := find[corev1.ConfigMap](t, etcd, ref.Name).Data[ref.Key]
			if !found {
				t.Fatalf("%s of container %s: k8s/etcd has no such key", v.Name, c.Name)
			}
			env[v.Name] = value
		default:
			t.Fatalf("%s of container %s comes from where this test does not look", v.Name, c.Name)
		}
	}
	return env
}

// expand puts variables in, as the kubelet does.
func expand(text string, env map[string]string) string {
	for name, value := range env {
		text = strings.ReplaceAll(text, "$("+name+")", value)
	}
	return text
}

func list(env map[string]string) []string {
	var entries []string
	for _, name := range slices.Sorted(maps.Keys(env)) {
		entries = append(entries, name+"="+env[name])
	}
	return entries
}
