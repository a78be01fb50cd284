// Package importer turns the rules of other firewalls (iptables-save, ufw,
// nft -j, firewalld) into a policy.
//
// It promises that the policy admits no flow that the original denied, but for what
// it lists as wider (denials by reverse path, routing header, fragment or TCP flags,
// "recent" lists that become a rate) and for what only SYN was admitted to, which is
// open to every new flow. What it cannot prove to be admitted it leaves out, and
// lists. Every format becomes chains of rules; [walk] follows each packet set through
// them and keeps only what certainly arrives; what a policy can say of that is
// written down.
//
// It reads files, starts nothing and asks no kernel.
package importer
