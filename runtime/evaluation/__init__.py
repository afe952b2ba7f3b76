"""What a gate catches, misses and wrongly refuses (autosteer-eval). Not needed to run a package."""
