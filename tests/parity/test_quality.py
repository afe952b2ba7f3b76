"""The ruler that rounding is measured with reads zero where nothing is rounded."""

import json

import pytest
import torch
from exported import demo_checkpoint, demo_package
from quality import Sample, Score, answers, original_log_probs, package_log_probs
from real_weights import shuffle
from transformers import LlamaConfig, LlamaForCausalLM

from autosteer.export.checkpoint.hf_model import load_hf_model
from autosteer.export.checkpoint.open import DEMO
from autosteer.runtime.engine import Engine


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """An answer to a question about a picture, and a passage."""
    _, processor = load_hf_model(demo_checkpoint())
    picture = str(DEMO / "examples" / "benign.png")
    row = {"prompt": "describe the picture.", "images": [picture], "answer": "a blue star at the top left."}
    data = tmp_path_factory.mktemp("data") / "test.jsonl"
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    ids = processor.tokenizer("a red circle and a green triangle.").input_ids
    return [*answers(data, processor.tokenizer, 10), Sample((), ids, given=1), Sample((), ids, given=4)]


def test_a_float32_package_scores_as_pytorch_does(samples: list[Sample]) -> None:
    model, processor = load_hf_model(demo_checkpoint())
    engine = Engine.load(demo_package("fp32"), device="cpu", threads=1)
    score, of_pytorch = Score(), Score()
    for sample in samples:
        theirs = original_log_probs(model, processor, sample)
        targets = torch.tensor(sample.targets[-len(theirs) :])
        score.add(package_log_probs(engine, sample), theirs, targets)
        of_pytorch.add(theirs, theirs, targets)
    assert len(samples) == 3 and score.tokens == sum(len(sample.targets) - sample.given for sample in samples)
    assert abs(score.facts()["kl"]) < 1e-5 and score.facts()["agree"] == 1
    assert score.facts()["perplexity"] == pytest.approx(of_pytorch.facts()["perplexity"], rel=1e-4)
    assert 1 < score.facts()["perplexity"] < 100  # of 1,600 tokens


def test_divergence_and_perplexity_are_those_of_a_worked_example() -> None:
    score = Score()
    original, ours = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    score.add(ours, original, torch.tensor([0]))
    assert score.facts()["perplexity"] == pytest.approx(4)
    assert score.facts()["kl"] == pytest.approx(0.1438, abs=1e-4)  # .5 ln(.5/.25) + .5 ln(.5/.75)


def test_shuffled_channels_compute_the_same_and_leave_no_block_as_it_was() -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # norms of ones would hide a permutation that is missing
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before, weights = model(ids).logits, {n: p.clone() for n, p in model.named_parameters()}
        shuffle(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            assert not torch.equal(parameter[:, :32].sort(1).values, weights[name][:, :32].sort(1).values), name
