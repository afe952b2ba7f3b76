"""Medians, ratios and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from operator import itemgetter
from statistics import median
from typing import Any

from autosteer.runtime.console import table

from .machine import Machine
from .session import Measured

Round = dict[str, Any]


def prefill_tok_s(r: Round) -> float:
    """Prompt tokens per second of the time to the first token, image encoding left out."""
    seconds = (float(r["ttft_ms"]) - float(r.get("stages", {}).get("vision", 0.0))) / 1000
    return int(r["prompt_tokens"]) / seconds


def first_tokens_per_s(r: Round) -> float:
    """How many first tokens a second takes: pictures, prompt and all."""
    return 1000 / float(r["ttft_ms"])


def decode_tok_s(r: Round) -> float:
    """Tokens per second after the first."""
    return 1000 * (len(r["token_ids"]) - 1) / float(r["decode_ms"])


def gate_share(r: Round) -> float:
    """Prober and decision, as a part of the time to the first token."""
    return float(r["stages"]["gate"]) / float(r["ttft_ms"])


def steering_cost(r: Round) -> float:
    """How much longer a steered step takes than a plain one, as a part of it."""
    return decode_tok_s(r) / decode_tok_s(r["steered"]) - 1


def stop_share(r: Round) -> float:
    """A stopped prompt's time to its refusal, as a part of a passed prompt's time to its first token."""
    return float(r["stopped"]["ttft_ms"]) / float(r["ttft_ms"])


def row(measured: Measured, dims: tuple[int, int, int], machine: Machine) -> dict[str, Any]:
    """The JSON object of one configuration. `dims`: layers, key-value heads, head size."""
    rounds, facts, weights = measured.rounds, measured.facts, measured.configuration.weights

    def middle(value: Callable[[Round], float]) -> float:
        return median(map(value, rounds))

    layers, kv_heads, head_dim = dims
    length = middle(lambda r: r["prompt_tokens"] + len(r["token_ids"]) / 2)
    kv_bytes = 2 * layers * kv_heads * head_dim * facts["kv_itemsize"] * length
    out: dict[str, Any] = {
        "configuration": measured.configuration.name,
        "path": str(measured.configuration.path),
        "versions": facts["versions"],
        "settings": facts["settings"],
        "weights": weights and weights.describe(),
        "block_size": weights and weights.body.block_size,
        "bits": weights and weights.body.bits,
        "prompt_tokens": round(middle(lambda r: r["prompt_tokens"])),
        "tokens": round(middle(lambda r: len(r["token_ids"]))),
        "prefill_tok_s": middle(prefill_tok_s),
        "decode_tok_s": middle(decode_tok_s),
        "ttft_ms": middle(lambda r: r["ttft_ms"]),
        "peak_rss_mb": measured.memory["peak_rss_mb"],
        "private_rss_mb": measured.memory["private_rss_mb"],
        "import_rss_mb": facts["import_rss_mb"],
        "load_ms": facts["load_ms"],
        "cold_start_ms": median(measured.cold_start_ms) if measured.cold_start_ms else None,
    }
    if weights:
        out["bytes_per_token"] = round(weights.bytes_per_token + kv_bytes)
        out["read_gb_s"] = out["bytes_per_token"] * out["decode_tok_s"] / 1e9
        out["of_read_bandwidth"] = out["read_gb_s"] / machine.read_gb_s
    if "stages" in rounds[0]:
        stages = {f"{name}_ms": median(r["stages"][name] or 0.0 for r in rounds) for name in rounds[0]["stages"]}
        counts = [name for name in ("kv_mb", "image_tiles", "accepted_tokens") if name in rounds[0]]
        out |= stages | {name: middle(itemgetter(name)) for name in counts}
    if "steered" in rounds[0]:
        out |= {
            "gate_share_of_ttft": middle(gate_share),
            "steered_decode_tok_s": middle(lambda r: decode_tok_s(r["steered"])),
            "steering_cost": middle(steering_cost),
            "stop_ttft_ms": middle(lambda r: r["stopped"]["ttft_ms"]),
            "stop_share_of_ttft": middle(stop_share),
        }
    return out


def ratios(first: Measured, other: Measured) -> dict[str, Any]:
    """The first configuration over another, round by round: medians, and the worst and best round."""
    pairs = list(zip(first.rounds, other.rounds, strict=True))
    out: dict[str, Any] = {"of": first.configuration.name, "to": other.configuration.name}
    for name, value in (("first_token", first_tokens_per_s), ("prefill", prefill_tok_s), ("decode", decode_tok_s)):
        found = sorted(value(a) / value(b) for a, b in pairs)
        out |= {name: median(found), f"{name}_worst": found[0], f"{name}_best": found[-1]}
    out["same_tokens"] = median(_common(a["token_ids"], b["token_ids"]) for a, b in pairs)
    return out


def _common(a: list[int], b: list[int]) -> int:
    """Tokens from the start that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def text(
    machine: Machine, workload: dict[str, Any], rows: Sequence[dict[str, Any]], compared: Sequence[dict[str, Any]]
) -> str:
    """The report for people: Markdown."""
    speed = [
        (
            r["configuration"],
            f"{r['prefill_tok_s']:.0f}",
            f"{r['decode_tok_s']:.1f}",
            f"{r['ttft_ms']:.0f}",
            f"{r['peak_rss_mb']:.0f}",
            "" if r["cold_start_ms"] is None else f"{r['cold_start_ms'] / 1000:.2f}",
            f"{r['bytes_per_token'] / 1e6:.0f}" if "bytes_per_token" in r else "",
            f"{100 * r['of_read_bandwidth']:.0f}" if "bytes_per_token" in r else "",
        )
        for r in rows
    ]
    header = ("configuration", "prefill tok/s", "decode tok/s", "first token, ms", "peak RSS, MB", "cold start, s")
    parts = [_setting(machine, workload, rows[0]), table((*header, "MB a token", "% of read speed"), speed)]
    if compared:
        cells = [
            (
                f"{c['of']} / {c['to']}",
                *(
                    f"{c[what]:.2f} ({c[f'{what}_worst']:.2f}-{c[f'{what}_best']:.2f})"
                    for what in ("first_token", "prefill", "decode")
                ),
                f"{c['same_tokens']:.0f}",
            )
            for c in compared
        ]
        ratio = "ratio of speeds, median (worst-best round)"
        parts.append(table((ratio, "first token", "prefill", "decode", "same first tokens"), cells))
    if staged := [r for r in rows if "vision_ms" in r]:
        names = [key for key in staged[0] if key in ("vision_ms", "embed_ms", "lower_ms", "gate_ms", "upper_ms")]
        cells = [
            (r["configuration"], f"{r['ttft_ms']:.1f}", *(f"{r[n]:.2f}" if n in r else "" for n in names))
            for r in staged
        ]
        parts.append(table(("first token by stage, ms", "all", *(n.removesuffix("_ms") for n in names)), cells))
    if gated := [r for r in rows if "steering_cost" in r]:
        cells = [
            (
                r["configuration"],
                f"{100 * r['gate_share_of_ttft']:.2f} %",
                f"{100 * r['steering_cost']:.1f} %",
                f"{r['stop_share_of_ttft']:.2f}x",
            )
            for r in gated
        ]
        parts.append(table(("the gate", "of first token", "of a steered step", "a stop's first answer"), cells))
    parts.append(
        "\n".join(f"{r['configuration']}: {r['weights'] or 'as named'}; {r['settings']}; {_versions(r)}" for r in rows)
    )
    return "\n\n".join(parts)


def _setting(machine: Machine, workload: dict[str, Any], r: dict[str, Any]) -> str:
    """Everything that a number is meaningless without."""
    others = workload["others_cpu_share"]
    return "\n".join(
        [
            f"{workload['date']}: {workload['command']}",
            f"{machine.cpu}, {machine.cores} cores ({', '.join(machine.features)}), {machine.memory_gib} GiB read at "
            f"{machine.read_gb_s} GB/s; {machine.system}; Python {machine.python}",
            f"{r['prompt_tokens']} + {r['tokens']} tokens, {workload['threads']} threads, medians of "
            f"{workload['rounds']} rounds in {workload['seconds']:.0f} s"
            + ("" if others is None else f"; other processes took {100 * others:.0f} % of the processor"),
        ]
    )


def _versions(r: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in r["versions"].items())


def as_json(
    machine: Machine,
    workload: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    compared: Sequence[dict[str, Any]],
    missing: Sequence[str],
) -> dict[str, Any]:
    """The report for programs."""
    return {
        "machine": asdict(machine),
        "workload": workload,
        "configurations": list(rows),
        "ratios": list(compared),
        "missing": list(missing),
    }
