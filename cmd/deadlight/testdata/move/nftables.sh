sudo nft -j list ruleset | deadlight import - | sudo tee /etc/deadlight/policy.toml
deadlight check && sudo deadlight plan
sudo deadlight apply --confirm 5m --no-wait
sudo deadlight verify && sudo deadlight confirm
sudo systemctl enable --now deadlight
sudo systemctl mask nftables
sudo systemctl stop nftables
sudo nft delete table inet filter
sudo deadlight verify
