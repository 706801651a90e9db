//go:build linux

package k8s_test

import (
	"bytes"
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
	"time"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/kubectl-validate/pkg/openapiclient"
	"sigs.k8s.io/kubectl-validate/pkg/validator"
	"sigs.k8s.io/yaml"
)

// An overlay is something to apply, and what it is for.
type overlay struct {
	schemas []string // of these versions of Kubernetes; kubectl-validate has none that is older
	old     bool     // Kubernetes 1.20 knows all of it
	bare    bool     // has no PodDisruptionBudget
	asks    bool     // its pods ask the API server
}

var overlays = map[string]overlay{
	"etcd":                    {schemas: []string{"1.23", "1.30"}},
	"etcd/one-member":         {schemas: []string{"1.23", "1.30"}, old: true, bare: true},
	"etcd/kubernetes-1.20":    {schemas: []string{"1.23", "1.30"}, old: true, bare: true},
	"etcd/cert-manager":       {schemas: []string{"1.23", "1.30"}},
	"wrapper":                 {schemas: []string{"1.23", "1.30"}},
	"wrapper/kubernetes-1.20": {schemas: []string{"1.23", "1.30"}, old: true, bare: true},
	"wrapper/route-to-leader": {schemas: []string{"1.23", "1.30"}, asks: true},
	"sidecar":                 {schemas: []string{"1.29", "1.30"}},
	"sidecar/plain":           {schemas: []string{"1.23", "1.30"}},
	"sidecar/kubernetes-1.20": {schemas: []string{"1.23", "1.30"}, old: true, bare: true},
}

// Folders that are of no use alone.
var parts = []string{
	"certs", "etcd/base", "etcd/pdb", "wrapper/base", "wrapper/pdb", "sidecar/base", "sidecar/pdb",
}

func eachOverlay(t *testing.T, f func(t *testing.T, o overlay, objects []object)) {
	for name, o := range overlays {
		t.Run(name, func(t *testing.T) { f(t, o, shared.rendered[name]) })
	}
}

func TestManifests_AllAreTested(t *testing.T) {
	err := filepath.WalkDir(shared.tree, func(path string, _ os.DirEntry, err error) error {
		if err != nil || filepath.Base(path) != "kustomization.yaml" {
			return err
		}
		name, err := filepath.Rel(shared.tree, filepath.Dir(path))
		if _, tested := overlays[name]; !tested && !slices.Contains(parts, name) {
			t.Errorf("no test knows k8s/%s", name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// values are what the objects say, in the order of their names.
func values(t *testing.T, objects []object) (all []any) {
	t.Helper()
	byName := func(a, b object) int { return strings.Compare(a.String(), b.String()) }
	for _, o := range slices.SortedFunc(slices.Values(objects), byName) {
		var value any
		if err := yaml.Unmarshal(o.yaml, &value); err != nil {
			t.Fatal(err)
		}
		all = append(all, value)
	}
	return all
}

// kubectl 1.20 has kustomize 2.0.3 in it, which reads less and writes otherwise.
func TestManifests_OldAndNewKustomizeAgree(t *testing.T) {
	for name := range overlays {
		text, err := exec.Command(shared.old, "render", filepath.Join(shared.tree, name)).Output()
		if err != nil {
			t.Errorf("kustomize 2.0.3 does not render k8s/%s: %v", name, stderr(err))
			continue
		}
		objects, err := split(text)
		if err != nil {
			t.Fatal(err)
		}
		old, today := values(t, objects), values(t, shared.rendered[name])
		if !reflect.DeepEqual(old, today) {
			t.Errorf("k8s/%s differs: kustomize 2.0.3 renders\n%v\nthat of today\n%v",
				name, old, today)
		}
	}
}

// The kubectl that is here says what the library says, if there is one: it is what people type.
func TestManifests_KubectlKustomize(t *testing.T) {
	kubectl := needs(t, "kubectl")
	for name := range overlays {
		text, err := exec.Command(kubectl, "kustomize", filepath.Join(shared.tree, name)).Output()
		if err != nil {
			t.Errorf("kubectl kustomize k8s/%s: %v", name, stderr(err))
			continue
		}
		if objects, err := split(text); err != nil || len(objects) != len(shared.rendered[name]) {
			t.Errorf("kubectl kustomize k8s/%s: %d objects (%v), want %d",
				name, len(objects), err, len(shared.rendered[name]))
		}
	}
}

func needs(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	switch {
	case err == nil:
		return path
	case os.Getenv("E2E_NO_SKIP") == "1":
		t.Fatalf("needs %s, and E2E_NO_SKIP=1 forbids to skip", program)
	}
	t.Skipf("skipped: needs %s", program)
	return ""
}

func stderr(err error) string {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return fmt.Sprintf("%v: %s", err, exit.Stderr)
	}
	return err.Error()
}

// Kubernetes' own kinds and those of cert-manager.
var kinds = runtime.NewScheme()

func init() {
	utilruntime.Must(scheme.AddToScheme(kinds))
	utilruntime.Must(certmanager.AddToScheme(kinds))
}

var strict = json.NewSerializerWithOptions(json.DefaultMetaFactory, kinds, kinds,
	json.SerializerOptions{Yaml: true, Strict: true})

func decode(text []byte) (runtime.Object, error) {
	o, _, err := strict.Decode(text, nil, nil)
	return o, err
}

// cert-manager's own objects, which Kubernetes does not know.
func foreign(o object) bool { return o.kind == "Certificate" || o.kind == "Issuer" }

func TestManifests_StrictDecoding(t *testing.T) {
	eachOverlay(t, func(t *testing.T, _ overlay, objects []object) {
		for _, o := range objects {
			if _, err := decode(o.yaml); err != nil {
				t.Errorf("%v: %v", o, err)
			}
		}
	})
	t.Run("can fail", func(t *testing.T) {
		for _, is := range []struct{ overlay, kind, old, bad string }{
			{"wrapper", "Deployment", "enableServiceLinks", "enableServiceLink"},
			{"wrapper", "Deployment", "replicas: 3", "replicas: three"},
			{"etcd/cert-manager", "Certificate", "issuerRef", "issuer"},
		} {
			broken := substitute(t, shared.rendered[is.overlay], is.kind, is.old, is.bad)
			if _, err := decode(broken); err == nil {
				t.Errorf("%q in the place of %q was taken", is.bad, is.old)
			}
		}
	})
}

// substitute returns the object of that kind with one text in the place of another, which must be
// there.
func substitute(t *testing.T, objects []object, kind, old, replacement string) []byte {
	t.Helper()
	i := slices.IndexFunc(objects, func(o object) bool { return o.kind == kind })
	if i < 0 || !bytes.Contains(objects[i].yaml, []byte(old)) {
		t.Fatalf("there is no %s with %q", kind, old)
	}
	return bytes.ReplaceAll(objects[i].yaml, []byte(old), []byte(replacement))
}

func TestManifests_Kubernetes120(t *testing.T) {
	known := func(text []byte) error {
		cmd := exec.Command(shared.old, "decode")
		cmd.Stdin = bytes.NewReader(text)
		if _, err := cmd.Output(); err != nil {
			return fmt.Errorf("Kubernetes 1.20 does not know it: %s", stderr(err))
		}
		return nil
	}
	eachOverlay(t, func(t *testing.T, overlay overlay, objects []object) {
		for _, o := range objects {
			if err := known(o.yaml); err != nil && overlay.old {
				t.Errorf("%v: %v", o, err)
			}
		}
	})
	t.Run("can fail", func(t *testing.T) {
		for overlay, kind := range map[string]string{
			"wrapper": "PodDisruptionBudget", "sidecar": "Deployment",
		} {
			text := substitute(t, shared.rendered[overlay], kind, "apiVersion", "apiVersion")
			if err := known(text); err == nil {
				t.Errorf("the %s of k8s/%s passes for one that Kubernetes 1.20 knows",
					kind, overlay)
			}
		}
	})
}

// The pages have this for those who don't want a drain to wait for pods that are not ready. It
// can't be there by default: the manifests are for 1.21 and newer.
func TestManifests_EvictionPolicy(t *testing.T) {
	for _, app := range []string{"wrapper", "sidecar"} {
		text := substitute(t, shared.rendered[app], "PodDisruptionBudget",
			"maxUnavailable: 1\n",
			"maxUnavailable: 1\n  unhealthyPodEvictionPolicy: AlwaysAllow\n")
		_, err := decode(text)
		if err = errors.Join(err, schemaFault("1.27", text)); err != nil {
			t.Errorf("k8s/%s: Kubernetes 1.27 does not take unhealthyPodEvictionPolicy,"+
				" and the page says so: %v", app, err)
		}
		if schemaFault("1.23", text) == nil {
			t.Errorf("k8s/%s: Kubernetes 1.23 takes unhealthyPodEvictionPolicy,"+
				" and the page says that it does not", app)
		}
	}
}

func schemaFault(version string, text []byte) error {
	v, err := validator.New(openapiclient.NewHardcodedBuiltins(version))
	if err != nil {
		return err
	}
	_, parsed, err := v.Parse(text)
	if err != nil {
		return err
	}
	return v.Validate(parsed)
}

func TestManifests_Schema(t *testing.T) {
	eachOverlay(t, func(t *testing.T, overlay overlay, objects []object) {
		for _, version := range overlay.schemas {
			for _, o := range objects {
				if foreign(o) {
					continue
				}
				if err := schemaFault(version, o.yaml); err != nil {
					t.Errorf("Kubernetes %s: %v: %v", version, o, err)
				}
			}
		}
	})
	t.Run("can fail", func(t *testing.T) {
		sidecar, wrapper := shared.rendered["sidecar"], shared.rendered["wrapper"]
		text := substitute(t, sidecar, "Deployment", "apiVersion", "apiVersion")
		if err := schemaFault("1.23", text); err == nil {
			t.Error("Kubernetes 1.23 takes a native sidecar")
		}
		text = substitute(t, wrapper, "Deployment", "maxSkew: 1", "maxSkew: one")
		if err := schemaFault("1.30", text); err == nil {
			t.Error("Kubernetes 1.30 takes a word for a number")
		}
	})
}

// templates are the pods that objects make.
func templates(t *testing.T, objects []object) map[string]corev1.PodTemplateSpec {
	t.Helper()
	pods := map[string]corev1.PodTemplateSpec{}
	for _, o := range objects {
		switch o.kind {
		case "Deployment":
			pods[o.String()] = find[appsv1.Deployment](t, objects, o.name).Spec.Template
		case "StatefulSet":
			pods[o.String()] = find[appsv1.StatefulSet](t, objects, o.name).Spec.Template
		}
	}
	if len(pods) == 0 {
		t.Fatal("there are no pods")
	}
	return pods
}

func restrictedFault(t *testing.T, pod corev1.PodTemplateSpec) string {
	t.Helper()
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks())
	if err != nil {
		t.Fatal(err)
	}
	restricted := api.LevelVersion{Level: api.LevelRestricted, Version: api.LatestVersion()}
	result := policy.AggregateCheckResults(
		evaluator.EvaluatePod(restricted, &pod.ObjectMeta, &pod.Spec))
	if result.Allowed {
		return ""
	}
	return result.ForbiddenDetail()
}

func TestManifests_PodSecurityRestricted(t *testing.T) {
	eachOverlay(t, func(t *testing.T, _ overlay, objects []object) {
		for name, pod := range templates(t, objects) {
			if fault := restrictedFault(t, pod); fault != "" {
				t.Errorf("%s: %s", name, fault)
			}
		}
	})
	t.Run("can fail", func(t *testing.T) {
		for _, spoil := range []func(*corev1.PodSpec){
			func(p *corev1.PodSpec) { p.SecurityContext.SeccompProfile = nil },
			func(p *corev1.PodSpec) { p.SecurityContext.RunAsNonRoot = nil },
			func(p *corev1.PodSpec) { p.InitContainers[0].SecurityContext.Capabilities = nil },
			func(p *corev1.PodSpec) {
				p.Containers[0].SecurityContext.AllowPrivilegeEscalation = nil
			},
			func(p *corev1.PodSpec) {
				root := &corev1.HostPathVolumeSource{Path: "/"}
				p.Volumes[0].VolumeSource = corev1.VolumeSource{HostPath: root}
			},
		} {
			pod := find[appsv1.Deployment](t, shared.rendered["wrapper"], "wrapper").Spec.Template
			spoil(&pod.Spec)
			if restrictedFault(t, pod) == "" {
				t.Error("a pod that is not restricted passes")
			}
		}
	})
}

const getsToken = "it gets a service account token"

// podFaults says what is wrong with a pod by our own rules, which no library has.
func podFaults(pod corev1.PodTemplateSpec) (faults []string) {
	add := func(format string, args ...any) {
		faults = append(faults, fmt.Sprintf(format, args...))
	}
	spec := pod.Spec
	if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		add(getsToken)
	}
	if spec.EnableServiceLinks == nil || *spec.EnableServiceLinks {
		add("it gets service links")
	}
	if len(spec.TopologySpreadConstraints) == 0 {
		add("it is not spread")
	}
	for _, c := range spec.TopologySpreadConstraints {
		if !selects(c.LabelSelector, pod.Labels) {
			add("a spread constraint counts other pods")
		}
	}
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		s := c.SecurityContext
		if s == nil || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
			add("container %s can write to its root", c.Name)
		}
		for _, v := range c.Env {
			if v.ValueFrom != nil && v.ValueFrom.SecretKeyRef != nil {
				add("container %s has a secret in %s, not in a file", c.Name, v.Name)
			}
		}
		if len(c.EnvFrom) > 0 {
			add("container %s takes its environment whole from elsewhere", c.Name)
		}
	}
	return faults
}

func selects(selector *metav1.LabelSelector, of map[string]string) bool {
	s, err := metav1.LabelSelectorAsSelector(selector)
	return err == nil && s.Matches(labels.Set(of))
}

func TestManifests_Pods(t *testing.T) {
	eachOverlay(t, func(t *testing.T, overlay overlay, objects []object) {
		for name, pod := range templates(t, objects) {
			for _, fault := range podFaults(pod) {
				if overlay.asks && fault == getsToken {
					continue
				}
				t.Errorf("%s: %s", name, fault)
			}
			app := pod.Labels["app.kubernetes.io/name"]
			netpol := find[networkingv1.NetworkPolicy](t, objects, app)
			if !selects(&netpol.Spec.PodSelector, pod.Labels) {
				t.Errorf("%s: the NetworkPolicy is for other pods", name)
			}
			if overlay.bare {
				continue
			}
			pdb := find[policyv1.PodDisruptionBudget](t, objects, app)
			if !selects(pdb.Spec.Selector, pod.Labels) {
				t.Errorf("%s: the PodDisruptionBudget is for other pods", name)
			}
		}
	})
	t.Run("can fail", func(t *testing.T) {
		yes := true
		for _, spoil := range []func(*corev1.PodTemplateSpec){
			func(p *corev1.PodTemplateSpec) { p.Spec.AutomountServiceAccountToken = nil },
			func(p *corev1.PodTemplateSpec) { p.Spec.EnableServiceLinks = &yes },
			func(p *corev1.PodTemplateSpec) { p.Spec.TopologySpreadConstraints = nil },
			func(p *corev1.PodTemplateSpec) { p.Labels = nil },
			func(p *corev1.PodTemplateSpec) {
				p.Spec.Containers[0].SecurityContext.ReadOnlyRootFilesystem = nil
			},
			func(p *corev1.PodTemplateSpec) {
				secret := &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{}}
				c := &p.Spec.Containers[0]
				c.Env = append(c.Env, corev1.EnvVar{Name: "LEASEHOLD_PASSWORD", ValueFrom: secret})
			},
		} {
			pod := find[appsv1.Deployment](t, shared.rendered["wrapper"], "wrapper").Spec.Template
			spoil(&pod)
			if len(podFaults(pod)) == 0 {
				t.Error("a pod that breaks a rule passes")
			}
		}
	})
}

// The rule that the pages give for a port of the reader's own lets everybody in there,
// and 4040 stays as it was.
func TestManifests_PortsOfOnesOwn(t *testing.T) {
	const rule = "- ports: [{protocol: TCP, port: 8080}]"
	for _, app := range []string{"wrapper", "sidecar"} {
		page := read(t, filepath.Join(shared.root, "docs"), "kubernetes-"+app+".md")
		if !strings.Contains(string(page), "`"+rule+"`") {
			t.Errorf("docs/kubernetes-%s.md does not have the rule %s", app, rule)
		}
		text := string(read(t, filepath.Join(shared.tree, app, "base"), "network-policy.yaml"))
		text = strings.Replace(text, "  ingress:\n", "  ingress:\n  "+rule+"\n", 1)
		o, err := decode([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		before := find[networkingv1.NetworkPolicy](t, shared.rendered[app], app).Spec.Ingress
		ingress := o.(*networkingv1.NetworkPolicy).Spec.Ingress
		if len(ingress) != len(before)+1 || !reflect.DeepEqual(ingress[1:], before) ||
			ingress[0].Ports[0].Port.IntValue() != 8080 || len(ingress[0].From) > 0 {
			t.Errorf("k8s/%s: with that rule the NetworkPolicy lets in %+v", app, ingress)
		}
	}
}

// An etcd of another chart in the same namespace bears the same name, and is not ours to
// route to, count or shut off.
func TestManifests_EtcdOfOthers(t *testing.T) {
	etcd := shared.rendered["etcd"]
	set := find[appsv1.StatefulSet](t, etcd, "etcd").Spec
	netpol := find[networkingv1.NetworkPolicy](t, etcd, "etcd").Spec
	theirs := map[string]string{
		"app.kubernetes.io/name": "etcd", "app.kubernetes.io/instance": "theirs",
	}
	selectors := map[string]*metav1.LabelSelector{
		"Service":             {MatchLabels: find[corev1.Service](t, etcd, "etcd").Spec.Selector},
		"StatefulSet":         set.Selector,
		"PodDisruptionBudget": find[policyv1.PodDisruptionBudget](t, etcd, "etcd").Spec.Selector,
		"NetworkPolicy":       &netpol.PodSelector,
		"rule for peers in":   netpol.Ingress[1].From[0].PodSelector,
		"rule for peers out":  netpol.Egress[0].To[0].PodSelector,
	}
	for i, c := range set.Template.Spec.TopologySpreadConstraints {
		selectors[fmt.Sprintf("spread constraint %d", i)] = c.LabelSelector
	}
	for what, selector := range selectors {
		if !selects(selector, set.Template.Labels) {
			t.Errorf("%s: it does not select our own members", what)
		}
		if selects(selector, theirs) {
			t.Errorf("%s: it selects an etcd that is not ours", what)
		}
	}
}

// A Service's port is not the one that a NetworkPolicy sees: behind 53 the DNS of
// OpenShift listens on 5353.
func TestManifests_EtcdReachesDNS(t *testing.T) {
	netpol := find[networkingv1.NetworkPolicy](t, shared.rendered["etcd"], "etcd")
	var open []string
	for _, rule := range netpol.Spec.Egress {
		for _, port := range rule.Ports {
			if len(rule.To) == 0 {
				open = append(open, fmt.Sprint(*port.Protocol, " ", port.Port))
			}
		}
	}
	for _, want := range []string{"UDP 53", "TCP 53", "UDP 5353", "TCP 5353"} {
		if !slices.Contains(open, want) {
			t.Errorf("etcd can't reach %s, only %v", want, open)
		}
	}
}

// Only who bears the label that k8s/etcd's NetworkPolicy asks for, and has the
// Secret, gets through to etcd.
func TestManifests_ClientsReachEtcd(t *testing.T) {
	etcd := shared.rendered["etcd"]
	netpol := find[networkingv1.NetworkPolicy](t, etcd, "etcd")
	elsewhere := map[string]string{"kubernetes.io/metadata.name": "elsewhere"}
	for name := range overlays {
		app, _, _ := strings.Cut(name, "/")
		if app == "etcd" {
			continue
		}
		pod := find[appsv1.Deployment](t, shared.rendered[name], app).Spec.Template
		from := netpol.Spec.Ingress[0].From[0]
		if !selects(from.PodSelector, pod.Labels) {
			t.Errorf("k8s/%s: the NetworkPolicy of k8s/etcd shuts its pods out", name)
		}
		// No selector at all means its own namespace alone.
		if from.NamespaceSelector == nil || !selects(from.NamespaceSelector, elsewhere) {
			t.Errorf("k8s/%s: the NetworkPolicy of k8s/etcd shuts out its pods in other namespaces",
				name)
		}
		c := leaseholdIn(pod.Spec)
		volumes := pod.Spec.Volumes
		i := slices.IndexFunc(volumes, func(v corev1.Volume) bool { return v.Secret != nil })
		secret := find[corev1.Secret](t, etcd, volumes[i].Secret.SecretName)
		for variable, file := range map[string]string{
			"CA": "ca.crt", "CERT": "tls.crt", "KEY": "tls.key",
		} {
			path := environment(t, *c, "pod", etcd)["LEASEHOLD_TLS_"+variable+"_FILE"]
			mounted := slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool {
				return m.Name == volumes[i].Name && filepath.Join(m.MountPath, file) == path
			})
			if !mounted || len(secret.Data[file]) == 0 {
				t.Errorf("k8s/%s: %s is no file of the Secret", name, path)
			}
		}
	}
}

// A timing is what a pod and its daemon have to agree on.
type timing struct {
	ttl, stopGrace, lossGrace, podGrace time.Duration
	poll                                time.Duration // of the app that asks a sidecar
	liveness, readiness                 *corev1.Probe
	strategy                            appsv1.DeploymentStrategy
	pdb, native, elect                  bool
}

func timingOf(t *testing.T, objects []object, app string) timing {
	t.Helper()
	deployment := find[appsv1.Deployment](t, objects, app)
	spec := deployment.Spec.Template.Spec
	c := leaseholdIn(spec)
	env := environment(t, *c, "pod", shared.rendered["etcd"])
	seconds := func(name string, unset time.Duration) time.Duration {
		if env[name] == "" {
			return unset
		}
		d, err := time.ParseDuration(env[name])
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return d
	}
	tm := timing{
		ttl:       seconds("LEASEHOLD_TTL", 15*time.Second),
		stopGrace: seconds("LEASEHOLD_STOP_GRACE", 10*time.Second),
		podGrace:  time.Duration(*spec.TerminationGracePeriodSeconds) * time.Second,
		liveness:  c.LivenessProbe, readiness: c.ReadinessProbe, strategy: deployment.Spec.Strategy,
		pdb: slices.ContainsFunc(objects, func(o object) bool {
			return o.kind == "PodDisruptionBudget"
		}),
		native: c.RestartPolicy != nil, elect: slices.Equal(c.Args, []string{"elect"}),
	}
	tm.lossGrace = seconds("LEASEHOLD_LOSS_GRACE", tm.ttl/5)
	sleep := regexp.MustCompile(`(?m)^\s*sleep ([0-9.]+) &`)
	for _, other := range spec.Containers {
		pause := sleep.FindStringSubmatch(strings.Join(other.Args, "\n"))
		if pause != nil {
			tm.poll, _ = time.ParseDuration(pause[1] + "s")
		}
	}
	if env["LEASEHOLD_LISTEN"] != ":4040" || env["LEASEHOLD_IDENTITY"] != "pod" {
		t.Errorf("it listens on %q as %q, want :4040 and the pod's name",
			env["LEASEHOLD_LISTEN"], env["LEASEHOLD_IDENTITY"])
	}
	return tm
}

func (tm timing) faults() (faults []string) {
	add := func(format string, args ...any) {
		faults = append(faults, fmt.Sprintf(format, args...))
	}
	budget := func(what, path string, p *corev1.Probe) time.Duration {
		if p == nil || p.HTTPGet == nil || p.HTTPGet.Path != path ||
			p.HTTPGet.Port.String() != "leasehold" {
			add("no %s probe asks %s", what, path)
			return 0
		}
		if p.TimeoutSeconds > p.PeriodSeconds {
			add("the %s probe times out after its period", what)
		}
		return time.Duration(p.PeriodSeconds*p.FailureThreshold) * time.Second
	}
	if b := budget("liveness", "/livez", tm.liveness); b <= tm.ttl {
		add("liveness is given up after %v, "+
			"before the daemon's own deadlines within %v have ended what hangs", b, tm.ttl)
	}
	path := "/readyz"
	if tm.readiness != nil && tm.readiness.HTTPGet != nil &&
		tm.readiness.HTTPGet.Path == "/leader" {
		path = "/leader"
		// A Deployment replaces so many pods at once as may be unavailable; all but
		// the leader always are.
		recreate := tm.strategy.Type == appsv1.RecreateDeploymentStrategyType
		r := tm.strategy.RollingUpdate
		if !recreate && (r == nil || r.MaxUnavailable.String() != "100%") {
			add("only the leader is ready, and a rolling update waits for others to be")
		}
		if tm.pdb {
			add("only the leader is ready, and the PodDisruptionBudget lets no node be drained")
		}
	}
	if b := budget("readiness", path, tm.readiness); b > tm.ttl {
		add("readiness is given up after %v, later than a TTL (%v)", b, tm.ttl)
	}
	// A planned stop ends with the job's death, and the revoke, which is bounded by a fifth of the
	// TTL. The rest is for a slow node.
	need := max(tm.stopGrace, tm.lossGrace) + tm.ttl/5 + 5*time.Second
	if tm.native { // It is stopped after the app, which may finish its step.
		need += tm.lossGrace
	}
	if tm.podGrace < need {
		add("the pod has %v to stop, and needs %v", tm.podGrace, need)
	}
	// The rule of the page. What time to stop the app has is what the page leaves it.
	if tm.elect && (tm.poll <= 0 || tm.poll >= tm.lossGrace) {
		add("the app asks every %v, and has to be done within %v of asking", tm.poll, tm.lossGrace)
	}
	if tm.elect && tm.stopGrace < tm.lossGrace {
		add("the app may work for %v after it has asked, "+
			"and the lease is given back %v after the stop", tm.lossGrace, tm.stopGrace)
	}
	return faults
}

func TestManifests_Timing(t *testing.T) {
	for name := range overlays {
		if app, _, _ := strings.Cut(name, "/"); app != "etcd" {
			tm := timingOf(t, shared.rendered[name], app)
			for _, fault := range tm.faults() {
				t.Errorf("k8s/%s: %s", name, fault)
			}
			if want := name == "sidecar"; tm.native != want || tm.elect != (app == "sidecar") {
				t.Errorf("k8s/%s: native sidecar %v, elect %v", name, tm.native, tm.elect)
			}
		}
	}
	for what, spoil := range map[string]func(*timing){
		"liveness is given up":         func(tm *timing) { tm.ttl = time.Minute },
		"readiness is given up":        func(tm *timing) { tm.ttl = 5 * time.Second },
		"the pod has":                  func(tm *timing) { tm.podGrace = 15 * time.Second },
		"no liveness probe":            func(tm *timing) { tm.liveness.HTTPGet.Path = "/leader" },
		"no readiness probe":           func(tm *timing) { tm.readiness = nil },
		"the liveness probe times out": func(tm *timing) { tm.liveness.TimeoutSeconds = 60 },
		"a rolling update waits":       func(tm *timing) { tm.readiness.HTTPGet.Path = "/leader" },
		"lets no node be drained":      func(tm *timing) { tm.readiness.HTTPGet.Path = "/leader" },
		"needs 21s": func(tm *timing) {
			tm.native, tm.podGrace = true, 20*time.Second
		},
		"the app asks every 0s": func(tm *timing) { tm.elect = true },
		"the app asks every 4s": func(tm *timing) { tm.elect, tm.poll = true, 4*time.Second },
		"given back 2s after":   func(tm *timing) { tm.elect, tm.stopGrace = true, 2*time.Second },
	} {
		tm := timingOf(t, shared.rendered["wrapper"], "wrapper")
		spoil(&tm)
		if !strings.Contains(strings.Join(tm.faults(), "\n"), what) {
			t.Errorf("not found: %q; found: %q", what, tm.faults())
		}
	}
}
