package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Counter is what a named counter has counted.
type Counter struct{ Packets, Bytes uint64 }

// Counters reads the named counters of a table. A table that is not there has
// none.
func (c *Conn) Counters(table string) (map[string]Counter, error) {
	out := map[string]Counter{}
	ask := attr32(attrString(nil, unix.NFTA_OBJ_TABLE, table), unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_COUNTER)
	err := c.dump(unix.NFT_MSG_GETOBJ, ask, func(r reply) error {
		var name string
		var typ uint32
		var n Counter
		for t, v := range attributes(r.attrs) {
			switch t {
			case unix.NFTA_OBJ_NAME:
				name = cString(v)
			case unix.NFTA_OBJ_TYPE:
				typ = be32(v)
			case unix.NFTA_OBJ_DATA:
				for t, v := range attributes(v) {
					switch {
					case len(v) != 8:
					case t == unix.NFTA_COUNTER_PACKETS:
						n.Packets = binary.BigEndian.Uint64(v)
					case t == unix.NFTA_COUNTER_BYTES:
						n.Bytes = binary.BigEndian.Uint64(v)
					}
				}
			}
		}
		if typ == unix.NFT_OBJECT_COUNTER {
			out[name] = n
		}
		return nil
	})
	if errors.Is(err, errTorn) {
		err = nil // every counter stands for itself
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("read the counters: %w", err)
	}
	return out, nil
}
