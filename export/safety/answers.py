"""Generate greedy answers with the Refusal Head, at several strengths side by side."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autosteer.export.checkpoint.decoder_config import kv_bytes_per_token
from autosteer.export.checkpoint.hf_model import cache_argument, placed

from .batches import encode, sweep_groups, waiting_bytes
from .model import Encoded, FitModel, cache_after
from .pairs import Prompt
from .states import Advance


@dataclass(frozen=True)
class SteeredAnswer:
    """Greedy tokens, with the end-of-turn token if it was generated."""

    ids: list[int]
    log_probs: list[float]  # of each token under the unsteered model: how natural the answer is


def steered_answers(
    fit_model: FitModel,
    prompts: Sequence[Prompt],
    steer_matrix: torch.Tensor,
    lm_head: torch.Tensor,
    strengths: Sequence[float],
    *,
    tokens: int,
    advance: Advance = lambda done: None,
) -> list[list[SteeredAnswer]]:
    """Greedy answers of at most `tokens` tokens to each prompt at each strength: [prompt][strength].

    Prefill runs once per prompt, and the strengths are one batch of decode steps. All prompts share each sweep over the
    model. steer_matrix (d, d), lm_head (vocab, d), which are on the model's device.
    """
    model, device, end = fit_model.hf_model.base_model, fit_model.device, fit_model.end_token
    matrix, epsilon = steer_matrix.to(device), torch.tensor(strengths, device=device)[:, None]

    @torch.inference_mode()
    def answer(inputs: Encoded) -> list[SteeredAnswer]:
        prompt = {key: t.to(device) for key, t in inputs.items()}
        places = placed(model, prompt)
        out = model(**prompt, **places, use_cache=True)
        cache = {cache_argument(model): cache_after(out.past_key_values, keep=True)}
        hidden = out.last_hidden_state[:, -1].expand(len(strengths), -1)
        ids, log_probs = [], []
        for step in range(tokens):
            token = ((hidden + epsilon * hidden @ matrix.T) @ lm_head.T).argmax(dim=-1, keepdim=True)
            ids.append(token)
            log_probs.append((hidden @ lm_head.T).log_softmax(dim=-1).gather(1, token))
            advance(1 / tokens)
            if bool((torch.cat(ids, dim=1) == end).any(dim=1).all()) or step + 1 == tokens:
                break
            places = {name: at.amax().expand(3, len(token), 1) + 1 for name, at in places.items()}
            hidden = model(input_ids=token, use_cache=True, **places, **cache).last_hidden_state[:, -1]
        advance(1 - len(ids) / tokens)
        rows = zip(torch.cat(ids, dim=1).tolist(), torch.cat(log_probs, dim=1).tolist(), strict=True)
        return [_up_to(end, row, scores) for row, scores in rows]

    answers: list[list[SteeredAnswer]] = []
    encoded = (encode(fit_model, prompt, generation=True) for prompt in prompts)
    for group in sweep_groups(
        encoded, lambda inputs: waiting_bytes(fit_model, inputs) + _cache_bytes(fit_model, inputs)
    ):
        answers += fit_model.sweep.run([functools.partial(answer, inputs) for inputs in group])
    return answers


def _cache_bytes(fit_model: FitModel, inputs: Encoded) -> int:
    """Bytes of a prompt's keys and values."""
    config = fit_model.decoder
    per_token = kv_bytes_per_token(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    return inputs["input_ids"].numel() * per_token


def _up_to(end: int, ids: list[int], log_probs: list[float]) -> SteeredAnswer:
    length = ids.index(end) + 1 if end in ids else len(ids)
    return SteeredAnswer(ids[:length], log_probs[:length])
