"""Shards and their manifests, the order of the samples, and the stream that trains on them."""
