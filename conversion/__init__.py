"""Other formats of configurations, read as Tessera's own."""
