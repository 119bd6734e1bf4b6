"""Recipes and what they need: data, losses, the loop, runs on disk. Nothing here prints."""
