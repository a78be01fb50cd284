package verify

import (
	"context"
	"errors"
	"net/netip"
)

var (
	ErrLocalTarget = errors.New("x")
	ErrPermission  = errors.New("y")
)

func Sweep(ctx context.Context, cfg Config) (*Result, error) { return nil, errors.New("stub") }
func ResolveLink(dst netip.Addr) (Link, netip.Addr, error) {
	return Link{}, netip.Addr{}, errors.New("stub")
}
