"""Fit the safety half: SAS chooses a layer, the prober scores it, the Refusal Head bends the answer (autosteer-fit)."""
