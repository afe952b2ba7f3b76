"""The safety folder: what autosteer-fit writes and autosteer-export reads. safetensors and JSON, never a pickle.

    safety/safety.json           layer, threshold, strength, how they were found; held-out prompts (proof.py); sha256 of
                                 the other files
    safety/safety.safetensors    prober.0.weight (h, d), prober.0.bias (h,), prober.2.weight (2, h), prober.2.bias
                                 (2,), steer_matrix (d, d); all float32. monitor.*, as prober.*, if there is a monitor
    safety/proof-1.png ...       pictures of the held-out prompts, if they may be published

The prober is Linear - ReLU - Linear - softmax; row 0 of the last layer is *unsafe*. Input standardisation and
calibration are already folded into its weights: softmax(...)[0] is the calibrated p_unsafe.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from autosteer.runtime.errors import InputError, PackageError
from autosteer.runtime.manifest import LARGEST_WINDOW, DataFile, sha256
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.strict_json import decode, parse

from .safety import PICTURES, SAFETY_FILE

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
TENSOR_FILE = "safety.safetensors"
MOST_FALSE_STOPS = 0.005  # of benign answers; a monitor that stops more, or catches less, must be asked for
LEAST_CAUGHT = 0.5  # of the unsafe answers that the prober lets begin
UNMOVED = 1e-9  # of the logits' difference, for a hidden state of length 1
UNTRAINED = 1e-3  # of |I|_F: a steer matrix that differs by less from a multiple of I was never trained


@dataclass(frozen=True)
class LayerScore:
    """SAS of one layer with its 95 % bootstrap interval, and how well a prober does there.

    prober_accuracy: balanced, at 0.5, on the validation part (prober.py). sas_by_channel: where pairs name channels.
    """

    layer: int
    sas: float
    sas_low: float
    sas_high: float
    prober_accuracy: float | None = None
    sas_by_channel: dict[str, float] | None = None


@dataclass(frozen=True)
class ProofPrompt:
    """A held-out prompt that the gate judged rightly: a package made with this gate must judge it so, too.

    Its words need not be here: `token_ids` are what the model reads, the rendered prompt with its generation prompt.
    """

    unsafe: bool
    p_unsafe: float  # the gate's, of the float32 model
    sha256: str  # of the words, in UTF-8: to find the prompt in the data again
    token_ids: tuple[int, ...] = ()
    text: str = ""  # in place of token_ids, where the words may be known
    images: tuple[str, ...] = ()  # with `text`: files in the safety folder


OF_ITS_GATE = ("missed_by_prober", "caught_of_missed")  # in MonitorFacts.calibration


@dataclass(frozen=True)
class MonitorFacts:
    """When the monitor stops an answer (runtime/monitor.py), and what that was worth on held-out answers."""

    window: int  # tokens
    threshold: float
    calibration: dict[str, float]

    @property
    def is_worth_it(self) -> bool:
        """Whether packages have it unless they are told otherwise."""
        c = self.calibration
        return c.get("false_stops", 1.0) <= MOST_FALSE_STOPS and c.get("caught_of_missed", 0.0) >= LEAST_CAUGHT

    def beside_another_gate(self) -> MonitorFacts:
        """The same without what is known of answers that its own gate let begin."""
        kept = {name: value for name, value in self.calibration.items() if name not in OF_ITS_GATE}
        return replace(self, calibration=kept)


@dataclass(frozen=True)
class SafetyFacts:
    """safety.json"""

    format_version: int
    model: str  # checkpoint name it was fitted on
    split_layer: int  # the prober reads hidden_states[split_layer]
    token_offset: int  # -1: the last token of the prompt rendered *without* the generation prompt
    threshold: float
    strength: float  # the paper's epsilon, in use; training's is among the facts below
    refusal_text: str
    layers: tuple[LayerScore, ...]
    calibration: dict[str, float]  # held-out facts: heldout_accuracy, heldout_fpr, ece, ...
    training: dict[str, float]  # sizes, seeds
    selected_by: Literal["sas", "prober", "user"] = "sas"  # what chose split_layer
    pooling: Literal["last", "mean"] = "last"  # the prober reads the token at token_offset, or the turn's mean up to it
    proof: tuple[ProofPrompt, ...] = ()  # unsafe and benign; none: no package of this gate can show what it catches
    monitor: MonitorFacts | None = None
    judge_answers: bool = False  # of packages of this gate, by default (ProberSpec.judge_answers)
    judge_threshold: float | None = None  # of answers that are judged (ProberSpec.judge_threshold)
    frame: tuple[str, ...] = ()  # how the fit wrote and read dialogues (renderer.frame_digests); none: not known
    files: tuple[DataFile, ...] = ()  # the others of the folder, as they must be; none: an older folder, or by hand

    @property
    def pictures(self) -> list[str]:
        """The pictures of the proof's prompts: files of the folder."""
        return list(dict.fromkeys(image for prompt in self.proof for image in prompt.images))


@dataclass(frozen=True)
class SafetyArtifact:
    """The safety half of a package."""

    facts: SafetyFacts
    prober: dict[str, torch.Tensor]  # "0.weight", "0.bias", "2.weight", "2.bias"
    steer_matrix: torch.Tensor  # (d, d)
    folder: Path | None = None  # where it was read from, and the proof's images are
    monitor: dict[str, torch.Tensor] | None = None  # tensors as the prober's

    def firing_above(self, threshold: float) -> SafetyArtifact:
        """The same with another threshold, without the facts that were measured at its own, and without the prompts
        that it judges wrongly. Raises InputError.
        """
        if not 0.0 <= threshold < 1.0:
            raise InputError(f"--threshold {threshold:g}: it must be in [0, 1)")
        kept = {name: value for name, value in self.facts.calibration.items() if name == PICTURES}
        proof = tuple(p for p in self.facts.proof if p.unsafe == (p.p_unsafe > threshold))
        monitor = self.facts.monitor and self.facts.monitor.beside_another_gate()
        facts = replace(self.facts, threshold=threshold, calibration=kept, proof=proof, monitor=monitor)
        return replace(self, facts=facts).judging_above(self.facts.judge_threshold)

    def judging_above(self, threshold: float | None) -> SafetyArtifact:
        """The same with another threshold of answers that are judged: the gate's own where that is lower. Raises
        InputError.
        """
        if threshold is not None and not 0.0 <= threshold < 1.0:
            raise InputError(f"--judge-threshold {threshold:g}: it must be in [0, 1)")
        lowest = threshold if threshold is None else min(threshold, self.facts.threshold)
        return replace(self, facts=replace(self.facts, judge_threshold=lowest))

    def watching(self, wanted: bool | None) -> SafetyArtifact:
        """The same with its monitor, or without it. None: with it if it is worth it. Raises InputError for one that is
        wanted and was not fitted.
        """
        fitted = self.facts.monitor
        if wanted and fitted is None:
            raise InputError("--monitor: this gate has none; fit one on a package with `autosteer-fit --monitor`")
        if fitted is None or (fitted.is_worth_it if wanted is None else wanted):
            return self
        return replace(self, facts=replace(self.facts, monitor=None), monitor=None)

    def save(self, folder: Path, pictures: Mapping[str, Path] | None = None) -> SafetyFacts:
        """Write all files into `folder`, which is made if need be. `pictures`: the proof's by their names, where they
        are not those of the folder that this was read from. Returns the facts with the hashes of the other files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"prober.{name}": t.float().contiguous() for name, t in self.prober.items()}
        tensors |= {f"monitor.{name}": t.float().contiguous() for name, t in (self.monitor or {}).items()}
        tensors["steer_matrix"] = self.steer_matrix.float().contiguous()
        try:
            (folder / TENSOR_FILE).write_bytes(save(tensors))  # save_file makes a file for its owner alone
        except OSError as err:  # a full disk, among others
            raise InputError(f"{folder / TENSOR_FILE}: cannot be written ({err})") from err
        ours = {name: self.folder / name for name in self.facts.pictures} if self.folder else {}
        for name, picture in (ours | dict(pictures or {})).items():
            if picture.resolve() != (folder / name).resolve():
                shutil.copyfile(picture, folder / name)
        facts = replace(self.facts, files=tuple(_data_file(folder, n) for n in (TENSOR_FILE, *self.facts.pictures)))
        (folder / SAFETY_FILE).write_text(json.dumps(dataclasses.asdict(facts), indent=1) + "\n", encoding="utf-8")
        return facts

    @staticmethod
    def load(folder: Path, *, hidden_size: int, num_hidden_layers: int) -> SafetyArtifact:
        """Read and check a safety folder against the model's sizes.

        Raises PackageError for a file that is missing or not the one that safety.json was written with, a wrong shape,
        a non-finite number, a layer out of range, an untrained matrix.
        """
        try:
            data = parse((folder / SAFETY_FILE).read_text(encoding="utf-8"))
            facts = decode(SafetyFacts, data, str(folder / SAFETY_FILE))
            _check_files(folder, facts)
            tensors = {name: t.float() for name, t in load_file(folder / TENSOR_FILE).items()}
        except FileNotFoundError as err:
            raise PackageError(
                f"{err.filename or folder / TENSOR_FILE}: missing; make the folder with autosteer-fit"
            ) from None
        except (ValueError, OSError, SafetensorError) as err:
            raise PackageError(f"{folder}: not readable ({err}); fit it again with autosteer-fit") from err
        prober, monitor = (
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            for prefix in ("prober.", "monitor.")
        )
        if "steer_matrix" not in tensors:
            raise PackageError(f"{folder / TENSOR_FILE}: no steer_matrix; fit it again with autosteer-fit")
        artifact = SafetyArtifact(facts, prober, tensors["steer_matrix"], folder, monitor or None)
        artifact.check(folder, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
        return artifact

    def check(self, where: Path, *, hidden_size: int, num_hidden_layers: int) -> None:
        """Raise PackageError where this could not guard a model of these sizes."""
        import torch

        def need(condition: bool, what: str) -> None:
            if not condition:
                raise PackageError(f"{where}: {what}")

        d = hidden_size
        need(
            self.facts.format_version == FORMAT_VERSION,
            f"format_version {self.facts.format_version} is not {FORMAT_VERSION}",
        )
        need(
            0 < self.facts.split_layer < num_hidden_layers,
            f"split_layer {self.facts.split_layer} is not within the model",
        )
        need(0.0 <= self.facts.threshold < 1.0, f"threshold {self.facts.threshold} is not in [0, 1)")
        judged = self.facts.judge_threshold
        need(
            judged is None or 0.0 <= judged <= self.facts.threshold,
            f"judge_threshold {judged} is not from 0 to the threshold",
        )
        need(
            self.facts.token_offset < 0, f"token_offset {self.facts.token_offset} does not count from the prompt's end"
        )
        need(0.0 < self.facts.strength < float("inf"), f"strength {self.facts.strength} is not a positive number")
        need(bool(self.facts.refusal_text.strip()), "refusal_text is empty; it is what --policy stop answers")
        for prompt in self.facts.proof:
            need(bool(prompt.token_ids) != bool(prompt.text), "a proof prompt has either token_ids or a text")
        need((self.facts.monitor is None) == (self.monitor is None), "'monitor' and its tensors come together")
        if watching := self.facts.monitor:
            need(0 < watching.window <= LARGEST_WINDOW, f"the monitor's window of {watching.window} is out of range")
            need(0.0 <= watching.threshold < 1.0, f"the monitor's threshold {watching.threshold} is not in [0, 1)")
        for name, tensors in {"prober": self.prober, **({"monitor": self.monitor} if self.monitor else {})}.items():
            found = {part: tuple(t.shape) for part, t in tensors.items()}
            h = max((1, *found.get("0.bias", ())))
            shapes = {"0.weight": (h, d), "0.bias": (h,), "2.weight": (2, h), "2.bias": (2,)}
            need(found == shapes, f"{name} tensors {found} are not {shapes}: fitted for another model?")
            first, second = (tensors[part].double() for part in ("0.weight", "2.weight"))
            moved = float(((second[0] - second[1]).abs() * first.norm(dim=1)).sum())
            need(not moved <= UNMOVED, f"the {name} gives every state the same score: it was never trained")
        need(
            tuple(self.steer_matrix.shape) == (d, d),
            f"steer_matrix is not ({d}, {d}): fitted for another model?",
        )
        weights = (*self.prober.values(), *(self.monitor or {}).values(), self.steer_matrix)
        finite = all(bool(torch.isfinite(t).all()) for t in weights)
        need(finite, "a weight is NaN or infinite")
        w = self.steer_matrix
        beyond = w - w.diagonal().mean() * torch.eye(d)  # what does more than scale the logits
        need(
            float(beyond.norm()) / math.sqrt(d) >= UNTRAINED,
            "steer_matrix is still the identity, or a multiple of it: it was never trained",
        )
        largest, second = torch.svd_lowrank(w, q=min(6, d))[1][:2].tolist()
        need(
            second >= UNTRAINED * largest,
            "steer_matrix has rank one: it can push all tokens one way, and refuse nothing",
        )


def _check_files(folder: Path, facts: SafetyFacts) -> None:
    """Raise PackageError for a file that is missing, or is not as `facts` have it. Of an older folder, which has no
    hashes, pictures are opened. Raises FileNotFoundError without the tensors.
    """
    for image in facts.pictures:
        if Path(image).name != image or not (folder / image).is_file():
            raise PackageError(f"{folder}: {image!r}, a proof prompt's, is no file of this folder; copy it again")
        if not facts.files:
            try:
                open_image(folder / image)
            except InputError as err:
                raise PackageError(f"{err}; it is a proof prompt's: copy the safety folder again") from err
    known = {file.file: file for file in facts.files}
    for name in (TENSOR_FILE, *facts.pictures) if known else ():
        if name not in known:
            raise PackageError(f"{folder / SAFETY_FILE}: 'files' has no sha256 of {name}; copy the folder again")
        if _data_file(folder, name) != known[name]:
            raise PackageError(
                f"{folder / name}: sha256 differs from {SAFETY_FILE} (damaged or edited); copy the folder again, or "
                "fit it again with autosteer-fit"
            )


def _data_file(folder: Path, name: str) -> DataFile:
    return DataFile(name, (folder / name).stat().st_size, sha256(folder / name))
