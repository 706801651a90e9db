//go:build linux

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// piece is how much memory hoard takes at a time.
const piece = 32 << 20

// spacious is how much memory must be free for huge pages.
const spacious = 2 << 30

// hoard takes memory while it wants more, says "full" on standard output, and goes on touching
// all of it, so that it stays wanted. If the kernel runs out of memory, this process is the one
// to kill; but it gives memory back while it has too much.
func hoard(more func(have, untouched int64) bool, tooMuch func() bool) {
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0) // always allowed
	var (
		hands  sync.WaitGroup
		mu     sync.Mutex
		have   int64
		busy   int64 // of that, not yet touched
		pieces [][]byte
	)
	take := func() []byte {
		mu.Lock()
		defer mu.Unlock()
		if !more(have, busy) {
			return nil
		}
		p, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return nil
		}
		if available() > spacious { // else making room for them takes longer than they spare
			_ = unix.Madvise(p, unix.MADV_HUGEPAGE) // where there are such
		}
		have, busy = have+piece, busy+piece
		pieces = append(pieces, p)
		return p
	}
	// Each of them waits where a virtual machine gets its memory from its host.
	for range 8 {
		hands.Go(func() {
			for p := take(); p != nil; p = take() {
				touch(p)
				mu.Lock()
				busy -= piece
				mu.Unlock()
			}
		})
	}
	hands.Wait()
	fmt.Println("full")
	for i := 0; ; i++ {
		if n := len(pieces); n > 0 && tooMuch() {
			_ = unix.Munmap(pieces[n-1]) // nobody else unmaps it
			pieces = pieces[:n-1]
		} else if n > 0 {
			touch(pieces[i%n])
		}
		time.Sleep(time.Millisecond) // the machine is to be short of memory, not of CPU
	}
}

func touch(p []byte) {
	for i := 0; i < len(p); i += os.Getpagesize() {
		p[i]++
	}
}

// available is what the kernel thinks it can give to programs, in bytes.
func available() int64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if rest, found := strings.CutPrefix(line, "MemAvailable:"); found {
			number := strings.TrimSuffix(strings.TrimSpace(rest), " kB")
			kib, _ := strconv.ParseInt(number, 10, 64) // 0 is nothing left
			return kib << 10
		}
	}
	return 0
}
