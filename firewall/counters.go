package firewall

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Counter is what a named counter has counted.
type Counter struct{ Packets, Bytes uint64 }

// Counters reads the named counters of a table of family inet, by name; of a
// table that is not there, none. Errors to test for: [ErrPermission].
func (c *Conn) Counters(table string) (map[string]Counter, error) {
	const tries = 10
	err := errTorn
	var out map[string]Counter
	for i := 0; i < tries && err == errTorn; i++ {
		out = map[string]Counter{}
		q := attr32(attrString(nil, unix.NFTA_OBJ_TABLE, table), unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_COUNTER)
		err = c.dump(unix.NFT_MSG_GETOBJ, q, func(r reply) error {
			if attrText(r.attrs, unix.NFTA_OBJ_TABLE) != table || attrNumber(r.attrs, unix.NFTA_OBJ_TYPE) != unix.NFT_OBJECT_COUNTER {
				return nil
			}
			data := attrOf(r.attrs, unix.NFTA_OBJ_DATA)
			out[attrText(r.attrs, unix.NFTA_OBJ_NAME)] = Counter{
				Packets: value64(attrOf(data, unix.NFTA_COUNTER_PACKETS)), Bytes: value64(attrOf(data, unix.NFTA_COUNTER_BYTES)),
			}
			return nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("read the counters: %w", err)
	}
	return out, nil
}
