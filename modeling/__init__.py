"""Configuration and model. Flat files that import only torch, transformers and each other: this folder
travels to the Hub as remote code, so nothing in it may need the rest of the package."""
