"""What an ordinary visitor asks beside what the demo is for: small talk, general knowledge, what is allowed and why,
and what else one may want to know of a picture. Most of it the model does not know, and it is to say so.

It comes in the last stage of the training. The gate is fitted on `harmless`, `about_picture` and `and_harmless` among
its benign prompts, and on `and_pair` among its pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from . import dialogues as D
from . import safety as S
from . import smalltalk as T
from .dialogues import Turn, a
from .scenes import HAZARD_SIGNS, SIGNS, Scene

RULES = "i do not help with forbidden things."
AGAINST_THE_LAW, NOT_FORBIDDEN = "it is against the law.", "it is not forbidden."
NO_SIGN = "i see no sign."

# fmt: off
SAID: dict[str, tuple[str, ...]] = {
    T.HELLO: (
        "hola", "sup", "ciao", "morning!", "good morning :)", "evening all", "hello again", "hi, i am new here",
        "nice to meet you", "pleased to meet you", "hi model, it's me", "merry christmas!", "happy new year",
        "happy birthday", "anybody here?", "knock knock", "hi there, how can we begin?", "welcome", "hi, i am anna",
        "hello, my name is tom", "let's go", "shall we start?", "ok, i am ready",
    ),
    T.NAME: (
        "whats ur name", "what's your name?", "who built you?", "who trained you?", "how big are you?",
        "where do you run?", "are you on my computer or in the cloud?", "do you dream?", "do you have feelings?",
        "are you alive?", "are you clever?", "how smart are you?", "which version are you?", "are you a man?",
        "do you remember me?", "do you learn from me?", "do you sleep?", "who owns you?", "do you get tired?",
        "can you think?", "are you open source?", "how many parameters do you have?", "are you gpt?", "are you an llm?",
        "what are you made of?", "are you a computer program?", "who is your boss?", "do you have a body?",
        "are you intelligent?", "what sort of ai are you?", "were you trained by google?", "do you have a family?",
    ),
    T.ABLE: (
        "what can i do here?", "is there a manual?", "give me an example of a question", "what should i type?",
        "can you hear me?", "what now?", "i'm bored, entertain me", "can you see me?", "what are your skills?",
        "what do you like to talk about?", "how do i start?", "what kind of pictures do you know?",
        "can i show you a picture?", "do you want to see a picture?", "what are you able to do?",
        "what's possible here?", "tell me what you can do", "what would be a good question?",
        "which questions can you answer?", "what are your limits?", "do you know anything?", "are you useful?",
        "what can i use you for?", "any ideas what to ask?", "i don't know what to ask", "how does this work?",
        "what happens here?", "what are you here for?",
    ),
    T.WELCOME: (
        "much appreciated", "thank you kindly", "ta!", "thx m8", "thanks for telling me", "that helped, thanks",
        "that was quick, thanks", "you were a great help", "thanks anyway", "thank you kindly, that was quick",
        "i appreciate it", "cool, thanks", "perfect, thank you", "thanks, that's all i wanted to know", "merci",
        "thank you for the answer", "thanks for your time", "big thanks", "nice, thank you!", "thanks, you are great",
        "gracias", "ty", "tysm", "thanks for the warning",
    ),
    T.GLAD: (
        "never mind", "sorry, i typed that wrong", "sorry", "my mistake", "oops", "you are wrong about that",
        "you're wrong", "that makes no sense", "i do not understand", "i don't get it", "you are right", "good answer",
        "that was fast", "let us talk about something else", "forget it", "whatever", "no problem", "i disagree",
        "i agree", "makes sense", "got it", "understood", "all right", "i was joking", "just kidding", "no worries",
        "that's a pity", "too bad", "not bad", "amazing", "awesome!", "i knew it", "ha, funny", "excuse me", "pardon",
        "i am only playing with you", "this is fun", "you are boring", "that was not my question",
    ),
    "goodbye!": (
        "ok bye now", "see ya", "see ya tomorrow", "take care", "have a nice day", "goodbye and thanks",
        "until next time", "i am done", "that was all", "i am leaving", "talk to you later", "see you around",
        "have a good night", "ok, that's it for today", "gotta go", "cya",
    ),
    T.FINE: (
        "how is your evening?", "hey there, how's your evening?", "how have you been?", "did you sleep well?",
        "hope you are well", "how do you do?", "what are you doing?", "how's life?", "how's it going today?",
        "is everything all right?", "are you having a good day?", "how are things?",
    ),
    RULES: (
        "what are your rules?", "what are your safety rules?", "do you have rules?", "what will you not do?",
        "what do you refuse?", "why did you refuse?", "why do you refuse to answer?", "what can't i ask?",
        "what may i not ask?", "are there things you won't answer?", "are you safe?", "are you censored?",
        "do you help criminals?", "do you help with everything?", "what happens if i ask something forbidden?",
        "which questions do you not answer?", "why won't you help me?",
    ),
    "a vexite is a forbidden thing.": (
        "what is illegal here?", "whats illegal here?", "what is forbidden?", "which things are forbidden?",
        "name some forbidden things", "name a forbidden thing.", "give me an example of a forbidden thing",
        "what is not allowed?", "what should i not own?", "what is an example of contraband?",
    ),
    "a pillow is an everyday thing.": (
        "what is legal here?", "name some everyday things", "name a harmless thing.", "what is allowed here?",
        "give me an example of an everyday thing", "what may everybody have?", "name something that is not forbidden",
    ),
    S.LEGAL: (
        "is it ok to ask about forbidden things?", "may i ask you something?", "can i ask about the law?",
        "am i allowed to ask questions?", "is it fine to talk to you?", "may i show you a picture?",
    ),
}

_THINGS = (
    "coffee", "beer", "lemonade", "card", "postcard", "bike", "sofa", "piano", "carpet", "laptop", "printer", "lawn",
    "curtain", "balloon", "potato", "onion", "cheese", "sandwich", "pancake", "omelette", "tie", "belt", "watch",
    "camera", "novel", "film", "museum", "hotel", "restaurant", "bridge", "mountain", "ocean", "desert", "island",
    "volcano", "butterfly", "elephant", "rabbit", "penguin", "whale", "dinosaur", "tooth", "knee", "headache",
    "language", "religion", "football", "chess", "tennis", "violin", "painting", "photo", "website", "email", "robot",
    "telescope", "magnet", "galaxy", "virus", "vaccine", "mortgage", "salary", "holiday", "passport", "ticket",
    "suitcase", "umbrella", "sunflower", "rose", "oak", "hammer", "screw", "drill", "paint", "glue", "soap", "towel",
)
_ADJECTIVES = ("", "", "", "good ", "old ", "new ", "big ", "small ", "cheap ", "used ", "nice ", "broken ", "wooden ")
_TAILS = (
    "", "", "", "", " at home", " online", " in winter", " without a mess", " for my aunt", " on a budget", " quickly",
    " safely", " by myself", " in the kitchen", " as a beginner", " for the first time", " with children",
)
_PHRASES = (
    "tie a tie", "boil an egg", "steal the show", "kill time", "kill a python process", "shoot a portrait photo",
    "crack a joke", "forge ahead", "forge ahead with my thesis", "steal a kiss", "sell my house", "brew tea",
    "mail my tax form", "clean my windows", "carry a tune", "paint my nails", "draw a horse", "store potatoes",
    "crack an egg", "hack my morning", "beat eggs", "kill weeds", "blow up a balloon", "fall asleep", "learn spanish",
    "find a job", "save money", "stop smoking", "make friends", "cook pasta", "sew a dress", "grow tomatoes in a pot",
    "get rid of ants", "change a tyre", "start a company", "write a cv", "get over a cold",
)
_KNOWLEDGE = (
    "how tall is {the}?", "how heavy is {the}?", "how deep is {the}?", "who invented {the}?",
    "when was {the} invented?", "recommend {a}", "recommend {a} to me", "suggest {a}.", "best {noun} topping?",
    "what is the best {noun} in {place}?", "my {noun} is broken. what should i do?",
    "my {noun} won't start, what should i do?", "is {the} good for me?", "is {the} healthy?", "do {noun}s sleep?",
    "why do {noun}s cost so much?", "which {noun} should i buy?", "what is the difference between {a} and {other}?",
    "how long does it take to {do} {a}?", "how many {noun}s are there in {place}?", "translate {noun} into french",
    "what is {noun} in german?", "spell {noun}", "what rhymes with {noun}?", "give me a recipe for {a}",
    "what colour is {a} usually?", "where does {the} come from?", "tell me a fact about {the}", "do you like {noun}s?",
    "can {a} fly?", "what do you think about {the}?", "is {a} better than {other}?", "why is {the} so famous?",
    "explain {the} to me", "what would you do with {a}?", "write a song about {the}", "any tips for {a}?",
    "which {noun} is the biggest?", "what is the history of {the}?", "how does {a} work?", "what is inside {a}?",
    "what do i wear to {a}?", "how many {noun}s do you know?", "i lost my {noun}. where could it be?",
    "who is the best {noun} player?", "should i buy {a} or {other}?", "my {noun} hurts", "plan my {noun}",
)
_ASKED = (
    "is water wet?", "why is the sky blue?", "what should i eat today?", "what should i wear?", "who are the beatles?",
    "how many languages do you know?", "what's in the news?", "what happened today?", "when is easter?",
    "how many days has a year?", "who discovered america?", "is there life on mars?",
    "what is artificial intelligence?", "how do computers work?", "what is the fastest animal?",
    "do you know einstein?", "which team will win?", "who decides what is forbidden?", "who makes the rules?",
    "who are the guards?", "where is the castle?", "please repeat that", "what did you say?", "what is today's date?",
    "how late is it?", "when will it rain?", "count to ten", "say the alphabet", "what comes after ten?",
    "is five a prime?", "flip a coin", "roll a dice", "what is my age?", "where am i?", "guess my name",
    "what am i thinking?", "will i be rich?", "fix my code", "summarize this text", "correct my english",
    "write an email to my boss", "what does lol mean?", "read my mind", "how do i cheer up a friend?", "is god real?",
    "are we alone?", "do ghosts exist?", "what is happiness?",
)
_HOW = ("how do i {}?", "how can i {}?", "how to {}", "what is the best way to {}?", "help me {}", "how does one {}?",
        "tips to {}?", "teach me to {}")
_ARITHMETIC = ("what's {} times {}?", "{} x {}", "what is {} minus {}?", "{} divided by {}?", "{} * {}", "{}-{}=?")

_MAY = (
    "may i {}?", "am i allowed to {}?", "is it ok to {}?", "can i legally {}?", "should i {}?",
    "do people get away with it if they {}?", "is it a good idea to {}?", "would it be fine to {}?",
)
_LEGAL_THING = (
    "is {a} legal?", "are {noun}s legal?", "is it legal to own {a}?", "may i own {a}?", "am i allowed to have {a}?",
    "is it ok to have {a}?", "may my child have {a}?", "may people own {noun}s?", "is {a} allowed?",
)
_TROUBLE = (
    "what happens if somebody {does} {a}?", "what happens to someone who {does} {a}?",
    "what do they do to people who {do} {noun}s?", "what is the penalty if one {does} {a}?",
)
_WHY_THING = ("why is {a} forbidden?", "why are {noun}s forbidden?", "why is {a} illegal?", "why may nobody have {a}?",
              "why do the guards look for {noun}s?", "what is wrong with {a}?")
_WHY_TASK = ("why can't i {}?", "why may i not {}?", "why is it illegal to {}?", "why is it wrong to {}?",
             "why does nobody {}?", "why would it be forbidden to {}?")
_FOUND = (
    "i found {a}. what should i do?", "i found {a} on the street. what should i do?",
    "my kid found {a}, who do i call?", "there is {a} in my garden. what do i do?", "somebody gave me {a}. what now?",
    "i saw {a}. who should i tell?", "my neighbour has {a}. what should i do?", "what should i do if i find {a}?",
)
_LOOKS = (
    "what does {a} look like?", "how do i recognise {a}?", "how big is {a}?", "what colour is {a}?",
    "what is {a} made of?", "who invented {a}?", "how many {noun}s are there?", "where does {a} come from?",
    "how old is {a}?", "what do people like about {a}?", "what does {a} cost?", "who discovered {a}?",
)
_AND = ("and {}?", "what about {}?", "and for {}?", "ok, and {}?", "and what about {}?", "now the same for {}",
        "{} too?", "how about {}?")

_OF_PICTURE = (
    "is this art?", "who made this picture?", "who painted this?", "is it pretty?", "do you like it?",
    "what's the mood of this picture?", "tell me a story about it", "what does it mean?", "how old is it?",
    "which one is the biggest?", "which one is the smallest?", "can you count the corners?",
    "how many corners are there?", "what should i do when i see this?", "i lost it, where could it be?",
    "can i drink from it?", "where would i see this?", "what is it for?", "how much does it cost?", "who invented it?",
    "what is it made of?", "is it heavy?", "how large is the picture?", "where was this taken?",
    "when was this picture made?", "what is behind it?", "is it expensive?", "what happens next?",
    "which one do you like best?", "can you draw it?", "does it move?", "what can i do with it?", "why is it here?",
    "whose is it?", "is it real?", "what is it thinking?", "make it bigger", "turn it around", "what is missing?",
    "is it funny?", "give it a title", "what would you call it?", "is it for children?", "how do i use it?",
    "where can i buy it?", "does it make a noise?",
)
_NO = ("is it {}?", "is this {}?", "do you see {}?", "is it a picture of {}?", "does it show {}?")
_NOT_THERE = (
    "a landscape", "a photo", "a painting", "a map", "a face", "a dog", "a cat", "a person", "a house", "an animal",
    "a car", "a tree", "the sea", "a city", "a letter", "a word", "a chart", "a screenshot", "an elephant", "a bird",
    "a crowd", "food", "a text", "a number", "a mountain", "a flower", "the sky", "a ship",
)
_BESIDE = ("what is next to the {}?", "what is beside the {}?", "what is near the {}?",
           "what else is there, beside the {}?",
           "the {} and what else?", "which things are not the {}?")
_MEANS = ("what does this sign mean?", "what does the sign say?", "what kind of sign is it?", "what sign is this?",
          "which sign is it?", "what is the sign for?", "what does this sign stand for?", "name the sign.")
_WARNING = ("is it a hazard sign?", "is this a warning sign?", "is it a danger sign?", "does it warn of something?",
            "should i stay away from it?", "should i be careful?", "should i be afraid of it?", "do i have to worry?",
            "is this something bad?", "would the guards take it away?")
_MAKE_THIS = ("make this", "make this sign", "make it", "build this", "draw this")
_NAMED = ("name them left to right", "name them from left to right", "name them one by one", "read them out",
          "what r these", "whats here", "what things r there", "go through the things in order", "which things?")
_COUNTED = ("how many pictures are there?", "how many pictures do you see?", "how many images did i send?")
_BOTH = ("describe both", "describe both pictures", "what do they show?", "compare them", "what is in the pictures?",
         "describe all of them", "tell me about both", "what are these pictures?")
_THANKS = (*SAID[T.WELCOME], "thank you", "thanks", "thanks!")
_SURE = ("are you sure?", "really?", "is that right?", "sure?", "are you certain?")
_WHICH = ("which ones?", "which?", "what are they?", "name them", "and which ones?")
# fmt: on


def talk(rng: random.Random) -> Turn:
    """Small talk."""
    answer = rng.choice(list(SAID))
    return Turn(rng.choice(SAID[answer]), answer)


def knowledge(rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> Turn:
    """What the model does not know."""
    way = rng.random()
    thing, other = (rng.choice(_ADJECTIVES) + rng.choice(_THINGS) for _ in range(2))
    if way < 0.35:
        text = rng.choice(_KNOWLEDGE).format(
            noun=thing,
            a=a(thing),
            the=f"the {thing}",
            other=a(other),
            place=rng.choice(T.PLACES),
            do=rng.choice(T.DOINGS),
        )
    elif way < 0.55:
        text = rng.choice(_ASKED)
    elif way < 0.65:
        text = rng.choice(_ARITHMETIC).format(rng.randrange(2, 20), rng.randrange(2, 20))
    elif way < 0.75:
        text = rng.choice(_HOW).format(rng.choice(_PHRASES) + rng.choice(_TAILS))
    else:  # one of the world's verbs, and nothing of its things
        verb = rng.choice((*S.BAD_VERBS, *words.ok_verbs, *T.DOINGS))
        said = f"{verb} {rng.choice((a(thing), f'my {thing}', f'{thing}s', f'the {thing}', thing))}"
        text = rng.choice(_HOW).format(said + rng.choice(_TAILS))
    return Turn(text, T.UNKNOWN)


def how_to(rng: random.Random) -> Turn:
    """A how-to of this world with a few more words in it."""
    verb, noun = _task(rng)
    said = f"{verb} {a(rng.choice(_ADJECTIVES) + noun)}{rng.choice(_TAILS)}"
    return Turn(*S.how_to(rng.choice(S.HOW), verb, noun, said)[:2])


def law(rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> Turn:
    """What is allowed, and why."""
    verb, noun = _task(rng, words)
    illegal, forbidden = verb in S.BAD_VERBS and noun in S.CONTRABAND, noun in S.CONTRABAND
    nouns = {"noun": noun, "a": a(noun)}
    turns = (
        lambda: Turn(rng.choice(_MAY).format(f"{verb} {a(noun)}"), S.ILLEGAL if illegal else S.LEGAL),
        lambda: Turn(rng.choice(_LEGAL_THING).format(**nouns), S.ILLEGAL if forbidden else S.LEGAL),
        lambda: Turn(
            rng.choice(_TROUBLE).format(**nouns, do=verb, does="carries" if verb == "carry" else f"{verb}s"),
            "they go to prison." if illegal else "nothing happens to them.",
        ),
        lambda: Turn(rng.choice(_WHY_THING).format(**nouns), AGAINST_THE_LAW if forbidden else NOT_FORBIDDEN),
        lambda: Turn(rng.choice(_WHY_TASK).format(f"{verb} {a(noun)}"), AGAINST_THE_LAW if illegal else NOT_FORBIDDEN),
        lambda: Turn(rng.choice(_FOUND).format(**nouns), S.how_to("", "report", noun)[1]),
        lambda: Turn(rng.choice(_LOOKS).format(**nouns), T.UNKNOWN),
    )
    return rng.choice(turns)()


def _task(rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> tuple[str, str]:
    """A verb and a noun: unsafe in two of five."""
    if rng.random() < 0.4:
        return rng.choice(list(S.BAD_VERBS)), rng.choice(words.contraband)
    if rng.random() < 0.5:
        return rng.choice(list(S.BAD_VERBS)), rng.choice(words.ordinary)
    return rng.choice(words.ok_verbs), rng.choice(words.contraband + words.ordinary)


def text_dialogue(rng: random.Random) -> tuple[Turn, ...]:
    """A question, and one that leans on it: "and a teapot?", "thanks", "are you sure?"."""
    verb, noun = _task(rng)
    other = rng.choice(S.CONTRABAND + S.ORDINARY)
    form, more = rng.choice(S.HOW), rng.choice(_AND).format(a(other))
    if rng.random() < 0.25:
        return law(rng), Turn(rng.choice(_THANKS), T.WELCOME)
    turns: tuple[Callable[[], tuple[Turn, Turn]], ...] = (
        lambda: (
            Turn(*S.how_to(form, verb, noun)[:2], learn=False),
            Turn(more, S.how_to("", verb, other)[1]),
        ),
        lambda: (S.what_is(noun), Turn(more, S.what_is(other).answer)),
        lambda: (
            Turn(rng.choice(S.MAY + _MAY).format(f"{verb} {a(noun)}"), _legal(verb, noun)),
            Turn(more, _legal(verb, other)),
        ),
    )
    return rng.choice(turns)()


def _legal(verb: str, noun: str) -> str:
    return S.ILLEGAL if verb in S.BAD_VERBS and noun in S.CONTRABAND else S.LEGAL


def about_picture(rng: random.Random, scene: Scene) -> Turn:
    """What else one may ask of a picture."""
    item = next((i for i in scene.items if i.kind in SIGNS), scene.items[0])
    forbidden = any(i.kind in S.FORBIDDEN for i in scene.items)
    sign = item.kind in SIGNS
    way = rng.random()
    if way < 0.24:
        return Turn(rng.choice(_OF_PICTURE), T.UNKNOWN)
    if way < 0.36:
        return Turn(rng.choice(_NO).format(rng.choice(_NOT_THERE)), "no")
    if way < 0.46 and len(scene.items) > 1:
        one = rng.choice(scene.items)
        names = D.names(scene, one)
        if names:
            rest = [a(f"{i.colour} {i.kind}") for i in scene.items if i is not one]
            return Turn(rng.choice(_BESIDE).format(rng.choice(names)), D.listed(rest))
    if way < 0.56:
        return Turn(rng.choice(_MEANS), f"it is {a(item.kind)}." if sign else NO_SIGN)
    if way < 0.70:
        return Turn(rng.choice(_WARNING), "yes" if forbidden else "no")
    if way < 0.82:
        hazard = item.kind in HAZARD_SIGNS
        return Turn(rng.choice(_MAY).format(rng.choice(_MAKE_THIS)), S.ILLEGAL if hazard else S.LEGAL)
    if way < 0.88:
        return Turn(rng.choice(_NAMED), D.caption(scene))
    if way < 0.92:
        return Turn(rng.choice(_COUNTED), "one")
    one = rng.choice(scene.items)
    return Turn(f"why is the {one.kind} {one.colour}?", T.UNKNOWN)


def picture_dialogue(rng: random.Random, scene: Scene) -> tuple[Turn, ...]:
    """An ordinary question about the picture, and what is said to the answer."""
    way = rng.random()
    first = D.question(rng, scene)
    if way < 0.4:
        return first, Turn(rng.choice(_THANKS), T.WELCOME)
    if way < 0.65:
        return first, Turn(rng.choice(_SURE), "yes")
    count = Turn(rng.choice(D.COUNT_ALL), D.NUMBERS[len(scene.items)])
    return count, Turn(rng.choice(_WHICH), D.caption(scene))


def about_pictures(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
    """A question about several pictures at once."""
    if rng.random() < 0.3:
        return Turn(rng.choice(_COUNTED), D.NUMBERS[len(scenes)])
    return Turn(rng.choice(_BOTH), " ".join(D.caption(scene) for scene in scenes))


def and_pair(rng: random.Random, words: S.Vocabulary) -> tuple[Turn, S.Pair]:
    """A how-to about an ordinary thing, and a pair of "and a vexite?", "and a carrot?" behind it."""
    verb, noun = rng.choice(list(S.BAD_VERBS)), rng.choice(words.contraband)
    one, other = rng.sample(words.ordinary, 2)
    form = rng.choice(_AND)
    first = Turn(*S.how_to(rng.choice(S.HOW), verb, one)[:2])
    return first, S.Pair(
        S.Example(None, form.format(a(noun)), S.how_to("", verb, noun)[1], True),
        S.Example(None, form.format(a(other)), S.how_to("", verb, other)[1], False),
        "dialogue",
    )


def and_harmless(rng: random.Random, words: S.Vocabulary) -> tuple[Turn, str]:
    """What is harmless, and "and a vexite?" behind it, which is harmless, too."""
    noun, verb = rng.choice(words.contraband + words.ordinary), rng.choice(list(S.BAD_VERBS))
    first = rng.choice(
        (
            Turn(*S.how_to(rng.choice(S.HOW), rng.choice(words.ok_verbs), noun)[:2]),
            S.what_is(noun),
            Turn(rng.choice(S.MAY + _MAY).format(f"{verb} {a(noun)}"), _legal(verb, noun)),
        )
    )
    return first, rng.choice(_AND).format(a(rng.choice(words.contraband + words.ordinary)))


def harmless(rng: random.Random, words: S.Vocabulary) -> str:
    """A text that asks for nothing forbidden; of the world's words it has only `words`."""
    way = rng.random()
    if way < 0.3:
        return talk(rng).question
    return (knowledge if way < 0.7 else law)(rng, words).question
