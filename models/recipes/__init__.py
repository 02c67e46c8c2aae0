"""Recipes: one module per model, each with NAME, ABOUT, INPUT_SETS and build(directory)."""
