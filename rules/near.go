package rules

import "strings"

// nearest gives the word that was probably meant, or "". It stops guessing in a
// file so full of errors that guessing would take long.
func (r *reader) nearest(got string, words []string) string {
	r.guesses -= len(words)
	if r.guesses < 0 || len(got) > 64 {
		return ""
	}
	best, least := "", 3
	for _, w := range words {
		d := distance(strings.ToLower(got), strings.ToLower(w), least+1)
		// The first letter is seldom the wrong one.
		if (d < least || d == least && best != "" && best[0] != got[0] && w[0] == got[0]) && d < max(len(w), len(got))/2+1 {
			best, least = w, d
		}
	}
	return best
}

// distance counts the letters to add, drop, change or swap with a neighbour to
// turn a into b. It stops short of a result that cannot be below limit.
func distance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	var older []int
	old := make([]int, len(b)+1)
	for j := range old {
		old[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := old[j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			row[j] = min(old[j]+1, row[j-1]+1, change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], older[j-2]+1)
			}
		}
		older, old = old, row
	}
	return old[len(b)]
}
