"""Flow matching on plain arrays: paths and times, step grids, solvers, guidance."""
