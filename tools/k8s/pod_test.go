//go:build linux

package k8s_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"leasehold/e2e/harness"
)

// A world stands in for a Kubernetes cluster: each pod is a node of a network, with an address of
// its own, and each of its containers a process that has the manifest's command, environment,
// files, user and privileges. What a container sees as its root is that of this machine, to read,
// with the image's few programs in it.
type world struct {
	t       *testing.T
	network *harness.Network
	dir     string
	etcd    harness.Etcd
	hosts   map[string]string // addresses by name: what the cluster's DNS knows
	configs []object          // where ConfigMaps and Secrets are found
}

func newWorld(t *testing.T, etcd []object) *world {
	t.Helper()
	harness.NeedsRoot(t)
	tools, err := harness.FindEtcd(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	network, err := harness.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(network.Close)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return &world{
		t: t, network: network, dir: dir, etcd: tools,
		hosts: map[string]string{}, configs: etcd,
	}
}

// A pod is one of a Deployment or StatefulSet.
type pod struct {
	world   *world
	name    string
	node    *harness.Node
	spec    corev1.PodSpec
	volumes map[string]string // the folder of each
}

const uid = 65532

func (w *world) pod(name string, spec corev1.PodSpec, claims []corev1.PersistentVolumeClaim) *pod {
	w.t.Helper()
	node, err := w.network.Node(name)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(node.Close)
	p := &pod{world: w, name: name, node: node, spec: spec, volumes: map[string]string{}}
	folder := func(volume string) string {
		path := filepath.Join(w.dir, name, volume)
		err := errors.Join(
			os.MkdirAll(path, 0o755), os.Chown(path, 0, uid), os.Chmod(path, 0o2775))
		if err != nil {
			w.t.Fatal(err)
		}
		p.volumes[volume] = path
		return path
	}
	for _, claim := range claims {
		folder(claim.Name)
	}
	for _, v := range spec.Volumes {
		path := folder(v.Name)
		switch {
		case v.Secret != nil:
			w.mountSecret(path, v.Secret)
		case v.EmptyDir == nil:
			w.t.Fatalf("volume %s is of a kind that this test does not have", v.Name)
		}
	}
	return p
}

// mountSecret writes a Secret's files, as the kubelet does with an fsGroup; it
// replaces them where they are.
func (w *world) mountSecret(path string, source *corev1.SecretVolumeSource) {
	w.t.Helper()
	for file, data := range find[corev1.Secret](w.t, w.configs, source.SecretName).Data {
		file = filepath.Join(path, file)
		err := errors.Join(
			os.WriteFile(file+".new", data, os.FileMode(*source.DefaultMode)),
			os.Chown(file+".new", 0, uid),
			os.Rename(file+".new", file))
		if err != nil {
			w.t.Fatal(err)
		}
	}
}

// A process is a running container.
type process struct {
	*exec.Cmd
	pod   *pod
	spec  corev1.Container
	out   *output
	ended chan struct{}

	killed float64 // when kill had done its work, in seconds of /proc/uptime
}

// output collects what a container writes.
type output struct {
	sync.Mutex
	bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.Lock()
	defer o.Unlock()
	return o.Buffer.Write(p)
}

func (o *output) String() string {
	o.Lock()
	defer o.Unlock()
	return o.Buffer.String()
}

// start starts a container.
func (p *pod) start(c corev1.Container) *process {
	w := p.world
	w.t.Helper()
	env := environment(w.t, c, p.name, w.configs)
	if _, set := env["PATH"]; !set {
		env["PATH"] = "/busybox"
	}
	command := slices.Clone(c.Command)
	if len(command) == 0 && strings.HasPrefix(c.Image, "localhost/leasehold") {
		command = []string{"/leasehold"} // the image's entry point
	}
	for _, arg := range c.Args {
		command = append(command, expand(arg, env))
	}
	script := w.container(p, c)
	setpriv := []string{
		"chroot", "/mnt/root", "/usr/bin/setpriv",
		fmt.Sprint("--reuid=", *p.spec.SecurityContext.RunAsUser),
		fmt.Sprint("--regid=", *p.spec.SecurityContext.RunAsGroup),
		fmt.Sprint("--groups=", *p.spec.SecurityContext.FSGroup),
		"--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "/usr/bin/env", "-i",
	}
	unshare := []string{"--mount", "--propagation=private", "sh", "-ec", script, "sh"}
	args := slices.Concat(unshare, setpriv, list(env), command)
	proc := &process{
		Cmd: exec.Command("unshare", args...), pod: p, spec: c,
		out: &output{}, ended: make(chan struct{}),
	}
	proc.Stdout, proc.Stderr = proc.out, proc.out
	proc.WaitDelay = 100 * time.Millisecond
	proc.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := p.node.Do(proc.Start); err != nil {
		w.t.Fatalf("start container %s of pod %s: %v", c.Name, p.name, err)
	}
	go func() {
		defer close(proc.ended)
		_ = proc.Wait() // what it ended with is in ProcessState
	}()
	w.t.Cleanup(func() {
		children := harness.Descendants(proc.Process.Pid)
		for _, pid := range append([]int{proc.Process.Pid}, children...) {
			_ = syscall.Kill(pid, syscall.SIGKILL) // most have ended
		}
		<-proc.ended
		if w.t.Failed() {
			w.t.Logf("container %s of pod %s said:\n%s", c.Name, p.name, proc.out)
		}
	})
	return proc
}

// container makes a container's root out of this machine's own, in a mount
// namespace that ends with it.
func (w *world) container(p *pod, c corev1.Container) string {
	var hosts strings.Builder
	hosts.WriteString("127.0.0.1 localhost\n")
	for name, address := range w.hosts {
		fmt.Fprintf(&hosts, "%s %s\n", address, name)
	}
	var s strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&s, format+"\n", args...) }
	line("mount -t tmpfs tmpfs /mnt && mkdir /mnt/up /mnt/work /mnt/root")
	line("mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work /mnt/root")
	line("cd /mnt/root")
	line("for d in proc sys; do mount --rbind /$d $d; done")
	line("mount -t tmpfs -o mode=755 tmpfs dev")
	line("for d in null zero full random urandom; " +
		"do touch dev/$d; mount --bind /dev/$d dev/$d; done")
	line("touch dev/termination-log; mount --bind %s dev/termination-log", p.lastWords(c))
	line("printf %%s '%s' >etc/hosts; echo 'hosts: files' >etc/nsswitch.conf", hosts.String())
	install := func(program, at string) {
		line("mkdir -p .%s; touch .%s; mount --bind %s .%s", filepath.Dir(at), at, program, at)
	}
	switch {
	case strings.Contains(c.Image, "busybox"):
		line("mkdir busybox; busybox --install -s busybox")
	case strings.Contains(c.Image, "etcd"):
		install(w.etcd.Server, "/usr/local/bin/etcd")
	case strings.HasPrefix(c.Image, "localhost/leasehold"):
		install(shared.leasehold, "/leasehold")
	default:
		w.t.Fatalf("image %s is not one that this test has", c.Image)
	}
	if readOnly := c.SecurityContext.ReadOnlyRootFilesystem; readOnly == nil || !*readOnly {
		w.t.Fatal("a root to write to is not what this test makes")
	}
	for _, m := range c.VolumeMounts {
		line("mkdir -p .%s; mount --bind %s .%s", m.MountPath, p.volumes[m.Name], m.MountPath)
		if m.ReadOnly {
			line("mount -o remount,bind,ro .%s", m.MountPath)
		}
	}
	line("mount -o remount,ro /mnt/root")
	line(`exec "$@"`)
	return s.String()
}

// lastWords is the file of a container's termination message.
func (p *pod) lastWords(c corev1.Container) string {
	p.world.t.Helper()
	path := filepath.Join(p.world.dir, p.name, c.Name+".termination-log")
	if err := errors.Join(os.WriteFile(path, nil, 0o666), os.Chmod(path, 0o666)); err != nil {
		p.world.t.Fatal(err)
	}
	return path
}

// stop does what the kubelet does first to a container that is to end.
func (p *process) stop(t *testing.T) {
	t.Helper()
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
}

// kill does what the kubelet does when the time is over. Once killed it does nothing more.
func (p *process) kill() {
	if p.killed != 0 {
		return
	}
	for _, pid := range append([]int{p.Process.Pid}, harness.Descendants(p.Process.Pid)...) {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
	}
	<-p.ended
	p.killed = harness.Now().Seconds() // both count from the boot, suspend included
}

// end waits for the end and returns the exit code.
func (p *process) end(t *testing.T, within time.Duration) int {
	t.Helper()
	select {
	case <-p.ended:
		return p.ProcessState.ExitCode()
	case <-time.After(within):
		t.Fatalf("container %s of pod %s has not ended within %v", p.spec.Name, p.pod.name, within)
		return 0
	}
}

// probe asks what a probe asks, from where the kubelet would, once.
func (p *process) probe(probe *corev1.Probe) error {
	port := probe.HTTPGet.Port.IntValue()
	for _, named := range p.spec.Ports {
		if named.Name == probe.HTTPGet.Port.StrVal {
			port = int(named.ContainerPort)
		}
	}
	code, err := p.get(port, probe.HTTPGet.Path)
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("%s of pod %s: status %d", probe.HTTPGet.Path, p.pod.name, code)
	}
	return err
}

func (p *process) get(port int, path string) (int, error) {
	client := http.Client{
		Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true},
	}
	resp, err := client.Get(fmt.Sprintf("http://%s:%d%s", p.pod.node.Addr, port, path))
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// until waits until f reports no error.
func until(t *testing.T, what string, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := harness.Until(ctx, f); err != nil {
		t.Fatalf("wait for %s: %v", what, err)
	}
}

// startEtcd starts the StatefulSet's pods, all at once, and waits until they are ready.
func (w *world) startEtcd() []*process {
	w.t.Helper()
	members := w.etcdPods()
	var started []*process
	for _, m := range members {
		started = append(started, m.start(m.spec.Containers[0]))
	}
	for _, m := range started {
		until(w.t, m.pod.name+" to be ready", func() error {
			return m.probe(m.spec.ReadinessProbe)
		})
	}
	return started
}

func (w *world) etcdPods() []*pod {
	w.t.Helper()
	set := find[appsv1.StatefulSet](w.t, w.configs, "etcd")
	var pods []*pod
	for i := range *set.Spec.Replicas {
		name := fmt.Sprintf("%s-%d", set.Name, i)
		p := w.pod(name, set.Spec.Template.Spec, set.Spec.VolumeClaimTemplates)
		w.hosts[p.name+"."+set.Spec.ServiceName] = p.node.Addr
		pods = append(pods, p)
	}
	return pods
}
