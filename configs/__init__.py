"""Presets as JSON files, and finding the configuration that a user means."""
