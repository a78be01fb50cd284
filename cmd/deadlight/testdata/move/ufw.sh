sudo deadlight import --from ufw | sudo tee /etc/deadlight/policy.toml
deadlight check && sudo deadlight plan
sudo deadlight apply --confirm 5m --no-wait
sudo deadlight verify && sudo deadlight confirm
sudo systemctl enable --now deadlight
for c in INPUT OUTPUT FORWARD; do sudo iptables -P $c ACCEPT; sudo ip6tables -P $c ACCEPT; done
sudo ufw disable
sudo deadlight verify
