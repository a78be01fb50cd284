package firewall

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Namespace identifies a network namespace. Inode numbers are used again when a
// namespace is gone, cookies are not until the next boot (SO_NETNS_COOKIE,
// Linux 5.14).
type Namespace struct {
	Dev    uint64 `json:"dev"`
	Inode  uint64 `json:"inode"`
	Cookie uint64 `json:"cookie"`
	Boot   string `json:"boot"` // /proc/sys/kernel/random/boot_id
}

// Is reports whether both are the same namespace of the same boot.
func (n Namespace) Is(o Namespace) bool { return n == o }

// Gone reports whether n ended with its boot: the host has been started again
// since.
func (n Namespace) Gone(now Namespace) bool { return n.Boot != now.Boot }

// Heir reports whether o, of the same boot, has the number of n but is another:
// n has ended.
func (n Namespace) Heir(o Namespace) bool {
	return n.Boot == o.Boot && n.Dev == o.Dev && n.Inode == o.Inode && n.Cookie != o.Cookie
}

// Namespace identifies the network namespace of the socket.
func (c *Conn) Namespace() (Namespace, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(c.ns.Fd()), &st); err != nil {
		return Namespace{}, fmt.Errorf("identify the network namespace: %w", err)
	}
	cookie, err := unix.GetsockoptUint64(c.fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return Namespace{}, fmt.Errorf("identify the network namespace: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Namespace{}, fmt.Errorf("identify the boot: %w", err)
	}
	return Namespace{Dev: uint64(st.Dev), Inode: st.Ino, Cookie: cookie, Boot: strings.TrimSpace(string(boot))}, nil
}

// StateDir is where the state of the calling thread's network namespace is kept:
// /var/lib/deadlight for that of PID 1, else a directory that ends with the boot,
// as the namespace does. Where that cannot be told it is taken for another one:
// the state of the host must not be lost to a container.
func StateDir() (string, error) {
	const host = "/var/lib/deadlight"
	own, err := stat("/proc/thread-self/ns/net")
	if err != nil {
		return "", fmt.Errorf("identify the network namespace: %w", err)
	}
	elsewhere := fmt.Sprintf("/run/deadlight/netns-%d", own.Ino)
	first, err := stat("/proc/1/ns/net")
	switch {
	case err == nil && first.Dev == own.Dev && first.Ino == own.Ino:
		return host, nil
	case err == nil:
		return elsewhere, nil
	case !errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("identify the network namespace of PID 1: %w", err)
	}
	// Not allowed to look: a service or a container without CAP_SYS_PTRACE. The
	// kernel's first namespace is the host's, and this setting is there alone
	// (net_core_table, net/core/sysctl_net_core.c).
	if _, err := stat("/proc/sys/net/core/netdev_max_backlog"); err == nil {
		return host, nil
	}
	return elsewhere, nil
}
