"""Floor 2: faster parts of a model, each equal to the plain one."""
