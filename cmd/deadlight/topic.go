package main

import "github.com/spf13/cobra"

// newPolicyTopic is `deadlight help policy`: the language in one screen.
func newPolicyTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "policy",
		Short: "The policy language in one screen",
		Long:  policyLanguage,
	}
}

const policyLanguage = `The policy language, in one screen. A key that is not here is an error; one value
may stand wherever a list may. configs/reference.toml has every key with its default.

  version = 1
  include = ["conf.d/*.toml"]     more tables; a table there with override = true
                                  replaces one of the same name
[default]   input = "drop" | "reject"           what an unlisted port does
            published = "drop" | "ignore"       ports that containers publish
            output = "accept" | "drop" | "reject"   else [egress.*] lists what may leave
            forward = "ignore" | "drop"         what is routed through this host
            established = "recheck" | "keep"    closing a port ends its flows, or not
            enforce = true | false              false: count and log, drop nothing
[open.NAME] ports = [80, "6000-6010"]           or service = ["http", "metrics"]
            protocol = ["tcp", "udp"]           sctp; esp ah gre vrrp or a number
                                                (no ports); "any": everything
            from = ["10.0.0.0/8", "192.0.2.1-192.0.2.9", "@admins"]
            except = ["10.6.6.6"]               not from these
            to = ["198.51.100.4"]               only this address of the host
            interfaces = ["eth0", "wg*"]        by name, one * at the end
            family = "ipv4" | "ipv6"
            rate = { limit = "10/minute", burst = 5, per = "source" | "rule" }
            connections = 20                    at once, a source (IPv6: a /64)
            expires = 2027-01-31T00:00:00Z      closes by itself
            log = true   comment = "why"   override = true
[block.NAME]   wins over every open. As [open.*] without rate and connections;
            without ports, service and protocol it means everything.
            from except to ports service protocol interfaces family
            expires log comment override
[egress.NAME]  used unless output is accept: ports service protocol to
            interfaces family expires log comment override, and
            user = "name"   group = "name"      of the process
[set.NAME]  addresses = ["198.51.100.7"]   files = ["lists/*.txt"]
            optional = true  a missing file is a warning   override = true
[service.NAME] ports = [9100]   protocol = "tcp"   override = true
[published] interfaces = ["docker0", "br-*", "podman*", "cni*"]
[icmp]      echo = true | false | { limit = "10/second", burst = 20, per = "source" }
[dhcp]      client = true | false | ["eth0"]
[log]       dropped = false | true | { limit = "5/second", burst = 20 }
            prefix = "deadlight"   group = 0    nflog; without: the kernel log
            knocks = true | false               count what is dropped by port and source
[failsafe]  ports service protocol from interfaces    what the boot lock-down admits
[verify]    vantage = "netns" | "ssh://user@host"   thorough = 1
[[expect]]  from = "198.51.100.9"   to   in   port = "5432/tcp"
            state = "open" | "filtered" | "rejected"  a test; check proves it
`
