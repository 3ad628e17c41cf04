"""NextStep-1 (arXiv 2508.10711) in JAX and Flax.

A causal transformer reads text tokens and continuous image tokens in one sequence; a language
head predicts the text, and a small flow-matching head samples each image token. The rooms:
`models` (networks), `flow` (flow matching on plain arrays), `data`, `training`, `sampling`,
`parallel`, `interop` (published weights) and `evaluation`. Importing the package imports none of
them, so it is cheap and leaves jax unconfigured.
"""

__version__ = "0.1.0"
