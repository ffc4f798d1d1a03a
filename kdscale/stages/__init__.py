"""Stages: pure functions with a content key, run on Ray workers."""
