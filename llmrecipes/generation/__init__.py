"""Prompts to answers: what the model is asked with, and how its tokens become text again."""
