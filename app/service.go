//go:build linux

package app

import (
	"context"
	"fmt"
	"sync"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/boottime"
	"leasehold/kubernetes"
)

// addService has the leader's pod made the one endpoint of a Service of Kubernetes, if that is
// wanted. It runs beside the candidate, as the records do: nothing waits for it, except a daemon
// that has left etcd and exits.
func (d *daemon) addService(ec *election.Config, p parts, snapshot func() health.Snapshot) {
	k := p.cfg.Kubernetes
	if k.Service == "" {
		return
	}
	address, _ := k.Address() // config has checked it
	d.service = kubernetes.New(kubernetes.Config{
		Server: k.Server(), Account: p.account, Service: k.Service, Address: address,
		Election: p.cfg.Election, Adopted: adoptedToken(ec.Adopt),
		Term: func() kubernetes.Term { return serviceTerm(snapshot()) },
		Now:  boottime.Now, Logger: p.log,
	})
	beside := ec.Beside
	ec.Beside = func(ctx context.Context, etcd *election.Client) {
		var running sync.WaitGroup
		defer running.Wait()
		running.Go(func() { d.service.Run(ctx) })
		beside(ctx, etcd)
	}
}

// serviceTerm is the term while /leader answers 200.
func serviceTerm(s health.Snapshot) kubernetes.Term {
	if !s.Leads(boottime.Now()) || s.Leader == nil {
		return kubernetes.Term{}
	}
	return kubernetes.Term{Token: s.Leader.Token, StopAt: s.StopAt}
}

// adoptedToken is the token of the term that this process goes on with; 0: there is none.
func adoptedToken(a *election.Adoption) int64 {
	if a == nil || !a.Leading {
		return 0
	}
	return a.Created
}

// lookAccount returns an error if the pod's service account is needed and can't be used.
func lookAccount(cfg config.Config) error {
	if cfg.Kubernetes.Service == "" {
		return nil
	}
	if err := kubernetes.CheckAccount(kubernetes.AccountDir); err != nil {
		return &config.Error{Problems: []error{
			fmt.Errorf("%s_KUBERNETES_SERVICE: %w", config.Prefix, err),
		}}
	}
	return nil
}
