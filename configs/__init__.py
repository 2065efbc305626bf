"""The presets as data: model dialects in models/*.json, training recipes in recipes/*.yaml."""
