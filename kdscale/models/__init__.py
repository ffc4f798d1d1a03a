"""Image-text towers: building, weights, inputs, and the layers that must not depend on workers."""
