"""Recipes, roles, keys, storage and errors: everything that needs neither torch nor Ray."""
