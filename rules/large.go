package rules

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// Large sets are not read back: the kernel lists an interval set in quadratic
// time, minutes for a million elements. A rule that is never reached says instead
// what was loaded, in its comment: unlike the comment of a set it can be replaced
// in the transaction that changes the elements.

// LargeSet is the number of ranges above which a list, and each set that holds a
// part of it, is large.
const LargeSet = 16384

// Large reports whether a set is marked with its digest rather than read back.
func (s *Set) Large() bool {
	return (s.Type == TypeIPv4 || s.Type == TypeIPv6) && s.Targets == nil && !s.Meter && s.OfList() > LargeSet
}

// Digest gives 32 hexadecimal digits that tell the content of a set: its type,
// whether it holds ranges, and its elements.
func (s *Set) Digest() string {
	const full = 64 << 10
	sum := sha256.New()
	b := make([]byte, 0, full+1024)
	flush := func(limit int) {
		if len(b) >= limit {
			sum.Write(b)
			b = b[:0]
		}
	}
	text := func(t string) {
		b = binary.BigEndian.AppendUint32(b, uint32(len(t)))
		b = append(b, t...)
	}
	interval := byte(0)
	if s.Interval {
		interval = 1
	}
	b = append(b, byte(s.Type), interval)
	b = binary.BigEndian.AppendUint64(b, uint64(s.Len()))
	for _, r := range s.Addrs.v4 {
		b = binary.BigEndian.AppendUint64(b, r)
		flush(full)
	}
	for _, r := range s.Addrs.v6 {
		for _, n := range [...]uint64{r.lo.high, r.lo.low, r.hi.high, r.hi.low} {
			b = binary.BigEndian.AppendUint64(b, n)
		}
		flush(full)
	}
	for _, p := range s.Ports {
		b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, p.Lo), p.Hi)
		flush(full)
	}
	for _, n := range s.Names {
		text(n)
		flush(full)
	}
	for _, n := range s.Codes {
		b = binary.BigEndian.AppendUint32(b, n)
		flush(full)
	}
	for _, t := range s.Targets {
		text(t)
		flush(full)
	}
	flush(0)
	return hex.EncodeToString(sum.Sum(nil)[:16])
}

// ChainApplied is the chain of the marks, see [ParseMark].
const ChainApplied = "applied"

// marks gives the chain that says what large sets hold, or none without them.
// Nothing jumps there.
func marks(sets []Set) []Chain {
	ch := Chain{Name: ChainApplied}
	for i := range sets {
		if s := &sets[i]; s.Large() {
			ch.Rules = append(ch.Rules, line(fmt.Sprintf("%s %d elements %s", s.Name, s.Len(), s.Digest()), Verdict{Kind: VerdictReturn}))
		}
	}
	if len(ch.Rules) == 0 {
		return nil
	}
	return []Chain{ch}
}

// ParseMark reads the comment of a rule of the chain "applied": the name of a
// set, [Set.Len] and [Set.Digest] of what was loaded into it.
func ParseMark(comment string) (set string, n int, digest string, ok bool) {
	f := strings.Split(comment, " ")
	if len(f) != 4 || f[0] == "" || f[2] != "elements" || len(f[3]) != 32 || strings.Trim(f[3], "0123456789abcdef") != "" {
		return "", 0, "", false
	}
	n, err := strconv.Atoi(f[1])
	if err != nil || strconv.Itoa(n) != f[1] || n < 0 {
		return "", 0, "", false
	}
	return f[0], n, f[3], true
}
