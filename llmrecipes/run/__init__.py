"""Floor 3: one function a command; the only place that knows data and models."""
