"""autosteer-eval: measure what a gate catches, misses and wrongly refuses. Not needed to run a package."""
