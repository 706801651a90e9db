//go:build linux

// Package check computes what the lives of a job's processes say: when the job of a term could
// run, when the jobs of two terms could, and when none could. It judges nothing: which overlap is
// a fault, and which downtime is too long, is for the caller to say.
package check
