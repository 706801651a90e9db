// K8s-1.20 is what Kubernetes 1.20 makes of our manifests, from that release's own libraries.
//
//	k8s-1.20 render DIR    what `kubectl kustomize DIR` of that release prints
//	k8s-1.20 decode <YAML  says which objects and fields that release does not know
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/cli-runtime/pkg/kustomize"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/kustomize/pkg/fs"
)

func main() {
	err := errors.New("wrong usage: render DIR, or decode")
	switch args := os.Args[1:]; {
	case len(args) == 2 && args[0] == "render":
		err = kustomize.RunKustomizeBuild(os.Stdout, fs.MakeRealFS(), args[1])
	case len(args) == 1 && args[0] == "decode":
		err = decode(os.Stdin)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func decode(in io.Reader) error {
	text, err := io.ReadAll(in)
	if err != nil {
		return err
	}
	decoder := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme,
		json.SerializerOptions{Yaml: true, Strict: true})
	var faults []error
	objects := 0
	for document := range bytes.SplitSeq(text, []byte("\n---\n")) {
		if len(bytes.TrimSpace(document)) == 0 {
			continue
		}
		if _, _, err := decoder.Decode(document, nil, nil); err != nil {
			faults = append(faults, err)
		}
		objects++
	}
	if objects == 0 {
		faults = append(faults, errors.New("there is no object"))
	}
	return errors.Join(faults...)
}
