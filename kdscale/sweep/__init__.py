"""Sweeps: which trials, which stages, what they cost, how they run, what came out."""
