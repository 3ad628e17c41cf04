"""Meshes over the devices, and the sharding rules of parameters and batches."""
