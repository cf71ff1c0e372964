"""Measurements of the engine: one module per `kbsync bench` command; a value first, then a table and a plot."""
