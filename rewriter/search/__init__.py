"""Cost table, problem, solvers, refinement."""
