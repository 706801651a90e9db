//go:build linux

// Elected runs a command while its pod leads by a Lease of Kubernetes, as client-go elects. The
// test of traffic compares leasehold with it.
//
//	elected LEASE COMMAND...
//
// POD_NAME and POD_NAMESPACE say where it runs. It is the first process of its container, and the
// command's processes are all others: they end with the command's first one. The pod that leads has
// the label "leader", by which a Service can select it. GET / on port 4040 answers as leasehold
// does.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: elected LEASE COMMAND...")
		os.Exit(64)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "elected:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, lease string, command []string) error {
	config, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	config.Timeout = 5 * time.Second
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	p := pod{client, os.Getenv("POD_NAMESPACE"), os.Getenv("POD_NAME")}
	// A container that was killed has left it.
	if err := p.label(ctx, p.name, nil); err != nil {
		return err
	}
	var token atomic.Int64 // of this term; 0 while another pod leads
	go func() { fmt.Fprintln(os.Stderr, p.serve(&token)) }()

	leading, over := make(chan struct{}), make(chan struct{})
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta: meta.ObjectMeta{Namespace: p.namespace, Name: lease},
			Client:    client.CoordinationV1(),
			// One of its own for each process, as the components of Kubernetes have it.
			LockConfig: resourcelock.ResourceLockConfig{
				Identity: p.name + "_" + string(uuid.NewUUID()),
			},
		},
		// The defaults of the components of Kubernetes.
		LeaseDuration: 15 * time.Second, RenewDeadline: 10 * time.Second,
		RetryPeriod: 2 * time.Second, ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(context.Context) { close(leading) },
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return err
	}
	electing, release := context.WithCancel(context.WithoutCancel(ctx))
	defer func() { release(); <-over }()
	go func() {
		defer close(over)
		elector.Run(electing)
	}()
	select {
	case <-ctx.Done():
		return nil
	case <-over:
		return errors.New("the election has ended")
	case <-leading:
	}

	token.Store(time.Now().UnixNano())
	job := exec.CommandContext(context.WithoutCancel(ctx), command[0], command[1:]...)
	job.Stdout, job.Stderr = os.Stdout, os.Stderr
	job.Env = append(os.Environ(), "LEASEHOLD_IDENTITY="+p.name,
		"LEASEHOLD_FENCING_TOKEN="+strconv.FormatInt(token.Load(), 10))
	if err := job.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for { // until there is no process but this one
			pid, err := syscall.Wait4(-1, nil, 0, nil)
			if errors.Is(err, syscall.ECHILD) {
				return
			}
			if pid == job.Process.Pid {
				_ = syscall.Kill(-1, syscall.SIGKILL)
			}
		}
	}()
	if err := p.take(electing); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	select {
	case <-over: // The job ends with the container.
		return errors.New("the lease is lost")
	case <-ctx.Done():
		_ = syscall.Kill(-1, syscall.SIGTERM)
	case <-ended:
	}
	token.Store(0)
	select {
	case <-ended:
	case <-over:
		return errors.New("the lease is lost")
	case <-time.After(10 * time.Second):
		_ = syscall.Kill(-1, syscall.SIGKILL)
		<-ended
	}
	// What deletes the pod takes it out of the Service too.
	return p.label(electing, p.name, nil)
}

// A pod is the one that this process runs in.
type pod struct {
	client          kubernetes.Interface
	namespace, name string
}

// serve answers as leasehold does, and returns when it no longer can.
func (p pod) serve(token *atomic.Int64) error {
	server := http.Server{
		Addr: ":4040", ReadHeaderTimeout: time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			now, state := token.Load(), "standby"
			if now != 0 {
				state = "leading"
			}
			_ = json.NewEncoder(w).Encode(map[string]any{
				"identity": p.name, "state": state, "leader": map[string]any{"token": now},
			})
		}),
	}
	return server.ListenAndServe()
}

// take gives this pod the label, and takes it from the pods that led before.
func (p pod) take(ctx context.Context) error {
	if err := p.label(ctx, p.name, "true"); err != nil {
		return err
	}
	pods, err := p.client.CoreV1().Pods(p.namespace).List(ctx,
		meta.ListOptions{LabelSelector: "leader=true"})
	if err != nil {
		return err
	}
	for _, other := range pods.Items {
		if other.Name != p.name {
			err = errors.Join(err, p.label(ctx, other.Name, nil))
		}
	}
	return err
}

// label sets the label "leader" of a pod, or removes it if the value is nil.
func (p pod) label(ctx context.Context, name string, value any) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"labels": map[string]any{"leader": value}},
	})
	if err == nil {
		_, err = p.client.CoreV1().Pods(p.namespace).
			Patch(ctx, name, types.MergePatchType, patch, meta.PatchOptions{})
	}
	if err != nil {
		return fmt.Errorf("label pod %s: %w", name, err)
	}
	return nil
}
