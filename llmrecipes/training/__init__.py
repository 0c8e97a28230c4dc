"""Floor 2: the loss, the optimizer step and the loop."""
