"""Fit the safety half: SAS chooses a layer, the prober scores it, the Refusal Head bends the answer (autosteer-fit)."""

SAFETY_FILE = "safety.json"  # what makes a folder a safety folder
