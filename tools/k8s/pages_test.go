//go:build linux

package k8s_test

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

var block = regexp.MustCompile("(?ms)^```sh\n(.*?)^```$")

// Each command of the pages is run here, in their order and in a copy of the tree, as far as it
// needs no cluster: what would be applied is rendered by the real kubectl and has to pass the
// checks. `make e2e-k8s` runs the same commands in a cluster.
func TestPages_Commands(t *testing.T) {
	kubectl := needs(t, "kubectl")
	for _, page := range []string{"kubernetes-wrapper.md", "kubernetes-sidecar.md"} {
		t.Run(page, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join(shared.root, "docs", page))
			if err != nil {
				t.Fatal(err)
			}
			var script strings.Builder
			for _, match := range block.FindAllSubmatch(text, -1) {
				script.Write(match[1])
			}
			tree, dir := t.TempDir(), t.TempDir()
			asked, old := filepath.Join(dir, "asked"), filepath.Join(dir, "old")
			err = copyTree(filepath.Join(shared.root, "k8s"), filepath.Join(tree, "k8s"))
			if err != nil {
				t.Fatal(err)
			}
			// What make k8s-certs needs of the tree.
			for _, file := range []string{
				"Makefile", "go.mod", "go.sum", "tools/k8s/go.mod", "tools/k8s/go.sum",
				"tools/k8s/certs/main.go",
			} {
				to := filepath.Join(tree, file)
				err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755),
					os.WriteFile(to, read(t, shared.root, file), 0o644))
				if err != nil {
					t.Fatal(err)
				}
			}
			charts := filepath.Join(shared.root, "charts")
			if err := os.Symlink(charts, filepath.Join(tree, "charts")); err != nil {
				t.Fatal(err)
			}
			// The image needs a builder, and is another test's.
			prelude := fmt.Sprintf(`set -euo pipefail
make() {
	case $1 in
	k8s-certs) command make "$@" ;;
	image) ;;
	*) echo "this test does not know make $1"; exit 1 ;;
	esac
}
n=0
helm() {
	case $1 in
	install|upgrade) n=$((n + 1)); %s template "${@:2}" | tee %s.$n >%s.$n ;;
	rollback|uninstall) ;;
	*) echo "this test does not know helm $*"; exit 1 ;;
	esac
}
kubectl() {
	case "$1 $2" in
	"apply -k") n=$((n + 1)); %s kustomize "$3" >%s.$n; %s render "$3" >%s.$n ;;
	"rollout status"|"exec deployment/"*|"logs -l"|"delete pdb") echo "$*" >>%s ;;
	*) echo "this test does not know kubectl $*"; exit 1 ;;
	esac
}
`, helm(t).Path, asked, old, kubectl, asked, shared.old, old, asked)
			cmd := exec.Command("bash", "-c", prelude+script.String())
			cmd.Dir = tree
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}

			// As the page says for clients of other namespaces.
			remake := exec.Command("make", "-C", tree, "k8s-certs", "NAMESPACE=mine")
			if out, err := remake.CombinedOutput(); err != nil {
				t.Fatalf("make k8s-certs NAMESPACE=mine: %v\n%s", err, out)
			}
			block, _ := pem.Decode(read(t, filepath.Join(tree, "k8s/certs"), "server.crt"))
			server, err := x509.ParseCertificate(block.Bytes)
			if err != nil || server.VerifyHostname("etcd-0.etcd.mine") != nil {
				t.Errorf("make k8s-certs NAMESPACE=mine: "+
					"the server's certificate is not for etcd-0.etcd.mine (%v)", err)
			}

			applied, err := filepath.Glob(asked + ".*")
			if err != nil || len(applied) < 2 {
				t.Fatalf("the page applies %d things (%v)", len(applied), err)
			}
			var all []object
			elections, last := map[string]string{}, map[string]*corev1.Container{}
			for _, file := range applied {
				rendered, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				objects, err := split(rendered)
				if err != nil {
					t.Fatal(err)
				}
				// kubectl 1.20 makes the same of what the page has the reader write.
				old := strings.Replace(filepath.Base(file), "asked", "old", 1)
				before, err := split(read(t, dir, old))
				if err != nil {
					t.Fatal(err)
				}
				was, is := values(t, before), values(t, objects)
				if !reflect.DeepEqual(was, is) {
					t.Errorf("kustomize 2.0.3 renders\n%v\nthat of today\n%v", was, is)
				}
				for _, o := range objects {
					if _, err := decode(o.yaml); err != nil {
						t.Errorf("%v: %v", o, err)
					}
				}
				for name, pod := range templates(t, objects) {
					if fault := restrictedFault(t, pod); fault != "" {
						t.Errorf("%s: %s", name, fault)
					}
				}
				all = append(all, objects...)
				// Rolled into another election, old and new pods would each have a leader; and what
				// is the reader's own stays.
				for name, pod := range templates(t, objects) {
					c := leaseholdIn(pod.Spec)
					if c == nil {
						continue
					}
					env := environment(t, *c, "pod", shared.rendered["etcd"])
					election := env["LEASEHOLD_ELECTION"]
					if before, found := elections[name]; found && before != election {
						t.Errorf("%s is rolled from the election %s into %s: two jobs at once",
							name, before, election)
					}
					before := last[name]
					if before != nil && strings.Contains(before.Image, "debian") &&
						(c.Image != before.Image || !slices.Equal(c.Args, before.Args)) {
						t.Errorf("%s: the reader's job %s %q is rolled back to %s %q",
							name, before.Image, before.Args, c.Image, c.Args)
					}
					elections[name], last[name] = election, c
				}
			}
			// What is asked of a Deployment is asked of one that was applied, and
			// of a container that it has.
			lines, err := os.ReadFile(asked)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(lines)) {
				words := strings.Fields(line)
				for i, word := range words {
					if name, found := strings.CutPrefix(word, "deployment/"); found {
						spec := find[appsv1.Deployment](t, all, name).Spec.Template.Spec
						if words[0] == "exec" && leaseholdIn(spec).Name != words[i+2] {
							t.Errorf("%q: leasehold is in container %s",
								line, leaseholdIn(spec).Name)
						}
					}
				}
			}
		})
	}
}

// Every path of k8s/ and docs/ that the pages name is there.
func TestPages_Paths(t *testing.T) {
	named := regexp.MustCompile("k8s/[a-z0-9./-]+[a-z0-9]")
	for _, page := range []string{"kubernetes-wrapper.md", "kubernetes-sidecar.md"} {
		text, err := os.ReadFile(filepath.Join(shared.root, "docs", page))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range named.FindAllString(string(text), -1) {
			made := strings.HasPrefix(path, "k8s/mine") || path == "k8s/certs/ca.key"
			if _, err := os.Stat(filepath.Join(shared.root, path)); err != nil && !made {
				t.Errorf("docs/%s names %s: %v", page, path, err)
			}
		}
	}
}
