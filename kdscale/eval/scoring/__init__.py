"""Scoring rules of the benchmarks, one file per family; `kdscale.eval.score` puts them together."""
