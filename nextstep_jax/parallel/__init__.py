"""Meshes, sharding rules and compilation ahead of time."""
