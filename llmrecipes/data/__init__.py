"""Data: files to rows, rows to checked samples, samples to batches."""
