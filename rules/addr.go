package rules

import (
	"net/netip"
)

// Prefix gives the prefix that covers exactly the range, if there is one.
func (r AddrRange) Prefix() (netip.Prefix, bool) {
	lo, hi := r.Lo.AsSlice(), r.Hi.AsSlice()
	bits := 0
	for i := range lo {
		d := lo[i] ^ hi[i]
		if d == 0 {
			bits += 8
			continue
		}
		for m := byte(0x80); m&d == 0; m >>= 1 {
			bits++
		}
		break
	}
	p := netip.PrefixFrom(r.Lo, bits)
	if p.Masked().Addr() != r.Lo || lastAddr(p) != r.Hi {
		return netip.Prefix{}, false
	}
	return p, true
}
