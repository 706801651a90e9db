package simetcd

import (
	_ "unsafe" // for go:linkname

	_ "go.etcd.io/etcd/client/v3"
)

// valCtxCh is the Done channel of the contexts in which etcd's client watches. It is made when the
// program starts, outside all bubbles, and is never closed. A goroutine that waits for it would
// stop the time of a bubble. nil says the same: such a context has no end of its own.
//
//go:linkname valCtxCh go.etcd.io/etcd/client/v3.valCtxCh
var valCtxCh chan struct{}

func init() { valCtxCh = nil }
