"""The networks: parameters and forward passes, without I/O, training or a policy on randomness."""
