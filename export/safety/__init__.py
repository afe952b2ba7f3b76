"""Fit a safety gate (autosteer-fit): SAS chooses a layer, the prober scores prompts, the Refusal Head steers."""

SAFETY_FILE = "safety.json"  # a folder with this file is a safety folder
REFUSAL_TEXT = "I'm sorry, but I can't assist with that."  # default; the paper's
DEFAULT_THRESHOLD = 0.5
DROPOUT = 0.5  # share of the prober's inputs; no loss on known data, 0.03 more AUC on prompts of another kind
DROPOUT_USED = "dropout"  # among SafetyFacts.training: with what the prober was trained
PICTURES = "prompts_with_pictures"  # among SafetyFacts.calibration: of the prompts that the gate was fitted on
