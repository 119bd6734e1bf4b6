"""Ways to adapt a model other than by low-rank terms: each a config, a builder and a `Piece`."""
