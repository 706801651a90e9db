//go:build linux

package k8s_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
)

// helm returns the command with these arguments. The user's own settings of Helm take no part.
func helm(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	program := filepath.Join(shared.root, "bin", "helm")
	if _, err := os.Stat(program); err != nil {
		if os.Getenv("E2E_NO_SKIP") == "1" {
			t.Fatalf("needs bin/helm, and E2E_NO_SKIP=1 forbids to skip: %v", err)
		}
		t.Skip("skipped: needs bin/helm (make bin/helm)")
	}
	dir := t.TempDir()
	cmd := exec.Command(program, args...)
	cmd.Dir = shared.root
	cmd.Env = append(os.Environ(), "KUBECONFIG="+filepath.Join(dir, "none"),
		"HELM_CACHE_HOME="+dir, "HELM_CONFIG_HOME="+dir, "HELM_DATA_HOME="+dir)
	return cmd
}

// chart returns what a release of that name renders to.
func chart(t *testing.T, release string, args ...string) []object {
	t.Helper()
	all := append([]string{"template", release, "charts/leasehold"}, args...)
	text, err := helm(t, all...).Output()
	if err != nil {
		t.Fatalf("helm %s: %s", strings.Join(all, " "), stderr(err))
	}
	objects, err := split(text)
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// A release that bears the name of a folder of k8s/ renders to what is there.
func TestChart_RendersTheManifests(t *testing.T) {
	noBudget := "--set=podDisruptionBudget.enabled=false"
	for overlay, args := range map[string][]string{
		"wrapper":                 nil,
		"wrapper/kubernetes-1.20": {noBudget},
		"wrapper/route-to-leader": {"--set=leaderService.name=leader"},
		"sidecar":                 {"--set=form=sidecar"},
		"sidecar/plain":           {"--set=form=plain-sidecar"},
		"sidecar/kubernetes-1.20": {"--set=form=plain-sidecar", noBudget},
	} {
		app, _, _ := strings.Cut(overlay, "/")
		got, want := values(t, chart(t, app, args...)), values(t, shared.rendered[overlay])
		if !reflect.DeepEqual(got, want) {
			t.Errorf("k8s/%s differs: the chart with %q renders\n%v\nkustomize\n%v",
				overlay, args, got, want)
		}
	}
	t.Run("can fail", func(t *testing.T) {
		got := values(t, chart(t, "wrapper", "--set=ttl=16s"))
		if reflect.DeepEqual(got, values(t, shared.rendered["wrapper"])) {
			t.Error("another TTL makes no difference")
		}
	})
}

func TestChart_Lint(t *testing.T) {
	for _, form := range []string{"wrapper", "sidecar", "plain-sidecar"} {
		lint := helm(t, "lint", "--strict", "charts/leasehold", "--set=form="+form)
		if out, err := lint.CombinedOutput(); err != nil {
			t.Errorf("form %s: %v\n%s", form, err, out)
		}
	}
}

// Every value, and none as it is by default.
const everyValue = `
replicas: 5
election: jobs/mine
etcd: {endpoints: [https://a:2379, https://b:2379], tlsSecret: mine}
ttl: 30s
stopGrace: 12s
lossGrace: 7s
terminationGracePeriodSeconds: 60
env: [{name: LEASEHOLD_MARGIN, value: 2s}]
image: {repository: example.com:5000/leasehold, tag: v1, pullPolicy: Always}
imagePullSecrets: [{name: registry}]
job:
  image: {repository: example.com/job, tag: "2", pullPolicy: Never}
  command: [/job]
  args: [run]
  ports: [{name: http, containerPort: 8080}]
  volumeMounts: [{name: data, mountPath: /data}]
  resources: {limits: {memory: 1Gi}}
app:
  image: {repository: example.com/app, tag: "3", pullPolicy: Never}
  command: [sh]
  args: ["-c", "while :; do sleep 1 & wait $!; done\n  sleep 2 & wait\n"]
  env: [{name: A, value: b}]
  ports: [{name: http, containerPort: 8080}]
  volumeMounts: [{name: data, mountPath: /data}]
  resources: {limits: {memory: 1Gi}}
  readinessProbe: {httpGet: {path: /, port: http}}
sidecar: {resources: {limits: {memory: 128Mi}}}
volumes: [{name: data, emptyDir: {sizeLimit: 1Gi}}]
podDisruptionBudget: {maxUnavailable: 40%, unhealthyPodEvictionPolicy: AlwaysAllow}
networkPolicy: {ingress: [{ports: [{protocol: TCP, port: 8080}]}]}
podSecurityContext: {runAsUser: 1000}
securityContext: {readOnlyRootFilesystem: true}
podAnnotations: {note: "yes"}
podLabels: {team: mine}
nodeSelector: {disk: fast}
tolerations: [{key: spot, operator: Exists}]
affinity: {podAntiAffinity: {}}
priorityClassName: high
`

// With other values the chart keeps the rules of the manifests, and every value is somewhere.
func TestChart_EveryValue(t *testing.T) {
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(everyValue), 0o600); err != nil {
		t.Fatal(err)
	}
	everywhere := []string{
		"replicas: 5", "jobs/mine", "https://a:2379,https://b:2379", "secretName: \"mine\"",
		"value: 30s", "value: 12s", "value: 7s", "terminationGracePeriodSeconds: 60",
		"name: LEASEHOLD_MARGIN", "example.com:5000/leasehold:v1", "imagePullPolicy: Always",
		"- name: registry", "imagePullPolicy: Never", "containerPort: 8080", "mountPath: /data",
		"memory: 1Gi", "sizeLimit: 1Gi", "maxUnavailable: 40%", "AlwaysAllow", "port: 8080",
		"runAsUser: 1000", "note: \"yes\"", "team: mine", "disk: fast", "key: spot",
		"podAntiAffinity", "priorityClassName: \"high\"",
	}
	for form, more := range map[string][]string{
		"wrapper":       {"example.com/job:2", "- /job", "- run"},
		"sidecar":       {"example.com/app:3", "name: A", "memory: 128Mi", "path: /\n"},
		"plain-sidecar": {"example.com/app:3", "name: A", "memory: 128Mi", "path: /\n"},
	} {
		objects := chart(t, "mine", "--set=form="+form, "--values="+file)
		var text strings.Builder
		for _, o := range objects {
			text.Write(o.yaml)
			_, err := decode(o.yaml)
			if err = errors.Join(err, schemaFault("1.30", o.yaml)); err != nil {
				t.Errorf("form %s: %v: %v", form, o, err)
			}
		}
		for _, want := range slices.Concat(everywhere, more) {
			if !strings.Contains(text.String(), want) {
				t.Errorf("form %s: no %q in\n%s", form, want, text.String())
			}
		}
		pod := find[appsv1.Deployment](t, objects, "mine").Spec.Template
		faults := append(podFaults(pod), timingOf(t, objects, "mine").faults()...)
		if fault := restrictedFault(t, pod); fault != "" || len(faults) > 0 {
			t.Errorf("form %s: %q %q", form, fault, faults)
		}
		netpol := find[networkingv1.NetworkPolicy](t, objects, "mine")
		if len(netpol.Spec.Ingress) != 2 || len(netpol.Spec.Ingress[0].From) != 1 {
			t.Errorf("form %s: the NetworkPolicy lets in %+v", form, netpol.Spec.Ingress)
		}
	}
}

// Beside an app, it is leasehold that writes who the leader is, and its container alone gets the
// token. Its rights are about that Service alone, except the one that can't be.
func TestChart_LeaderService(t *testing.T) {
	for _, form := range []string{"sidecar", "plain-sidecar"} {
		objects := chart(t, "mine", "--set=form="+form, "--set=leaderService.name=front",
			"--set=leaderService.ports[0].port=80,leaderService.ports[0].targetPort=8080")
		pod := find[appsv1.Deployment](t, objects, "mine").Spec.Template.Spec
		if *pod.AutomountServiceAccountToken {
			t.Errorf("form %s: every container gets the token", form)
		}
		var mounted []string // in these containers
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			for _, m := range c.VolumeMounts {
				if m.MountPath == "/var/run/secrets/kubernetes.io/serviceaccount" {
					mounted = append(mounted, c.Name+" "+m.Name)
				}
			}
		}
		projected := slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool {
			return v.Name == "account" && v.Projected != nil && len(v.Projected.Sources) == 3
		})
		if !slices.Equal(mounted, []string{"leasehold account"}) || !projected {
			t.Errorf("form %s: the token is in %q, of the volumes %v", form, mounted, pod.Volumes)
		}
		env := environment(t, *leaseholdIn(pod), "pod", shared.rendered["etcd"])
		account := find[corev1.ServiceAccount](t, objects, pod.ServiceAccountName)
		rights := find[rbacv1.RoleBinding](t, objects, "mine")
		ports := find[corev1.Service](t, objects, "front").Spec.Ports
		for _, rule := range find[rbacv1.Role](t, objects, "mine").Rules {
			one := slices.Equal(rule.ResourceNames, []string{"front"})
			if create := slices.Equal(rule.Verbs, []string{"create"}); one == create {
				t.Errorf("form %s: the rule is %v, and the Service is front", form, rule)
			}
		}
		if env["LEASEHOLD_KUBERNETES_SERVICE"] != "front" ||
			rights.Subjects[0].Name != account.Name || ports[0].TargetPort.IntValue() != 8080 {
			t.Errorf("form %s: %v, %v, %v", form, env, rights, ports)
		}
	}
}

// The probes follow the TTL, and the pod has time for what the values ask for.
func TestChart_Timing(t *testing.T) {
	long := []string{"9s", "10s", "19s", "29s", "30s", "31s"}
	for form, ttls := range map[string][]string{
		"wrapper": append([]string{"2s", "3s", "5s"}, long...),
		// The app of the example asks once a second, and needs such a TTL.
		"sidecar": long, "plain-sidecar": long,
	} {
		for _, ttl := range ttls {
			objects := chart(t, "mine", "--set=form="+form, "--set=ttl="+ttl,
				"--set=stopGrace=7s")
			if faults := timingOf(t, objects, "mine").faults(); len(faults) > 0 {
				t.Errorf("form %s, TTL %s: %q", form, ttl, faults)
			}
		}
	}
}

// What can't work is refused before anything is sent, and by its name.
func TestChart_BadValues(t *testing.T) {
	for set, want := range map[string]string{
		"form=side-car":                       "/form",
		"replicas=three":                      "/replicas",
		"replica=3":                           "'replica'",
		"ttl=15":                              "/ttl",
		"ttl=1s":                              "/ttl",
		"ttl=2m":                              "/ttl",
		"ttl=null":                            "'ttl'",
		"stopGrace=1.5s":                      "/stopGrace",
		"stopGrace=09s":                       "/stopGrace",
		"lossGrace=040s":                      "/lossGrace",
		"stopGrace=40s":                       "set at least 48",
		"form=sidecar,stopGrace=25s":          "set at least 36",
		"form=sidecar,stopGrace=2s":           "stopGrace: 2s is less than lossGrace (3s)",
		"lossGrace=30s":                       "set at least 38",
		"election=jobs/a/":                    "/election",
		"election=jobs//a":                    "/election",
		"election=a job":                      "/election",
		"etcd.endpoints={etcd-0}":             "/etcd/endpoints/0",
		"etcd.endpoints={http://a:1/x}":       "/etcd/endpoints/0",
		"etcd.configMap=":                     "/etcd/configMap",
		"env[0].name=LEASEHOLD_TTL":           "/env/0/name",
		"env[0].value=a":                      "'name'",
		"image.tag=1":                         "/image/tag",
		"image.name=x":                        "'name'",
		"job.command=null":                    "'command'",
		"job.image.pullPolicy=Sometimes":      "/job/image/pullPolicy",
		"job.securityContext.x=1":             "'securityContext'",
		"leaderService.name=The_Leader":       "/leaderService/name",
		"leaderService.ports[0].port=80":      "'targetPort'",
		"podDisruptionBudget.enabled=maybe":   "/podDisruptionBudget/enabled",
		"podDisruptionBudget.maxUnavailable=": "/podDisruptionBudget/maxUnavailable",
		"podLabels.etcd-client=no":            "'etcd-client'",
	} {
		render := helm(t, "template", "mine", "charts/leasehold", "--set="+set)
		if out, err := render.CombinedOutput(); err == nil || !strings.Contains(string(out), want) {
			t.Errorf("--set=%s: %v, want a fault that names %s:\n%s", set, err, want, out)
		}
	}
}
