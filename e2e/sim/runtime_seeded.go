//go:build simruntime

package sim

import _ "unsafe" // for go:linkname

// Deterministic reports whether the same seed gives the same run, byte for byte.
const Deterministic = true

// seedRuntime seeds what Go's runtime chooses at random in a bubble. It is in the runtime as
// e2e/cmd/sim compiles it.
//
//go:linkname seedRuntime
func seedRuntime(seed uint64)
