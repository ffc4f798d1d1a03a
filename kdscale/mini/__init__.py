"""The miniature world: drawn scenes with captions, written in the formats of the real data."""
