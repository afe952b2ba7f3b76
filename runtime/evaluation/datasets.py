"""Data sets -> rows. One reader for each format; a file's format is recognised by the fields of its first line.

    ours          {"prompt" | "turns", "images", "unsafe", "group", "answer", "family"}
    vlsafe        {"query", "image_id"}                    unsafe      COCO train2017
    tovilag       {"query", "image_pth"}                   unsafe      COCO 2014, porn/, bloody/
    turns         {"turns": [text], "dataset"}             your label  Alpaca, TrustLLM, TriviaQA of SafeSwitch
    mmmu          {"question", "options", "answer", "image_1" ...}     benign, graded
    realworldqa   {"question", "answer", "image"}                      benign, graded

Every file is JSONL and names its image files. docs/evaluation.md says how to convert MMMU and RealWorldQA, and how the
official evaluation differs.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from autosteer.runtime.errors import InputError
from autosteer.runtime.strict_json import no_duplicates
from autosteer.runtime.text import ImagePart, Message, Part

from .grading import LETTERS, Gold

Fields = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One prompt of a data set."""

    messages: tuple[Message, ...]
    unsafe: bool
    group: str
    gold: Gold | None  # the right answer, if the data set has one
    family: str = ""  # shared by rows with similar wording; "" if unknown
    where: str = field(default="", compare=False)  # file:line, for error messages

    @property
    def prompt(self) -> str:
        """The texts of the last turn."""
        return " ".join(self.messages[-1].texts)

    @property
    def pictures(self) -> Pictures:
        """Digests of the last turn's picture files, which are read."""
        return tuple(_picture_digest(Path(str(image))) for image in self.messages[-1].images)

    @cached_property
    def digest(self) -> str:
        """Equal for equal rows with equal pictures, whatever the paths of their files. Reads the image files."""

        def part(p: Part) -> str:
            if isinstance(p, str):
                return p
            assert isinstance(p, ImagePart) and isinstance(p.image, Path)
            return "image " + _picture_digest(p.image)

        dialogue = [[m.role, [part(p) for p in m.parts]] for m in self.messages]
        gold = self.gold and [self.gold.kind, self.gold.answers, self.gold.options]
        whole = json.dumps([dialogue, self.unsafe, self.group, gold])
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def cannot_be_asked(row: Row, err: InputError, how: str = "") -> InputError:
    """The error of a row that the engine refuses, with the row's place."""
    return InputError(
        f"{row.where}: cannot be asked{how}: {err}; mend or remove the row: --output keeps what is answered"
    )


@dataclass(frozen=True)
class DataSource:
    """A file of prompts, and its options from the command line."""

    path: Path
    unsafe: bool | None = None  # None: as in the file, or by its format
    format: str | None = None  # None: recognised by the fields
    labelled: bool = True  # False: it does not matter what a row says of that, or whether it does


@dataclass(frozen=True)
class Place:
    """A line of a file and the folder of its images, for readers and their errors."""

    file: DataSource
    number: int
    images: Path | None  # None: beside the file
    text_only: bool

    def error(self, what: str) -> InputError:
        """An InputError that names file and line."""
        return InputError(f"{self.file.path}:{self.number}: {what}")

    def need(self, condition: bool, what: str) -> None:
        """Raise InputError for a line that is not a row."""
        if not condition:
            raise self.error(f"not a row of a test set ({what})")

    def text(self, data: Fields, name: str) -> str:
        """A field that must be a text and not blank."""
        value = data.get(name)
        self.need(isinstance(value, str) and bool(value.strip()), f"{name!r} must be a text")
        return str(value)

    def image(self, name: Any) -> Path | None:
        """The path of a picture, None under --text-only. Raises InputError if it does not exist."""
        self.need(isinstance(name, str) and bool(name), "an image must be a file name")
        if self.text_only:
            return None
        folders = [*([self.images] if self.images else []), self.file.path.parent]
        for folder in folders:
            if (folder / str(name)).is_file():
                return folder / str(name)
        raise self.error(
            f"no image {name!r} under {' or '.join(map(str, folders))}; name its folder with --images, or "
            "leave pictures out with --text-only"
        )

    def label(self, of_format: bool) -> bool:
        """Whether the prompt is unsafe: by --unsafe or --benign, else by the format."""
        return of_format if self.file.unsafe is None else self.file.unsafe

    @property
    def group(self) -> str:
        """The group of rows that name none: the file's stem."""
        return self.file.path.stem


def read_rows(files: Sequence[DataSource], *, images: Path | None = None, text_only: bool = False) -> list[Row]:
    """Rows of JSONL files. `images`: the folder of their pictures. Raises InputError naming file and line."""
    rows: list[Row] = []
    for file in files:
        name = file.format
        for number, data in read_lines(file.path):
            place = Place(file, number, images, text_only)
            name = name or detect(data, place)
            rows.append(replace(READERS[name](data, place), where=f"{file.path}:{number}"))
            refuse_unread(name, data, place)
    if not rows:
        raise InputError(f"{', '.join(str(file.path) for file in files)}: no rows")
    return rows


def first_of_each_group(rows: Sequence[Row], limit: int) -> list[Row]:
    """The first `limit` rows of each group and label, in order."""
    seen: Counter[tuple[str, bool]] = Counter()
    kept = []
    for row in rows:
        seen[row.group, row.unsafe] += 1
        if seen[row.group, row.unsafe] <= limit:
            kept.append(row)
    return kept


def contradictions(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The first unsafe row and the first benign one of each dialogue that is called both, with equal pictures."""
    by_words: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        texts = ("".join(message.texts) for message in row.messages)
        by_words.setdefault(tuple(map(same_prompt, texts)), []).append(row)
    found = []
    for same in by_words.values():
        if {row.unsafe for row in same} == {True, False}:
            first: dict[Pictures, dict[bool, Row]] = {}
            for row in same:
                shown = tuple(_picture_digest(Path(str(i))) for message in row.messages for i in message.images)
                first.setdefault(shown, {}).setdefault(row.unsafe, row)
            found += [(labels[True], labels[False]) for labels in first.values() if len(labels) == 2]
    return found


def read_lines(path: Path) -> Iterator[tuple[int, Fields]]:
    """(line number, object) of a JSONL file, without blank lines. Raises InputError for a file or a line that is not
    readable.
    """
    try:
        read = path.read_bytes()
    except OSError as err:
        raise InputError(f"{path}: not readable ({err.strerror})") from err
    try:
        lines = read.decode("utf-8").split("\n")  # not splitlines(): JSON may hold a U+2028
    except UnicodeDecodeError as err:
        number = read.count(b"\n", 0, err.start) + 1
        raise InputError(f"{path}:{number}: not UTF-8 text ({err.reason})") from err
    for number, line in enumerate(lines, 1):
        line = line.removeprefix("\ufeff")  # Windows editors begin a file with it; within, where files were joined
        if not line.strip():
            continue
        try:
            data = json.loads(line, object_pairs_hook=no_duplicates)
            json.dumps(data, ensure_ascii=False).encode()  # \ud800 is JSON, and no text
        except (ValueError, RecursionError) as err:
            raise InputError(f"{path}:{number}: not JSON ({err})") from err
        if not isinstance(data, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        yield number, data


def detect(data: Fields, place: Place) -> str:
    """The format with these fields. Raises InputError if there is none."""
    for name, fields in FIELDS:
        if set(fields) <= set(data):
            return name
    known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FIELDS)
    raise place.error(f"not a row of a test set (fields {', '.join(map(repr, data)) or 'none'}; known are {known})")


# --- the formats -----------------------------------------------------------------------------------------------------


def _ours(data: Fields, place: Place) -> Row:
    place.need(("turns" in data) != ("prompt" in data), "one of 'prompt' and 'turns' must be given")
    turns, names = data["turns"] if "turns" in data else [data["prompt"]], data.get("images", [])
    group, answer = data.get("group", place.group), data.get("answer")
    unsafe = data.get("unsafe", place.file.unsafe) if place.file.labelled else place.file.unsafe
    place.need(
        _texts(turns) and len(turns) % 2 == 1, "texts must be strings: user, assistant, user, ..., the user last"
    )
    place.need(_texts(names), "'images' must be a list of file names")
    missing = "'unsafe' must be true or false; without it, give the file as --unsafe or as --benign"
    place.need(isinstance(unsafe, bool), missing)
    place.need(place.label(bool(unsafe)) is unsafe, "'unsafe' contradicts the command line")
    family = data.get("family", "")
    place.need(isinstance(group, str) and isinstance(family, str), "'group' and 'family' must be texts")
    place.need(answer is None or isinstance(answer, str), "'answer' must be a text")
    first, *later = turns
    messages = [Message.user(first, [path for name in names if (path := place.image(name))])]
    messages += [Message.assistant(t, trusted=True) if i % 2 == 0 else Message.user(t) for i, t in enumerate(later)]
    return Row(tuple(messages), bool(unsafe), group, None if answer is None else Gold("exact", (answer,)), family)


def _with_image(data: Fields, place: Place, image_field: str) -> Row:
    """VLSafe and ToViLaG: one unsafe query after one picture."""
    path = place.image(data.get(image_field))
    message = Message.user(place.text(data, "query"), [path] if path else [])
    return Row((message,), place.label(True), place.group, None)


def _vlsafe(data: Fields, place: Place) -> Row:
    place.need(place.label(True), "a row of VLSafe is unsafe, and its file is given as benign")
    return _with_image(data, place, "image_id")


def _tovilag(data: Fields, place: Place) -> Row:
    return _with_image(data, place, "image_pth")


def _turns(data: Fields, place: Place) -> Row:
    if place.file.unsafe is None:
        raise place.error("the format 'turns' does not say whether it is unsafe: give it as --unsafe or as --benign")
    turns = data.get("turns")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], str):
        raise place.error(
            "not a row of a test set ('turns' must be one text; a dialogue, user, assistant, user, has 'unsafe', too)"
        )
    return Row((Message.user(turns[0]),), place.file.unsafe, place.group, None)


_PLACEHOLDER = re.compile(r"<image (\d)>")


def _mmmu(data: Fields, place: Place) -> Row:
    """Text and pictures in the question's order. The answer is an option's letter, or short if there are no options."""
    options = _listed(data.get("options"), place, "options")
    answers = _listed(data.get("answer"), place, "answer", one_is_enough=True)
    text = place.text(data, "question").strip()
    if options:
        place.need(len(options) <= len(LETTERS), f"more than {len(LETTERS)} 'options'")
        place.need(
            len(answers) == 1 and answers[0] in [*LETTERS[: len(options)]], "'answer' must be an option's letter"
        )
        text += "\n" + "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        text += "\nPlease answer directly with only the letter of the correct option."
    else:
        place.need(bool(answers), "'answer' must be given")
        text += "\nPlease answer directly with a single word, phrase or number."
    pieces = _PLACEHOLDER.split(text)  # text, "1", text, "2", text
    parts: list[Part] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            path = place.image(data.get(f"image_{piece}"))
            parts += [ImagePart(path)] if path else []
        elif piece.strip():
            parts.append(piece.strip())
    place.need(any(isinstance(part, str) for part in parts), "there is no text in 'question'")
    gold = Gold("choice", tuple(answers), tuple(options)) if options else Gold("short", tuple(answers))
    return Row((Message("user", tuple(parts)),), place.label(False), place.group, gold)


def _realworldqa(data: Fields, place: Place) -> Row:
    """The question contains its options, one a line, and how to answer."""
    question, answer = place.text(data, "question"), place.text(data, "answer").strip()
    path = place.image(data.get("image"))
    options = dict(re.findall(r"^\(?([A-Z])[.)]\s*(.+)$", question, flags=re.MULTILINE))
    lettered = answer in options and list(options) == list(LETTERS[: len(options)])
    gold = Gold("choice", (answer,), tuple(options.values())) if lettered else Gold("short", (answer,))
    return Row((Message.user(question, [path] if path else []),), place.label(False), place.group, gold)


def _listed(value: Any, place: Place, name: str, *, one_is_enough: bool = False) -> list[str]:
    """A list of texts, which MMMU stores as a Python literal: "['a', 'b']"."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as err:
            raise place.error(f"not a row of a test set ({name!r} is not a list)") from err
    elif one_is_enough and isinstance(value, str):
        value = [value]
    place.need(isinstance(value, list), f"{name!r} must be a list")
    return [str(item).strip() for item in value]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


Reader = Callable[[Fields, Place], Row]
READERS: dict[str, Reader] = {
    "ours": _ours,
    "vlsafe": _vlsafe,
    "tovilag": _tovilag,
    "mmmu": _mmmu,
    "realworldqa": _realworldqa,
    "turns": _turns,
}
FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (  # the first whose fields a file has is its format
    ("ours", ("unsafe",)),
    ("ours", ("prompt",)),
    ("vlsafe", ("query", "image_id")),
    ("tovilag", ("query", "image_pth")),
    ("mmmu", ("question", "options", "answer")),
    ("realworldqa", ("question", "answer", "image")),
    ("turns", ("turns",)),
)


# --- fields that no reader reads -------------------------------------------------------------------------------------

ONE_PICTURE = ("image", "image_id", "image_path", "image_pth")  # several names of one picture, in published files
READ: dict[str, re.Pattern[str]] = {  # by format: fields that show a picture or a dialogue, and what stands beside them
    "ours": re.compile("images|turns"),
    "vlsafe": re.compile("|".join(ONE_PICTURE)),
    "tovilag": re.compile("|".join(ONE_PICTURE)),
    "mmmu": re.compile(r"image_\d|img_type"),
    "realworldqa": re.compile("|".join(ONE_PICTURE)),
    "turns": re.compile("turns"),
}
LOOKS_LIKE = {  # a kind of field -> how its name looks; "returns" is no dialogue
    "video": re.compile("video"),
    "picture": re.compile("image|picture|photo|img"),
    "dialogue": re.compile("(?<!re)turns|messages"),
}
PICTURES_OF = {
    "ours": "name pictures in 'images', a list of file names",
    "vlsafe": "name the picture in 'image_id'",
    "tovilag": "name the picture in 'image_pth'",
    "mmmu": "name pictures in 'image_1', 'image_2', ..., which 'question' shows as <image 1>, <image 2>, ...",
    "realworldqa": "name the picture in 'image'",
    "turns": "name pictures in 'images', a list of file names, and say 'unsafe'",
}


def refuse_unread(name: str, data: Fields, place: Place) -> None:
    """Raise InputError for a field that looks like a picture or a dialogue, and that the format `name` does not read:
    the text alone would be measured. Other fields (ids, sources) may be there, and so may fields that hold nothing, and
    pictures under --text-only.
    """
    for field_name, value in data.items():
        kind = next((kind for kind, looks in LOOKS_LIKE.items() if looks.search(field_name.lower())), None)
        if not value or not kind or READ[name].fullmatch(field_name) or (place.text_only and kind != "dialogue"):
            continue
        hints = {
            "video": "videos cannot be measured",
            "picture": PICTURES_OF[name],
            "dialogue": "write dialogues into 'turns', user, assistant, user, ..., and say 'unsafe'",
        }
        raise place.error(
            f"{field_name!r} is not read in the format {name!r}, and looks like a {kind}; {hints[kind]}, or remove the "
            "field"
        )


# --- what a gate was fitted on ---------------------------------------------------------------------------------------

Pictures = tuple[str, ...]  # digests
Known = dict[str, set["Pictures | None"]]  # what was seen with each text; None: pictures that are not known

_PROMPT_FIELDS: dict[str, tuple[str, ...]] = {  # a text -> where its picture is named: the first that is there
    "prompt": ("images",),
    "query": ("image_id", "image_pth"),
    "question": ("image",),
    "orig_query": ("image_id",),
    "safe_query": ("image_id",),
    "unsafe": ("image",),
    "safe": ("safe_image", "image"),
}


def prompts_of(files: Sequence[Path], *, images: Path | None = None, text_only: bool = False) -> Known:
    """Every prompt in files of pairs or prompts of any format: texts, normalised by `same_prompt`, and pictures.

    A picture that is not found under `images` or beside its file could be any; under `text_only` each could.
    """
    found: Known = {}
    for path in files:
        folders = [*([images] if images else []), path.parent]
        prompts = [prompt for _, data in read_lines(path) for prompt in _prompts_in(data)]
        for text, names in prompts:
            found.setdefault(same_prompt(text), set()).add(None if text_only else _pictures(names, folders))
        if not prompts:
            raise InputError(f"{path}: --exclude: no prompt in it (fields {', '.join(_PROMPT_FIELDS)}, turns)")
    return found


def _prompts_in(data: Fields) -> Iterator[tuple[str, Any]]:
    """(text, how its pictures are named) of each prompt in a row. A dialogue shows its pictures in its first turn."""
    for name, fields in _PROMPT_FIELDS.items():
        if isinstance(data.get(name), str):
            names: Any = next((data[field] for field in fields if data.get(field)), [])
            yield data[name], [] if data.get("earlier") else names
    turns = data.get("turns")
    asked = turns[0::2] if isinstance(turns, list) else []
    yield from ((text, [] if i else data.get("images", [])) for i, text in enumerate(asked) if isinstance(text, str))


def _pictures(names: Any, folders: Sequence[Path]) -> Pictures | None:
    """Digests of the pictures with these names; None if one is not found."""
    names = [names] if isinstance(names, str) else names
    paths = [next((f / str(name) for f in folders if (f / str(name)).is_file()), None) for name in names]
    return None if None in paths else tuple(_picture_digest(path) for path in paths if path)


def _picture_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_prompt(text: str) -> str:
    """A prompt without differences of case and white space."""
    return " ".join(text.casefold().split())


def drop_known(rows: Sequence[Row], known: Known) -> tuple[list[Row], Counter[tuple[str, bool]]]:
    """(rows whose prompt, with its pictures, is not among `known`, how many were of each group and label). Raises
    InputError if none is left.
    """

    def is_known(row: Row) -> bool:
        seen = known.get(same_prompt(row.prompt), set())
        return bool(seen) and (None in seen or row.pictures in seen)

    kept = [row for row in rows if not is_known(row)]
    dropped = Counter((row.group, row.unsafe) for row in rows)
    dropped.subtract((row.group, row.unsafe) for row in kept)
    if not kept:
        raise InputError("--exclude: every row was also fitted on; nothing is left to measure")
    return kept, +dropped
