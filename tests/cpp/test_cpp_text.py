"""The C++ runtime's token ids and pieces of text are those of Python's."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import time
import unicodedata
from pathlib import Path

import pytest
from cpp_inputs import odd_texts
from exported import demo_checkpoint, demo_package
from llama_tokenizer import gemma_tokenizer, llama_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from autosteer.runtime.obfuscation import deobfuscated
from autosteer.runtime.pieces import pieces
from autosteer.runtime.text import Detokeniser, load_tokenizer


def qwen_like(path: Path) -> Path:
    """A tokenizer.json built as Qwen2's is: NFC, its split pattern, byte-level BPE, added tokens of both kinds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    pattern = words + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(odd_texts(300) + ["the thing is the ring of the king"] * 5, trainer)
    tokenizer.add_tokens(["<|added|>"])
    tokenizer.add_special_tokens(["<|im_end|>", "<image>", "<|endoftext|>"])
    tokenizer.save(str(path))
    return path


def llama3_like(path: Path) -> Path:
    """ignore_merges and digits in groups, as in Llama 3; a prefix space, as in GPT-2's older kin."""
    data = json.loads(qwen_like(path).read_text())
    data["model"]["ignore_merges"] = True
    data["model"]["vocab"]["Ġzebra"] = len(data["model"]["vocab"])
    for token in data["added_tokens"]:
        token["id"] += 1
    data["normalizer"] = None
    data["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
            {"type": "Split", "pattern": {"String": "\n"}, "behavior": "Removed", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(data))
    return path


def uncased(path: Path) -> Path:
    """NFC, then lower case, as the demo model has it."""
    data = json.loads(qwen_like(path).read_text())
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    path.write_text(json.dumps(data))
    return path


def llama2_like(path: Path) -> Path:
    """SentencePiece's BPE with byte fallback, as transformers writes Llama 2's today: spaces by Metaspace."""
    tokenizer = llama_tokenizer("<image>", "<|im_end|>", legacy=True)
    tokenizer.backend_tokenizer.save(str(path))
    return path


def llama2_like_of_runs(path: Path) -> Path:
    """The same as an export writes it: no space before a run of text."""
    data = json.loads(llama2_like(path).read_text())
    data["pre_tokenizer"]["prepend_scheme"] = "never"
    path.write_text(json.dumps(data))
    return path


def mistral_like(path: Path) -> Path:
    """The same as files on the hub have it: spaces by normalisers, and a decoder that strips none."""
    data = json.loads(llama2_like(path).read_text())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    data["pre_tokenizer"] = None
    del data["decoder"]["decoders"][-1]
    path.write_text(json.dumps(data))
    return path


def llama2_like_by_words(path: Path) -> Path:
    """The same, cut at spaces."""
    data = json.loads(llama2_like(path).read_text())
    data["pre_tokenizer"]["split"] = True
    path.write_text(json.dumps(data))
    return path


def gemma_like(path: Path) -> Path:
    """Spaces by a normaliser, and a cut at spaces that finds none; many added tokens that are not special."""
    gemma_tokenizer().backend_tokenizer.save(str(path))
    return path


def demo_tokenizer(_path: Path) -> Path:
    """The bundled checkpoint's own."""
    return demo_checkpoint().folder / "tokenizer.json"


FALLING_BACK = [llama2_like, llama2_like_of_runs, llama2_like_by_words, mistral_like, gemma_like]
TOKENIZERS = [demo_tokenizer, qwen_like, llama3_like, uncased, *FALLING_BACK]


def test_every_character_is_obfuscated_for_both_or_for_neither(parts):
    """Each one that Python's Unicode knows, within a word and by itself; and odd texts."""
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    texts = [f"st{c}al {c}{c} {c}" for c in known] + odd_texts(2000)
    assert parts.run({"part": "deobfuscate", "texts": texts}) == [[deobfuscated(text) for text in texts]]


def test_obfuscated_letters_are_looked_for_in_linear_time(parts):
    """128 KB of "aa-." took half a minute (Python: test_limits.py)."""
    texts = [unit * (128_000 // len(unit)) for unit in ("aa-.", "aa--", "a.b_", "aa.a1", "a b ", "s-t-")]
    before = time.monotonic()
    assert parts.run({"part": "deobfuscate", "texts": texts}) == [[deobfuscated(text) for text in texts]]
    assert time.monotonic() - before < 15


def test_obfuscated_words_are_the_same_for_both(parts):
    """Random mixtures of what the steps look for."""
    rng = random.Random(0)
    marks = [
        *"aBct013459@$! .-_,?\n",
        "11",
        "w",
        "www",
        "km",
        "\u200b",
        "\u0301",
        "\u00e9",
        "\u0430",
        "\u03bf",
        "\uff41",
        "YWJj",
    ]
    texts = ["".join(rng.choices(marks, k=rng.randint(1, 30))) for _ in range(20000)]
    plain = [deobfuscated(text) for text in texts]
    assert parts.run({"part": "deobfuscate", "texts": texts}) == [plain]
    assert sum(a != b for a, b in zip(texts, plain, strict=True)) > 2000


def test_pieces_are_the_same_for_both(parts):
    """Random mixtures of words and of what parts them."""
    rng = random.Random(0)
    marks = [*" \t\n\v\f\r.?!;,:/|+&", " ", " ", *"\u2026\u3002\u2013\uff0c\u00a0\u2028\u00e9", "a", "bc"]
    marks += [" and ", " OR", "then ", "and"]
    marks += ["de ", " f g h "] * 5
    marks += [*"\u4eca\u5929\u306a\u30a2\uff66\uff01\u300c\u3000\u30fc", "\U00020000", "\u4ec0\u4e48\u6837\uff1f"]
    texts = ["".join(rng.choices(marks, k=rng.randint(0, 80))) for _ in range(5000)]
    cut = [pieces(text) for text in texts]
    assert parts.run({"part": "cut", "texts": texts}) == [cut]
    assert sum(map(bool, cut)) > 2000


@pytest.mark.parametrize("make", TOKENIZERS)
def test_token_ids_are_the_tokenizers_librarys(parts, tmp_path, make):
    """Special tokens in the text are plain text for both; an added token that is not special is one for both."""
    path = make(tmp_path / "tokenizer.json")
    texts = [
        *odd_texts(500),
        " zebra zebra 12345",
        "<unused7><unused1<unused12>\n\n\n\u2581\u2581  \u2581<end_of_turn>",
    ]
    tokenizer = load_tokenizer(path)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    (found,) = parts.run({"part": "encode", "tokenizer": str(path), "texts": texts})
    assert [(t, f) for t, f, e in zip(texts, found, expected, strict=True) if f != e] == []


@pytest.mark.parametrize("make", [qwen_like, uncased, llama2_like])
def test_every_kind_of_character_is_split_alike(parts, tmp_path, make):
    """One of every 37 code points of the first planes, and all that have a lower case, between letters and digits."""
    path = make(tmp_path / "tokenizer.json")
    points = [c for c in range(1, 0x32000, 37) if not 0xD800 <= c < 0xE000 and unicodedata.category(chr(c)) != "Cn"]
    points += [c for c in range(0x32000) if not 0xD800 <= c < 0xE000 and chr(c).lower() != chr(c)]
    texts = ["".join(f"a{chr(c)}{chr(c)} b {chr(c)}1" for c in points[i : i + 32]) for i in range(0, len(points), 32)]
    tokenizer = load_tokenizer(path)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    (found,) = parts.run({"part": "encode", "tokenizer": str(path), "texts": texts})
    assert found == expected


@pytest.mark.parametrize("stop", [[], ["the"], ["ab", "b\n", "é"]])
@pytest.mark.parametrize("make", TOKENIZERS)
def test_pieces_of_text_come_as_from_python(parts, tmp_path, make, stop):
    """Random ids: incomplete and ill-formed characters, special tokens, ids that no token has."""
    path = make(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(path)
    rng = random.Random(3)
    size = tokenizer.get_vocab_size() + 5
    answers = [[rng.randrange(size) for _ in range(rng.randrange(40))] for _ in range(200)]
    answers += [tokenizer.encode(text, add_special_tokens=False).ids for text in odd_texts(50)]
    expected = []
    for ids in answers:
        detokeniser, pieces = Detokeniser(tokenizer, stop), []
        for token in ids:
            pieces.append(detokeniser.push(token))
            if detokeniser.stopped:
                break
        expected.append([*pieces, detokeniser.flush()])
    (found,) = parts.run({"part": "decode", "tokenizer": str(path), "answers": answers, "stop": stop})
    assert [(f, e) for f, e in zip(found, expected, strict=True) if f != e] == []


def test_text_that_is_not_unicode_is_an_input_error(built):
    done = subprocess.run(
        [built / "autosteer-cli", demo_package("fp32"), "--prompt", b"a\xff\xfeb"], capture_output=True, check=False
    )
    assert done.returncode == 5
    assert b"not valid Unicode" in done.stderr


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "type"), "WordPiece"),
        (("model", "unk_token"), "<unk>"),
        (("model", "byte_fallback"), True),
        (("normalizer",), {"type": "NFKC"}),
        (("pre_tokenizer",), {"type": "Whitespace"}),
        (("pre_tokenizer",), None),
        (("decoder",), None),
        (("model", "merges"), [["nobody", "knows"]]),
        (("added_tokens", 0, "id"), 5),  # the library ignores it and counts on; a reader cannot do both
    ],
)
def test_tokenizer_with_what_the_reader_does_not_know_is_refused(parts, tmp_path, keys, value):
    path = qwen_like(tmp_path / "tokenizer.json")
    data = json.loads(path.read_text())
    functools.reduce(lambda d, k: d[k], keys[:-1], data)[keys[-1]] = value
    path.write_text(json.dumps(data))
    (answer,) = parts.run({"part": "encode", "tokenizer": str(path), "texts": [""]})
    assert answer["exit_code"] == 3
    assert str(path) in answer["error"]


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "byte_fallback"), False),
        (("model", "ignore_merges"), True),
        (("model", "vocab", "<0x41>"), None),
        (("pre_tokenizer", "prepend_scheme"), "first"),
        (("pre_tokenizer", "replacement"), "_"),
        (("pre_tokenizer", "type"), "Whitespace"),
        (("decoder", "decoders", 0, "content"), "_"),
        (("decoder", "type"), "ByteLevel"),
        (("normalizer",), {"type": "Replace", "pattern": {"Regex": " "}, "content": "_"}),
        (("added_tokens", -1, "special"), False),  # it is normalised, too
    ],
)
def test_what_else_falls_back_to_bytes_is_refused(parts, tmp_path, keys, value):
    path = llama2_like(tmp_path / "tokenizer.json")
    data = json.loads(path.read_text())
    data["added_tokens"][-1]["normalized"] = True
    place = functools.reduce(lambda d, k: d[k], keys[:-1], data)
    place[keys[-1]] = value
    if value is None:
        del place[keys[-1]]
    path.write_text(json.dumps(data))
    (answer,) = parts.run({"part": "encode", "tokenizer": str(path), "texts": [""]})
    assert answer["exit_code"] == 3
    assert str(path) in answer["error"]
