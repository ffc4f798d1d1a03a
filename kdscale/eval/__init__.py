"""Evaluation: zero-shot classification and, per benchmark, scores one can trust."""
