"""From files, or the built-in world, to packed batches: documents, sequences, rows, Grain."""
