"""Analyses of finished models: representation similarity and the uncertainty of scores."""
