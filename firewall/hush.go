package firewall

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// While anybody on the machine listens for nftables events, in whatever network
// namespace, the kernel makes a message of every element of a transaction: a
// million prefixes then take ten times as long, and some 10 GB until the commit.
// A watch of ours therefore stops listening while many elements are loaded.

// manyElements is how many in one transaction make it worth it.
const manyElements = 50_000

// hushed calls send, quietly if it is a matter of many elements.
func (c *Conn) hushed(msgs []message, send func() error) error {
	many := 0
	for _, m := range msgs {
		many += m.many
	}
	if c.Hush == nil || many < manyElements {
		return send()
	}
	done, err := c.Hush(many)
	if err != nil {
		return err
	}
	return errors.Join(send(), done())
}

// Listener is a process that listens for nftables events.
type Listener struct {
	PID  int // the netlink port, which is the process for all who did not choose one
	Comm string
}

// Listeners lists who listens for nftables events in the network namespace of the
// calling thread; those in other namespaces cannot be seen.
func Listeners() ([]Listener, error) {
	f, err := os.Open("/proc/thread-self/net/netlink")
	if err != nil {
		return nil, fmt.Errorf("list netlink sockets: %w", err)
	}
	defer f.Close()
	var out []Listener
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// sk Eth Pid Groups …: netlink_native_seq_show, net/netlink/af_netlink.c.
		w := strings.Fields(lines.Text())
		if len(w) < 4 || w[1] != strconv.Itoa(unix.NETLINK_NETFILTER) {
			continue
		}
		groups, err := strconv.ParseUint(w[3], 16, 32)
		if err != nil || groups&(1<<(unix.NFNLGRP_NFTABLES-1)) == 0 {
			continue
		}
		pid, err := strconv.Atoi(w[2])
		if err != nil {
			continue
		}
		comm, _ := os.ReadFile(filepath.Join("/proc", w[2], "comm")) // it may have ended, or not be ours to see
		out = append(out, Listener{pid, strings.TrimSpace(string(comm))})
	}
	return out, lines.Err()
}

const hushName = "hush"

// Hush asks a watch that uses this state to stop listening, until done is called
// or the process ends.
func (s *State) Hush() (done func() error, err error) {
	f, err := s.hushFile(unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	return f.Close, nil
}

// Hushed reports whether somebody asks for it.
func (s *State) Hushed() (bool, error) {
	if _, err := stat(filepath.Join(s.dir, hushName)); errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	f, err := s.hushFile(unix.LOCK_SH | unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, f.Close()
}

func (s *State) hushFile(how int) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(s.dir, hushName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, s.failed(hushName, err)
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(s.failed(hushName, err), f.Close())
	}
	return f, nil
}
