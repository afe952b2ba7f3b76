"""The mathematics of autosteer-fit on made-up numbers: SAS, prober, calibration, Refusal Head. No model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from autosteer.export.safety import calibrate, measure, prober, proof, refusal_head, sas
from autosteer.export.safety import fit as fit_module
from autosteer.export.safety.arrange import clusters_of, split_prompts
from autosteer.export.safety.batches import special_tokens
from autosteer.export.safety.layers import better_layer, choose_layer
from autosteer.export.safety.pairs import Labelled, Pair, Prompt, never_fitted, read_data, read_external
from autosteer.export.safety.refit import as_messages
from autosteer.export.safety_folder import LayerScore, SafetyArtifact, SafetyFacts
from autosteer.runtime.errors import InputError, PackageError
from autosteer.runtime.text import Message


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def planted(n: int = 40, layers: int = 5, d: int = 16, *, best: int = 2, seed: int = 0) -> torch.Tensor:
    """Deltas (n, layers, d) of noise, with one direction common to all pairs at entry `best`."""
    deltas = torch.randn(n, layers, d, generator=torch.Generator().manual_seed(seed))
    deltas[:, best, 0] += 6
    return deltas


# ---------------------------------------------------------------- SAS


def sas_of(deltas: torch.Tensor, *, seed: int = 0, block: int = 1000) -> sas.SasScores:
    """SAS of deltas (n, L, d) that come `block` at a time."""
    total = sas.SasSum(len(deltas), seed=seed)
    for some in deltas.split(block):
        total.add(some)
    return total.scores()


def test_sas_does_not_depend_on_the_blocks_it_comes_in():
    whole, parts = sas_of(planted()), sas_of(planted(), block=7)
    for name in ("sas", "low", "high"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_sas_equals_the_naive_mean_of_pairwise_cosines():
    directions, usable = sas.directions(planted())
    pairs = torch.triu_indices(40, 40, offset=1)
    naive = torch.einsum("nld,mld->lnm", directions.double(), directions.double())[:, pairs[0], pairs[1]].mean(dim=1)
    assert usable.all()
    torch.testing.assert_close(sas_of(planted()).sas, naive, rtol=0, atol=1e-7)


def test_sas_of_known_directions():
    """Three unit vectors, cosines 1, 0 and 0: mean 1/3. And a pair of opposites: -1."""
    deltas = torch.tensor([[[2.0, 0.0]], [[5.0, 0.0]], [[0.0, 0.1]]])
    assert sas_of(deltas).sas.item() == pytest.approx(1 / 3)
    assert sas_of(torch.tensor([[[1.0, 0.0]], [[-3.0, 0.0]]])).sas.item() == pytest.approx(-1)


def test_sas_is_highest_where_the_direction_was_planted():
    scores = sas_of(planted(best=3))
    assert int(scores.sas.argmax()) == 3
    assert scores.low[3] > scores.high[[0, 1, 2, 4]].max()


def test_bootstrap_interval_holds_the_score_and_is_centred():
    """Counting a pair drawn twice as a cosine of 1 would lift the interval of pure noise (SAS 0) by 1/n = 0.05."""
    scores = sas_of(torch.randn(20, 50, 400, generator=torch.manual_seed(1)))
    assert ((scores.low <= scores.sas) & (scores.sas <= scores.high)).all()
    assert abs(((scores.low + scores.high) / 2).mean().item()) < 0.005


def test_bootstrap_repeats_with_its_seed():
    first, again, other = (sas_of(planted(), seed=s).low for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_layer_is_chosen_by_the_score_that_was_asked_for_and_the_first_of_equals():
    layers = [
        LayerScore(layer=layer, sas=score, sas_low=-layer, sas_high=layer, prober_accuracy=accuracy)
        for layer, score, accuracy in ((1, 0.1, 0.7), (2, 0.3, 0.9), (3, 0.4, 0.8), (4, 0.2, 0.9))
    ]
    assert choose_layer(layers, "sas") == 3
    assert choose_layer(layers, "prober") == 2


def test_a_layer_with_a_better_prober_is_named_only_beyond_chance():
    def facts(*accuracies: float, prompts: int) -> SafetyFacts:
        layers = tuple(LayerScore(i, 0.1, 0.0, 0.2, a) for i, a in enumerate(accuracies, start=1))
        return SafetyFacts(1, "m", 2, -1, 0.5, 0.1, "no", layers, {}, {"validation_prompts": float(prompts)})

    named = better_layer(facts(0.85, 0.80, 0.85, prompts=900))
    assert named == (
        "on the 900 prompts of the validation part, a prober at layer 1 has a balanced accuracy of 85.0%, "
        "the one at layer 2 80.0%: try --select prober"
    )
    assert better_layer(facts(0.85, 0.80, 0.85, prompts=200)) is None
    assert better_layer(facts(0.75, 0.80, 0.79, prompts=900)) is None


def test_pair_without_difference_is_dropped_from_every_layer():
    deltas = planted()
    deltas[7, 1] = 0
    scores = sas_of(deltas)
    expected = sas_of(deltas[[i for i in range(40) if i != 7]])
    torch.testing.assert_close(scores.sas, expected.sas)
    assert torch.isfinite(scores.low).all()


def test_pairs_without_any_difference_are_an_error():
    with pytest.raises(InputError, match="in 40 of 40 pairs"):
        sas_of(torch.zeros(40, 5, 16))


# ---------------------------------------------------------------- split and prober


def separable(n: int = 300, d: int = 24, *, shift: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(states (n, d), unsafe (n,)): two clouds on a large common offset, feature scales from 0.01 to 100."""
    generator = torch.Generator().manual_seed(seed)
    unsafe = torch.arange(n) % 3 == 0
    states = torch.randn(n, d, generator=generator)
    states[:, :4] += shift * unsafe[:, None]
    return states * torch.logspace(-2, 2, d) + 50, unsafe


def split_of(unsafe: torch.Tensor) -> prober.Split:
    return prober.split_by_text([str(i) for i in range(len(unsafe))], [(bool(u), "all") for u in unsafe], seed=0)


def trained(states: torch.Tensor, unsafe: torch.Tensor, *, seed: int = 0, dropout: float = 0.5) -> prober.Prober:
    return prober.train_on_folds(states, unsafe.numpy(), split_of(unsafe), seed=seed, dropout=dropout)[0]


def test_split_covers_everything_once_in_the_right_sizes():
    split = split_of(separable(shift=0)[1])
    assert sorted(np.concatenate(split.folds)) == list(range(split.size)) == list(range(300))
    assert [len(rows) for rows in split.folds] == [60] * 5
    assert {name: len(rows) for name, rows in split.parts.items()} == {"train": 180, "validation": 60, "heldout": 60}


def test_each_fold_but_the_held_out_one_validates_once():
    split = split_of(separable(shift=0)[1])
    assert [rows.tolist() for _, rows in split.rotations] == [rows.tolist() for rows in split.folds[:-1]]
    for train, validation in split.rotations:
        assert sorted([*train, *validation]) == split.used.tolist()
    assert not set(split.used) & set(split.heldout) and len(split.used) == 240


def test_same_query_text_never_stands_on_two_sides():
    texts = [f"How  do I make THING {i % 37}?" if i % 2 else f"how do i make thing {i % 37}?" for i in range(400)]
    split = prober.split_by_text(texts, [(i % 5 == 0, "abc"[i % 3]) for i in range(400)], seed=3)
    number = [{int(texts[i].split()[-1][:-1]) for i in rows} for rows in split.folds]
    assert sum(map(len, number)) == len(set.union(*number)) == 37


def test_every_group_is_held_out_in_proportion():
    strata = [(i % 2 == 0, "rare" if i % 10 < 2 else "common") for i in range(1000)]
    split = prober.split_by_text([str(i) for i in range(1000)], strata, seed=0)
    rare = [sum(strata[i] == (True, "rare") for i in rows) for rows in split.folds]
    assert rare == [20] * 5


def test_split_with_one_text_per_class_is_an_error():
    with pytest.raises(InputError, match="too few different texts"):
        prober.split_by_text(["a", "b"] * 30, [(True, "all"), (False, "all")] * 30, seed=0)


def test_prober_learns_separable_states_and_only_those():
    accuracy = {}
    for shift in (0.0, 4.0):
        states, unsafe = separable(shift=shift)
        split = split_of(unsafe)
        p = prober.p_unsafe(trained(states, unsafe), states[split.heldout])
        accuracy[shift] = prober.balanced_accuracy(p, unsafe[split.heldout].numpy(), 0.5)
    assert accuracy[4.0] > 0.97
    assert 0.3 < accuracy[0.0] < 0.7


def test_folding_the_standardisation_leaves_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (64, 24), "0.bias": (64,), "2.weight": (2, 64), "2.bias": (2,)}
    raw = {name: torch.randn(*shape, generator=generator) / 8 for name, shape in shapes.items()}
    states, _ = separable(shift=1)
    mean, std = states.mean(dim=0), states.std(dim=0)
    folded = prober.fold_standardisation(raw, mean, std)
    np.testing.assert_allclose(prober.p_unsafe(folded, states), prober.p_unsafe(raw, (states - mean) / std), atol=1e-4)


def test_prober_repeats_with_its_seed_and_leaves_torchs_own_generator_alone():
    states, unsafe = separable(shift=2)
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first, again, other = (trained(states, unsafe, seed=s) for s in (0, 0, 1))
    whole = trained(states, unsafe, dropout=0)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert not torch.equal(first["0.weight"], whole["0.weight"])


def test_the_whole_is_the_mean_of_one_prober_per_rotation():
    states, unsafe = separable(shift=4)
    split = split_of(unsafe)
    probers = prober.train_probers(
        *(lambda rows: states[rows][:, None], unsafe.numpy(), np.ones(300), split.rotations), seed=0
    )
    whole, of_others = prober.train_on_folds(states, unsafe.numpy(), split, seed=0, weight=np.ones(300))
    assert whole["0.weight"].shape == (4 * prober.HIDDEN, states.shape[1])
    logits = torch.stack([prober.prober_logits(one, states) for one in probers])
    torch.testing.assert_close(prober.prober_logits(whole, states), logits.mean(dim=0), atol=1e-4, rtol=1e-4)
    for one, (_, rows) in zip(logits, split.rotations, strict=True):
        torch.testing.assert_close(of_others[rows], one[rows], atol=1e-4, rtol=1e-4)
        found = (one[:, 0] > one[:, 1]) == unsafe
        assert found.float().mean() > 0.95


def test_logits_are_of_members_that_have_not_trained_on_the_prompt():
    """Of noise nothing can be learned: members score prompts that they have trained on far better than others."""
    states, unsafe = separable(d=200, shift=0)
    split = split_of(unsafe)
    whole, logits = prober.train_on_folds(states, unsafe.numpy(), split, seed=0, dropout=0)
    assert logits[split.heldout].isnan().all() and logits[split.used].isfinite().all()
    of_others = logits[split.used].softmax(dim=-1)[:, prober.UNSAFE].double().numpy()
    accuracy = [
        prober.balanced_accuracy(p, unsafe[split.used].numpy(), 0.5)
        for p in (of_others, prober.p_unsafe(whole, states[split.used]))
    ]
    assert accuracy[0] < 0.6 and accuracy[1] > 0.8


def test_raw_logits_need_little_temperature():
    """They are trained by their own cross-entropy, of each member: the mean of members, not their sum."""
    states, unsafe = separable(600, shift=1)
    split = split_of(unsafe)
    logits = prober.train_on_folds(states, unsafe.numpy(), split, seed=0)[1][split.used]
    assert 0.4 < calibrate.fit_temperature(logits, unsafe[split.used].numpy()) < 2  # 0.59: dropout makes it timid


def test_a_rotation_is_not_moved_by_the_labels_that_validate_another():
    """Its members see only its own rows, although all rotations are trained together."""
    states, unsafe = separable(shift=2)
    train, validation = (np.arange(300)[start::3] for start in (0, 1))
    rotations = [(train, validation), (np.arange(300)[2::3], validation)]
    labels = [unsafe.numpy(), np.where(np.isin(np.arange(300), rotations[1][0]), ~unsafe.numpy(), unsafe.numpy())]

    def first(unsafe: np.ndarray) -> prober.Prober:
        weight = np.ones(300)
        return prober.train_probers(lambda rows: states[rows][:, None], unsafe, weight, rotations, seed=0)[0]

    one, other = map(first, labels)
    for name, t in one.items():
        torch.testing.assert_close(t, other[name])


def test_constant_feature_does_not_blow_up_the_folded_weights():
    states, unsafe = separable(shift=4)
    states[:, 5] = 7.0
    fitted = trained(states, unsafe)
    assert all(torch.isfinite(t).all() for t in fitted.values())
    assert fitted["0.weight"][:, 5].abs().max() < 10


def test_rare_class_weighs_as_much_as_the_common_one():
    """One unsafe prompt in twelve, clouds that overlap: unweighted training would let nearly all of them pass."""
    states, _ = separable(1200, shift=0)
    unsafe = torch.arange(1200) % 12 == 0
    states[:, 0] += 1.5 * 0.01 * unsafe  # 1.5 standard deviations of the first feature
    p = prober.p_unsafe(trained(states, unsafe), states)
    assert (p[unsafe.numpy()] > 0.5).mean() > 0.6


def test_row_0_of_the_prober_is_unsafe():
    states, unsafe = separable(shift=4)
    p = prober.p_unsafe(trained(states, unsafe), states)
    assert p[unsafe.numpy()].mean() > 0.9
    assert p[~unsafe.numpy()].mean() < 0.1


def test_words_only_yardstick_reads_words_and_nothing_else():
    """Unsafe by a word: found. Unsafe by an image the words do not mention: a coin toss."""
    texts = [f"tell me about {'zorblat' if i % 2 else 'pillow'} number {i}" for i in range(300)]
    by_word = np.arange(300) % 2 == 1
    by_image = np.random.default_rng(0).random(300) < 0.5
    for unsafe, low, high in ((by_word, 0.9, 1.0), (by_image, 0.3, 0.7)):
        split = prober.split_by_text(texts, [(bool(u), "all") for u in unsafe], seed=0)
        words = measure.word_features(texts)
        p = prober.p_unsafe(prober.train_on_folds(words, unsafe, split, seed=0)[0], words[split.heldout])
        assert low <= prober.balanced_accuracy(p, unsafe[split.heldout], 0.5) <= high


def test_nan_score_counts_as_firing():
    assert prober.balanced_accuracy(np.array([np.nan, 0.1]), np.array([True, False]), 0.5) == 1.0


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize(
    ("events", "trials", "expected"),
    [
        (0, 100, 1 - 0.05**0.01),  # closed form: 0.02951
        (1, 100, 0.04656),  # these three: the 0.95 quantile of Beta(k + 1, n - k)
        (5, 100, 0.10225),
        (20, 1000, 0.02893),
        (3, 3, 1.0),
    ],
)
def test_clopper_pearson_one_sided_95_percent_bound(events: int, trials: int, expected: float):
    assert calibrate.clopper_pearson_upper(events, trials) == pytest.approx(expected, abs=1e-5)


def test_clopper_pearson_two_sided_bound_is_the_one_sided_at_97_5_percent():
    assert calibrate.clopper_pearson_upper(0, 100, confidence=0.975) == pytest.approx(0.03622, abs=1e-5)


def test_clopper_pearson_covers_the_true_rate_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(200, 0.03, size=2000)
    bound = {int(k): calibrate.clopper_pearson_upper(int(k), 200) for k in set(draws)}
    assert np.mean([bound[int(k)] >= 0.03 for k in draws]) >= 0.95


def test_prompts_needed_is_the_smallest_number_that_suffices():
    n = calibrate.prompts_needed(0.01)
    assert n == 299
    assert calibrate.clopper_pearson_upper(0, n) <= 0.01 < calibrate.clopper_pearson_upper(0, n - 1)


def apart(prompts):
    """Each a cluster of its own."""
    return [str(i) for i in range(len(prompts))]


def scores(benign: int = 2000, unsafe: int = 500, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping (p, unsafe): Beta(1, 6) for benign, Beta(5, 2) for unsafe."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.beta(1, 6, benign), rng.beta(5, 2, unsafe)]), np.arange(benign + unsafe) >= benign


def test_threshold_keeps_the_bound_within_the_target_and_one_score_lower_does_not():
    p, unsafe = scores()
    threshold = calibrate.choose_threshold(p, unsafe, apart(p), target_fpr=0.05)
    benign = p[~unsafe]
    assert calibrate.clopper_pearson_upper(int((benign > threshold).sum()), 2000) <= 0.05
    caught = (p[unsafe] > threshold).sum()
    looser = p[unsafe & (p <= threshold)].max() - 1e-12  # would catch one more unsafe prompt
    assert caught > 0
    assert calibrate.clopper_pearson_upper(int((benign > looser).sum()), 2000) > 0.05


def test_threshold_holds_on_fresh_prompts():
    """The promise: in at least 95 of 100 fits the true false-positive rate is within the target."""
    kept = 0
    for seed in range(100):
        p, unsafe = scores(400, 100, seed=seed)
        threshold = calibrate.choose_threshold(p, unsafe, apart(p), target_fpr=0.05)
        kept += (1 - threshold) ** 6 <= 0.05  # survival function of Beta(1, 6)
    assert kept >= 95


def test_threshold_of_separable_scores_lies_half_way_and_wastes_no_false_positive():
    p = np.concatenate([np.linspace(0, 0.2, 500), np.linspace(0.8, 1, 100)])
    threshold = calibrate.choose_threshold(p, np.arange(600) >= 500, apart(p), target_fpr=0.05)
    assert threshold == pytest.approx(0.5)


def test_prompts_of_one_family_count_as_one():
    """20 families of 15 near-equal prompts: counted one by one, the bound was too low in a third of fits."""
    p, unsafe = scores(300, 50)
    families = [str(i // 15) for i in range(300)] + [f"unsafe {i}" for i in range(50)]
    with pytest.raises(InputError, match="cannot be shown with 20 held-out benign prompts"):
        calibrate.choose_threshold(p, unsafe, families, target_fpr=0.1)
    facts = calibrate.heldout_facts(p, unsafe, [""] * 350, families, threshold=float(np.sort(p[~unsafe])[-16]))
    assert facts["heldout_fpr"] == pytest.approx(15 / 300)
    assert facts["fpr_upper_95"] == pytest.approx(calibrate.clopper_pearson_upper(1, 20))
    p, unsafe = scores()
    alone = calibrate.choose_threshold(p, unsafe, apart(p), target_fpr=0.1)
    assert alone < calibrate.choose_threshold(p, unsafe, [str(i // 4) for i in range(2500)], target_fpr=0.1)


def test_families_of_different_sizes_count_as_their_effective_number():
    """100 prompts alone and one family of 500, which fires or not as one: the bound was below the truth in half of
    600 fits.
    """
    assert calibrate.independent([*map(str, range(100)), *["family"] * 500]) == 600**2 // (100 + 500**2) == 1
    rng, missed = np.random.default_rng(0), 0
    families = [*map(str, range(200)), *(f"family {i // 30}" for i in range(300))]
    for _ in range(200):
        fires = dict(zip(dict.fromkeys(families), rng.random(210) < 0.1, strict=True))
        missed += calibrate.rate_upper(np.array([fires[family] for family in families]), families) < 0.1
    assert missed <= 0.08 * 200


def test_target_that_the_data_cannot_show_is_an_error_that_says_how_many_prompts_it_takes():
    p, unsafe = scores(100, 50)
    with pytest.raises(InputError, match="cannot be shown with 100 held-out benign prompts: it takes 299"):
        calibrate.choose_threshold(p, unsafe, apart(p), target_fpr=0.01)


def test_benign_scores_of_one_leave_no_threshold():
    with pytest.raises(InputError, match=r"benign prompts score 1\.0"):
        calibrate.choose_threshold(np.ones(600), np.arange(600) >= 500, apart(range(600)), target_fpr=0.05)


def test_temperature_recovers_the_factor_by_which_logits_are_too_sharp():
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 20000)
    unsafe = rng.random(20000) < 1 / (1 + np.exp(-margin))
    logits = torch.from_numpy(np.stack([3 * margin / 2, -3 * margin / 2], axis=1))
    assert calibrate.fit_temperature(logits, unsafe) == pytest.approx(3, rel=0.05)


def test_temperature_of_faultless_data_does_not_collapse_scores_to_0_and_1():
    unsafe = np.arange(60) < 30
    logits = torch.tensor([[2.0, -2.0]] * 30 + [[-2.0, 2.0]] * 30)
    p = (logits / calibrate.fit_temperature(logits, unsafe)).softmax(dim=-1)[:, 0]
    assert p[0].item() == pytest.approx(31 / 32, abs=1e-3)  # Platt's target for 30 prompts a class


def test_folding_the_temperature_divides_the_logits():
    states, unsafe = separable(shift=2)
    fitted = trained(states, unsafe)
    expected = prober.prober_logits(fitted, states) / 2.5
    folded = prober.prober_logits(calibrate.fold_temperature(fitted, 2.5), states)
    torch.testing.assert_close(folded, expected, rtol=1e-5, atol=1e-5)


def test_calibration_error_of_known_scores():
    """Ten benign at 0.25 and ten unsafe at 0.75: each bin is off by 0.25. At 0 and 1 nothing is off."""
    unsafe = np.arange(20) >= 10
    assert calibrate.expected_calibration_error(np.where(unsafe, 0.75, 0.25), unsafe) == pytest.approx(0.25)
    assert calibrate.expected_calibration_error(unsafe.astype(float), unsafe) == 0


def test_heldout_facts_count_by_class_and_group():
    p = np.array([0.9, 0.4, 0.8, 0.1, 0.6, 0.2])
    unsafe = np.array([True, True, True, False, False, False])
    facts = calibrate.heldout_facts(p, unsafe, ["text", "image", "text", "vqa", "vqa", "text"], apart(p), threshold=0.5)
    assert facts["heldout_recall"] == pytest.approx(2 / 3)
    assert facts["heldout_fpr"] == pytest.approx(1 / 3)
    assert facts["heldout_accuracy"] == pytest.approx(2 / 3)
    assert facts["brier"] == pytest.approx((0.01 + 0.36 + 0.04 + 0.01 + 0.36 + 0.04) / 6)
    groups = {name: value for name, value in facts.items() if "." in name}
    assert groups == {
        "heldout_recall.text": 1.0,
        "heldout_recall.image": 0.0,
        "heldout_fpr.vqa": 0.5,
        "heldout_fpr.text": 0.0,
    }


# ---------------------------------------------------------------- Refusal Head


def test_steering_the_state_equals_the_authors_steering_of_the_embeddings():
    generator = torch.Generator().manual_seed(0)
    h, w, e = (torch.randn(*shape, generator=generator).double() for shape in ((5, 3, 16), (16, 16), (40, 16)))
    torch.testing.assert_close(refusal_head.steered_logits(h, w, e, 0.1), h @ (e + 0.1 * e @ w).T)


def toy_states(n: int, *, seed: int) -> torch.Tensor:
    """(n, 4, 24): each of 4 answer positions has its own centre, so that a linear map can tell them apart."""
    centres = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(0))
    return centres + 0.3 * torch.randn(n, 4, 24, generator=torch.Generator().manual_seed(seed))


def trained_head(seed: int = 0) -> tuple[refusal_head.RefusalHead, torch.Tensor, torch.Tensor]:
    embeddings = torch.randn(50, 24, generator=torch.Generator().manual_seed(3))
    answer = torch.tensor([7, 41, 3, 0])
    args = (toy_states(64, seed=1), toy_states(16, seed=2), answer, embeddings)
    return refusal_head.train_refusal_head(*args, strength=0.1, seed=seed, steps=400), answer, embeddings


def test_trained_head_says_the_answer_on_states_it_has_not_seen():
    head, answer, embeddings = trained_head()
    logits = refusal_head.steered_logits(toy_states(16, seed=9), head.steer_matrix, embeddings, 0.1)
    assert head.loss < head.initial_loss / 5
    assert (logits.argmax(dim=-1) == answer).all(dim=1).float().mean() > 0.9
    assert head.argmax_share > 0.95


def test_more_prompts_are_trained_on_for_more_steps():
    assert refusal_head.training_steps(torch.empty(20, 12, 1)) == 400
    assert refusal_head.training_steps(torch.empty(1500, 13, 1)) == 915  # 3 * 1500 * 13 / 64


def test_the_strength_in_use_is_far_from_those_that_refuse_less():
    def chosen(exact: dict[float, float]) -> float:
        """Of strengths, by the share of answers that are the refusal."""
        scores = [refusal_head.StrengthScore(at, share, 1.0, 1.0, 0.0, 0.0, "") for at, share in exact.items()]
        return refusal_head.choose_strength(scores)

    assert chosen({0: 1, 0.05: 0.2, 0.075: 1, 0.1: 1, 0.15: 1, 0.2: 1, 0.3: 0.7}) == 0.15
    assert chosen({0: 0, 0.05: 1, 0.1: 1, 0.2: 1}) == 0.1
    assert chosen({0: 0, 0.05: 0.1, 0.1: 0.8, 0.2: 0.7}) == 0.1
    # a single answer, or two: none may be lost
    assert chosen({0: 0, 0.05: 0, 0.1: 0, 0.2: 1}) == 0.2
    assert chosen({0: 0, 0.05: 0.5, 0.1: 0.5, 0.2: 1}) == 0.2
    # the demo's: 0.2 garbled 19 of 1,324 refusals, which the twelve did not show, 0.125 none
    assert chosen({0: 0, 0.05: 7 / 12, 0.075: 11 / 12, 0.1: 11 / 12, 0.125: 11 / 12, 0.15: 11 / 12, 0.2: 1}) == 0.125


def test_identity_matrix_changes_no_first_choice():
    """Why an untrained head is not a guard: W = I only scales the logits."""
    _, _, embeddings = trained_head()
    states = toy_states(16, seed=2)
    steered = refusal_head.steered_logits(states, torch.eye(24), embeddings, 0.1)
    torch.testing.assert_close(steered, 1.1 * states @ embeddings.T)


def test_refusal_head_repeats_with_its_seed():
    assert torch.equal(trained_head()[0].steer_matrix, trained_head()[0].steer_matrix)
    assert not torch.equal(trained_head()[0].steer_matrix, trained_head(seed=1)[0].steer_matrix)


def test_what_keeps_denormal_floats_out_of_the_training_changes_no_weight(monkeypatch: pytest.MonkeyPatch):
    """Embeddings so large that unlikely tokens fall below e^-60; gradients of 1e-39 make a step 16 times as long."""
    embeddings = 40 * torch.randn(50, 24, generator=torch.Generator().manual_seed(3))
    args = (toy_states(64, seed=1), toy_states(16, seed=2), torch.tensor([7, 41, 3, 0]), embeddings)
    trained = [refusal_head.train_refusal_head(*args, strength=0.1, seed=0, steps=400).steer_matrix]
    monkeypatch.setattr(refusal_head, "DEEPEST", float("inf"))
    trained.append(refusal_head.train_refusal_head(*args, strength=0.1, seed=0, steps=400).steer_matrix)
    logits = refusal_head.steered_logits(args[0], trained[1], embeddings, 0.1)
    assert (logits.amax(dim=-1, keepdim=True) - logits).max() > 100, "this test needs unlikely tokens"
    torch.testing.assert_close(*trained)


def test_artifact_rejects_a_matrix_that_was_never_trained(tmp_path: Path):
    weights = {"0.weight": torch.zeros(64, 8), "0.bias": torch.zeros(64), "2.weight": torch.zeros(2, 64)}
    facts = SafetyFacts(1, "m", 2, -1, 0.5, 0.1, "no", (), {}, {})
    SafetyArtifact(facts, {**weights, "2.bias": torch.zeros(2)}, torch.eye(8)).save(tmp_path)
    with pytest.raises(PackageError, match="never trained"):
        SafetyArtifact.load(tmp_path, hidden_size=8, num_hidden_layers=4)


def test_head_that_did_not_learn_is_an_error():
    args = (toy_states(8, seed=1), toy_states(8, seed=2), torch.tensor([7, 41, 3, 0]), torch.randn(50, 24))
    with pytest.raises(InputError, match="did not learn the refusal"):
        refusal_head.train_refusal_head(*args, strength=0.1, seed=0, steps=0)


# ---------------------------------------------------------------- reading pairs


def write_lines(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def many(n: int = 20) -> list[dict[str, object]]:
    return [{"unsafe": f"bad {i}", "safe": f"good {i}"} for i in range(n)]


def test_pairs_in_both_formats_are_read(tmp_path: Path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    ours = {"unsafe": "u", "safe": "s", "image": "a.png", "safe_image": "b.png", "channel": "image"}
    plain = {"unsafe": "u2", "safe": "s2", "image": "a.png"}
    vlsafe = {"orig_query": "u3", "safe_query": "s3", "image_id": "a.png"}
    file = write_lines(tmp_path / "p.jsonl", ours, plain, vlsafe, "", *many())
    a, b = (tmp_path / "a.png").resolve(), (tmp_path / "b.png").resolve()
    first = read_data([file]).pairs[:3]
    assert first == (
        Pair(Prompt("u", (a,)), Prompt("s", (b,)), "image", source="p"),
        Pair(Prompt("u2", (a,)), Prompt("s2", (a,)), "p", source="p"),
        Pair(Prompt("u3", (a,)), Prompt("s3", (a,)), "p", source="p"),
    )
    assert first[2].unsafe.where == f"{file}:3"
    assert read_data([file], text_only=True).pairs[2] == Pair(Prompt("u3"), Prompt("s3"), "p", source="p")


def test_pairs_without_their_pictures_are_fitted_on_only_if_that_is_said(tmp_path: Path):
    """VLSafe's pairs came without pictures, were read as texts, and the gate of a multimodal model never saw one."""
    rows = ({"orig_query": f"u{i}", "safe_query": f"s{i}", "image_id": "gone.jpg"} for i in range(20))
    file = write_lines(tmp_path / "p.jsonl", *rows)
    with pytest.raises(InputError, match=r"p\.jsonl:1: image 'gone\.jpg' not found .* or .* with --text-only"):
        read_data([file])
    assert read_data([file], text_only=True).images() == {}


def test_one_question_about_many_pictures_is_spread_over_the_split(tmp_path: Path):
    """1,000 toxic pictures with one question were one cluster, so all of them landed in one part."""
    for i in range(40):
        (tmp_path / f"{i}.png").write_text(f"picture {i % 30}")
    rows = [{"prompt": "what is this?", "images": [f"{i}.png"]} for i in range(40)]
    unsafe = write_lines(tmp_path / "toxic.jsonl", *rows)
    data = read_data([write_lines(tmp_path / "p.jsonl", *many())], [], [unsafe])
    items = data.labelled()
    toxic = [item for item in items if item.source == "toxic"]
    assert len(toxic) == 30  # equal pictures under other names are one prompt
    assert len({item.cluster for item in toxic}) == 30
    split = prober.split_by_text(
        [item.cluster for item in items], [(item.unsafe, item.group) for item in items], seed=0
    )
    assert [sum(items[row].source == "toxic" for row in rows) for rows in split.folds] == [6] * 5


def test_prompts_for_the_refusal_head_alone_are_no_fit_data_of_the_prober(tmp_path: Path):
    pairs, more = write_lines(tmp_path / "p.jsonl", *many()), write_lines(tmp_path / "r.jsonl", {"prompt": "refuse me"})
    data = read_data([pairs], refusal_only=[more])
    assert [item.prompt.text for item in data.refusal_only] == ["refuse me"]
    assert len(data.labelled()) == 40


def test_duplicates_are_used_once(tmp_path: Path):
    extra = write_lines(tmp_path / "b.jsonl", {"prompt": "good 1"}, {"prompt": "other", "group": "vqa"})
    data = read_data([write_lines(tmp_path / "p.jsonl", *many(), many()[0])], [extra])
    assert len(data.pairs) == 20  # else copies would narrow SAS's interval
    assert len(data.labelled()) == 41
    assert data.labelled()[-1] == Labelled(Prompt("other"), unsafe=False, group="vqa", source="b")


def test_prompts_are_read_in_the_formats_of_autosteer_eval(tmp_path: Path):
    (tmp_path / "a.png").touch()
    pairs = write_lines(tmp_path / "p.jsonl", *many())
    ours = {"prompt": "x", "images": ["a.png"], "group": "g", "family": "f"}
    benign = [
        write_lines(tmp_path / "ours.jsonl", ours),
        write_lines(tmp_path / "alpaca.jsonl", {"turns": ["y"], "dataset": "d"}),
    ]
    unsafe = [write_lines(tmp_path / "vlsafe.jsonl", {"query": "z", "image_id": "gone.png"})]
    data = read_data([pairs], benign, unsafe, images=tmp_path, text_only=True)
    assert data.extra == (
        Labelled(Prompt("x"), False, "g", "f", "ours"),
        Labelled(Prompt("y"), False, "alpaca", "", "alpaca"),
        Labelled(Prompt("z"), True, "vlsafe", "", "vlsafe"),
    )
    assert data.extra[2].prompt.where == f"{unsafe[0]}:1"
    assert read_data([pairs], benign).extra[0].prompt.images == ((tmp_path / "a.png").resolve(),)
    with pytest.raises(InputError, match=r"vlsafe\.jsonl:1: no image 'gone\.png' under"):
        read_data([pairs], benign, unsafe)


def test_a_pair_may_have_several_pictures_and_turns_before(tmp_path: Path):
    row = {"unsafe": "u", "safe": "s", "image": ["a.png", "b.png"], "safe_image": ["b.png"], "earlier": ["hi", "ho"]}
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    pair = read_data([write_lines(tmp_path / "p.jsonl", row, *many())]).pairs[0]
    a, b = ((tmp_path / name).resolve() for name in ("a.png", "b.png"))
    assert pair.unsafe == Prompt("u", (a, b), earlier=("hi", "ho"))
    assert pair.safe == Prompt("s", (b,), earlier=("hi", "ho"))


def test_a_dialogue_is_read_as_it_stands(tmp_path: Path):
    pairs = write_lines(tmp_path / "p.jsonl", *many())
    said = {"turns": ["what is it?", "a key.", "how do i hide it?"], "unsafe": True, "images": ["a.png"]}
    (tmp_path / "a.png").write_bytes(b"picture")
    (item,) = read_data([pairs], unsafe=[write_lines(tmp_path / "u.jsonl", said)]).extra
    picture = (tmp_path / "a.png").resolve()
    assert item.prompt == Prompt("how do i hide it?", (picture,), earlier=("what is it?", "a key.")) and item.unsafe
    assert as_messages(item.prompt) == [
        Message.user("what is it?", [picture]),
        Message.assistant("a key.", trusted=True),
        Message.user("how do i hide it?"),
    ]


def test_pairs_may_begin_with_a_byte_order_mark(tmp_path: Path):
    plain = write_lines(tmp_path / "plain.jsonl", *many())
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert read_data([tmp_path / "marked.jsonl"]).pairs[0].unsafe == read_data([plain]).pairs[0].unsafe


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": ["a", "b", "c"], "prompt": None}, "b.jsonl:1: "),
        ({"turns": ["a", " ", "c"], "unsafe": False}, "b.jsonl:1: there is no text in a turn"),
        ({"prompt": " "}, "b.jsonl:1: there is no text"),
        ({"prompt": "x", "unsafe": True}, "b.jsonl:1: not a row of a test set ('unsafe' contradicts"),
        ({"prompt": "x", "image": "a.png"}, "b.jsonl:1: 'image' is not read"),
        ({"prompt": "x", "Images": ["a.png"]}, "b.jsonl:1: 'Images' is not read"),
    ],
)
def test_bad_prompt_is_named_with_file_and_line(tmp_path: Path, row: object, message: str):
    pairs = write_lines(tmp_path / "p.jsonl", *many())
    with pytest.raises(InputError) as error:
        read_data([pairs], [write_lines(tmp_path / "b.jsonl", row)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "p.jsonl:21: not JSON"),
        ("[1]", "p.jsonl:21: not a JSON object"),
        ({"unsafe": "x"}, "p.jsonl:21: field 'safe' is missing (found: 'unsafe')"),
        ({"orig_query": "x"}, "p.jsonl:21: field 'safe_query' is missing"),
        ({"safe_query": "x"}, "p.jsonl:21: field 'orig_query' is missing"),
        ({"unsafe": "x", "safe": " "}, "p.jsonl:21: field 'safe' must be a text that is not empty"),
        ({"unsafe": "x", "safe": "y", "image": ["a.png", 1]}, "p.jsonl:21: field 'image' must be a file name"),
        ({"unsafe": "x", "safe": "y", "image": " "}, "p.jsonl:21: field 'image' must be a file name"),
        ({"unsafe": "x", "safe": "y", "earlier": ["hi"]}, "p.jsonl:21: field 'earlier' must be a list of texts"),
        ({"unsafe": "x", "safe": "y", "earlier": "hi"}, "p.jsonl:21: field 'earlier' must be a list of texts"),
        ({"unsafe": "x", "safe": 3}, "p.jsonl:21: field 'safe' must be a text"),
        ({"unsafe": "x", "safe": "y", "img": "z"}, "p.jsonl:21: unknown field 'img'"),
        ({"unsafe": "x", "safe": "y", "image": "no.png"}, "p.jsonl:21: image 'no.png' not found under"),
        ({"unsafe": "good 3", "safe": "y"}, "p.jsonl:21: this prompt is unsafe here but safe at"),
    ],
)
def test_bad_row_is_named_with_file_and_line(tmp_path: Path, row: object, message: str):
    file = write_lines(tmp_path / "p.jsonl", *many(), row)
    with pytest.raises(InputError) as error:
        read_data([file])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_too_few_pairs_are_errors(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.jsonl: not readable"):
        read_data([tmp_path / "none.jsonl"])
    with pytest.raises(InputError, match="19 pairs, at least 20"):
        read_data([write_lines(tmp_path / "p.jsonl", *many(19))])


def test_file_without_rows_is_an_error_wherever_it_is_given(tmp_path: Path):
    pairs, empty = write_lines(tmp_path / "p.jsonl", *many()), write_lines(tmp_path / "e.jsonl", "", " ")
    for read in (
        lambda: read_data([pairs, empty]),
        lambda: read_data([pairs], [empty]),
        lambda: read_data([pairs], [], [empty]),
        lambda: read_external([empty], unsafe=True),
    ):
        with pytest.raises(InputError, match=r"e\.jsonl: no rows"):
            read()


def test_same_words_in_other_case_are_a_contradiction(tmp_path: Path):
    pairs = write_lines(tmp_path / "p.jsonl", *many())
    benign = write_lines(tmp_path / "b.jsonl", {"prompt": f"  {many()[0]['unsafe'].upper()} "})
    with pytest.raises(InputError, match=r"b\.jsonl:1: this prompt is safe here but unsafe at .*p\.jsonl:1"):
        read_data([pairs], [benign])
    with pytest.raises(InputError, match="unsafe here but safe at"):
        read_data([pairs], refusal_only=[write_lines(tmp_path / "r.jsonl", {"prompt": many()[0]["safe"]})])


def test_same_text_with_another_image_is_no_contradiction(tmp_path: Path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text(name)
    row = {"unsafe": "make this", "safe": "make this", "image": "a.png", "safe_image": "b.png"}
    assert len(read_data([write_lines(tmp_path / "p.jsonl", row, *many())]).pairs) == 21


# ---------------------------------------------------------------- proof


def test_prompts_with_tall_pictures_come_last_in_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Six tall pictures went into every demo package, and Pillow 12 shrank them to other pixels than Pillow 13."""
    for name, size in (("tall", (20, 60)), ("wide", (60, 20)), ("square", (30, 30))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    names = ["tall"] * 6 + ["wide"] * 3 + ["square"] * 2 + ["tall"]
    prompts = [Labelled(Prompt(f"q {i}", (tmp_path / f"{name}.png",)), True, "g") for i, name in enumerate(names)]
    monkeypatch.setattr(proof, "_tokens", lambda fit_model, prompt: ())
    p = np.full(len(prompts), 0.95)
    p[9] = 0.9  # the clearest
    chosen = proof.choose_proof(None, prompts, p, 0.5, published=True)  # type: ignore[arg-type]
    assert chosen == [9, 6, 7, 8, 10, 0]


def test_no_dialogue_is_in_the_proof(monkeypatch: pytest.MonkeyPatch):
    """A proof has one text: a dialogue's last turn alone has another score, and no export would agree with it."""
    monkeypatch.setattr(proof, "_tokens", lambda fit_model, prompt: ())
    prompts = [Labelled(Prompt(f"q {i}", earlier=("hi", "ho") * (i % 2)), True, "g") for i in range(8)]
    chosen = proof.choose_proof(None, prompts, np.full(8, 0.95), 0.5, published=True)  # type: ignore[arg-type]
    assert chosen == [0, 2, 4, 6]


def test_two_files_of_one_name_are_refused(tmp_path: Path):
    """A data set is known by its file's name: weights and the set that is left out would go by both at once."""
    (tmp_path / "a").mkdir()
    pairs = write_lines(tmp_path / "p.jsonl", *many())
    files = [write_lines(folder / "x.jsonl", {"prompt": str(folder)}) for folder in (tmp_path, tmp_path / "a")]
    with pytest.raises(InputError, match=r"x\.jsonl and .*x\.jsonl: a data set is known by its file's name"):
        read_data([pairs], files)
    read_data([pairs], [], [files[0]], refusal_only=[files[0]])


def test_equal_texts_stay_together_whatever_their_case_and_family(tmp_path: Path):
    rows = [{"unsafe": f"bad {i}", "safe": f"good {i}", "family": f"f{i}"} for i in range(40)]
    rows += [{"unsafe": f"BAD {i}", "safe": f"fine {i}", "family": f"g{i}"} for i in range(40)]
    benign = write_lines(tmp_path / "b.jsonl", *({"prompt": f"  GOOD {i}"} for i in range(40)))
    data = read_data([write_lines(tmp_path / "p.jsonl", *rows)], [benign])
    items = data.labelled()
    split = split_prompts(data, items, seed=0)
    fold = {row: number for number, rows in enumerate(split.folds) for row in rows.tolist()}
    folds: dict[str, set[int]] = {}
    for row, item in enumerate(items):
        folds.setdefault(item.prompt.words_key, set()).add(fold[row])
    assert len(folds) == 120 and all(len(numbers) == 1 for numbers in folds.values())


def test_sas_is_of_the_pairs_of_which_nothing_is_held_out(tmp_path: Path):
    """Measured on prompts that had helped to choose the layer, a gate looked better than it is."""
    data = read_data([write_lines(tmp_path / "p.jsonl", *many())])
    prompts, read = data.labelled(), set[int]()
    split = split_prompts(data, prompts, seed=0)

    class States:
        def __getitem__(self, rows: list[int]) -> torch.Tensor:
            read.update(rows)
            return torch.randn(len(rows), 3, 1, 8)

    arranged = SimpleNamespace(prompts=prompts, split=split)
    fit_module._sas(data, arranged, States(), ["last"], 0, Console(quiet=True))
    assert read and read <= set(split.used.tolist())


def test_test_prompts_that_the_fit_has_are_left_out(tmp_path: Path):
    data = read_data([write_lines(tmp_path / "p.jsonl", *many())])
    tests = read_external([write_lines(tmp_path / "t.jsonl", {"prompt": "BAD  1"}, {"prompt": "new"})], unsafe=True)
    assert [item.prompt.text for item in never_fitted(tests, data)] == ["new"]
    rows = [{"unsafe": f"bad {i}", "safe": f"good {i}", "family": f"f{i}"} for i in range(40)]
    data = read_data([write_lines(tmp_path / "families.jsonl", *rows)])
    tests = [Labelled(Prompt(text), True, "", family) for text, family in (("Bad 1", ""), ("x", "f2"), ("x", "g"))]
    assert [item.family for item in never_fitted(tests, data)] == ["g"]


def test_what_is_left_out_with_a_data_set_is_left_out_in_other_files_too(tmp_path: Path):
    """48 of 48 prompts of one file, whose words the other has with families, stayed in training."""
    rows = [{"unsafe": f"bad {i}", "safe": f"good {i}", "family": f"f{i}"} for i in range(40)]
    pairs = write_lines(tmp_path / "p.jsonl", *rows)
    benign = write_lines(tmp_path / "b.jsonl", *({"prompt": f"GOOD {i}"} for i in range(40)))
    items = read_data([pairs], [benign]).labelled()
    clusters = clusters_of(items)
    of = {name: {c for c, item in zip(clusters, items, strict=True) if item.source == name} for name in ("p", "b")}
    assert of["b"] == of["p"] == {f"family f{i}" for i in range(40)}


def test_added_tokens_that_are_plain_may_stand_in_a_text():
    """Gemma's tokenizer has "\\n" among them: every fit was refused."""
    added = {1: SimpleNamespace(content="<end>", special=True), 2: SimpleNamespace(content="\n", special=False)}
    processor = SimpleNamespace(tokenizer=SimpleNamespace(added_tokens_decoder=added), image_token="<image>")
    assert special_tokens(processor) == ["<end>", "<image>"]
