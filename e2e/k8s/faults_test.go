//go:build linux

package k8s_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"leasehold/e2e/harness"
	"leasehold/internal/boottime"
)

// A form is a way to run leasehold in a pod.
type form struct {
	name, folder, deployment string
	// Where a patch of a pod names leasehold's container and the job's; %s is what is new there.
	leasehold, job string
	first          string // how the command line of the first process in leasehold's begins
	patch          string // see patched
	mode           string // of the job

	// A Service that routes to the leader, and by what. "": there is none.
	way, service string
}

// The names of all forms, in the order of the table.
var formNames = []string{"wrapper", "sidecar", "plain"}

var wrapperForm = form{
	name: "wrapper", folder: "wrapper", deployment: "wrapper",
	leasehold: "containers: [{name: job, %s}]", job: "containers: [{name: job, %s}]",
	first: "/opt/leasehold/leasehold -- ", mode: "live",
	patch: `apiVersion: apps/v1
kind: Deployment
metadata: {name: wrapper}
spec:
  template:
    metadata:
      labels: {form: %[3]s}
    spec:
      containers:
      - name: job
        command: [/opt/leasehold/leasehold, --, /job]
        args: [%[1]s, /lives]
        resources:
          limits: {memory: 256Mi}
        volumeMounts:
        - {name: lives, mountPath: /lives}
      volumes:
      - name: lives
        hostPath: {path: %[2]s}
`,
}

const sidecarPatch = `apiVersion: apps/v1
kind: Deployment
metadata: {name: sidecar}
spec:
  template:
    metadata:
      labels: {form: %[3]s}
    spec:
      containers:
      - name: app
        command: [/job]
        args: [%[1]s, /lives]
        resources:
          limits: {memory: 256Mi}
        volumeMounts:
        - {name: lives, mountPath: /lives}
      volumes:
      - name: lives
        hostPath: {path: %[2]s}
`

// patched is the form's patch for jobs that keep their lives in this directory of their node.
func (f form) patched(lives string) string { return fmt.Sprintf(f.patch, f.mode, lives, f.name) }

// A fault is injected into the pod that leads, or around it.
type fault struct {
	name     string
	stubborn bool // the job ignores TERM
	// alone is for faults that hit a node or the whole cluster, and so the jobs of other namespaces
	// too. A trial there would not know which fault it has seen.
	alone   bool
	inject  func(c *cluster, f form, pod, node string)
	recover func(c *cluster, node string)
	// Within this time the next job has to run, for each form by its name. Forms that are not named
	// are not tried.
	within map[string]time.Duration
	// restart is the same for all forms, from when the kubelet has started leasehold's container
	// again.
	restart time.Duration
	stays   bool // the next job has to run in the same pod
}

// untouched is for faults that a job must not notice.
const untouched = -1

// handedOver is for stops in which the lease is given back. A plain sidecar first holds it for
// STOP_GRACE (20 s).
var handedOver = map[string]time.Duration{
	"wrapper": 10 * time.Second, "sidecar": 15 * time.Second, "plain": 30 * time.Second,
}

// The TTL is 15 s: a leader whose lease is not given back is followed after that. If a job ignores
// TERM, leasehold waits for STOP_GRACE (10 s). As a native sidecar it has to wait for the pod's
// whole time to stop (30 s), and its lease expires after that.
var faults = []fault{
	{
		name: "the pod is deleted", inject: deletePod("--wait=false"),
		within: handedOver,
	},
	{
		name: "the pod is deleted, the job ignores TERM", stubborn: true,
		inject: deletePod("--wait=false"),
		within: map[string]time.Duration{
			"wrapper": 20 * time.Second, "sidecar": time.Minute, "plain": 30 * time.Second,
		},
	},
	{
		name: "the pod is deleted by force", inject: deletePod("--grace-period=0", "--force"),
		within: everywhere(25 * time.Second),
	},
	{
		name: "the pod is evicted", inject: evict,
		within: handedOver,
	},
	{
		name: "the node is drained", alone: true,
		inject: func(c *cluster, f form, _, node string) {
			// It looks into all namespaces, and two forms have a Deployment of the same name.
			c.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data",
				"--pod-selector=form="+f.name, "--timeout=5m")
		},
		recover: func(c *cluster, node string) { c.kubectl("uncordon", node) },
		within:  handedOver,
	},
	{
		// The pods are replaced one by one, and the leader's may be the last.
		name: "the Deployment is rolled",
		inject: func(c *cluster, f form, _, _ string) {
			c.kubectl("rollout", "restart", "deployment/"+f.deployment)
			c.kubectl("rollout", "status", "deployment/"+f.deployment, "--timeout=5m")
		},
		within: everywhere(2 * time.Minute),
	},
	{
		name: "the elector is killed",
		inject: func(c *cluster, _ form, pod, node string) {
			c.killIn(pod, node, "leasehold elector ")
		},
		within: map[string]time.Duration{"wrapper": untouched},
	},
	{
		name: "the container's first process is killed",
		inject: func(c *cluster, f form, pod, node string) {
			c.killIn(pod, node, f.first)
		},
		within:  everywhere(10 * time.Second),
		restart: 1500 * time.Millisecond,
	},
	{
		// With cgroup v1 the kernel kills one process, the largest. With v2 the kubelet has it kill
		// all of the container. An app beside leasehold has its container for itself.
		name: "the job exceeds its memory limit, and the kernel kills it",
		inject: func(c *cluster, f form, pod, node string) {
			do := `kill -USR1 ${p#/proc/} && echo sent`
			if c.inPod(pod, node, "/job "+f.mode+" ", do) == "" {
				c.t.Fatalf("%s has no job", pod)
			}
		},
		within: everywhere(30 * time.Second), stays: true,
	},
	{
		name: "the node is cut off", alone: true, inject: cut, recover: mend,
		within: everywhere(25 * time.Second),
	},
	{
		name: "the node is cut off, the job ignores TERM", stubborn: true, alone: true,
		inject: cut, recover: mend, within: everywhere(25 * time.Second),
	},
	{
		name: "the kubelet is stopped", alone: true,
		inject: func(c *cluster, _ form, _, node string) {
			c.signalKubelet(node, "STOP")
		},
		recover: func(c *cluster, node string) { c.signalKubelet(node, "CONT") },
		within:  everywhere(untouched),
	},
	{
		name: "the cluster's DNS is gone", alone: true,
		inject: func(c *cluster, _ form, _, _ string) {
			c.kubectl("-n", "kube-system", "scale", "deployment/coredns", "--replicas=0")
		},
		recover: func(c *cluster, _ string) {
			c.kubectl("-n", "kube-system", "scale", "deployment/coredns", "--replicas=2")
			c.kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns")
		},
		within: everywhere(untouched),
	},
	{
		name: "an etcd member's pod is deleted",
		inject: func(c *cluster, _ form, _, _ string) {
			c.kubectl("delete", "pod", "etcd-0", "--wait=false")
		},
		within: everywhere(untouched),
	},
	{
		name:   "an etcd member loses its volume, and is added anew",
		inject: func(c *cluster, _ form, _, _ string) { c.loseVolume() },
		within: everywhere(untouched),
	},
	{
		name: "etcd has no majority for 30 s",
		inject: func(c *cluster, _ form, _, _ string) {
			c.kubectl("scale", "statefulset/etcd", "--replicas=1")
			if err := harness.Wait(c.t.Context(), 30*time.Second); err != nil {
				c.t.Fatal(err)
			}
			c.kubectl("scale", "statefulset/etcd", "--replicas=3")
		},
		within: everywhere(2 * time.Minute),
	},
	{
		name: "etcd's members are rolled",
		inject: func(c *cluster, _ form, _, _ string) {
			c.kubectl("rollout", "restart", "statefulset/etcd")
			c.kubectl("rollout", "status", "statefulset/etcd", "--timeout=5m")
		},
		within: everywhere(untouched),
	},
}

func everywhere(d time.Duration) map[string]time.Duration {
	return map[string]time.Duration{"wrapper": d, "sidecar": d, "plain": d}
}

func deletePod(flags ...string) func(c *cluster, _ form, pod, _ string) {
	return func(c *cluster, _ form, pod, _ string) {
		c.t.Helper()
		c.kubectl(append([]string{"delete", "pod", pod}, flags...)...)
	}
}

func evict(c *cluster, _ form, pod, _ string) {
	c.t.Helper()
	create := c.command(c.t.Context(), "create", "-f", "-", "--raw",
		fmt.Sprintf("/api/v1/namespaces/%s/pods/%s/eviction", c.namespace, pod))
	create.Stdin = strings.NewReader(fmt.Sprintf(
		`{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": %q}}`, pod))
	if out, err := create.CombinedOutput(); err != nil {
		c.t.Fatalf("evict %s: %v: %s", pod, err, out)
	}
}

// signalKubelet stops a node's kubelet, or lets it go on. The nodes share their pid namespace.
func (c *cluster) signalKubelet(node, signal string) {
	c.t.Helper()
	const script = `for p in /proc/[0-9]*; do
		case "$(tr '\0' ' ' <$p/cmdline)" in
		"kubelet "*"--hostname-override=$1 "*) kill -$2 ${p#/proc/} && echo done ;;
		esac
	done 2>/dev/null`
	if c.reach("node", node, "sh", "-c", script, "sh", node, signal) == "" {
		c.t.Fatalf("%s has no kubelet", node)
	}
}

func cut(c *cluster, _ form, _, node string) {
	c.t.Helper()
	c.reach("cut", node)
}

// mend gives a node back, and waits if the form has an etcd: forms that have none come last. TCP
// may try again only after as long as the cut has lasted. Until then the member of etcd there has
// not found all others. If the next fault cut another one off, etcd would have no majority.
func mend(c *cluster, node string) {
	c.t.Helper()
	c.reach("mend", node)
	if c.kubectl("get", "statefulset", "etcd", "--ignore-not-found") == "" {
		return
	}
	if err := harness.Wait(c.t.Context(), 30*time.Second); err != nil {
		c.t.Fatal(err)
	}
}

// Each fault is injected where a Deployment's job runs, in each form of leasehold in a pod. The
// jobs keep when they lived, by the clock of their kernel, in a directory of their node. No two of
// a form may ever have lived at once. N is how often each fault is injected. JSON names a file to
// which the trials are added.
//
// Each form has a namespace and an etcd of its own, and the forms' trials run at the same time.
// Faults that are `alone` follow, one by one; the jobs of the other forms run on.
//
// In the wrapper form a Service routes to the leader, and a pod connects to it all the time.
func TestCluster_Faults(t *testing.T) {
	needNodes(t)
	found := findCluster(t)
	job := found.images()
	commit, err := exec.Command("git", "-C", found.root, "rev-parse", "--short", "HEAD").Output()
	if err != nil {
		t.Fatal(err)
	}
	forms := found.forms()
	if !found.old {
		forms[0].folder = "wrapper/route-to-leader"
		forms[0].way, forms[0].service = "by leasehold", "leader"
	}
	clusters := make([]*cluster, len(forms))
	for i, form := range forms {
		clusters[i] = found.enter(form.name)
		clusters[i].keepLives(form.name)
	}
	about := fmt.Sprintf("%s: leasehold %s, Kubernetes %s, %d CPUs.",
		time.Now().UTC().Format(time.DateOnly), bytes.TrimSpace(commit),
		clusters[0].kubectl("get", "nodes", "-o", "jsonpath="+
			"{.items[0].status.nodeInfo.kubeletVersion}"+
			", Linux {.items[0].status.nodeInfo.kernelVersion}"), runtime.NumCPU())
	var mu sync.Mutex
	var run results
	plans := make([]plan, len(forms))
	for i, form := range forms {
		c := clusters[i]
		plans[i] = plan{
			form:  form,
			start: func(t *testing.T) { c.with(t).etcdForFaults() },
			wants: func(f fault) bool { return f.within[form.name] != 0 },
			deploy: func(t *testing.T, mode string) {
				form.mode = mode
				c.with(t).deploy(form, job)
			},
			try: func(t *testing.T, f fault) {
				result := c.with(t).trial(form, f)
				mu.Lock()
				defer mu.Unlock()
				run.Trials = append(run.Trials, result)
				run.Traffic = append(run.Traffic, result.traffic...)
				keep(t, results{About: about, Trials: []trial{result}, Traffic: result.traffic})
			},
		}
	}
	inject(t, plans)
	for i, form := range forms {
		if form.service != "" {
			t.Run("rights", func(t *testing.T) { clusters[i].with(t).forbidden() })
		}
		// Also those that were not looked at during the last trials.
		for _, o := range overlaps(clusters[i].jobs()) {
			t.Errorf("%s: two jobs at once: %s", form.name, o)
		}
		clusters[i].kubectl("delete", "deployment", form.deployment, "--ignore-not-found")
	}
	t.Logf("the tables:\n%s\n%s", run.table(), run.trafficTable())
}

// A plan is what is done with a form.
type plan struct {
	form   form
	start  func(t *testing.T) // what the form needs
	deploy func(t *testing.T, mode string)
	wants  func(f fault) bool
	try    func(t *testing.T, f fault)
}

// inject injects the faults into all forms at the same time. Those that are `alone` follow, one by
// one. N is how often.
func inject(t *testing.T, plans []plan) {
	rounds := 1
	if n, err := strconv.Atoi(os.Getenv("N")); err == nil {
		rounds = n
	}
	together := func(name string, f func(t *testing.T, p plan)) bool {
		return t.Run(name, func(t *testing.T) {
			for _, p := range plans {
				t.Run(p.form.name, func(t *testing.T) {
					t.Parallel()
					f(t, p)
				})
			}
		})
	}
	some := func(t *testing.T, p plan, stubborn, alone bool) {
		mode := p.form.mode
		if stubborn {
			mode += "-on"
		}
		p.deploy(t, mode)
		// Round by round: the kubelet waits before it restarts a container for the second time, and
		// each round has a rollout, which makes new ones.
		for range rounds {
			for _, f := range faults {
				if f.stubborn == stubborn && f.alone == alone && p.wants(f) {
					t.Run(f.name, func(t *testing.T) { p.try(t, f) })
				}
			}
		}
	}
	if !together("start", func(t *testing.T, p plan) { p.start(t) }) {
		return
	}
	// Pods whose job ignores TERM take long to replace: they come first here, and last below.
	together("at once", func(t *testing.T, p plan) {
		some(t, p, true, false)
		some(t, p, false, false)
	})
	for _, p := range plans {
		t.Run("alone/"+p.form.name, func(t *testing.T) {
			some(t, p, false, true)
			some(t, p, true, true)
		})
	}
}

// with returns the cluster for a part of a test.
func (c *cluster) with(t *testing.T) *cluster {
	part := *c
	part.t = t
	return &part
}

var keeping sync.Mutex // of the file

// keep adds results to those in $JSON at once: a run that is cut short has those until then.
func keep(t *testing.T, r results) {
	t.Helper()
	keeping.Lock()
	defer keeping.Unlock()
	if path := os.Getenv("JSON"); path != "" {
		if err := r.addTo(path); err != nil {
			t.Error(err)
		}
	}
}

// needNodes skips the test where nothing reaches the nodes.
func needNodes(t *testing.T) {
	t.Helper()
	if os.Getenv("CLUSTER") == "" {
		t.Skip("skipped: CLUSTER names no command that reaches the nodes: run this by" +
			" tools/kubernetes/cluster in make e2e-k8s")
	}
}

// newFaultyCluster skips the test where nothing reaches the nodes.
func newFaultyCluster(t *testing.T) (c *cluster, job string) {
	t.Helper()
	needNodes(t)
	c = newCluster(t)
	job = c.images()
	c.etcdForFaults()
	return c, job
}

func (c *cluster) etcdForFaults() {
	c.t.Helper()
	c.etcd()
	c.allowHostPaths()
}

// allowHostPaths lets pods write into a directory of their node: it outlives them, and is nothing
// for pods that are restricted.
func (c *cluster) allowHostPaths() {
	c.t.Helper()
	c.kubectl("label", "namespace", c.namespace, "pod-security.kubernetes.io/enforce=privileged",
		"--overwrite")
}

// keepLives makes the directory in which jobs keep when they lived.
func (c *cluster) keepLives(name string) {
	c.t.Helper()
	c.lives = "/var/log/" + c.namespace + "-" + name
	for _, node := range c.nodeNames {
		c.reach("node", node, "mkdir", "-m", "777", c.lives)
	}
}

func (c *cluster) deploy(form form, job string) {
	c.t.Helper()
	c.overlay("faults", form.folder, job, form.patched(c.lives))
}

// inEachForm calls f for all forms that this cluster can run, at the same time. Each has a
// namespace and an etcd of its own.
func inEachForm(t *testing.T, f func(c *cluster, form form, job string)) {
	t.Helper()
	needNodes(t)
	found := findCluster(t)
	job := found.images()
	for _, form := range found.forms() {
		t.Run(form.name, func(t *testing.T) {
			c := found.with(t).enter(form.name)
			t.Parallel()
			c.etcdForFaults()
			f(c, form, job)
		})
	}
}

// A rollout that cannot work stops at its first pod. The other two stay as they are, one of them
// leads, and undo brings back the first.
func TestCluster_BadRollouts(t *testing.T) {
	inEachForm(t, func(c *cluster, form form, job string) {
		c.keepLives("bad")
		c.deploy(form, job)
		// `kubectl set env` does not set those of init containers.
		const endpoint = `env: [{name: LEASEHOLD_ENDPOINTS, valueFrom: null, value: "https://%s"}]`
		for _, bad := range []struct{ name, where, what string }{
			{
				"an endpoint where nobody listens",
				form.leasehold, fmt.Sprintf(endpoint, "127.0.0.1:1"),
			},
			{
				"an endpoint whose name is unknown",
				form.leasehold, fmt.Sprintf(endpoint, "no.invalid:2379"),
			},
			{
				"a setting that is wrong",
				form.leasehold, `env: [{name: LEASEHOLD_TTL, value: "15"}]`,
			},
			{"an image that is not there", form.job, "image: localhost/nothing:1"},
		} {
			c.t.Run(bad.name, func(t *testing.T) {
				c.with(t).rollInVain(form, bad.name, fmt.Sprintf(bad.where, bad.what))
			})
		}
	})
}

func (c *cluster) rollInVain(form form, name, bad string) {
	t := c.t
	t.Helper()
	deployment := "deployment/" + form.deployment
	c.kubectl("rollout", "status", deployment, "--timeout=5m")
	first, began := c.leader(), boottime.Now()
	c.kubectl("patch", deployment, "--patch", "spec: {template: {spec: {"+bad+"}}}")
	pods := func() error {
		got := c.kubectl("get", deployment, "-o", "jsonpath="+
			"{.status.updatedReplicas} {.status.replicas} {.status.readyReplicas}")
		if got != "1 3 2" {
			return fmt.Errorf("updated, all and ready pods: %s, want 1 3 2", got)
		}
		return nil
	}
	c.until(2*time.Minute, pods)
	// Longer than the TTL, and than a new pod takes to be ready.
	if err := harness.Wait(t.Context(), 20*time.Second); err != nil {
		t.Fatal(err)
	}
	if err := pods(); err != nil {
		t.Error(err)
	}
	c.until(handedOver[form.name], func() error { // the first pod may have been the leader's
		_, err := c.running()
		return err
	})
	lives := c.jobs()
	c.kubectl("rollout", "undo", deployment)
	c.kubectl("rollout", "status", deployment, "--timeout=5m")
	c.keepRollout(form, "a rollout with "+name, lives, first, began)
}

// keepRollout keeps what a rollout did, and looks for overlaps until now. lives are those of the
// trial.
func (c *cluster) keepRollout(
	form form, name string, lives []life, first life, began time.Duration,
) {
	c.t.Helper()
	result := trial{Form: form.name, Fault: name}
	result.moved(lives, first, began)
	twice := overlaps(c.jobs())
	for _, o := range twice {
		c.t.Errorf("two jobs at once: %s", o)
	}
	result.Overlaps = len(twice)
	c.t.Logf("%+v", result)
	keep(c.t, results{Trials: []trial{result}})
}

// moved notes the times of the jobs after the first one, and returns the next one, if there is one.
func (t *trial) moved(lives []life, first life, began time.Duration) (next life) {
	i := slices.IndexFunc(lives, func(l life) bool { return l.began == first.began })
	if i+1 == len(lives) {
		return life{}
	}
	t.Moved = true
	t.Ended = harness.Milliseconds(lives[i].last - began)
	t.Next = harness.Milliseconds(lives[i+1].began - began)
	t.Gap = harness.Milliseconds(longestGap(lives[i:]))
	return lives[i+1]
}

// A rollout of the kinds that k8s/ does not have: a Deployment that stops all old pods before it
// starts new ones, and a StatefulSet.
func TestCluster_Rollouts(t *testing.T) {
	inEachForm(t, func(c *cluster, form form, job string) {
		for kind, most := range map[string]time.Duration{
			"Recreate": 2 * time.Minute, "StatefulSet": handedOver[form.name],
		} {
			c.t.Run(kind, func(t *testing.T) { c.with(t).rollAs(kind, most, form, job) })
		}
	})
}

func (c *cluster) rollAs(kind string, most time.Duration, form form, job string) {
	t := c.t
	t.Helper()
	c.keepLives(strings.ToLower(kind))
	text := c.kubectl("kustomize", c.write("rolled", form.folder, job, form.patched(c.lives)))
	const strategy = "  strategy:\n    rollingUpdate:\n      maxSurge: 0\n" +
		"      maxUnavailable: 1\n"
	if !strings.Contains(text, strategy) {
		t.Fatalf("there is no strategy in\n%s", text)
	}
	object, instead := "deployment/"+form.deployment, "  strategy: {type: Recreate}\n"
	if kind == "StatefulSet" {
		object = "statefulset/" + form.deployment
		instead = "  serviceName: " + form.deployment + "\n"
		text = strings.Replace(text, "kind: Deployment", "kind: StatefulSet", 1)
	}
	c.apply(strings.Replace(text, strategy, instead, 1))
	defer c.kubectl("delete", object, "--cascade=foreground")
	c.kubectl("rollout", "status", object, "--timeout=5m")
	first, began := c.leader(), boottime.Now()
	c.kubectl("rollout", "restart", object)
	c.kubectl("rollout", "status", object, "--timeout=5m")
	c.follower(first, time.Minute)
	lives := c.jobs()
	gap := longestGap(lives)
	if gap > most {
		t.Errorf("for %v there was no job, want at most %v", gap, most)
	}
	c.keepRollout(form, "a rollout as "+kind, lives, first, began)
}

// forms returns those that this cluster can run.
func (c *cluster) forms() []form {
	wrapper := wrapperForm
	plain := form{
		name: "plain", folder: "sidecar/plain", deployment: "sidecar",
		leasehold: "containers: [{name: leasehold, %s}]", job: "containers: [{name: app, %s}]",
		first: "/leasehold elect ", mode: "app", patch: sidecarPatch,
	}
	if c.old {
		wrapper.folder, plain.folder = "wrapper/kubernetes-1.20", "sidecar/kubernetes-1.20"
	}
	forms := []form{wrapper, plain}
	if c.sidecars {
		native := plain
		native.name, native.folder = "sidecar", "sidecar"
		native.leasehold = "initContainers: [{name: leasehold, %s}]"
		forms = append(forms, native)
	}
	return forms
}

// leader waits until there is a job, and returns its life.
func (c *cluster) leader() (leader life) {
	c.t.Helper()
	c.until(time.Minute, func() (err error) {
		leader, err = c.running()
		return err
	})
	return leader
}

// follower returns the job that follows another one. What waits for new pods may return while the
// last old one still ends.
func (c *cluster) follower(before life, within time.Duration) (next life) {
	c.t.Helper()
	c.until(within, func() (err error) {
		if next, err = c.running(); err == nil && next.began == before.began {
			err = fmt.Errorf("%v goes on", before)
		}
		return err
	})
	return next
}

// trial injects one fault and returns what it has done.
func (c *cluster) trial(form form, f fault) (result trial) {
	t := c.t
	t.Helper()
	c.kubectl("rollout", "status", "statefulset/etcd", "--timeout=5m")
	c.kubectl("rollout", "status", "deployment/"+form.deployment, "--timeout=5m")
	c.until(2*time.Minute, func() error { return c.threePods(form) })
	leader := c.leader()
	node := c.kubectl("get", "pod", leader.pod, "-o", "jsonpath={.spec.nodeName}")
	defer func() { // when the fault has ended: a node that was cut off has had its job until then
		twice := overlaps(c.jobs())
		for _, o := range twice {
			t.Errorf("two jobs at once: %s", o)
		}
		result.Overlaps = len(twice)
		t.Logf("%+v", result)
	}()
	measure := c.follow(form, f, leader, node)
	defer c.end(f, node) // also if the test ends here
	began := boottime.Now()
	f.inject(c, form, leader.pod, node)
	result = trial{Form: form.name, Fault: f.name}
	within := f.within[form.name]
	if within == untouched {
		// Longer than the TTL.
		if err := harness.Wait(t.Context(), 17*time.Second); err != nil {
			t.Fatal(err)
		}
		now := boottime.Now()
		lives := c.jobs()
		last := lives[len(lives)-1]
		if last.began != leader.began || now-last.last > time.Second {
			t.Errorf("the job was to go on, and %v is followed by %v", leader, last)
		}
	} else {
		var next life
		c.until(within+time.Minute, func() error {
			lives := c.jobs()
			next = lives[len(lives)-1]
			if next.began <= leader.began {
				return errors.New("no job follows")
			}
			return nil
		})
		lives := c.jobs()
		next = result.moved(lives, leader, began) // the last one may be another
		if after := next.began - began; after > within {
			t.Errorf("the next job began after %v, want at most %v", after, within)
		}
		if f.stays && next.pod != leader.pod {
			t.Errorf("the next job is in %s, want it in %s as before", next.pod, leader.pod)
		}
		if f.restart > 0 {
			restarted := c.started(form, leader.pod, node)
			if restarted < began || next.began-restarted > f.restart {
				t.Errorf("the next job began %v after the container, want at most %v",
					next.began-restarted, f.restart)
			}
			result.Restart = harness.Milliseconds(next.began - restarted)
		}
	}
	result.traffic = measure()
	return result
}

// end ends a fault. The next one needs a cluster that is well.
func (c *cluster) end(f fault, node string) {
	c.t.Helper()
	if f.recover == nil {
		return
	}
	f.recover(c, node)
	c.until(3*time.Minute, func() error {
		_, err := c.try("wait", "--for=condition=Ready", "node", "--all", "--timeout=10s")
		return err
	})
}

// threePods returns an error unless there are just three. One of before that still stops may still
// lead.
func (c *cluster) threePods(form form) error {
	pods, err := c.try("get", "pods", "-l", "app.kubernetes.io/name="+form.deployment, "-o", "name")
	if n := strings.Count(pods, "\n"); err == nil && n != 3 {
		err = fmt.Errorf("there are %d pods, want 3:\n%s", n, pods)
	}
	return err
}

// until asks again and again, with a pause: to answer takes several processes.
func (c *cluster) until(within time.Duration, f func() error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), within)
	defer cancel()
	err := harness.Until(ctx, func() error {
		err := f()
		if err != nil {
			_ = harness.Wait(ctx, 200*time.Millisecond)
		}
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
}

// reach runs the command in $CLUSTER, which reaches the nodes as kubectl can't.
func (c *cluster) reach(args ...string) string {
	c.t.Helper()
	out, err := exec.CommandContext(c.t.Context(), os.Getenv("CLUSTER"), args...).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		c.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, exit.Stderr)
	} else if err != nil {
		c.t.Fatal(err)
	}
	return string(out)
}

// inPod does something with the processes of a pod whose command line matches, on its node: there
// even the first process of a container can be killed.
func (c *cluster) inPod(pod, node, command, do string) string {
	c.t.Helper()
	const script = `for p in /proc/[0-9]*; do
		grep -qs "$1" $p/cgroup || continue
		case "$(tr '\0' ' ' <$p/cmdline)" in
		$2*) cd $p && %s ;;
		esac
	done`
	uid := c.kubectl("get", "pod", pod, "-o", "jsonpath={.metadata.uid}")
	return c.reach("node", node, "sh", "-c", fmt.Sprintf(script, do), "sh", uid, command)
}

func (c *cluster) killIn(pod, node, command string) {
	c.t.Helper()
	if c.inPod(pod, node, command, `kill -KILL ${p#/proc/} && echo killed`) == "" {
		c.t.Fatalf("%s has no process %q", pod, command)
	}
}

// started returns when leasehold's first process in a pod was started, in hundredths of a
// second since the machine's boot: that is how the kernel counts it.
func (c *cluster) started(form form, pod, node string) time.Duration {
	c.t.Helper()
	out := c.inPod(pod, node, form.first, `sed 's/.*) //' stat | cut -d ' ' -f 20`)
	ticks, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		c.t.Fatal(err)
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// A life is that of a job, from the start of its first process to the last sign of any of them, as
// times since the machine's boot.
type life struct {
	pod, token  string
	began, last time.Duration
}

func (l life) String() string {
	return fmt.Sprintf("%s with token %s, %v to %v", l.pod, l.token, l.began, l.last)
}

// jobs returns all lives that there have been, in the order of their beginning.
func (c *cluster) jobs() []life {
	c.t.Helper()
	var lines []string
	for _, node := range c.nodeNames {
		out := c.reach("node", node, "sh", "-c", "cd "+c.lives+" && grep -H . * || :")
		lines = append(lines, strings.Split(out, "\n")...)
	}
	lives, err := parseLives(lines)
	if err != nil {
		c.t.Fatal(err)
	}
	return lives
}

// running returns the life of the job that runs now.
func (c *cluster) running() (last life, err error) {
	c.t.Helper()
	now := boottime.Now()
	lives := c.jobs()
	if len(lives) == 0 {
		return life{}, errors.New("there has been no job")
	}
	last = lives[len(lives)-1]
	if now-last.last > time.Second {
		return life{}, fmt.Errorf("nobody has a job; the last one is %v", last)
	}
	return last, nil
}

// parseLives reads lines "POD TOKEN BEGAN PROCESS:LAST" of the processes of jobs.
func parseLives(lines []string) (lives []life, err error) {
	for _, line := range lines {
		if line == "" {
			continue
		}
		var l life
		name, last, _ := strings.Cut(line, ":")
		if _, err := fmt.Sscanf(name, "%s %s %d", &l.pod, &l.token, &l.began); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		if _, err := fmt.Sscanf(last, "%d", &l.last); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		i := slices.IndexFunc(lives, func(o life) bool {
			return o.pod == l.pod && o.token == l.token && o.began == l.began
		})
		if i < 0 {
			lives = append(lives, l)
		} else {
			lives[i].last = max(lives[i].last, l.last)
		}
	}
	slices.SortFunc(lives, func(a, b life) int { return int(a.began - b.began) })
	return lives, nil
}

// longestGap returns the longest time between two lives in which nobody lived.
func longestGap(lives []life) (longest time.Duration) {
	until := lives[0].last
	for _, l := range lives {
		longest, until = max(longest, l.began-until), max(until, l.last)
	}
	return longest
}

// overlaps returns the pairs of lives in which one began before the other had ended.
func overlaps(lives []life) (found []string) {
	for i, later := range lives {
		for _, earlier := range lives[:i] {
			if earlier.last >= later.began {
				found = append(found, fmt.Sprintf("%v; %v", earlier, later))
			}
		}
	}
	return found
}

// The judge of the faults, without a cluster.
func TestLives_Overlap(t *testing.T) {
	lives, err := parseLives([]string{
		"b 17 500 first:00600", "a 12 00100 first:00400", "a 12 00100 orphan:00450", "",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []life{{"a", "12", 100, 450}, {"b", "17", 500, 600}}
	if !slices.Equal(lives, want) || len(overlaps(lives)) != 0 {
		t.Errorf("%v, overlaps %v, want %v and none", lives, overlaps(lives), want)
	}
	// An orphan that lives on is a job that does.
	lives, err = parseLives([]string{
		"b 17 500 first:600", "a 12 100 first:400", "a 12 100 orphan:501",
	})
	if err != nil || len(overlaps(lives)) != 1 {
		t.Errorf("%v (%v), overlaps %v, want one", lives, err, overlaps(lives))
	}
	if _, err := parseLives([]string{"b 17"}); err == nil {
		t.Error("a line that says nothing is read")
	}
}
