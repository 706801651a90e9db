//go:build !simruntime

package sim

// Deterministic reports whether the same seed gives the same run, byte for byte.
const Deterministic = false

// seedRuntime does nothing: Go's own runtime chooses at random and can't be seeded.
func seedRuntime(uint64) {}
