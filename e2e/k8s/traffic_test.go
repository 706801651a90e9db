//go:build linux

package k8s_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/harness"
	"leasehold/internal/boottime"
)

// A way to route a Service to the leader.
type way struct {
	name, service string
	form          form
	patches       []string // of the form's folder
}

// By readiness. Rolling updates must not wait for pods to be ready.
const readyWhileLeading = `apiVersion: apps/v1
kind: Deployment
metadata: {name: wrapper}
spec:
  strategy:
    rollingUpdate: {maxUnavailable: 100%, maxSurge: 100%}
  template:
    spec:
      containers:
      - name: job
        readinessProbe:
          httpGet: {path: /leader, port: leasehold}
          periodSeconds: 1
          timeoutSeconds: 1
          failureThreshold: 1
`

const probedService = `apiVersion: v1
kind: Service
metadata: {name: probed}
spec:
  selector: {app.kubernetes.io/name: wrapper}
  ports: [{port: 4040}]
`

// By the label that client-go's leader election sets: three pods as the wrapper's.
const electedManifest = `apiVersion: v1
kind: ServiceAccount
metadata: {name: elected}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: elected}
rules:
- {apiGroups: [coordination.k8s.io], resources: [leases], verbs: [create, get, update]}
- {apiGroups: [""], resources: [pods], verbs: [list, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: elected}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: elected}
subjects: [{kind: ServiceAccount, name: elected}]
---
apiVersion: v1
kind: Service
metadata: {name: elected}
spec:
  selector: {app.kubernetes.io/name: elected, leader: "true"}
  ports: [{port: 4040}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: elected}
spec:
  replicas: 3
  selector:
    matchLabels: {app.kubernetes.io/name: elected}
  template:
    metadata:
      labels: {app.kubernetes.io/name: elected, form: elected}
    spec:
      serviceAccountName: elected
      securityContext: {runAsNonRoot: true, runAsUser: 65532}
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: ScheduleAnyway
        labelSelector:
          matchLabels: {app.kubernetes.io/name: elected}
      containers:
      - name: job
        image: %[1]s
        imagePullPolicy: IfNotPresent
        command: [/elected, elected, /job]
        args: [live, /lives]
        env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
        volumeMounts:
        - {name: lives, mountPath: /lives}
      volumes:
      - name: lives
        hostPath: {path: %[2]s}
`

const askerManifest = `apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: %s
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  containers:
  - name: asker
    image: %s
    imagePullPolicy: IfNotPresent
    command: [/job, ask, "http://%s:4040/"]
`

// Connections to a Service reach the next leader: the Service that leasehold writes, one with
// readiness on /leader, and one that selects the label of a pod that leads by a Lease. A pod that
// the fault does not reach connects all the time. N is how often each fault is injected. JSON names
// a file to which the trials are added.
func TestCluster_Traffic(t *testing.T) {
	c, job := newFaultyCluster(t, "elected")
	if c.old {
		t.Skip("skipped: Kubernetes 1.20 has no EndpointSlices of the version 1")
	}
	rounds := 1
	if n, err := strconv.Atoi(os.Getenv("N")); err == nil {
		rounds = n
	}
	routing, probed := wrapperForm, wrapperForm
	routing.folder, probed.folder = "wrapper/route-to-leader", "wrapper/base"
	var run results
	for _, w := range []way{
		{name: "by leasehold", service: "leader", form: routing},
		{
			name: "by readiness", service: "probed", form: probed,
			patches: []string{readyWhileLeading},
		},
		{
			name: "by a Lease", service: "elected",
			form: form{name: "elected", deployment: "elected", first: "/elected "},
		},
	} {
		t.Run(w.name, func(t *testing.T) {
			c := *c
			c.t = t
			c.keepLives(w.service)
			if w.form.folder == "" {
				c.apply(fmt.Sprintf(electedManifest, job+":latest", c.lives))
			} else {
				c.overlay("traffic", w.form.folder, job,
					append(w.patches, w.form.patched(c.lives))...)
			}
			if w.service == "leader" {
				c.kubectl("rollout", "status", "deployment/wrapper", "--timeout=5m")
				c.forbidden()
			}
			if w.service == "probed" {
				c.apply(probedService)
				// While standbys are not ready, it would block every drain.
				c.kubectl("delete", "pdb", "wrapper", "--ignore-not-found")
			}
			for _, f := range faults {
				if !slices.Contains([]string{
					"the pod is deleted", "the node is drained", "the node is cut off",
					"the container's first process is killed",
				}, f.name) {
					continue
				}
				for range rounds {
					t.Run(f.name, func(t *testing.T) {
						c := c
						c.t = t
						result := c.reroute(w, f, job)
						run.Traffic = append(run.Traffic, result)
						keep(t, results{Traffic: []traffic{result}})
					})
				}
			}
			c.kubectl("delete", "deployment", w.form.deployment)
			c.kubectl("wait", "--for=delete", "pod", "-l",
				"app.kubernetes.io/name="+w.form.deployment, "--timeout=1m")
		})
	}
	t.Logf("the table:\n%s", run.trafficTable())
}

func (c *cluster) apply(manifest string) {
	c.t.Helper()
	apply := c.command(c.t.Context(), "apply", "-f", "-")
	apply.Stdin = strings.NewReader(manifest)
	if out, err := apply.CombinedOutput(); err != nil {
		c.t.Fatalf("%v\n%s", err, out)
	}
}

// forbidden takes the rights away: the next job runs as ever, and the log says which one is
// missing. With the rights the Service routes to that job's pod.
func (c *cluster) forbidden() {
	c.t.Helper()
	c.routed(c.leader().pod)
	c.kubectl("delete", "rolebinding", "wrapper")
	before := c.leader()
	c.kubectl("delete", "pod", before.pod, "--wait=false")
	c.until(20*time.Second, func() error {
		if lives := c.jobs(); lives[len(lives)-1].began == before.began {
			return errors.New("no job follows")
		}
		return nil
	})
	leader := c.leader()
	const right = "right=\"get services leader\""
	var log string
	c.until(30*time.Second, func() error {
		if log = c.kubectl("logs", leader.pod, "-c", "job"); !strings.Contains(log, right) {
			return fmt.Errorf("%s does not log %s:\n%s", leader.pod, right, log)
		}
		return nil
	})
	c.kubectl("apply", "-f", filepath.Join(c.tree, "wrapper/route-to-leader/rights.yaml"))
	c.routed(leader.pod)
	if now := c.leader(); now.began != leader.began {
		c.t.Errorf("the job did not go on: %v, then %v", leader, now)
	}
	log = c.kubectl("logs", leader.pod, "-c", "job")
	if n := strings.Count(log, right); n != 1 {
		c.t.Errorf("the missing right is logged %d times:\n%s", n, log)
	}
}

// reroute injects a fault, and returns when connections reach the next leader.
func (c *cluster) reroute(w way, f fault, job string) traffic {
	t := c.t
	t.Helper()
	if w.service != "probed" { // whose standbys are never ready
		c.kubectl("rollout", "status", "deployment/"+w.form.deployment, "--timeout=5m")
	}
	var leader life
	c.until(3*time.Minute, func() error {
		leader = c.leader()
		if w.form.folder == "" { // nobody tells which pods are candidates
			return nil
		}
		out, err := c.try("exec", leader.pod, "-c", "job", "--",
			"/opt/leasehold/leasehold", "list", "--json")
		if err == nil && !strings.Contains(strings.ReplaceAll(out, " ", ""), `"candidates":3`) {
			err = fmt.Errorf("there are not three candidates: %s", out)
		}
		return err
	})
	node := c.kubectl("get", "pod", leader.pod, "-o", "jsonpath={.spec.nodeName}")
	others := slices.DeleteFunc(slices.Clone(c.nodeNames),
		func(name string) bool { return name == node })
	asker := fmt.Sprintf("asker-%d", boottime.Now())
	c.apply(fmt.Sprintf(askerManifest, asker, others[0], job+":latest",
		c.kubectl("get", "service", w.service, "-o", "jsonpath={.spec.clusterIP}")))
	defer c.kubectl("delete", "pod", asker, "--wait=false")
	c.until(time.Minute, func() error {
		_, err := c.reached(asker, leader)
		return err
	})
	if f.recover != nil {
		defer func() {
			f.recover(c, node)
			c.until(3*time.Minute, func() error {
				_, err := c.try("wait", "--for=condition=Ready", "node", "--all", "--timeout=10s")
				return err
			})
		}()
	}
	began := boottime.Now()
	f.inject(c, w.form, leader.pod, node)
	var next life
	var reached time.Duration
	c.until(90*time.Second, func() (err error) {
		lives := c.jobs()
		if next = lives[len(lives)-1]; next.began <= leader.began {
			return errors.New("no job follows")
		}
		reached, err = c.reached(asker, next)
		return err
	})
	result := traffic{
		Way: w.name, Fault: f.name, Next: harness.Milliseconds(next.began - began),
		Reached: harness.Milliseconds(reached - began),
	}
	t.Logf("%+v", result)
	for _, o := range overlaps(c.jobs()) {
		t.Errorf("two jobs at once: %s", o)
	}
	return result
}

// reached returns when the asker has first reached the pod of a job that leads.
func (c *cluster) reached(asker string, job life) (time.Duration, error) {
	c.t.Helper()
	log, err := c.try("logs", asker)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(log) {
		f := strings.Fields(line)
		if len(f) != 4 || f[1] != job.pod || f[2] != job.token || f[3] != "leading" {
			continue
		}
		at, err := strconv.ParseInt(f[0], 10, 64)
		return time.Duration(at), err
	}
	return 0, fmt.Errorf("%v is not reached, only:\n%s", job, log)
}
