"""The commands, one file for each stage: names, flags and help. The work is done in the stage's folder."""
