"""Write a package: every graph, the weights, the tokenizer, the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from autosteer.runtime.errors import InputError, PackageError, UnsupportedModelError
from autosteer.runtime.manifest import (
    FORMAT_VERSION,
    MAX_P_UNSAFE_TOLERANCE,
    WEIGHTS_FILE,
    CacheType,
    DataFile,
    Dims,
    GraphSpec,
    ImageSpec,
    KVCacheSpec,
    Manifest,
    MonitorSpec,
    Precision,
    ProberSpec,
    PromptSpec,
    RefusalSpec,
    Source,
    Tolerance,
    VideoSpec,
    sha256,
)

from .checkpoint import chat_template as prompt
from .checkpoint.decoder_config import DecoderConfig, decoder_config
from .checkpoint.open import Checkpoint, check_generation, end_token_ids, load_processor
from .checkpoint.stated import ADVICE
from .floor import lowest_onnxruntime
from .graphs import decoder
from .graphs import gate as gate_graphs
from .graphs.calibration import calibrate_decoder, calibration_rows, image_rows, rows_for_scales
from .graphs.gptq import round_decoder, text_rows
from .graphs.image_graph import image_graph
from .graphs.kv_scales import KVScales
from .graphs.quantize import Blocks, Recipe, Scheme, Target, recipe
from .graphs.weights import Advance, WeightStore
from .graphs.writer import GraphWriter
from .safety_folder import SafetyArtifact

if TYPE_CHECKING:
    from .validation.validate import ValidationResult

Report = Callable[[str], None]
ROUNDED = "rounded"  # a folder for what --calibrate rounded, until it is written
VERSIONS = ("autosteer-edge", "torch", "transformers", "onnx-ir", "tokenizers", "pillow")


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked of autosteer-export, besides the checkpoint and the safety folder."""

    precision: Precision = "fp32"
    split_layer: int | None = None  # None: the safety folder's
    context_length: int | None = None  # None: the checkpoint's
    block_size: int | None = None  # None: the precision's
    head_bits: int | None = None  # of lm_head and embed_tokens; None: the precision's
    image_precision: Precision | None = None  # None: the precision's
    target: Target = "cpu"
    kv_cache: CacheType | None = None  # None: the target's own
    prefill: Precision | None = None  # of a second copy of the decoder, for prefill; None: no such copy
    calibration_text: str | None = None  # what int4 is rounded for (gptq.py); None: channel energy alone

    @property
    def recipe(self) -> Recipe:
        """The recipe of these options. Raises InputError if they do not go together."""
        if self.calibration_text is not None and (self.precision, self.target) != ("int4", "cpu"):
            raise InputError(f"--calibrate goes with --precision int4 (here: {self.precision}, {self.target})")
        return recipe(
            self.precision,
            target=self.target,
            caches=self.kv_cache,
            block_size=self.block_size,
            head_bits=self.head_bits,
            image=self.image_precision,
            prefill=self.prefill,
        )


def write_package(
    folder: Path,
    checkpoint: Checkpoint,
    safety: SafetyArtifact | None,
    options: ExportOptions,
    report: Report,
    advance: Advance = lambda name, numbers: None,
) -> Manifest:
    """Write every file of an unvalidated package into `folder` and return its manifest (saved there, too).

    `safety` None makes an unguarded package, which runs only with --policy off. `report` is told each step, `advance`
    the name of a tensor and how many of its numbers were written.
    """
    config = decoder_config(checkpoint, options.context_length)
    layer = _split_layer(options, safety, config)
    chosen = options.recipe
    check_generation(checkpoint)
    report("prompt template")
    processor = load_processor(checkpoint)
    pictures, videos = image_spec(checkpoint, processor), video_spec(checkpoint, processor)
    prompt_spec = _write_tokenizer(folder, checkpoint, processor, config, pictures, videos)
    store = WeightStore(folder, checkpoint, advance)
    graphs: dict[str, GraphSpec] = {}
    image_file: Path | None = None
    if checkpoint.family.vision:
        report("images")
        image = image_graph(folder, checkpoint, store, chosen.image, chosen.activations)
        image_file = folder / image.file
        graphs[image_file.stem] = image
    tokenizer = getattr(processor, "tokenizer", processor)
    observation = _Observation(checkpoint, config, chosen, tokenizer, image_file, pictures, store, report)
    kv_scales: tuple[KVScales, ...] = ()
    if chosen.int8_caches or (chosen.body and chosen.body.needs_calibration):
        kv_scales = observation.calibrate()
    if options.calibration_text is not None:
        observation.round(options.calibration_text)
    graphs |= _write_graphs(folder, chosen, safety, options.precision, config, kv_scales, layer, store, report)
    store.expect_all_read(
        *(f"{config.module}.{part}" for part in ("embed_tokens", "layers", "norm")),
        checkpoint.family.lm_head.removesuffix(".weight"),
    )
    weights_sha256 = store.close()
    shutil.rmtree(folder / ROUNDED, ignore_errors=True)
    weights = DataFile(WEIGHTS_FILE, (folder / WEIGHTS_FILE).stat().st_size, weights_sha256)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=Source(checkpoint.name, checkpoint.revision, checkpoint.family.model_type, None),
        precision=options.precision,
        guarded=safety is not None,
        split_layer=layer,
        dims=Dims(**{field.name: getattr(config, field.name) for field in fields(Dims)}),
        graphs=graphs,
        files=(weights, data_file(folder, "tokenizer.json")),
        kv_cache=KVCacheSpec(chosen.caches, "BNSH"),
        rotary=config.rotary,
        prompt=prompt_spec,
        image=pictures,
        video=videos,
        prober=_prober_spec(safety, prompt.generation_length(prompt_spec, folder)) if safety else None,
        monitor=MonitorSpec(**vars(safety.facts.monitor)) if safety and safety.facts.monitor else None,
        refusal=RefusalSpec(safety.facts.strength, safety.facts.refusal_text) if safety else None,
        golden=(),
        tolerance=Tolerance(MAX_P_UNSAFE_TOLERANCE, 0),
        proof=None,
        validation={},
        versions={name: version(name) for name in VERSIONS} | {"onnxruntime": ort.__version__},
        onnxruntime=lowest_onnxruntime(chosen, windowed=config.windowed),
    )
    manifest.save(folder)
    return manifest


def _split_layer(options: ExportOptions, safety: SafetyArtifact | None, config: DecoderConfig) -> int:
    """The first layer of decoder_upper. Raises InputError if the model has no such layer."""
    layer = options.split_layer
    if layer is None:
        layer = safety.facts.split_layer if safety else config.num_hidden_layers // 2
    if not 0 < layer < config.num_hidden_layers:
        raise InputError(f"--layer {layer}: this model can be split at 1..{config.num_hidden_layers - 1}")
    return layer


def _write_tokenizer(
    folder: Path,
    checkpoint: Checkpoint,
    processor: Any,
    config: DecoderConfig,
    pictures: ImageSpec | None,
    videos: VideoSpec | None,
) -> PromptSpec:
    """Write tokenizer.json, in which nothing that frames a prompt can be typed, and take the chat template apart."""
    framing = tuple(
        i for frame in (pictures.tile_separators if pictures else ()) for ids in frame.token_ids for i in ids
    )
    video_ids = (processor.video_token_id,) if videos else ()
    ends = end_token_ids(checkpoint)
    if beyond := [i for i in ends if i >= config.vocab_size]:
        raise PackageError(f"{checkpoint.folder}: eos_token_id {beyond[0]} is no token of {config.vocab_size}")
    prompt.save_tokenizer(processor, folder, (*config.never_generated, *framing, *video_ids))
    video_token = processor.video_token if videos else None
    group = pictures.native.frames if pictures and pictures.native else 1
    return prompt.take_apart(processor, ends, folder, video_token, group)


@dataclass(frozen=True)
class _Observation:
    """The decoder, and what it runs on before its matrices are rounded."""

    checkpoint: Checkpoint
    config: DecoderConfig
    recipe: Recipe
    tokenizer: Any
    image_file: Path | None
    pictures: ImageSpec | None
    store: WeightStore
    report: Report

    def calibrate(self) -> tuple[KVScales, ...]:
        """Observe the decoder on texts and pictures: tell `store` each channel's energy; the scales of int8 caches."""
        self.store.flush()
        rows = calibration_rows(self.checkpoint, self.tokenizer, self.image_file, self.pictures)
        if self.recipe.int8_caches:
            rows = rows_for_scales(rows, self.checkpoint, self.config.vocab_size, self.image_file, self.pictures)
        observed = calibrate_decoder(self.checkpoint, self.config, rows, self.report)
        self.store.channel_energy = observed.channel_energy
        return observed.kv_scales if self.recipe.int8_caches else ()

    def round(self, text: str) -> None:
        """Round the decoder's matrices with GPTQ, and tell `store` where they are."""
        assert isinstance(self.recipe.body, Blocks)  # int4 is
        self.store.flush()
        picture = None
        if self.image_file and self.pictures:
            picture = image_rows(self.checkpoint, self.image_file, self.pictures)
        rows = text_rows(text, self.checkpoint, self.tokenizer, picture)
        scratch = self.store.folder / ROUNDED
        scratch.mkdir()
        self.store.rounded = round_decoder(self.checkpoint, self.config, rows, self.recipe.body, scratch, self.report)


def image_spec(checkpoint: Checkpoint, processor: Any) -> ImageSpec | None:
    """The family's ImageSpec, with the frames that the processor writes; None where the model takes no images."""
    if checkpoint.family.image_spec is None:
        return None
    spec = checkpoint.family.image_spec(checkpoint.config, processor.image_processor)
    if spec.anyres and any(side % spec.tile_size for sides in spec.anyres.grid_pinpoints for side in sides):
        raise UnsupportedModelError(
            f"{checkpoint.folder / 'config.json'}: image_grid_pinpoints are no multiples of image_size, which is "
            f"{spec.tile_size}; {ADVICE}"
        )
    return replace(spec, tile_separators=prompt.image_frames(processor, spec))


def video_spec(checkpoint: Checkpoint, processor: Any) -> VideoSpec | None:
    """The family's VideoSpec; None where the model takes no videos."""
    make = checkpoint.family.video_spec
    return make(checkpoint.config, processor.video_processor) if make else None


def reads_in_packs(recipe: Recipe, config: DecoderConfig) -> bool:
    """Whether the gate can read several texts in one pass (runtime/packed.py): on the CPU, by models in which neither a
    row's place in the caches nor the length of the prompt decides anything. Only where the weights are rounded: those
    packages need onnxruntime 1.23 anyway, and GroupQueryAttention has an attention_bias since 1.22.
    """
    plain = not any(config.windows) and config.rotary.long is None and not config.deepstack
    return recipe.body is not None and recipe.activations == "float32" and plain


def _write_graphs(
    folder: Path,
    recipe: Recipe,
    safety: SafetyArtifact | None,
    precision: Precision,
    config: DecoderConfig,
    kv_scales: Sequence[KVScales],
    layer: int,
    store: WeightStore,
    report: Report,
) -> dict[str, GraphSpec]:
    """The decoder's graphs and the gate's."""
    head = recipe.head and recipe.head.fitted(config.hidden_size)
    graphs: dict[str, GraphSpec] = {}

    def write(
        name: str, fill: Callable[[GraphWriter], None], precision: Precision = precision, layers: range | None = None
    ) -> None:
        report(name)
        writer = GraphWriter(name, store, recipe.storage, recipe.activations)
        fill(writer)
        graphs[name] = writer.save(folder, precision, (layers.start, layers.stop) if layers else None)

    def write_half(name: str, layers: range, scheme: Scheme | None, precision: Precision = precision) -> None:
        masked = layers.start == 0 and safety is not None and reads_in_packs(recipe, config)

        def fill(g: GraphWriter) -> None:
            decoder.decoder_half(g, config, layers, scheme, kv_scales, masked=masked)

        write(name, fill, precision, layers)

    lower, upper = range(layer), range(layer, config.num_hidden_layers)
    write("embed_tokens", lambda g: decoder.embed_tokens(g, config, head))
    write_half("decoder_lower", lower, recipe.body)
    write_half("decoder_upper", upper, recipe.body)
    if recipe.prefill:
        write_half("prefill_lower", lower, recipe.prefill, "int8")
        write_half("prefill_upper", upper, recipe.prefill, "int8")
    write("lm_head", lambda g: decoder.lm_head(g, config, head))
    if safety:
        write("prober", lambda g: gate_graphs.prober(g, "prober", safety.prober), "fp32")
        if monitor := safety.monitor:
            write("monitor", lambda g: gate_graphs.prober(g, "monitor", monitor), "fp32")
        write("refusal_head", lambda g: gate_graphs.refusal_head(g, safety.steer_matrix), "fp32")
    return graphs


def _prober_spec(safety: SafetyArtifact, generation_tokens: int) -> ProberSpec:
    """The fit counts the token from the end of the prompt without its generation prompt; the runtime from the full
    one's.
    """
    facts = safety.facts
    return ProberSpec(
        facts.token_offset - generation_tokens,
        facts.pooling,
        facts.threshold,
        facts.calibration,
        facts.judge_answers,
        facts.judge_threshold,
    )


def data_file(folder: Path, name: str) -> DataFile:
    """The manifest's entry for a file of the package."""
    path = folder / name
    return DataFile(name, path.stat().st_size, sha256(path))


def with_results(folder: Path, manifest: Manifest, results: ValidationResult) -> Manifest:
    """Add the validation's results and their files to the manifest, and save it again."""
    files = dict.fromkeys(file for golden in results.golden for file in golden.pictures())
    if results.proof:
        files[results.proof.file] = None
    complete = replace(
        manifest,
        golden=results.golden,
        tolerance=results.tolerance,
        proof=results.proof,
        validation={"CPUExecutionProvider": results.checks},
        files=(*manifest.files, *(data_file(folder, file) for file in files)),
    )
    complete.save(folder)
    return complete


def folder_bytes(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
