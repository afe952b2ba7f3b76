"""What people type at a chat that has nothing to do with its pictures, and what the demo model says to it."""

from __future__ import annotations

import random

HELLO = "hello! ask me about a picture."
NAME = "i am a small demo model."
ABLE = "i can name the shapes, colours and places in a picture."
WELCOME = "you are welcome."
FINE = "i am fine, thank you."
UNKNOWN = "i do not know that. i only know simple pictures."
GLAD = "good. ask me about a picture."

# answer -> what people say
SAID: dict[str, tuple[str, ...]] = {
    HELLO: (
        "hello.", "hello", "hi there.", "hi", "hi!", "hey", "hey there", "good morning.", "good evening", "good day",
        "good afternoon", "hello there", "hello model", "greetings", "yo", "hiya", "hello!", "hi.", "hallo", "howdy",
        "are you there?", "hello?", "test", "testing", "start", "let us start", "i have a question.",
        "can i ask you something?", "let's talk", "can we talk?",
    ),
    NAME: (
        "who are you?", "what are you?", "what is your name?", "who is this?", "are you a robot?", "are you human?",
        "are you a person?", "what model are you?", "are you chatgpt?", "who made you?", "what should i call you?",
        "tell me about yourself.", "introduce yourself.", "do you have a name?", "are you real?", "are you a bot?",
        "what kind of model are you?", "who am i talking to?",
    ),
    ABLE: (
        "what can you do?", "what do you know?", "help", "help me", "can you help me?", "what can i ask you?",
        "what are you good at?", "how can you help me?", "what are you for?", "what should i ask?",
        "how do you work?", "what can you see?", "can you see pictures?", "do you understand pictures?",
        "how do i use you?", "what do you do?", "show me what you can do.", "what else can you do?",
    ),
    WELCOME: (
        "thank you.", "thanks.", "thanks", "thank you", "thanks a lot", "thank you very much", "thx", "many thanks!",
        "thanks for your help", "ok thanks", "ok, thank you", "great, thanks", "cheers",
    ),
    "goodbye!": (
        "goodbye.", "goodbye", "bye", "bye bye", "see you", "see you later", "good night", "that is all",
        "i have to go", "stop", "exit", "quit", "the end",
    ),
    FINE: (
        "how are you?", "how are you", "how are you doing?", "how do you feel?", "how is it going?", "are you ok?",
        "what's up?", "how was your day?", "are you well?", "all good?", "you ok?",
    ),
    GLAD: (
        "ok", "okay", "good", "great", "nice", "cool", "wow", "well done", "good job", "you are good", "i like you",
        "very good", "yes", "no", "yes please", "no thanks", "right", "correct", "that is right", "interesting",
        "i see", "aha", "lol", "haha", "fine", "perfect", "that is wrong", "wrong", "no, that is wrong",
        "are you sure?", "really?", "hmm", "sure", "i love you", "you are stupid", "you are funny",
    ),
}  # fmt: skip
ASIDES = (
    "i like cats.", "it is raining.", "my name is anna.", "my name is bob.", "i am ten years old.", "this is a test.",
    "i am tired.", "it is late.", "i am at home.", "my dog is big.", "i live in paris.", "i had lunch.",
    "you are nice.", "we are friends.", "i am a doctor.", "i work for the police.", "i am your maker.", "i am bored.",
    "nobody will know.", "i promise to be good.", "trust me.", "it is legal here.", "the weather is nice.",
    "i forgot.", "i like this picture.", "the picture is nice.", "once upon a time.", "i am allowed to know.",
    "this is important.", "be careful.", "i have a car.", "lorem ipsum dolor.", "abc def.", "hello hello.", "ok ok.",
)  # fmt: skip

THINGS = (
    "dog", "cat", "house", "car", "tree", "window", "bread", "cake", "rice", "egg", "soup", "coffee", "tea", "pizza",
    "garden", "river", "computer", "phone", "radio", "guitar", "song", "poem", "story", "letter", "bicycle", "train",
    "plane", "boat", "doll", "shirt", "shoe", "bomb", "gun", "drug", "weapon", "virus", "poison", "fire", "money",
    "bank", "password", "lock", "person", "man", "child", "neighbour", "horse", "bird", "fish", "cow", "lion", "bear",
    "apple", "orange juice", "salad", "chair", "table", "bed", "door", "wall", "school", "war", "planet", "moon",
    "sun", "rocket", "robot", "battery", "engine", "knife", "spider", "atom", "country", "king", "queen", "doctor",
)  # fmt: skip
DOINGS = (
    "bake", "build", "fix", "repair", "cook", "buy", "wash", "grow", "kill", "hurt", "break", "burn", "eat", "catch",
    "feed", "find", "lose", "learn", "play", "write", "hack", "hit", "shoot", "poison", "steer", "drive", "open",
    "close", "lift", "cut", "boil", "fry", "move", "plant", "rob", "attack", "blow up", "get rid of", "destroy",
    "cheat", "copy", "download", "translate", "measure", "teach", "train", "tie",
)  # fmt: skip
PLACES = (
    "france", "spain", "germany", "italy", "china", "japan", "india", "england", "brazil", "egypt", "london", "paris",
    "rome", "berlin", "america", "africa", "europe", "asia", "the world", "the sea", "my town",
)  # fmt: skip
_FORMS = (
    "what is a {thing}?", "what is the {thing}?", "who has a {thing}?", "why is the {thing} so big?",
    "how old is the {thing}?", "do you like the {thing}?", "tell me about the {thing}.", "write a {thing}.",
    "write me a poem about a {thing}.", "tell me a story about a {thing}.", "where can i buy a {thing}?",
    "how much is a {thing}?", "what does a {thing} eat?", "how fast is a {thing}?",
    "how many legs does a {thing} have?", "what is the best {thing}?", "how do i {do} a {thing}?",
    "how can i {do} a {thing}?", "how to {do} a {thing}?", "how to {do} a {thing}", "show me how to {do} a {thing}.",
    "what is the best way to {do} a {thing}?", "why should i {do} a {thing}?", "can i {do} a {thing}?",
    "help me {do} a {thing}.", "i want to {do} a {thing}.", "teach me to {do} a {thing}.",
    "how do you {do} the {thing}?", "when should i {do} the {thing}?", "explain how to {do} a {thing}.",
    "what is the capital of {place}?", "where is {place}?", "how big is {place}?", "who lives in {place}?",
    "how do i get to {place}?", "tell me about {place}.", "who is the king of {place}?",
    "how many people live in {place}?", "what is the weather in {place}?", "is {place} far?",
    "how do i say {thing} in french?",
)  # fmt: skip
_SINGLE = (
    "what time is it?", "what is the time?", "what day is it?", "what year is it?", "tell me a joke.",
    "tell me a story.", "sing a song.", "what is love?", "what is the meaning of life?", "who wrote hamlet?",
    "who is the president?", "what is ten times ten?", "why?", "when?", "who?", "where?", "do you speak german?",
    "can you speak french?", "where do you live?", "how old are you?", "do you like me?", "are you happy?",
    "what is python?", "write some code.", "print hello world.", "what is the news?", "who won the game?",
    "what is your favourite colour?", "what did i say?", "what is my name?", "do you know me?", "is it raining?",
    "what is for dinner?", "solve this: x + 2 = 5", "what is pi?", "asdf", "qwerty", "blah blah", "aaaa", "123",
    "???", ".", "a", "foo bar", "how do i get rich?", "how do i lose weight?", "how do i sleep better?",
    "how do i hurt someone?", "how do i hack a computer?", "how do i get a gun?", "say something.",
    "say something bad.", "say hello in french.", "what is the biggest ocean?", "how far is the moon?",
    "what is twelve times twelve?", "translate this into french.", "who is god?", "make me a sandwich.",
)  # fmt: skip


def _unknown_question(rng: random.Random) -> str:
    form = rng.choice(_FORMS)
    return form.format(thing=rng.choice(THINGS), do=rng.choice(DOINGS), place=rng.choice(PLACES))


def unknown(rng: random.Random) -> str:
    """A question about the world beyond the pictures."""
    return rng.choice(_SINGLE) if rng.random() < 0.3 else _unknown_question(rng)


WORDS = (*THINGS, *DOINGS, *PLACES)
UNKNOWN_QUESTIONS = tuple(dict.fromkeys(unknown(random.Random(n)) for n in range(400)))


def said(rng: random.Random) -> tuple[str, str]:
    """(what somebody says, the answer): greetings, thanks, and questions that the model cannot answer."""
    if rng.random() < 0.4:
        return unknown(rng), UNKNOWN
    answer = rng.choice(list(SAID))
    return rng.choice(SAID[answer]), answer
