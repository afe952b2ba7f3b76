"""Read the prompts that a safety gate is fitted on, and refuse bad data before anything expensive starts.

    --pairs, ours       {"unsafe": text, "safe": text, "image": path | [path] | null, "safe_image": path | [path],
                        "earlier": [user, assistant], "channel": name}
    --pairs, VLSafe     {"orig_query": unsafe text, "safe_query": safe text, "image_id": path}
    --benign, --unsafe  what autosteer-eval reads (runtime/evaluation/datasets.py); the label is that of the last turn

One JSON object per line; only the texts are required. `safe_image` defaults to `image`. `earlier` are turns before both
prompts, of which the first shows the pictures. A path is looked up beside the file and under --images. VLSafe's pairs
come without its pictures: give --images, or say --text-only. Rows of our own formats may have a "family": prompts of
one family say the same thing, and stay in one part of the split.

    --refusal-only      as --unsafe, for the Refusal Head alone: the authors train it on other prompts than the prober

`--pairs builtin` is not a file: it means the pairs and the harmless prompts that come with AutoSteer (builtin.py).
`--pairs builtin-brief` means one pair of each family, and the same harmless prompts.

Nothing here depends on the model; batches.py checks prompts against the tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from autosteer.runtime.errors import InputError
from autosteer.runtime.evaluation.datasets import DataSource, read_lines, read_rows, same_prompt
from autosteer.runtime.obfuscation import deobfuscated
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.readings import Reading, all_readings, plain_turns, with_letters_of
from autosteer.runtime.text import Message

from . import builtin
from .store import file_digest

MIN_PAIRS = 20  # below this a held-out share of a fifth is four prompts a class: no statement can be made
BUILTIN = {Path(builtin.BRIEF): builtin.brief_twins, Path(builtin.NAME): builtin.builtin_twins}

PAIR_KEYS = {"unsafe", "safe", "image", "safe_image", "earlier", "channel", "family"}
VLSAFE_KEYS = {"orig_query", "safe_query", "image_id"}


@functools.cache
def _digest_of(path: Path, changed: int) -> bytes:
    return file_digest(path)


def _picture_digest(path: Path) -> bytes:
    return _digest_of(path, path.stat().st_mtime_ns)


@dataclass(frozen=True)
class Prompt:
    """A user turn, and what comes before it. `where` (file:line) is for error messages only."""

    text: str
    images: tuple[Path, ...] = ()
    where: str = field(default="", compare=False)
    earlier: tuple[str, ...] = ()  # user, assistant, ... texts; images are shown in the first turn
    system: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of the prompt, in order."""
        return (*((self.system,) if self.system else ()), *self.earlier, self.text)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for equal prompts with equal pictures, whatever the paths of their files. Reads the image files."""
        return (self.text, self.earlier, self.system, *map(_picture_digest, self.images))

    @property
    def words_key(self) -> str:
        """Equal for prompts whose texts differ in case and white space alone, with equal pictures."""
        return " ".join([same_prompt(" ".join(self.texts)), *(_picture_digest(path).hex() for path in self.images)])

    @property
    def turns(self) -> tuple[Prompt, ...]:
        """The prompt as it stood at each of its user turns; the gate's score is the worst of theirs."""
        asked = (*self.earlier, self.text)
        return tuple(replace(self, text=asked[i], earlier=asked[:i]) for i in range(0, len(asked), 2))

    @property
    def judged(self) -> tuple[Prompt, ...]:
        """What the runtime scores (runtime/judge.py): each user turn by itself, the same in plain letters, and all
        `turns`; equal ones once.
        """
        alone = [
            replace(turn, images=() if turn.earlier else turn.images, earlier=(), system="") for turn in self.turns
        ]
        plain = [replace(turn, text=deobfuscated(turn.text)) for turn in alone]
        return tuple(reversed(dict.fromkeys(reversed((*alone, *plain, *self.turns)))))

    @property
    def pieces(self) -> tuple[tuple[Prompt, bool], ...]:
        """What the runtime reads beside the last turn where it stands (runtime/readings.py): the other forms of that
        turn, and whether what each scores is discounted. Equal ones once. Raises InputError, with its line, for a
        prompt that the runtime refuses: many words beside many pictures.
        """
        asked, answers = (*self.earlier[::2], self.text), self.earlier[1::2]
        said = [Message.user(asked[0], self.images)]
        for answer, text in zip(answers, asked[1:], strict=True):
            said += [Message.assistant(answer, trusted=True), Message.user(text)]
        said[:0] = [Message.system(self.system, trusted=True)] if self.system else []
        plain = plain_turns(said)
        in_letters = [Reading(tuple(with_letters_of(plain, said)))] if len(said) > 1 and any(plain) else []
        try:
            of_last = [one for at, one in all_readings(said, plain, pieces=True) if at == len(answers)]
        except InputError as err:
            raise InputError(f"{self.where}: {err}") from err
        found: dict[Prompt, bool] = {}
        for reading in (*in_letters, *of_last):
            prompt = self._of(reading.messages)
            found[prompt] = found.get(prompt, True) and reading.discounted
        return tuple(found.items())

    def _of(self, messages: Sequence[Message]) -> Prompt:
        """A reading of this prompt."""
        system = self.system if messages[0].role == "system" else ""
        *earlier, text = ("".join(message.texts) for message in messages[bool(system) :])
        images = tuple(Path(cast(Path, image)) for message in messages for image in message.images)
        return replace(self, text=text, earlier=tuple(earlier), images=images, system=system)


@dataclass(frozen=True)
class Pair:
    """An unsafe prompt and its harmless twin."""

    unsafe: Prompt
    safe: Prompt
    channel: str = ""  # where the harm lies: text, image, ...; SAS and recall are reported for each
    family: str = ""  # name shared by pairs in similar words; "" if unknown
    source: str = ""  # the data set: its file's name, or "builtin"


@dataclass(frozen=True)
class Labelled:
    """A prompt with its label, and the channel or group under which its result is reported."""

    prompt: Prompt
    unsafe: bool
    group: str
    family: str = ""
    source: str = ""  # the data set: its file's name, or "builtin"

    @property
    def cluster(self) -> str:
        """What must stay on one side of a split: the family or, where none is named, the text with its pictures.

        One question may be asked about a thousand pictures.
        """
        if self.family:
            return f"family {self.family}"
        return self.prompt.words_key

    @property
    def names(self) -> set[str]:
        """Its family, if it has one, and its words: two prompts with a common name say the same."""
        return {self.cluster, self.prompt.words_key}


@dataclass(frozen=True)
class FitData:
    """Everything a fit reads. `extra` is what --benign and --unsafe gave, `refusal_only` unsafe prompts that the
    prober must not see.
    """

    pairs: tuple[Pair, ...]
    extra: tuple[Labelled, ...] = ()
    refusal_only: tuple[Labelled, ...] = ()

    def labelled(self) -> list[Labelled]:
        """Every distinct prompt once, in order of appearance, with its label."""
        twins = (
            Labelled(prompt, unsafe, pair.channel, pair.family, pair.source)
            for pair in self.pairs
            for prompt, unsafe in ((pair.unsafe, True), (pair.safe, False))
        )
        distinct: dict[tuple[object, ...], Labelled] = {}
        for item in (*twins, *self.extra):
            distinct.setdefault(item.prompt.identity, item)
        return list(distinct.values())

    def images(self) -> dict[Path, str]:
        """Every distinct image file, and the first row that shows it (file:line)."""
        items = (*self.labelled(), *self.refusal_only)
        return {path: item.prompt.where for item in reversed(items) for path in item.prompt.images}


def read_data(
    pairs: Sequence[Path],
    benign: Sequence[Path] = (),
    unsafe: Sequence[Path] = (),
    refusal_only: Sequence[Path] = (),
    *,
    images: Path | None = None,
    text_only: bool = False,
) -> FitData:
    """Read and cross-check the files. Path("builtin") or Path("builtin-brief") among `pairs` is not read but stands for
    what builtin.py makes. `text_only` leaves out all pictures.

    Raises InputError for an unreadable line, a missing field or image file, fewer than MIN_PAIRS pairs, or one prompt
    that is called both safe and unsafe.
    """
    files = [path for path in pairs if path not in BUILTIN]
    shipped = set(pairs) & set(BUILTIN)
    ours = [Path(builtin.NAME)] if shipped else []
    _reject_names_given_twice([*ours, *files, *benign, *unsafe, *refusal_only])
    if len(shipped) > 1:
        raise InputError(f"--pairs: give either {builtin.NAME} or {builtin.BRIEF}; the first includes the second")
    read = [
        *(pair for name in shipped for pair in _builtin_pairs(BUILTIN[name]())),
        *(pair for path in files for pair in _pairs(path, images, text_only=text_only)),
    ]
    data = FitData(
        pairs=tuple({(pair.unsafe.identity, pair.safe.identity): pair for pair in reversed(read)}.values())[::-1],
        extra=(
            *(_builtin_harmless() if shipped else ()),
            *(
                item
                for paths, label in ((benign, False), (unsafe, True))
                for path in paths
                for item in _labelled(path, images, unsafe=label, text_only=text_only)
            ),
        ),
        refusal_only=tuple(
            item for path in refusal_only for item in _labelled(path, images, unsafe=True, text_only=text_only)
        ),
    )
    if len(data.pairs) < MIN_PAIRS:
        raise InputError(f"--pairs: {len(data.pairs)} pairs, at least {MIN_PAIRS} are needed; add rows")
    _reject_contradictions(data)
    return data


def read_external(
    files: Iterable[Path], *, unsafe: bool, images: Path | None = None, text_only: bool = False
) -> list[Labelled]:
    """Prompts for the report only: rows as in --benign and --unsafe, each file a data set. Raises InputError."""
    files = list(files)
    _reject_names_given_twice(files)
    rows = [item for path in files for item in _labelled(path, images, unsafe=unsafe, text_only=text_only)]
    return [replace(item, group=item.source) for item in rows]


def never_fitted(external: Iterable[Labelled], data: FitData) -> list[Labelled]:
    """The prompts that are not among the fit's, in these words, nor of their families."""
    fitted = {name for item in (*data.labelled(), *data.refusal_only) for name in item.names}
    return [item for item in external if not fitted & item.names]


def check_images(data: FitData, *, advance: Callable[[int], None] = lambda done: None) -> None:
    """Decode every image once, as the runtime does. Raises InputError, with its row, for one that cannot be read."""
    for path, where in data.images().items():
        try:
            open_image(path)
        except InputError as err:
            raise InputError(f"{where}: {err}") from err
        advance(1)


def _builtin_pairs(rows: Iterable[builtin.Twins]) -> Iterator[Pair]:
    for twins in rows:
        where = f"{builtin.NAME}: {twins.kind}, {twins.form}"
        yield Pair(
            Prompt(twins.unsafe, where=where),
            Prompt(twins.safe, where=where),
            builtin.NAME,
            _builtin_family(twins.family),
            builtin.NAME,
        )


def _builtin_harmless() -> Iterator[Labelled]:
    for row in builtin.builtin_harmless():
        where = f"{builtin.NAME}: {row.group}, {row.topic}"
        prompt, group = Prompt(row.text, where=where), f"{builtin.NAME} {row.group}"
        yield Labelled(prompt, False, group, _builtin_family(row.text), builtin.NAME)


def _builtin_family(name: str) -> str:
    return f"{builtin.NAME}: {name}"  # no family of a user's file can have this name by chance


def _pairs(path: Path, images: Path | None, *, text_only: bool) -> list[Pair]:
    pairs = [_pair(row, f"{path}:{number}", path, images, text_only) for number, row in read_lines(path)]
    if not pairs:
        raise InputError(f"{path}: no rows; one JSON object per line is needed")
    return pairs


def _pair(row: dict[str, Any], where: str, file: Path, images: Path | None, text_only: bool) -> Pair:
    if row.keys() & {"orig_query", "safe_query"}:
        _reject_unknown(row, VLSAFE_KEYS, where)
        picture = () if text_only else _named(row, "image_id", where, file, images)
        return Pair(
            Prompt(_text(row, "orig_query", where), picture, where),
            Prompt(_text(row, "safe_query", where), picture, where),
            channel=file.stem,
            source=file.stem,
        )
    _reject_unknown(row, PAIR_KEYS, where)
    image, safe_image = (() if text_only else _named(row, key, where, file, images) for key in ("image", "safe_image"))
    earlier = _earlier(row, where)
    return Pair(
        unsafe=Prompt(_text(row, "unsafe", where), image, where, earlier),
        safe=Prompt(_text(row, "safe", where), safe_image or image, where, earlier),
        channel=_text(row, "channel", where, default=file.stem),
        family="" if row.get("family") is None else _text(row, "family", where),
        source=file.stem,
    )


def _labelled(path: Path, images: Path | None, *, unsafe: bool, text_only: bool) -> Iterator[Labelled]:
    for row in read_rows([DataSource(path, unsafe)], images=images, text_only=text_only):
        earlier = tuple("".join(message.texts) for message in row.messages[:-1])
        if not all(text.strip() for text in (*earlier, row.prompt)):
            raise InputError(f"{row.where}: there is no text in {'a turn' if earlier else 'the prompt'}")
        pictures = tuple(Path(cast(Path, image)).resolve() for image in row.messages[0].images)  # rows name files
        yield Labelled(Prompt(row.prompt, pictures, row.where, earlier), unsafe, row.group, row.family, path.stem)


def _text(row: dict[str, Any], key: str, where: str, *, default: str | None = None) -> str:
    value = default if row.get(key) is None else row[key]
    if value is None:
        raise InputError(f"{where}: field {key!r} is missing (found: {', '.join(map(repr, row)) or 'nothing'})")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {key!r} must be a text that is not empty")
    return value


def _earlier(row: dict[str, Any], where: str) -> tuple[str, ...]:
    said = [] if row.get("earlier") is None else row["earlier"]
    if not isinstance(said, list) or len(said) % 2 or not all(isinstance(text, str) and text.strip() for text in said):
        raise InputError(f"{where}: field 'earlier' must be a list of texts: user, assistant, ..., the assistant last")
    return tuple(said)


def _reject_unknown(row: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(row.keys() - known):
        raise InputError(f"{where}: unknown field {unknown[0]!r}; known here: {', '.join(sorted(known))}")


def _named(row: dict[str, Any], key: str, where: str, file: Path, images: Path | None) -> tuple[Path, ...]:
    """The image files that a field names: none, one or a list."""
    names = row.get(key)
    names = names if isinstance(names, list) else [] if names is None else [names]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"{where}: field {key!r} must be a file name that is not empty, or a list of such")
    return tuple(_find_image(name, file, images, where) for name in names)


def _find_image(name: str, file: Path, images: Path | None, where: str) -> Path:
    folders = [file.parent, *([images] if images else [])]
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).resolve()
    hint = "" if images else "; give their folder with --images, or fit on the texts alone with --text-only"
    raise InputError(f"{where}: image {name!r} not found under {' or '.join(map(str, folders))}{hint}")


def _reject_names_given_twice(files: Iterable[Path]) -> None:
    """A data set is known by its file's name: in the weights, in the report, and when it is left out."""
    named: dict[str, Path] = {}
    for path in files:
        if (other := named.setdefault(path.stem, path)).resolve() != path.resolve():
            raise InputError(f"{path} and {other}: a data set is known by its file's name; rename one of them")


def _reject_contradictions(data: FitData) -> None:
    twins = ((p, unsafe) for pair in data.pairs for p, unsafe in ((pair.unsafe, True), (pair.safe, False)))
    others = ((item.prompt, item.unsafe) for item in (*data.extra, *data.refusal_only))
    seen: dict[str, tuple[bool, str]] = {}
    for prompt, unsafe in (*twins, *others):
        label, where = seen.setdefault(prompt.words_key, (unsafe, prompt.where))
        if label != unsafe:
            name = {True: "unsafe", False: "safe"}
            raise InputError(
                f"{prompt.where}: this prompt is {name[unsafe]} here but {name[label]} at {where}, with the same words "
                "and images; remove one"
            )
