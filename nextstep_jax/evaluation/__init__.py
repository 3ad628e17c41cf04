"""What judges a model: image metrics, benchmark layouts, and the checker of the built-in world."""
