"""From a command to ranks: preflight, devices, the deepspeed launcher, hosts and what is wrong with them."""
