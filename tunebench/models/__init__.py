"""The models: families, presets, checkpoints, and what a built model is read back as."""
