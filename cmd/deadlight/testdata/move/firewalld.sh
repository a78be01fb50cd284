sudo deadlight import --from firewalld | sudo tee /etc/deadlight/policy.toml
deadlight check && sudo deadlight plan
sudo deadlight apply --confirm 5m --no-wait
sudo deadlight verify && sudo deadlight confirm
sudo systemctl enable --now deadlight
sudo systemctl disable --now firewalld
sudo deadlight verify
