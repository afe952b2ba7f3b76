"""What every model must hold of the single frames of a video."""

from __future__ import annotations

import numpy as np

from autosteer.runtime.prompt_encoder import PromptEncoder
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import Message, VideoPart


def check_single_frames(encoder: PromptEncoder, video: VideoPart, at_a_time: int) -> int:
    """A frame is laid out as if it were a video of its own, and nothing is encoded again. How many were as large there.

    (For some models the number of frames decides how large each of them is.)
    """
    seen, alike = encoder.prepare([Message("user", (video, "look"))], Stats()).seen, 0
    found, frames = [*encoder.single_frames(video, seen)], list[object]()
    for part, one in found:
        frames += part.frames
        said = [Message("user", (part, "look"))]
        ours, theirs = encoder.prepare_seen(said, [one], Stats()), encoder.prepare(said, Stats())
        assert len(part.frames) <= at_a_time and (one.first, one.tiles, ours.shown[0].video) == (0, 0, True)
        if one.grid != theirs.seen[0].grid:
            continue
        alike, end = alike + 1, len(ours.keys)
        assert end == theirs.probed[-1][-1] + 1 and ours.probed == theirs.probed
        np.testing.assert_array_equal(ours.positions, theirs.positions[:, :end])
        np.testing.assert_allclose(ours.inputs_embeds, theirs.inputs_embeds[:, :end], rtol=1e-4, atol=1e-4)
        assert ours.deepstack.keys() == theirs.deepstack.keys()
        for place, rows in ours.deepstack.items():
            np.testing.assert_allclose(rows, theirs.deepstack[place], rtol=1e-4, atol=1e-4)
        in_words = [key for key in ours.keys if isinstance(key, int)]
        assert in_words == [key for key in theirs.keys[:end] if isinstance(key, int)]
    assert len({one.key for _, one in found}) == len(found)
    assert not found or [*map(id, frames)] == [*map(id, video.frames)]
    assert bool(found) == (len(video.frames) > at_a_time)
    return alike
