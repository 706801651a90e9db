//go:build !unix

package health

// openFiles is how many files this process may have open at once.
func openFiles() uint64 { return 256 }
