"""The world of the demo checkpoint: generated pictures, questions, and an invented stand-in for harm.

    scenes.py      pictures: shapes, objects and signs; what is drawn where
    dialogues.py   ordinary questions with exact answers; small talk
    safety.py      the rule that makes a prompt unsafe; matched pairs; benign look-alikes; what is held out
    asking.py      the same requests in other words
    wording.py     any question mistyped, in quotes, among other questions
    wishes.py      requests that are no questions, and lists of them
    together.py    several pictures, several turns
    smalltalk.py   greetings, asides, questions about the world
    corpus.py      the training rows of the language model
    fit_pairs.py   pairs of these for the fit of the gate
    strangers.py, typed.py    what people typed, to judge by
    tiling.py      pictures to pixel values, as the Hugging Face processor does
    packing.py     rows to tensors (torch)
    checkpoint.py  tokenizer, processor, fresh model (torch, transformers)

The model is unaligned on purpose: it answers everything. "Unsafe" means a few made-up words, objects and signs, and the
answers hold nothing harmful, but the structure is that of the real problem: harm in the text, in the picture, or only
in the two together, each with harmless look-alikes, and answers that open alike whether harmless or not.
"""
