"""Image files, files written whole, and the bytes of checkpoints."""
