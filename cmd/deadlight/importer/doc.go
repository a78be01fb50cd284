// Package importer turns the rules of other firewalls (iptables-save, ufw,
// nft -j, firewalld) into a policy.
//
// It promises that the policy admits no flow that the original denied: what it
// cannot prove to be admitted it leaves out, and lists. Every format becomes
// chains of rules; [walk] follows each packet set through them and keeps only
// what certainly arrives; what a policy can say of that is written down.
//
// It reads files, starts nothing and asks no kernel.
package importer
