"""What the user reads: the plan, the progress, the scores, the closing summary, and the trackers that keep them."""
