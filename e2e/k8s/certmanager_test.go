//go:build linux

package k8s_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// With certificates that cert-manager makes, etcd starts and a job runs. Then every certificate is
// renewed, that of the authority first. The job goes on, and whoever connects anew is let in:
// etcd has the old certificate of the authority in its memory until it restarts.
func TestCluster_CertManager(t *testing.T) {
	needNodes(t)
	if _, err := exec.LookPath("certmanager"); err != nil {
		t.Skip("skipped: `make cluster` makes no cert-manager for this Kubernetes")
	}
	c := newCluster(t)
	c.certManager()
	c.kubectl("apply", "-k", "k8s/etcd/cert-manager")
	job := c.images() // etcd starts meanwhile
	c.kubectl("label", "namespace", c.namespace, "pod-security.kubernetes.io/enforce=privileged",
		"--overwrite")
	c.kubectl("wait", "--for=condition=Ready", "certificate", "--all", "--timeout=2m")
	c.kubectl("rollout", "status", "statefulset/etcd", "--timeout=5m")
	form := c.forms()[0]
	c.keepLives("cert-manager")
	c.deploy(form, job)
	c.kubectl("rollout", "status", "deployment/wrapper", "--timeout=5m")
	leader := c.leader()
	node := c.kubectl("get", "pod", leader.pod, "-o", "jsonpath={.spec.nodeName}")

	pods := "jsonpath={range .items[*]}{.metadata.name} {.metadata.uid}, RESTARTS " +
		"{.status.containerStatuses[*].restartCount}{\"\\n\"}{end}"
	before := c.kubectl("get", "pods", "-o", pods)
	leaves := []string{"etcd-server", "etcd-peer", "etcd-client"}
	authorities := map[string]string{}
	for _, name := range append(leaves, "etcd-ca") {
		authorities[name] = c.secret(name+"-tls", "ca.crt")
	}
	c.renew(authorities, "etcd-ca")
	c.renew(authorities, leaves...)
	// The kubelet looks for new Secrets when something happens to the pod, else within two minutes.
	c.kubectl("annotate", "pod", "--all", "renewed=true")
	for _, member := range []string{"etcd-0", "etcd-1", "etcd-2"} {
		c.serves(member, "etcd-server-tls")
	}
	uid := c.kubectl("get", "pod", leader.pod, "-o", "jsonpath={.metadata.uid}")
	c.until(3*time.Minute, func() error {
		file := "/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~secret/etcd-tls/tls.crt"
		if c.reach("node", node, "cat", file) != c.secret("etcd-client-tls", "tls.crt") {
			return fmt.Errorf("%s has the old certificate", leader.pod)
		}
		return nil
	})
	if after := c.kubectl("get", "pods", "-o", pods); after != before {
		t.Errorf("the certificates are renewed, and these pods\n%sare now\n%s", before, after)
	}

	// A new elector connects to members that have not been restarted, and so does a new member.
	began := time.Now()
	c.killIn(leader.pod, node, "leasehold elector ")
	c.kubectl("delete", "pod", "etcd-2")
	c.kubectl("rollout", "status", "statefulset/etcd", "--timeout=2m")
	const longerThanTTL = 20 * time.Second
	if err := harness.Wait(t.Context(), longerThanTTL-time.Since(began)); err != nil {
		t.Fatal(err)
	}
	if last := c.leader(); last.began != leader.began {
		t.Errorf("the job was to go on, and %v is followed by %v", leader, last)
	}
	if pod := c.leads(); pod != leader.pod {
		t.Errorf("etcd says that %s leads, want %s", pod, leader.pod)
	}
}

// certManager runs cert-manager beside the control plane until the test ends. It skips the test in
// a cluster that has a cert-manager: that one would lose its types, and with them all objects.
func (c *cluster) certManager() {
	t := c.t
	t.Helper()
	const ours = "leasehold-e2e"
	others := c.kubectl("get", "crds", "-o", "name", "-l", "!"+ours)
	if strings.Contains(others, "cert-manager.io") {
		t.Skip("skipped: this cluster has a cert-manager of its own")
	}
	download := exec.Command("go", "mod", "download", "-json",
		"github.com/cert-manager/cert-manager")
	download.Dir = filepath.Join(c.root, "tools", "kubernetes", "certmanager")
	out, err := download.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", download, err, out)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		t.Fatalf("%s: %v", download, err)
	}
	types := c.kubectl("label", "--local", "-f", filepath.Join(module.Dir, "deploy", "crds"),
		ours+"=true", "-o", "json")
	t.Cleanup(func() { c.kubectl("delete", "crds", "-l", ours, "--timeout=2m") })
	// They are too large for the annotation that kubectl leaves otherwise.
	apply := c.command(t.Context(), "apply", "--server-side", "-f", "-")
	apply.Stdin = strings.NewReader(types)
	if out, err := apply.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c.until(time.Minute, func() error {
		_, err := c.try("get", "certificates,certificaterequests,issuers,clusterissuers")
		return err
	})
	manager, err := harness.StartChild("cert-manager", nil, exec.Command("certmanager", c.config))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() { // soon the types are gone
			out, _ := c.try("describe", "certificates,certificaterequests,issuers")
			t.Log(out)
		}
		defer manager.Kill()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err := manager.Signal(syscall.SIGTERM)
		code, late := manager.Wait(ctx)
		if err = errors.Join(err, late); err != nil || code != 0 || t.Failed() {
			t.Errorf("cert-manager exits with %d (%v)\n%s%s",
				code, err, manager.Output(), manager.Log())
		}
	})
}

// renew does what `cmctl renew` does, and waits until the Secrets come with another certificate of
// the authority than these. (Their revision says less: under load cert-manager may issue a
// certificate twice.) It asks again, because cert-manager may not have seen the new authority yet.
func (c *cluster) renew(authorities map[string]string, certificates ...string) {
	c.t.Helper()
	for _, name := range certificates {
		c.until(time.Minute, func() error { return c.issue(name) })
	}
	for _, name := range certificates {
		asked := time.Now()
		c.until(3*time.Minute, func() error {
			if c.secret(name+"-tls", "ca.crt") != authorities[name] {
				return nil
			}
			err := fmt.Errorf("%s is not renewed", name)
			if time.Since(asked) > 20*time.Second {
				asked = time.Now()
				err = errors.Join(err, c.issue(name))
			}
			return err
		})
	}
}

// issue asks for a certificate. It fails while one is being issued.
func (c *cluster) issue(certificate string) error {
	_, err := c.try("patch", "certificate", certificate, "--subresource=status", "--type=json",
		"-p", `[{"op": "add", "path": "/status/conditions/-", "value": {"type": "Issuing",
		"status": "True", "reason": "ManuallyTriggered", "message": "for the test"}}]`)
	return err
}

func (c *cluster) secret(name, key string) string {
	c.t.Helper()
	coded := c.kubectl("get", "secret", name, "-o",
		"jsonpath={.data."+strings.ReplaceAll(key, ".", `\.`)+"}")
	text, err := base64.StdEncoding.DecodeString(coded)
	if err != nil {
		c.t.Fatal(err)
	}
	return string(text)
}

// serves waits until a member of etcd shows the certificate in a Secret to clients.
func (c *cluster) serves(member, secret string) {
	c.t.Helper()
	at := strings.Fields(c.kubectl("get", "pod", member, "-o",
		"jsonpath={.spec.nodeName} {.status.podIP}"))
	c.until(3*time.Minute, func() error {
		shown := c.reach("node", at[0], "sh", "-c", "timeout 5 openssl s_client -connect "+at[1]+
			":2379 </dev/null 2>/dev/null | openssl x509 2>/dev/null || :")
		if shown == "" || !strings.HasPrefix(c.secret(secret, "tls.crt"), shown) {
			return fmt.Errorf("%s shows another certificate than %s has: %q", member, secret, shown)
		}
		return nil
	})
}
