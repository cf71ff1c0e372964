"""Versions of a model: deltas with one column per fact, manifests, HEAD, and the weights they stand for."""
