"""What moves, as data: drags, tracks, flow maps. Knows nothing of models."""
