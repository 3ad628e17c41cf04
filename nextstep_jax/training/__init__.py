"""Losses, optimizer, state, step and loop, with their checkpoints and metrics."""
