// Package suggest finds what a misspelt word most likely stands for.
package suggest

import (
	"strings"
)

// maxWord bounds a word, since the time that Nearest takes grows with its length.
const maxWord = 100

// Nearest returns the candidate that a misspelt word most likely stands for, or "".
func Nearest(word string, candidates []string) string {
	if len(word) > maxWord {
		return ""
	}
	limit := max(2, len(word)/3)
	if len(word) < 3 {
		limit = 1 // at a distance of two it would be nearly any short word
	}
	best, least := "", 2*limit+2
	for _, candidate := range candidates {
		// Of two at the same distance, take the one that contains the word. Take that one even if
		// the distance is large, as for GRACE or CA_FILE.
		rank := 2*distance(word, candidate) + 1
		holds := strings.Contains(candidate, word) || strings.Contains(word, candidate)
		if len(word) >= 4 && holds {
			rank = min(rank-1, 2*limit+1)
		}
		if rank < least {
			best, least = candidate, rank
		}
	}
	return best
}

// distance is how many letters one has to insert, delete, replace or swap with their neighbour to
// turn b into a.
func distance(a, b string) int {
	var before []int
	last := make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			row[j] = min(last[j], row[j-1]) + 1
			if a[i-1] == b[j-1] {
				row[j] = min(row[j], last[j-1])
			} else {
				row[j] = min(row[j], last[j-1]+1)
			}
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
