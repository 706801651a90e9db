//go:build linux

package k8s_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"leasehold/e2e/harness"
	"leasehold/internal/boottime"
)

// The ways to route a Service to the leader, in the order of the table.
var wayNames = []string{"by leasehold", "by readiness", "by a Lease"}

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
  strategy:
    rollingUpdate: {maxUnavailable: 1, maxSurge: 0}
  selector:
    matchLabels: {app.kubernetes.io/name: elected}
  template:
    metadata:
      labels: {app.kubernetes.io/name: elected, form: lease}
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
        args: [%[2]s, /lives]
        env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
        resources:
          limits: {memory: 256Mi}
        volumeMounts:
        - {name: lives, mountPath: /lives}
      volumes:
      - name: lives
        hostPath: {path: %[3]s}
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

// Two other ways to route a Service to the leader, beside that of TestCluster_Faults: readiness on
// /leader, and the label of a pod that leads by a Lease. The faults are those of TestCluster_Faults
// that move the job. N is how often each is injected. JSON names a file to which the trials are
// added.
func TestCluster_Traffic(t *testing.T) {
	needNodes(t)
	found := findCluster(t)
	if found.old {
		t.Skip("skipped: Kubernetes 1.20 has no EndpointSlices of the version 1")
	}
	job := found.images("elected") + ":latest"
	probed := wrapperForm
	probed.name, probed.folder = "readiness", "wrapper/base"
	probed.way, probed.service = "by readiness", "probed"
	elected := form{
		name: "lease", deployment: "elected", first: "/elected ", mode: "live",
		way: "by a Lease", service: "elected",
	}
	var mu sync.Mutex
	var run results
	forms := []form{probed, elected}
	clusters, plans := make([]*cluster, len(forms)), make([]plan, len(forms))
	for i, form := range forms {
		c := found.enter(form.name)
		c.keepLives(form.name)
		clusters[i], plans[i] = c, plan{
			form: form,
			start: func(t *testing.T) {
				c := c.with(t)
				c.allowHostPaths()
				if form.folder != "" {
					c.etcd()
					c.apply(probedService)
				}
			},
			wants: func(f fault) bool {
				without := "the Deployment is rolled" // it never ends: standbys are not ready
				if form.folder == "" {
					without = "etcd" // there is none
				}
				return f.within["wrapper"] > 0 && !strings.Contains(f.name, without)
			},
			deploy: func(t *testing.T, mode string) {
				c := c.with(t)
				form.mode = mode
				if form.folder == "" {
					c.apply(fmt.Sprintf(electedManifest, job, mode, c.lives))
				} else {
					c.overlay("traffic", form.folder, job, readyWhileLeading, form.patched(c.lives))
				}
			},
			try: func(t *testing.T, f fault) {
				result := c.with(t).reroute(form, f)
				mu.Lock()
				defer mu.Unlock()
				run.Traffic = append(run.Traffic, result...)
				keep(t, results{Traffic: result})
			},
		}
	}
	inject(t, plans)
	for i, form := range forms { // also those that were not looked at during the last trials
		clusters[i].lookForTwo(form)
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
	leader := c.follower(before, 30*time.Second) // the job may ignore TERM
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

// reroute injects a fault into the pod that leads, and returns what that did to the connections.
func (c *cluster) reroute(form form, f fault) []traffic {
	c.t.Helper()
	if form.folder == "" {
		c.kubectl("rollout", "status", "deployment/"+form.deployment, "--timeout=5m")
	} else {
		c.kubectl("rollout", "status", "statefulset/etcd", "--timeout=5m")
	}
	var leader life
	c.until(3*time.Minute, func() (err error) {
		if err = c.threePods(form); err != nil {
			return err
		}
		leader, err = c.running()
		if err != nil || form.folder == "" { // nobody tells which pods are candidates by a Lease
			return err
		}
		out, err := c.try("exec", leader.pod, "-c", "job", "--",
			"/opt/leasehold/leasehold", "list", "--json")
		if err == nil && !strings.Contains(strings.ReplaceAll(out, " ", ""), `"candidates":3`) {
			err = fmt.Errorf("there are not three candidates: %s", out)
		}
		return err
	})
	node := c.kubectl("get", "pod", leader.pod, "-o", "jsonpath={.spec.nodeName}")
	measure := c.follow(form, f, leader, node)
	// When the fault has ended: a node that was cut off has had its job until then.
	defer c.lookForTwo(form)
	defer c.end(f, node)
	f.inject(c, form, leader.pod, node)
	return measure()
}

// lookForTwo looks whether two jobs have lived at once. client-go does not promise that none do.
func (c *cluster) lookForTwo(form form) {
	c.t.Helper()
	report := c.t.Errorf
	if form.way == "by a Lease" {
		report = c.t.Logf
	}
	for _, o := range overlaps(c.jobs()) {
		report("%s: two jobs at once: %s", form.name, o)
	}
}

// follow has a pod connect to the form's Service all the time, and returns when it has reached the
// leader. The fault comes next. measure says what that did to the connections, if there are any.
// The pod is on another node than the leader's, which is the only one that faults hit.
func (c *cluster) follow(form form, f fault, leader life, node string) (measure func() []traffic) {
	t := c.t
	t.Helper()
	if form.service == "" {
		return func() []traffic { return nil }
	}
	others := slices.DeleteFunc(slices.Clone(c.nodeNames),
		func(name string) bool { return name == node })
	asker := fmt.Sprintf("asker-%d", boottime.Now())
	c.apply(fmt.Sprintf(askerManifest, asker, others[0], c.jobImage()+":latest",
		c.kubectl("get", "service", form.service, "-o", "jsonpath={.spec.clusterIP}")))
	t.Cleanup(func() { c.kubectl("delete", "pod", asker, "--wait=false") })
	c.until(time.Minute, func() error {
		answers, err := c.answers(asker)
		if err == nil {
			_, err = reached(answers, []life{leader})
		}
		return err
	})
	began := boottime.Now()
	return func() []traffic { return []traffic{c.measure(form, f, leader, asker, began)} }
}

// measure returns when the asker has reached the job after the leader's, or sees to it that it has
// reached the leader all the time. It must have reached nobody else.
func (c *cluster) measure(
	form form, f fault, leader life, asker string, began time.Duration,
) traffic {
	t := c.t
	t.Helper()
	var answers []answer
	var lives []life // the leader's, and those after it
	look := func() (err error) {
		if answers, err = c.answers(asker); err != nil {
			return err
		}
		lives = c.jobs() // after the answers: so those who gave them are among them
		i := slices.IndexFunc(lives, func(l life) bool { return l.began == leader.began })
		lives = lives[i:]
		return nil
	}
	result := traffic{Way: form.way, Fault: f.name}
	if f.within["wrapper"] == untouched {
		ended := boottime.Now()
		c.until(20*time.Second, look)
		most := silence(answers, leader, began, ended)
		t.Logf("for %v at most no connection reached the leader", most)
		if most > mostSilence {
			t.Errorf("for %v no connection reached %v, want at most %v", most, leader, mostSilence)
		}
	} else {
		var at time.Duration
		c.until(90*time.Second, func() (err error) {
			if err = look(); err == nil {
				at, err = reached(answers, lives[1:])
			}
			return err
		})
		next := lives[1].began
		result.Next = harness.Milliseconds(next - began)
		result.Reached = harness.Milliseconds(at - began)
		if form.way == "by leasehold" && at-next > mostSilence {
			t.Errorf("for %v no connection reached the next job, want at most %v",
				at-next, mostSilence)
		}
	}
	for _, a := range answers {
		led := func(l life) bool { return l.pod == a.pod }
		if a.at >= began && !slices.ContainsFunc(lives, led) {
			t.Errorf("a connection reached %v, and only these have had a job: %v", a, lives)
			break
		}
	}
	t.Logf("%+v", result)
	return result
}

// mostSilence is for how long connections may not reach a leader. They mostly do after less than a
// second, but the nodes share two processors with the tests.
const mostSilence = 5 * time.Second

// An answer is that to one connection: when it came, from whom, and which token the leader has.
type answer struct {
	at                time.Duration
	pod, token, state string
}

func (a answer) from(l life) bool {
	return a.state == "leading" && a.pod == l.pod && a.token == l.token && a.at >= l.began
}

func (c *cluster) answers(asker string) ([]answer, error) {
	log, err := c.try("logs", asker)
	if err != nil {
		return nil, err
	}
	return parseAnswers(log)
}

func parseAnswers(log string) (answers []answer, err error) {
	for line := range strings.Lines(log) {
		var a answer
		if _, err := fmt.Sscan(line, &a.at, &a.pod, &a.token, &a.state); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		answers = append(answers, a)
	}
	return answers, nil
}

// reached returns when one of these jobs was reached first. In a rollout the next leader's pod may
// be replaced before it is reached.
func reached(answers []answer, jobs []life) (time.Duration, error) {
	for _, a := range answers {
		if slices.ContainsFunc(jobs, a.from) {
			return a.at, nil
		}
	}
	if len(jobs) == 0 {
		return 0, errors.New("no job follows")
	}
	if len(answers) == 0 {
		return 0, fmt.Errorf("nobody is reached, want one of %v", jobs)
	}
	return 0, fmt.Errorf("none of %v is reached, but at last %v", jobs, answers[len(answers)-1])
}

// silence returns the longest time in which no answer came from a job.
func silence(answers []answer, job life, from, to time.Duration) (longest time.Duration) {
	for _, a := range answers {
		if a.at > from && a.from(job) {
			longest, from = max(longest, a.at-from), a.at
		}
	}
	return max(longest, to-from)
}

// The judge of the connections, without a cluster.
func TestAnswers_Reached(t *testing.T) {
	answers, err := parseAnswers("90 a 12 leading\n110 a 12 leading\n120 b 12 standby\n" +
		"140 b 17 leading\n150 c 18 leading\n")
	if err != nil {
		t.Fatal(err)
	}
	a, b, c := life{"a", "12", 50, 115}, life{"b", "17", 130, 145}, life{"c", "18", 148, 200}
	for _, test := range []struct {
		jobs []life
		want time.Duration
	}{
		{[]life{a}, 90},
		{[]life{b, c}, 140},
		{[]life{{"a", "12", 100, 200}}, 110}, // it has begun again in the same pod
		{[]life{{"b", "16", 135, 147}, c}, 150},
		{[]life{{"d", "19", 160, 200}}, 0},
		{nil, 0},
	} {
		got, err := reached(answers, test.jobs)
		if got != test.want || (err == nil) != (test.want != 0) {
			t.Errorf("%v are reached at %v (%v), want %v", test.jobs, got, err, test.want)
		}
	}
	for _, test := range []struct{ from, to, want time.Duration }{
		{100, 112, 10}, {100, 115, 10}, {80, 115, 20}, {100, 140, 30}, {120, 125, 5},
	} {
		if got := silence(answers, a, test.from, test.to); got != test.want {
			t.Errorf("silence from %v to %v: %v, want %v", test.from, test.to, got, test.want)
		}
	}
	if _, err := parseAnswers("90 a"); err == nil {
		t.Error("a line that says nothing is read")
	}
}
