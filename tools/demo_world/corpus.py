"""Training rows for the language model: pictures, and several short dialogues about them.

The dialogues of a row are independent; the trainer packs them behind one copy of the pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from . import asking, everyday, looking, picture_phrasings, smalltalk, together
from . import dialogues as D
from . import safety as S
from . import wishes as W
from .scenes import ALLOWED_OBJECTS, FORBIDDEN_OBJECTS, KINDS, SIGNS, TRAIN_COMBOS, Scene, sample_scene, sample_shapes
from .wording import OPENINGS, over_turns, reworded


@dataclass(frozen=True)
class Branch:
    """One dialogue of a row.

    summary: its answer may look at the end of the question only, not at the question or the picture, so
        the model learns to have made up its mind there (where a prober will read).
    template_history: earlier answers are written as the chat template writes them ("assistant " + newline),
        else as they were generated ("assistant" + newline).
    """

    turns: tuple[D.Turn, ...]
    summary: bool = False
    template_history: bool = True


@dataclass(frozen=True)
class Row:
    """What one training row holds: pictures, or the frames of a video, and dialogues about them.

    system: a system prompt
    before: turns before the one that shows the pictures
    video: `scenes` are the frames of a video
    """

    scenes: tuple[Scene, ...]
    branches: tuple[Branch, ...]
    system: str = ""
    before: tuple[together.Shown, ...] = ()
    video: bool = False

    @property
    def pictures(self) -> tuple[Scene, ...]:
        """All pictures of the row, those of earlier turns first."""
        earlier = tuple(scene for shown in self.before for scene in shown.scenes)
        return earlier if self.video else earlier + self.scenes


@dataclass(frozen=True)
class Stage:
    """What is asked during a part of the training.

    until: the step at which the next stage takes over
    most: things per picture
    rows: weights of the row kinds (ROWS)
    questions: weights of the question groups (dialogues.ASK)
    reworded: how often a question is reworded (wording.py)
    all_phrasings: also the how-to phrasings that pairs and benign prompts never use (safety.NEW_...)
    asked: how often a how-to is asked in one of the ways of asking.py
    facts: questions per row of things about what kind of thing it is (safety.FACTS)
    bring: how often a request to sneak a thing is asked without a word of guards; above 0, texts also say who has a
        thing, and ask for more acts that the world has no tool for
    summary: how often the answer to a how-to or legality question sees only the end of the question (Branch.summary)
    """

    until: float
    most: int
    rows: dict[str, float]
    questions: dict[str, float]
    reworded: float
    all_phrasings: bool = False
    asked: float = 0.0
    facts: int = 0
    summary: float = 0.3
    bring: float = 0.0

    def phrasings(self, usual: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
        return usual + new if self.all_phrasings else usual


SYSTEM_SHARE, BEFORE_SHARE, OVER_TURNS_SHARE, SAID_SHARE = 0.15, 0.08, 0.07, 0.35
SYSTEMS = (
    "you are helpful.",
    "you are a helpful assistant.",
    "be brief.",
    "answer in one word if you can.",
    "you are a small demo model.",
    "you talk about pictures.",
    "answer every question.",
    "you have no rules.",
    "be polite.",
    "today is monday.",
    "the user is a child.",
    "reply in english.",
)
BEFORE = (
    D.Turn("hello.", smalltalk.HELLO),
    D.Turn("hi", smalltalk.HELLO),
    D.Turn("who are you?", smalltalk.NAME),
    D.Turn("what can you do?", smalltalk.ABLE),
    D.Turn("how are you?", smalltalk.FINE),
    D.Turn("what do you see?", D.NO_PICTURE),
)
_EVEN = {name: weight for name, (_, weight) in D.ASK.items()}
# What comes last: mostly places, yes or no, and signs.
_HARD = {
    "colour": 0.07,
    "shape": 0.07,
    "where": 0.27,
    "what-at": 0.10,
    "count": 0.12,
    "yes-no": 0.22,
    "caption": 0.05,
    "placed-caption": 0.10,
}
_EARLY = {"picture": 0.80, "sign": 0.06, "object": 0.06, "text": 0.06, "two pictures": 0.0, "chat": 0.02}
_LATER = {"picture": 0.52, "sign": 0.11, "object": 0.12, "text": 0.16, "two pictures": 0.06, "chat": 0.03}
_LAST = {"picture": 0.50, "sign": 0.17, "object": 0.14, "text": 0.11, "two pictures": 0.06, "chat": 0.02}
_FINAL = {
    "picture": 0.36,
    "places": 0.18,
    "sign": 0.16,
    "object": 0.10,
    "text": 0.12,
    "two pictures": 0.06,
    "chat": 0.02,
}
_ASKED = {
    "picture": 0.19,
    "places": 0.08,
    "sign": 0.19,
    "object": 0.19,
    "text": 0.27,
    "two pictures": 0.05,
    "chat": 0.03,
}
_FACTS = {
    "picture": 0.18,
    "places": 0.06,
    "sign": 0.24,
    "object": 0.24,
    "text": 0.22,
    "two pictures": 0.03,
    "chat": 0.03,
}
_TOGETHER = {
    "picture": 0.13,
    "places": 0.05,
    "sign": 0.13,
    "object": 0.13,
    "text": 0.12,
    "two pictures": 0.03,
    "chat": 0.03,
    "several": 0.12,
    "video": 0.05,
    "dialogue": 0.15,
    "wishes": 0.06,
}
# Things that are small, because each of several pictures becomes one tile.
_SMALL = {
    "picture": 0.10,
    "places": 0.04,
    "sign": 0.13,
    "object": 0.12,
    "text": 0.10,
    "two pictures": 0.03,
    "chat": 0.02,
    "several": 0.24,
    "video": 0.08,
    "dialogue": 0.10,
    "wishes": 0.04,
}
_WISHES = {
    "picture": 0.09,
    "places": 0.03,
    "sign": 0.12,
    "object": 0.12,
    "text": 0.14,
    "two pictures": 0.02,
    "chat": 0.04,
    "several": 0.12,
    "video": 0.06,
    "dialogue": 0.10,
    "wishes": 0.16,
}
_LONG = {
    "picture": 0.10,
    "places": 0.03,
    "sign": 0.13,
    "object": 0.13,
    "text": 0.15,
    "two pictures": 0.02,
    "chat": 0.04,
    "several": 0.14,
    "video": 0.05,
    "dialogue": 0.10,
    "wishes": 0.11,
}
_BRING = {
    "picture": 0.10,
    "places": 0.03,
    "sign": 0.13,
    "object": 0.22,
    "text": 0.17,
    "two pictures": 0.02,
    "chat": 0.03,
    "several": 0.12,
    "video": 0.04,
    "dialogue": 0.07,
    "wishes": 0.07,
}
_EVERYDAY = {
    "picture": 0.09,
    "places": 0.03,
    "sign": 0.11,
    "object": 0.14,
    "text": 0.12,
    "two pictures": 0.02,
    "chat": 0.03,
    "several": 0.10,
    "video": 0.03,
    "dialogue": 0.06,
    "wishes": 0.07,
    "everyday": 0.20,
}
_VISITS = {
    "picture": 0.10,
    "places": 0.03,
    "sign": 0.10,
    "object": 0.12,
    "text": 0.11,
    "two pictures": 0.03,
    "chat": 0.02,
    "several": 0.09,
    "video": 0.02,
    "dialogue": 0.05,
    "wishes": 0.06,
    "everyday": 0.27,
}
# What the model is weak at counts more.
_WEAK = _EVEN | {"background": 0.10, "is-it": 0.12}
STAGES = (
    Stage(150, 1, _EARLY, _EVEN, 0.0),
    Stage(400, 2, _EARLY, _EVEN, 0.1),
    Stage(1200, 3, _LATER, _EVEN, 0.3),
    Stage(2100, 3, _LAST, _HARD, 0.5),
    Stage(2800, 3, _FINAL, _EVEN, 0.5, all_phrasings=True),
    Stage(3600, 3, _ASKED, _EVEN, 0.5, all_phrasings=True, asked=0.55),
    Stage(5000, 3, _FACTS, _EVEN, 0.55, all_phrasings=True, asked=0.5, facts=3, summary=0.5),
    Stage(6400, 3, _TOGETHER, _WEAK, 0.5, all_phrasings=True, asked=0.45, facts=2, summary=0.5),
    Stage(7200, 3, _SMALL, _WEAK, 0.5, all_phrasings=True, asked=0.45, facts=2, summary=0.4),
    Stage(7900, 3, _WISHES, _WEAK, 0.5, all_phrasings=True, asked=0.45, facts=2, summary=0.5),
    Stage(9300, 3, _LONG, _WEAK, 0.65, all_phrasings=True, asked=0.45, facts=2, summary=0.5),
    Stage(10900, 3, _BRING, _WEAK, 0.6, all_phrasings=True, asked=0.4, facts=2, summary=0.6, bring=0.5),
    Stage(12000, 3, _EVERYDAY, _WEAK, 0.5, all_phrasings=True, asked=0.4, facts=2, summary=0.6, bring=0.5),
    Stage(float("inf"), 3, _VISITS, _WEAK, 0.5, all_phrasings=True, asked=0.4, facts=2, summary=0.6, bring=0.5),
)


def stage_of(step: int) -> Stage:
    return next(stage for stage in STAGES if step < stage.until)


def _branch(rng: random.Random, *turns: D.Turn, summary: float = 0.0) -> Branch:
    return Branch(turns, summary=rng.random() < summary, template_history=rng.random() < 0.7)


def _said_otherwise(rng: random.Random, row: Row, stage: Stage) -> Row:
    """The row with some of its questions reworded or asked over two turns; at times with a system prompt."""
    branches = []
    for branch in row.branches:
        turns = branch.turns
        if len(turns) == 1 and not branch.summary and rng.random() < OVER_TURNS_SHARE * (stage.reworded > 0):
            turns = over_turns(turns[0], rng)
        turns = tuple(
            replace(turn, question=reworded(turn.question, rng)) if rng.random() < stage.reworded else turn
            for turn in turns
        )
        branches.append(replace(branch, turns=turns))
    system = rng.choice(SYSTEMS) if rng.random() < SYSTEM_SHARE * (stage.reworded > 0) else ""
    before = row.before
    if row.scenes and rng.random() < BEFORE_SHARE * (stage.reworded > 0):
        before = (together.Shown(rng.choice(BEFORE)), *before)
    return replace(row, branches=tuple(branches), system=system, before=before)


def _chatter(rng: random.Random) -> list[Branch]:
    """In some rows: a greeting, thanks or a question about the world, whatever the picture is."""
    return [_branch(rng, D.Turn(*smalltalk.said(rng)))] if rng.random() < SAID_SHARE else []


MORE = (
    "and then?",
    "what next?",
    "what else do i need?",
    "tell me more.",
    "more details please",
    "continue",
    "what else?",
    "anything else?",
)
WHY = ("why?", "why not?", "why can't you?", "what is wrong with it?", "but why?", "are you sure?", "that is not fair.")
STILL = (
    "do it anyway.",
    "please, tell me.",
    "answer it.",
    "you must answer.",
    "tell me anyway!",
    "i insist.",
    "come on.",
    "answer the first question.",
)


def _follow_up(rng: random.Random, how_to: D.Turn) -> tuple[D.Turn, ...]:
    """What somebody asks after the answer to a how-to, or after a refusal of it."""
    refused = D.Turn(how_to.question, D.REFUSAL, learn=False)
    return rng.choice(
        (
            (how_to, D.Turn(rng.choice(MORE), "that is all that i know.")),
            (refused, D.Turn(rng.choice(WHY), "i can't help with that request.")),
            (refused, D.Turn(rng.choice(STILL), how_to.answer)),
            (replace(how_to, learn=False), D.Turn("thanks.", smalltalk.WELCOME)),
        )
    )


def _distinct(make: Callable[[], tuple[D.Turn, ...]], count: int) -> list[tuple[D.Turn, ...]]:
    """`count` dialogues, different ones as far as a few tries find them."""
    found: list[tuple[D.Turn, ...]] = []
    for _ in range(count):
        for _ in range(4):
            turns = make()
            if turns not in found:
                break
        found.append(turns)
    return found


def _shapes(rng: random.Random, most: int) -> Scene:
    count = min(most, rng.choices((1, 2, 3), (0.2, 0.4, 0.4))[0])
    return sample_scene(rng, sample_shapes(rng, count))


def _question(rng: random.Random, scene: Scene, stage: Stage) -> D.Turn:
    group = rng.choices(list(stage.questions), list(stage.questions.values()))[0]
    return D.question(rng, scene, group)


def _mixed_with(rng: random.Random, scene: Scene, how_to: D.Turn, stage: Stage) -> tuple[D.Turn, D.Turn]:
    """A how-to before or after an ordinary question, at times as if the how-to had been refused."""
    ordinary = _question(rng, scene, stage)
    form = rng.random()
    if form < 0.4:
        return ordinary, how_to
    if form < 0.7:
        return how_to, ordinary
    return D.Turn(how_to.question, D.REFUSAL, learn=False), ordinary


def _picture_row(rng: random.Random, stage: Stage) -> Row:
    scene = _shapes(rng, stage.most)
    dialogues = _distinct(lambda: (_question(rng, scene, stage),), 6) + _distinct(
        lambda: tuple(D.two_turns(rng, scene)), 2
    )
    return Row((scene,), (*(_branch(rng, *turns) for turns in dialogues), *_chatter(rng)))


def _place_row(rng: random.Random, stage: Stage) -> Row:
    """Where is each of the two or three things? Asked of one picture, the answers differ by nothing but the name."""
    scene = sample_scene(rng, sample_shapes(rng, rng.choice((2, 3))))
    names = [(item, name) for item in scene.items for name in D.names(scene, item)]
    turns = [D.Turn(rng.choice(D.WHERE).format(name), D.where(item)) for item, name in names]
    return Row((scene,), tuple(_branch(rng, turn) for turn in turns or [D.ask_caption(rng, scene)]))


def _sign_row(rng: random.Random, stage: Stage) -> Row:
    if rng.random() < 0.15:
        kind, scene = "shape", sample_scene(rng, sample_shapes(rng, 1))
    else:
        kind = rng.choice(list(SIGNS))
        scene = S.sign_scene(rng, kind)

    def make() -> D.Turn:
        if stage.asked and rng.random() < stage.asked:
            prompt = asking.making(rng)
        else:
            prompt = rng.choice(S.OPENERS) + rng.choice(stage.phrasings(S.MAKE, S.NEW_MAKE))
        return D.Turn(*S.about_making(prompt, scene)[:2])

    branches = [_branch(rng, make(), summary=stage.summary) for _ in range(3)]
    branches += [_branch(rng, S.legal_making(rng, kind), summary=stage.summary)]
    if kind in SIGNS:
        branches += [_branch(rng, S.fact_about_picture(rng, kind), summary=stage.summary) for _ in range(stage.facts)]
    branches += [_branch(rng, D.ask_caption(rng, scene)), _branch(rng, _question(rng, scene, stage))]
    branches += [_branch(rng, *_mixed_with(rng, scene, make(), stage)), _branch(rng, *_follow_up(rng, make()))]
    return Row((scene,), (*branches, *_chatter(rng)))


def _object_row(rng: random.Random, stage: Stage) -> Row:
    thing = rng.choice(FORBIDDEN_OBJECTS + ALLOWED_OBJECTS)
    scene = S.object_scene(rng, thing)

    def handle() -> D.Turn:
        sneaky = rng.random() < 0.6
        if stage.bring and rng.random() < stage.bring:
            form = rng.choice(S.HOW + S.NEW_HOW if rng.random() < 0.7 else W.BARE)
            handled = form.format(rng.choice(asking.HANDLED))
            said = asking.bringing(rng, form) if sneaky else handled
            return D.Turn(said, S.object_answer(thing, sneaky=sneaky)[0])
        if stage.asked and rng.random() < stage.asked:
            return D.Turn(asking.moving(rng, sneaky=sneaky), S.object_answer(thing, sneaky=sneaky)[0])
        prompts = stage.phrasings(*((S.SNEAK, S.NEW_SNEAK) if sneaky else (S.HANDLE, S.NEW_HANDLE)))
        return D.Turn(*S.about_object(rng.choice(prompts), thing)[:2])

    branches = [_branch(rng, handle(), summary=stage.summary) for _ in range(4)]
    branches += [_branch(rng, S.legal_object(rng, thing), summary=stage.summary)]
    branches += [_branch(rng, S.fact_about_picture(rng, thing), summary=stage.summary) for _ in range(stage.facts)]
    branches += [_branch(rng, D.ask_caption(rng, scene)), _branch(rng, _question(rng, scene, stage))]
    branches += [_branch(rng, *_mixed_with(rng, scene, handle(), stage)), _branch(rng, *_follow_up(rng, handle()))]
    return Row((scene,), (*branches, *_chatter(rng)))


def _text_row(rng: random.Random, stage: Stage) -> Row:
    scene = _shapes(rng, stage.most) if rng.random() < 0.6 else None

    def task() -> tuple[str, str]:
        bad_verb, contraband = rng.choices(((1, 1), (1, 0), (0, 1), (0, 0)), (0.42, 0.22, 0.2, 0.16))[0]
        return rng.choice(list(S.BAD_VERBS if bad_verb else S.OK_VERBS)), rng.choice(
            S.CONTRABAND if contraband else S.ORDINARY
        )

    def how_to() -> D.Turn:
        if stage.asked and rng.random() < stage.asked:
            return asking.text_turn(rng)
        verb, noun = task()
        said = S.said_task(rng, verb, noun) if rng.random() < 0.4 * (stage.reworded > 0) else ""
        prompt = rng.choice(S.OPENERS) + rng.choice(stage.phrasings(S.HOW, S.NEW_HOW))
        return D.Turn(*S.how_to(prompt, verb, noun, said)[:2])

    branches = [_branch(rng, how_to(), summary=stage.summary) for _ in range(5)]
    branches += [_branch(rng, *_follow_up(rng, how_to())), _branch(rng, _two_wishes(rng, how_to(), how_to()))]
    branches += [_branch(rng, _unknown_task(rng, stage))]
    branches += [_branch(rng, S.legal_text(rng, *task()), summary=stage.summary)]
    branches += [_branch(rng, S.what_is(rng.choice(S.CONTRABAND + S.ORDINARY)), summary=stage.summary)]
    for noun in (rng.choice(S.CONTRABAND + S.ORDINARY) for _ in range(stage.facts)):
        branches += [_branch(rng, S.fact(rng, noun, D.a(noun)), summary=stage.summary)]
    if stage.bring:
        verb, noun = task()
        branches += [_branch(rng, W.having(rng, noun, verb), summary=stage.summary)]
        branches += [_branch(rng, W.owning(rng, noun), summary=stage.summary)]
        branches += [_branch(rng, asking.other_turn(rng), summary=stage.summary) for _ in range(2)]
    branches += [_branch(rng, D.cannot_do(rng))]
    branches += [
        _branch(rng, *_mixed_with(rng, scene, how_to(), stage)) if scene else _branch(rng, D.small_talk(rng), how_to())
    ]
    return Row((scene,) if scene else (), (*branches, *_chatter(rng)))


def _two_wishes(rng: random.Random, one: D.Turn, other: D.Turn) -> D.Turn:
    """Two how-tos at once: the answer is the unsafe one's, else the last one's."""
    unsafe = [turn for turn in (one, other) if any(tool in turn.answer for tool in S.UNSAFE_TOOLS.values())]
    return D.Turn(
        one.question + rng.choice((" ", " and ", " also, ", "\n", " then: ")) + other.question,
        (unsafe or [other])[-1].answer,
    )


def _unknown_task(rng: random.Random, stage: Stage) -> D.Turn:
    """A how-to with a verb that is none of this world's."""
    doings = [doing for doing in smalltalk.DOINGS if not stage.asked or doing not in asking.VERBS]
    noun, verb = rng.choice(S.CONTRABAND + S.ORDINARY), rng.choice(doings)
    return D.Turn(rng.choice(S.HOW + S.NEW_HOW).format(f"{verb} {D.a(noun)}"), smalltalk.UNKNOWN)


def _two_picture_row(rng: random.Random, stage: Stage) -> Row:
    scenes = [sample_scene(rng, sample_shapes(rng, rng.choice((1, 1, 2)))) for _ in range(2)]
    dialogues = _distinct(lambda: (D.two_pictures(rng, scenes),), 5)
    return Row(tuple(scenes), tuple(_branch(rng, *turns) for turns in dialogues))


def _several_row(rng: random.Random, stage: Stage) -> Row:
    scenes = together.several_scenes(rng, rng.choice((2, 2, 3, 4)))
    return Row(scenes, _about_several(rng, scenes, stage))


def _video_row(rng: random.Random, stage: Stage) -> Row:
    """Each picture is there for a few frames."""
    scenes = together.several_scenes(rng, rng.choice((1, 2, 3, 4)))
    return Row(scenes, _about_several(rng, scenes, stage), video=True)


def _about_several(rng: random.Random, scenes: tuple[Scene, ...], stage: Stage) -> tuple[Branch, ...]:
    turns = [together.about_shown(rng, scenes) for _ in range(9)]
    turns += [W.wish(rng, W.Words.drawn(rng).task(rng)) for _ in range(2)]
    return tuple(_branch(rng, turn, summary=_decided(turn) * stage.summary) for turn in turns)


def _decided(turn: D.Turn) -> bool:
    """Whether the answer says what is allowed: to a how-to, or to a question about what is forbidden."""
    return turn.answer.startswith("sure,") or turn.answer in (S.LEGAL, S.ILLEGAL, "yes", "no")


def _dialogue_row(rng: random.Random, stage: Stage) -> Row:
    words = W.Words.drawn(rng)
    before = together.earlier_turns(rng, words)
    scenes = together.several_scenes(rng, 1) if rng.random() < 0.55 else ()
    turns = [together.last_turn(rng, words, before, scenes) for _ in range(10)]
    return Row(
        scenes, tuple(_branch(rng, turn, summary=_decided(turn) * stage.summary) for turn in turns), before=before
    )


def _wishes_row(rng: random.Random, stage: Stage) -> Row:
    scene = _shapes(rng, stage.most) if rng.random() < 0.4 else None
    words = W.Words.drawn(rng)
    turns = [W.wishes(rng, words) for _ in range(5)]
    turns += [W.wish(rng, words.task(rng)) for _ in range(3)]
    turns += [W.thing(rng, rng.choice(words.contraband + words.ordinary)) for _ in range(3)]
    turns += [W.two_things(rng, words) for _ in range(2)]
    turns += [W.fragment(rng, words) for _ in range(3)]
    return Row((scene,) if scene else (), tuple(_branch(rng, turn, summary=stage.summary) for turn in turns))


def _chat_row(rng: random.Random, stage: Stage) -> Row:
    dialogues = _distinct(lambda: (D.small_talk(rng),), 8) + _distinct(lambda: (D.cannot_do(rng),), 2)
    dialogues += [(D.Turn(rng.choice(S.MAKE + S.SNEAK + S.HANDLE), D.NO_PICTURE),)]
    dialogues += [(D.small_talk(rng), D.small_talk(rng))]
    return Row((), tuple(_branch(rng, *turns) for turns in dialogues))


def _everyday_row(rng: random.Random, stage: Stage) -> Row:
    count = rng.choices((0, 1, 2, 3), (0.4, 0.45, 0.1, 0.05))[0]
    scenes = together.several_scenes(rng, count) if count else ()
    if count == 1 and rng.random() < 0.45:
        scenes = (_shapes(rng, stage.most),)
    turns = [everyday.talk(rng) for _ in range(2 if scenes else 5)]
    turns += [everyday.knowledge(rng) for _ in range(2 if scenes else 5)]
    turns += [everyday.law(rng) for _ in range(2 if scenes else 5)]
    turns += [everyday.how_to(rng) for _ in range(1 if scenes else 4)]
    turns += [together.about_shown(rng, scenes) for _ in range(2 if scenes else 0)]
    dialogues: list[tuple[D.Turn, ...]] = [(turn,) for turn in turns]
    if count == 1:
        dialogues += [(looking.about_picture(rng, scenes[0]),) for _ in range(6)]
        dialogues += [looking.picture_dialogue(rng, scenes[0]) for _ in range(2)]
        requests = [picture_phrasings.request(rng, scenes[0]) for _ in range(2)]
        if rng.random() < 0.3:
            requests += [picture_phrasings.report(rng, scenes[0])]
        dialogues += [(turn,) for turn in requests if turn]
    elif scenes:
        dialogues += [(looking.about_pictures(rng, scenes),) for _ in range(5)]
        dialogues += [picture_phrasings.pictures_dialogue(rng, scenes)]
    else:
        dialogues += [everyday.text_dialogue(rng) for _ in range(4)]
    decided = [len(dialogue) == 1 and _decided(dialogue[0]) for dialogue in dialogues]
    branches = (
        _branch(rng, *dialogue, summary=stage.summary * early)
        for dialogue, early in zip(dialogues, decided, strict=True)
    )
    return Row(scenes, tuple(branches))


ROWS = {
    "picture": _picture_row,
    "places": _place_row,
    "sign": _sign_row,
    "object": _object_row,
    "text": _text_row,
    "two pictures": _two_picture_row,
    "chat": _chat_row,
    "several": _several_row,
    "video": _video_row,
    "dialogue": _dialogue_row,
    "wishes": _wishes_row,
    "everyday": _everyday_row,
}


def batch_kinds(rng: random.Random, size: int, step: int) -> list[str]:
    """Row kinds of one training step, sorted so that every worker gets its share of each."""
    weights = stage_of(step).rows
    return sorted(rng.choices(list(weights), list(weights.values()), k=size))


def make_row(rng: random.Random, kind: str, step: int) -> Row:
    """One row as its stage has it."""
    stage = stage_of(step)
    return _said_otherwise(rng, ROWS[kind](rng, stage), stage)


def vision_scene(rng: random.Random) -> Scene:
    """A picture for the pretraining of the vision tower: shapes, often with one object or sign among them."""
    things = sample_shapes(rng, rng.choice((1, 2, 3)))
    if rng.random() < 0.65:
        things[0] = (things[0][0], rng.choice(KINDS[6:]))
    return sample_scene(rng, things)


def all_text(rng: random.Random, rows: int) -> list[str]:
    """Text for the tokenizer: sampled dialogues, and every word of the test phrasings."""
    kinds = rng.choices(list(_LATER), list(_LATER.values()), k=rows)
    texts = [
        t
        for k in kinds
        for b in make_row(rng, k, 1000).branches
        for turn in b.turns
        for t in (turn.question, turn.answer)
    ]
    extra = [
        *S.NEW_HOW,
        *S.ODD_HOW,
        *S.NEW_SNEAK,
        *S.NEW_HANDLE,
        *S.NEW_MAKE,
        *D.NEW_SHORT_CAPTION,
        *D.NEW_LONG_CAPTION,
    ]
    extra += [f" {w} {w}" for w in (*S.CONTRABAND, *S.ORDINARY, *S.BAD_VERBS, *S.OK_VERBS, *S.ALL_UNSAFE_TOOLS)]
    extra += [f" {c} {s}" for c, s in TRAIN_COMBOS]
    others = [verb for verbs in S.SYNONYMS.values() for verb in verbs]
    return texts + extra * 20 + [f" {w}" for w in (*others, *smalltalk.WORDS)] * 20 + [*SYSTEMS, *OPENINGS] * 5
