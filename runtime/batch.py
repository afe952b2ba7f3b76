"""Several answers decoded together: one pass of the decoder gives each its next token. For a server.

A pass reads all weights, whatever it computes. For four answers it takes about one and a half times as long as for one.

    batch = Batch(manifest, graphs, device, rows)
    answers = [engine.steps(prompt, sampling, record, conversation, batch) for ...]
    ... advance each until it pauses (yields None) or ends ...
    batch.run()                                              # then advance them again

Each request reads its prompt by itself. Once it decodes beside others, its caches are a row of arrays that all share:

    by layer, key and value   (rows, H, capacity, d)   row i: the i-th request's; GroupQueryAttention takes the first B
    decoder halves            (B, 1, D)                rows of any length (seqlens_k), but of one new position each
    embed_tokens, the heads   (1, B, D)                the same bytes

So drafts are verified only while a request decodes alone. All rows read the same rotary tables: a model whose pictures
have rows and columns (rotary.py) takes one answer at a time. Rows do not mix: each has its own length and strength, and
NaN stays in its row. If a pass fails, each request is run by itself, and fails by itself. When a request leaves, its
caches go with it, the last row takes its place, and after the last request the arrays are freed.

Not thread-safe: one thread advances all answers. On the CPU only, where the arrays are the caches' memory.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Mapping, Sequence

import numpy as np

from .arrays import Float
from .generation import HALVES, Request, unmasked
from .kv_cache import Arrays, KVCache, empty_arrays
from .manifest import Manifest
from .rotary import RotaryTables
from .subgraph import Call, Device, Subgraph, buffer

log = logging.getLogger(__name__)

FIRST = np.zeros((3, 1), np.int64)  # position of the first row; all others follow


class Batch:
    """The requests that decode together."""

    def __init__(self, manifest: Manifest, graphs: Mapping[str, Subgraph], device: Device, rows: int):
        """`rows`: the most requests that share a pass; further ones are run by themselves. More than one needs a
        package and a device that `can_share`.
        """
        self._manifest, self._graphs, self._device, self._rows = manifest, graphs, device, rows
        self._asked: dict[Request, Sequence[int]] = {}  # tokens of the requests that wait for `run`
        self._given: dict[Request, Float | Exception] = {}  # what it gave them
        self._seated: list[Request] = []  # by row
        self._arrays: dict[str, Arrays] = {}  # by decoder half; for `_rows` requests, once there are two
        self._rotary: RotaryTables | None = None  # as long as the arrays
        self._passes: dict[int, SharedPass] = {}  # by number of requests

    @property
    def bytes(self) -> int:
        """Size of the shared caches. Pages that no request has written take no memory."""
        return sum(array.nbytes for arrays in self._arrays.values() for array in arrays.values())

    def decode(self, request: Request, tokens: Sequence[int]) -> Generator[None, None, Float]:
        """`Request.verify_draft`, after a pause in which `run` must be called.

        Beside others only tokens[0] is run: logits (1, V).
        """
        self._asked[request] = tokens
        try:
            yield
            given = self._given.pop(request)
        finally:
            self._asked.pop(request, None)
        if isinstance(given, Exception):
            raise given
        return given

    def run(self) -> None:
        """One pass for every request that waits. Raises nothing: an error is raised where its request waits."""
        self._given.clear()
        if len(self._asked) > 1:
            self._run_together()
        for request, tokens in self._asked.items():
            if request not in self._given:
                self._given[request] = _run_alone(request, tokens)

    def leave(self, request: Request) -> None:
        """Give a request its own caches back; it decodes no more. Call it before anything else gets them."""
        if request not in self._seated:
            return
        try:
            request.move(request.empty_caches())
        finally:
            row, last = self._seated.index(request), self._seated.pop()
            if last is not request:
                self._seated[row] = last
                last.move(self._row(row))
            if not self._seated:
                self._arrays, self._rotary = {}, None
                self._passes.clear()

    def _run_together(self) -> None:
        """Requests that get nothing here are to be run by themselves."""
        for request in self._asked:
            if request not in self._seated and len(self._seated) < self._rows:
                with contextlib.suppress(MemoryError):  # no room for it beside the others
                    self._seat(request)
        try:
            rows = [(request, self._asked[request][:1]) for request in self._seated]
            for request, tokens in rows:
                request.require_room(len(tokens))
            shared = self._pass(len(rows))
            logits = shared.run(rows)
        except Exception as err:  # whose fault it is shows when each is run by itself
            log.warning("a pass for %d requests failed, so each is run by itself: %s", len(self._seated), err)
            return
        for (request, tokens), row, hidden in zip(rows, logits, shared.hidden, strict=True):
            request.ran(tokens, row[None], lambda state=hidden: state)  # type: ignore[misc]
            self._given[request] = row[None]

    def _seat(self, request: Request) -> None:
        """Move a request's caches into the next row. The arrays double when they are too short, up to the context."""
        held = self._capacity()
        if request.capacity > held:
            manifest = self._manifest
            capacity = max(request.capacity, min(2 * held, manifest.dims.context_length))
            arrays = {
                half: empty_arrays(manifest.graphs[half], manifest.dims, manifest.kv_cache, capacity, self._rows)
                for half in HALVES
            }
            rotary = RotaryTables(manifest.rotary, FIRST, capacity, manifest.activations, self._device)
            self._arrays, self._rotary = arrays, rotary  # only now: without memory for both, all stays as it was
            self._passes.clear()
            for row, seated in enumerate(self._seated):
                seated.move(self._row(row))
        request.move(self._row(len(self._seated)))
        self._seated.append(request)

    def _capacity(self) -> int:
        return next(iter(self._arrays["decoder_lower"].values())).shape[2] if self._arrays else 0

    def _row(self, row: int) -> dict[str, Arrays]:
        return {half: {name: a[row : row + 1] for name, a in arrays.items()} for half, arrays in self._arrays.items()}

    def _pass(self, count: int) -> SharedPass:
        if count not in self._passes:
            caches = {
                half: KVCache({name: array[:count] for name, array in arrays.items()}, self._device)
                for half, arrays in self._arrays.items()
            }
            assert self._rotary is not None
            self._passes[count] = SharedPass(self._manifest, self._graphs, self._device, caches, self._rotary, count)
        return self._passes[count]


class SharedPass:
    """The whole decoder on one token of each of B requests, with every buffer bound once."""

    def __init__(
        self,
        manifest: Manifest,
        graphs: Mapping[str, Subgraph],
        device: Device,
        caches: Mapping[str, KVCache],
        rotary: RotaryTables,
        count: int,
    ):
        """`caches`: of B = `count` rows, by decoder half. `rotary`: as long as they are."""
        width, dtype = manifest.dims.hidden_size, np.dtype(manifest.activations)
        self._tokens = np.zeros((1, count), np.int64)
        self._lengths, self._total = np.zeros(count, np.int32), np.zeros((), np.int32)
        embeds, self.hidden, last = (np.zeros((count, 1, width), dtype) for _ in range(3))
        self._last, self._steered, self._chosen = (
            last.reshape(1, count, width),
            *(np.zeros((1, count, width), dtype) for _ in range(2)),
        )
        self._rotary, self._strength = rotary, np.zeros(1, np.float32)
        self._logits: Float = np.zeros((1, count, manifest.dims.vocab_size), np.float32)

        def bind(name: str, inputs: Arrays, outputs: Arrays, *, more: Arrays | None = None) -> Call:
            ins, outs = ({n: buffer(a, device) for n, a in side.items()} for side in (inputs, outputs))
            if name not in caches:
                return graphs[name].bind(ins, outs)
            lengths = {"seqlens_k": self._lengths, "total_sequence_length": self._total, **(more or {})}
            ins |= {n: buffer(a, device) for n, a in lengths.items()} | rotary.inputs
            ins, outs = {**ins, **caches[name].past}, {**outs, **caches[name].present}
            if name == "decoder_lower" and manifest.reads_in_packs:
                total = self._total  # not self: a cycle would keep the caches in memory
                return graphs[name].bind(ins, outs, lambda: unmasked(1, int(total)))
            return graphs[name].bind(ins, outs)

        self._decoder = (
            bind("embed_tokens", {"input_ids": self._tokens}, {"inputs_embeds": embeds.reshape(1, count, width)}),
            bind("decoder_lower", {"inputs_embeds": embeds}, {"hidden_states": self.hidden}),
            bind(
                "decoder_upper",
                {"hidden_states": self.hidden},
                {"last_hidden_state": last},
                more={"num_logits": np.ones(1, np.int64)},
            ),
        )
        self._steer = (
            bind(
                "refusal_head",
                {"last_hidden_state": self._last, "strength": self._strength},
                {"steered_hidden_state": self._steered},
            )
            if manifest.guarded
            else None
        )
        self._head = bind("lm_head", {"last_hidden_state": self._chosen}, {"logits": self._logits})

    def run(self, rows: Sequence[tuple[Request, Sequence[int]]]) -> Float:
        """Logits (B, V) of what follows each request's token. Valid until the next pass."""
        self._tokens[0] = [token for _, (token,) in rows]
        self._lengths[:] = [request.length for request, _ in rows]  # one less than with the token
        self._total[...] = 1 + self._lengths.max()
        self._rotary.extend(int(self._total))
        for graph in self._decoder:
            graph()
        self._chosen[:] = self._last
        strengths = [request.steered_by for request, _ in rows]
        for strength in dict.fromkeys(s for s in strengths if s is not None):
            assert self._steer is not None
            self._strength[0] = strength
            self._steer()
            steered = [row for row, own in enumerate(strengths) if own == strength]
            self._chosen[:, steered] = self._steered[:, steered]
        self._head()
        logits: Float = self._logits[0]
        return logits


def can_share(manifest: Manifest, device: Device) -> bool:
    """Whether several answers can be decoded together."""
    alike = not manifest.rotary.axes and not manifest.rotary.long  # they share one table
    return alike and not manifest.deepstack and device.kind == "cpu"


def _run_alone(request: Request, tokens: Sequence[int]) -> Float | Exception:
    """`Request.verify_draft`, or what it raised."""
    try:
        return request.verify_draft(tokens)
    except Exception as err:
        return err
