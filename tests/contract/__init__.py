"""transformers' own common tests, run over the five dialects (`make test-contract`)."""
