// Package k8s holds the test that needs a Kubernetes cluster: `make e2e-k8s` runs it against that
// of the current kubectl context, in a namespace of its own which it deletes at the end; those of
// runs that were killed, if they are more than six hours old, it deletes at the start. It needs
// kubectl, and docker, podman or buildah for the images.
//
//	IMAGE   leasehold's image, made by `make image` and known to the nodes by that name
//	        (localhost/leasehold)
//	LOAD    a command that brings an image to the nodes, such as `kind load docker-image` or
//	        `docker push`; it is asked for each image. Unset: for contexts of kind and minikube
//	        it is known, elsewhere the nodes are taken to share this machine's images
//
// tools/k8s checks the same manifests without a cluster.
package k8s
