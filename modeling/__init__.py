"""Configuration and model, in flat files that travel to the Hub as remote code: they import only torch,
transformers and each other. `loading.py` and `accounting.py` stay behind, for the package's own tools."""
