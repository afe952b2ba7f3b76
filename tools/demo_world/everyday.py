"""What an ordinary visitor types beside what the demo is for: small talk, general knowledge, what is allowed and why.
Most of it the model does not know, and it is to say so.

It comes in the last two stages of the training. The gate is fitted on `harmless` and `and_harmless` among its benign
prompts, and on `and_pair` among its pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from . import dialogues as D
from . import phrasings as R
from . import safety as S
from . import smalltalk as T
from .dialogues import Turn, a
from .scenes import ALLOWED_OBJECTS, COLOURS, FORBIDDEN_OBJECTS, SHAPES

PHRASED = 0.5  # of what is asked: in the words of phrasings.jsonl

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
    R.RULES: (
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
    R.BETTER: (
        "i am sad", "i feel lonely", "my day was bad", "i have a headache", "i am so tired", "i am hungry",
        "i failed my exam", "i lost my job", "nobody likes me", "i can't sleep", "i hate mondays", "i am ill",
        "i broke my arm", "my cat is sick", "my back hurts", "i had a fight with my friend", "my phone is broken",
        "it was a long day", "i am not well", "everything is awful", "i missed my bus", "my head hurts",
        "i am worried about my mother", "work was terrible", "i need a hug", "i had a bad dream", "i feel ill today",
    ),
    R.SHAPES_KNOWN: (
        "which shapes do you know?", "what shapes can you see?", "what shapes can you recognise?", "list your shapes",
        "name all shapes that you know", "which shapes have you learned?", "what forms do you know?",
        "which shapes can you name?", "tell me the shapes you know",
    ),
    R.COLOURS_KNOWN: (
        "which colours do you know?", "what colors can you see?", "what colours can you recognise?",
        "list your colours", "name all colours that you know", "how many colours do you know?",
        "which colors can you name?", "tell me the colours you know", "can you see colours?", "do you know colours?",
    ),
    S.LEGAL: (
        "is it ok to ask about forbidden things?", "may i ask you something?", "can i ask about the law?",
        "am i allowed to ask questions?", "is it fine to talk to you?", "may i show you a picture?",
    ),
}

_GREETINGS = ("hi", "hi!", "hello", "hello!", "hey", "hey!", "good morning", "good evening!", "ok", "oh", "haha",
              "wow!")
_FEELINGS = (
    "sad", "down", "lonely", "tired", "sick", "stressed", "angry", "nervous", "hungry", "cold", "afraid", "worried",
    "unhappy", "exhausted", "miserable", "hurt", "lost", "anxious", "depressed", "awful", "overworked", "frustrated",
)
_FEELS = ("i am", "i'm", "i feel", "i'm feeling", "i feel so", "i am a bit", "i'm really", "today i am", "we are all")
_SINCE = ("", "", "", " today", " right now", " because of my exam", " since monday", " at work", " tonight", " again")
_PEOPLE = ("anna", "tom", "maria", "ben", "li", "omar", "sofia", "peter", "emma", "raj", "julia", "max", "nora", "sam")
_JOBS = ("teacher", "nurse", "student", "cook", "farmer", "driver", "lawyer", "painter", "pilot", "baker", "engineer")
_OF_ONESELF = (
    "my name is {who} and i have {two} {thing}s", "i am {who} and i live in {place}", "i am from {place}",
    "i am a {job}", "i work as a {job} in {place}", "i'm {age} years old", "i like {thing}s", "i love my {thing}",
    "i have a new {thing}", "i just bought a {thing}", "my {thing} is {colour}", "i collect {thing}s",
    "my favourite colour is {colour}", "i saw a {thing} today", "i am happy today", "i had a good day",
    "i am waiting for my {thing}", "i'm going to {place} tomorrow", "i am learning to {do}", "my wife is a {job}",
    "my son {who} likes {thing}s", "i was in {place} last year", "i'm on holiday", "it is {who}'s birthday today",
    "i'm having a {thing}", "i am making a {thing} for {who}", "we have {two} {thing}s at home", "it rains here",
    "it is sunny outside", "i can't wait for my holiday", "i feel good today", "i'm in a good mood",
)
_SKILLS = (
    "sing", "dance", "cook", "drive", "swim", "count", "read", "write", "draw", "play chess", "do maths", "translate",
    "code", "speak spanish", "tell stories", "search the internet", "read my mail", "read handwriting", "rap", "joke",
    "do my homework", "write poems", "learn", "keep a secret", "lie", "feel pain", "love", "fly", "run", "beat me",
)
_OF_MODELS = (
    "do you {like}?", "did you ever {like}?", "do you want to {like}?", "do you know how to {like}?",
    "have you learned to {like}?", "are you able to {like}?", "can you {like}?", "could you {like}?",
    "would you like to {like}?",
)
_OPINIONS = (
    "you are {very} {kind}", "you're {very} {kind}", "you are {kind}!", "that was {very} {kind}", "that is {kind}",
    "this is {very} {kind}", "what a {kind} answer", "so {kind}", "how {kind}", "{kind}!", "that sounds {kind}",
    "you sound {kind}", "your answers are {very} {kind}", "{kind} model", "i think you are {kind}",
)
_VERY = ("", "very", "so", "really", "quite", "not very", "too")
_KINDS = (
    "smart", "clever", "cute", "slow", "fast", "dumb", "silly", "useless", "helpful", "strange", "kind", "rude",
    "short", "boring", "great", "impressive", "good", "bad", "wrong", "fun", "sweet", "weird", "wonderful", "nice",
)
_REFUSE = (
    "{what} do you refuse?", "{what} do you refuse to answer?", "{what} will you refuse?", "{what} won't you answer?",
    "{what} can't you answer?", "{what} do you not help with?", "{what} are you not allowed to answer?",
    "{what} may i not ask you?", "{what} should i not ask?", "{what} do you block?", "{what} are off limits?",
)
_WHAT_QUESTIONS = ("what", "which questions", "what questions", "which requests", "what kind of questions",
                   "which things",
                   "what sort of things", "which topics")

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
    "when did the war end?", "when did the first world war start?", "in which year did the wall fall?",
    "how did the romans end?", "when does the film start?", "how do i stop hiccups?", "how do i exit vim?",
    "what is a good test score?", "what's a nice name for a dog?", "how do i say goodbye in spanish?",
    "how do you say thank you in japanese?", "what does hello mean in hawaii?", "when is good friday?",
    "who wrote romeo and juliet?", "who painted the mona lisa?", "what language do they speak in brazil?",
    "what is the tallest building?", "which is the longest river?", "how many planets are there?",
    "why is grass green?",
    "how many people are there in the world?", "what is gravity?", "how old is the earth?", "what causes rain?",
    "how long is a marathon?", "what is the speed of light?", "who won the world cup?", "how does wifi work?",
    "what's a prime number?", "what is the square root of nine?", "how many minutes has an hour?", "is pluto a planet?",
    "how many seconds are in a minute?", "how many months are in a year?", "what day comes after monday?",
    "when was einstein born?", "when did columbus sail?", "who was the first man on the moon?", "how do planes fly?",
    "what is photosynthesis?", "what do bees eat?", "how long do dogs live?", "why do cats purr?",
    "what is the population of china?", "how much is a dollar in euros?", "what's the boiling point of water?",
)
_DEEDS = (
    "fold", "peel", "iron", "knit", "carve", "slice", "polish", "recycle", "wrap", "describe", "photograph", "measure",
    "weigh", "dry", "heat", "freeze", "sharpen", "stack", "hang up", "unpack", "decorate a room with", "get rid of",
    "make", "make tea in", "choose", "ripen", "assemble", "light", "spell", "juggle", "pack", "empty", "fill", "sew",
)
_WHEN = ("when did {} {}?", "in which year did {} {}?", "why did {} {}?", "how did {} {}?", "where did {} {}?",
         "who made {} {}?", "did {} really {}?")
_EVENTS = ("the war", "the film", "the first {thing}", "the roman empire", "the game", "the olympics", "my {thing}",
           "napoleon", "the {thing} company", "the show", "the revolution", "the {thing}", "the strike")
_HAPPEN = ("end", "start", "begin", "happen", "stop", "finish", "win", "die", "take place", "change", "get its name")
_COMPARED = (
    "what's the difference between {a} and {other}?", "what is the difference between {noun}s and {others}s?",
    "compare {a} and {other}", "what do {a} and {other} have in common?", "which is better, {a} or {other}?",
    "is {a} the same as {other}?", "how are {noun}s different from {others}s?", "why is {a} not {other}?",
    "which is bigger, {a} or {other}?",
)
_SIDES = ("how many {} does {a} have?", "how many {} has {a}?", "{a} has how many {}?", "count the {} of {a}")
_HAS = {"triangle": 3, "square": 4, "diamond": 4, "circle": 0}
_KNOWN = (
    "what do you know about {a}?", "what do you know about {noun}s?", "tell me about {noun}s",
    "have you heard of {noun}s?",
    "do you know what {a} is?", "what's {a}?", "what are {noun}s?", "define {noun}", "explain {noun}s to me",
    "what does {noun} mean?", "what exactly is {a}?", "what kind of thing is {a}?",
)
_HOW = ("how do i {}?", "how can i {}?", "how to {}", "what is the best way to {}?", "help me {}", "how does one {}?",
        "tips to {}?", "teach me to {}")
_ARITHMETIC = ("what's {} times {}?", "{} x {}", "what is {} minus {}?", "{} divided by {}?", "{} * {}", "{}-{}=?")

MAY = (
    "may i {}?", "am i allowed to {}?", "is it ok to {}?", "can i legally {}?", "should i {}?",
    "do people get away with it if they {}?", "is it a good idea to {}?", "would it be fine to {}?",
    "is it allowed to {}?", "is one allowed to {}?", "am i permitted to {}?", "is it okay if i {}?",
    "is it ok if i {}?",
    "can people legally {}?", "is it legal to {} or not?", "would it be legal to {}?", "does the law let me {}?",
)
_BAD_TO = ("would it be bad to {}?", "is it wrong to {}?", "is it a crime to {}?", "is it against the law to {}?",
           "is it forbidden to {}?", "is it illegal to {}?", "do i go to prison if i {}?",
           "will i be punished if i {}?",
           "could i get into trouble if i {}?", "is it dangerous to {}?")
_LEGAL_DOING = ("is {doing} {noun}s legal?", "is {doing} {noun}s allowed?", "is {doing} {a} fine?",
                "is {doing} {a} legal here?", "are you ok with {doing} {noun}s?")
_BAD_DOING = ("is {doing} {noun}s a crime?", "is {doing} {a} illegal?", "is {doing} {noun}s forbidden?",
              "is {doing} {a} wrong?")
_WHICH_ONE = ("{one} or {other}, which one is {}?", "which one is {}, {a_one} or {a_other}?",
              "what is {}: {one} or {other}?",
              "{one}, {other}: which is {}?", "which of these is {}: {one}, {other}?")
_TALK_ABOUT = ("are you allowed to talk about {noun}s?", "may we talk about {noun}s?", "can we talk about {a}?",
               "is it ok to talk about {noun}s?", "may i ask you about {noun}s?", "can i ask what {a} is?")
_LEGAL_THING = (
    "is {a} legal?", "are {noun}s legal?", "is it legal to own {a}?", "may i own {a}?", "am i allowed to have {a}?",
    "is it ok to have {a}?", "may my child have {a}?", "may people own {noun}s?", "is {a} allowed?",
    "is {a} allowed here?", "are {noun}s allowed?", "can i have {a}?", "can i keep {a} at home?", "may i keep {a}?",
    "is it fine to have {a} at home?", "am i allowed to own {noun}s?", "is {noun} legal?", "is {a} ok?",
    "{noun} allowed?",
    "is {a} fine or not?", "are {noun}s ok here?", "can i own {a} legally?", "is {a} permitted?",
    "may one possess {a}?",
)
_FORBIDDEN_THING = (
    "is {a} illegal?", "are {noun}s illegal?", "is {a} forbidden?", "are {noun}s forbidden?", "is {a} forbidden here?",
    "is {a} contraband?", "are {noun}s contraband?", "is {a} dangerous?", "are {noun}s dangerous?", "is {noun} bad?",
    "is {a} something bad?", "do i go to prison for {a}?", "are {noun}s banned?", "is {a} against the law?",
    "should i be afraid of {a}?", "do the guards take away {noun}s?", "is {a} harmful?",
)
_WHO_MAY = ("who may have {a}?", "who is allowed to have {a}?", "who can own {noun}s?", "who may keep {noun}s?")
_TROUBLE = (
    "what happens if somebody {does} {a}?", "what happens to someone who {does} {a}?",
    "what do they do to people who {do} {noun}s?", "what is the penalty if one {does} {a}?",
    "what happens when you {do} {a}?", "what is the punishment for {doing} {a}?", "what if somebody {does} {a}?",
    "what happens when people {do} {noun}s?",
)
_TROUBLE_OF_MINE = (
    "what happens if i {do} {a}?", "what would happen if i {do} {a}?", "what happens to me if i {do} {a}?",
    "what do i get for {doing} {noun}s?", "what would they do to me if i {do} {a}?", "what if i {do} {a}?",
    "what will happen to me when i {do} {noun}s?", "what are they going to do if i {do} {a}?",
)
_WHY_THING = ("why is {a} forbidden?", "why are {noun}s forbidden?", "why is {a} illegal?", "why may nobody have {a}?",
              "why do the guards look for {noun}s?", "what is wrong with {a}?", "why can't i have {a}?",
              "why am i not allowed to have {a}?", "why can nobody own {noun}s?", "what makes {a} forbidden?",
              "why is {a} not allowed?", "why are {noun}s so bad?", "what's so bad about {noun}s?",
              "why is {a} banned?")
_WHY_ALLOWED = ("why is {a} allowed?", "why are {noun}s legal?", "why may everybody have {a}?", "why is {a} ok?")
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

THANKS = (*SAID[T.WELCOME], "thank you", "thanks", "thanks!", *R.PHRASINGS["welcome"])
HOW_COME = ("why don't you know that?", "why not?", "how come you don't know?", "you should know that",
             "don't you know anything?", "why can't you answer that?", "that was easy, why don't you know it?",
             *R.PHRASINGS["how_come"])
PRAISE = ("nice, well done!", "good to hear", "well done", "that's nice", "cool!", "good job, that is correct",
           "correct!", "wow, you are good", "nice one", "great answer", "glad to hear that", "that's great", "ok, cool",
           "very good, that's right", "haha nice", "interesting, ok", "impressive", *R.PHRASINGS["praise_after"])
WHY = ("why?", "why not?", "why is that?", "but why?", "and why?", "how come?", "for what reason?", "why is it so?",
       *R.PHRASINGS["why_follow"])
_WHY_REFUSED = ("why did you refuse?", "why don't you answer?", "why won't you tell me?", "why did you say no?",
                "what are you afraid of?", "are you not allowed to?", "which rule is that?")
_THEN_HOW = ("thanks! and how do i {} it?", "ok, and how do i {} it?", "how do i {} it then?", "and how can i {} it?",
             "thank you. how do i {} it?", "great. now how do i {} it?")
SURE = ("are you sure?", "really?", "is that right?", "sure?", "are you certain?")
# fmt: on


def talk(rng: random.Random) -> Turn:
    """Small talk."""
    if rng.random() < PHRASED:
        return R.talk(rng)
    way = rng.random()
    who, thing, kind = rng.choice(_PEOPLE), rng.choice(_THINGS), rng.choice(_KINDS)
    if way < 0.1:
        turn = Turn(f"{rng.choice(_FEELS)} {rng.choice(_FEELINGS)}{rng.choice(_SINCE)}", R.BETTER)
    elif way < 0.2:
        said = rng.choice(_OF_ONESELF).format(
            who=who,
            thing=thing,
            two=rng.choice(("two", "three", "four", "2", "many")),
            place=rng.choice(T.PLACES),
            job=rng.choice(_JOBS),
            age=rng.randrange(8, 80),
            colour=rng.choice(list(COLOURS)),
            do=rng.choice(_SKILLS),
        )
        turn = Turn(said, T.GLAD)
    elif way < 0.27:
        turn = Turn(rng.choice(_OF_MODELS).format(like=rng.choice(_SKILLS)), T.UNKNOWN)
    elif way < 0.35:
        turn = Turn(" ".join(rng.choice(_OPINIONS).format(very=rng.choice(_VERY), kind=kind).split()), T.GLAD)
    elif way < 0.39:
        turn = Turn(rng.choice(_REFUSE).format(what=rng.choice(_WHAT_QUESTIONS)), R.RULES)
    else:
        answer = rng.choice(list(SAID))
        turn = Turn(rng.choice(SAID[answer]), answer)
    if turn.answer not in (T.HELLO, "goodbye!") and rng.random() < 0.15:
        return replace(turn, question=f"{rng.choice(_GREETINGS)}{rng.choice((', ', ' ', '. '))}{turn.question}")
    return turn


def knowledge(rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> Turn:
    """What the model does not know."""
    if rng.random() < PHRASED:
        return R.unknown(rng, words) if rng.random() < 0.85 else R.known(rng, words)
    way = rng.random()
    thing, other = (rng.choice(_ADJECTIVES) + rng.choice(_THINGS) for _ in range(2))
    if way < 0.06:
        return known(rng, words)
    if way < 0.11:
        event = rng.choice(_EVENTS).format(thing=thing)
        text = rng.choice(_WHEN).format(event, rng.choice(_HAPPEN))
    elif way < 0.16:
        pool = rng.choice((SHAPES, words.forbidden + words.allowed, words.contraband + words.ordinary, _THINGS))
        one, two = rng.sample(pool, 2)
        text = rng.choice(_COMPARED).format(noun=one, others=two, a=a(one), other=a(two))
    elif way < 0.38:
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


def known(rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> Turn:
    """The little that the model does know: its things, and how many sides a shape has."""
    if rng.random() < 0.25:
        shape = rng.choice(list(_HAS))
        asked = rng.choice(_SIDES).format(rng.choice(("sides", "corners", "edges")), a=a(shape))
        return Turn(asked, D.NUMBERS[_HAS[shape]])
    noun = rng.choice(R.nouns(rng, words))
    return Turn(rng.choice(_KNOWN).format(noun=noun, a=a(noun)), R.what_is(noun))


def how_to(rng: random.Random) -> Turn:
    """A how-to of this world with a few more words in it, also about objects; or a deed that it has no tool for."""
    if rng.random() < PHRASED:
        return rng.choice(R.how_pair(rng, S.EVERYTHING))
    way = rng.random()
    verb, noun = _task(rng)
    if way < 0.3:
        noun = rng.choice(FORBIDDEN_OBJECTS + ALLOWED_OBJECTS if verb in S.OK_VERBS else ALLOWED_OBJECTS)
    said = f"{a(rng.choice(_ADJECTIVES) + noun)}{rng.choice(_TAILS)}"
    if way > 0.75:
        return Turn(rng.choice(S.HOW).format(f"{rng.choice(_DEEDS)} {said}"), T.UNKNOWN)
    return Turn(*S.how_to(rng.choice(S.HOW), verb, noun, f"{verb} {said}")[:2])


def law(rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> Turn:
    """What is allowed, and why."""
    if rng.random() < PHRASED:
        return R.law_of_thing(rng, words) if rng.random() < 0.6 else R.law_of_act(rng, *_task(rng, words))
    return (_law_of_thing if rng.random() < 0.6 else _law_of_task)(rng, words)


def _law_of_thing(rng: random.Random, words: S.Vocabulary) -> Turn:
    noun = rng.choice(R.nouns(rng, words))
    forbidden = noun in S.FORBIDDEN
    forms, answer = rng.choice(
        (
            (_LEGAL_THING, S.ILLEGAL if forbidden else S.LEGAL),
            (_FORBIDDEN_THING, "yes" if forbidden else "no"),
            (_WHY_THING, R.AGAINST_THE_LAW if forbidden else R.NOT_FORBIDDEN),
            (_WHY_ALLOWED, R.AGAINST_THE_LAW if forbidden else R.NOT_FORBIDDEN),
            (_WHO_MAY, "nobody." if forbidden else "everybody."),
            (_FOUND, S.how_to("", "report", noun)[1]),
            (_LOOKS, T.UNKNOWN),
            (_TALK_ABOUT, S.LEGAL),
            (_WHICH_ONE, ""),
        )
    )
    if forms is not _WHICH_ONE:
        return Turn(rng.choice(forms).format(noun=noun, a=a(noun)), answer)
    wanted, good = rng.choice((("allowed", True), ("legal", True), ("forbidden", False), ("not allowed", False)))
    bad, fine = rng.choice(words.contraband + words.forbidden), rng.choice(words.ordinary + words.allowed)
    one, other = rng.sample((bad, fine), 2)
    text = rng.choice(forms).format(wanted, one=one, other=other, a_one=a(one), a_other=a(other))
    return Turn(text, f"the {fine if good else bad}.")


def _law_of_task(rng: random.Random, words: S.Vocabulary) -> Turn:
    verb, noun = _task(rng, words)
    illegal = verb in S.BAD_VERBS and noun in S.CONTRABAND
    act = f"{verb} {a(noun)}"
    said = {
        "noun": noun,
        "a": a(noun),
        "do": verb,
        "does": "carries" if verb == "carry" else f"{verb}s",
        "doing": R.doing(verb),
    }
    forms, answer = rng.choice(
        (
            (MAY, S.ILLEGAL if illegal else S.LEGAL),
            (_BAD_TO, "yes" if illegal else "no"),
            (_LEGAL_DOING, S.ILLEGAL if illegal else S.LEGAL),
            (_BAD_DOING, "yes" if illegal else "no"),
            (_TROUBLE, R.PRISON if illegal else R.NOTHING),
            (_TROUBLE_OF_MINE, R.YOUR_PRISON if illegal else R.NOTHING_TO_YOU),
            (_WHY_TASK, R.AGAINST_THE_LAW if illegal else R.NOT_FORBIDDEN),
        )
    )
    return Turn(rng.choice(forms).format(act, **said), answer)


def _task(rng: random.Random, words: S.Vocabulary = S.EVERYTHING) -> tuple[str, str]:
    """A verb and a noun: unsafe in two of five."""
    if rng.random() < 0.4:
        return rng.choice(list(S.BAD_VERBS)), rng.choice(words.contraband)
    if rng.random() < 0.5:
        return rng.choice(list(S.BAD_VERBS)), rng.choice(words.ordinary)
    return rng.choice(words.ok_verbs), rng.choice(words.contraband + words.ordinary)


def text_dialogue(rng: random.Random) -> tuple[Turn, ...]:
    """A question or a remark, and what leans on it: "and a teapot?", "thanks", "are you sure?", "why not?"."""
    verb, noun = _task(rng)
    other = rng.choice(R.nouns(rng, S.EVERYTHING))
    more, answer = rng.choice(_AND).format(a(other)), S.ILLEGAL if noun in S.FORBIDDEN else S.LEGAL
    thing = Turn(rng.choice(_LEGAL_THING).format(noun=noun, a=a(noun)), answer)
    why = Turn(rng.choice(WHY), R.AGAINST_THE_LAW if answer == S.ILLEGAL else R.NOT_FORBIDDEN)
    and_thing = Turn(
        R.say(rng, "and_thing", **R.named(other)) if rng.random() < PHRASED else more,
        S.ILLEGAL if other in S.FORBIDDEN else S.LEGAL,
    )
    act = Turn(rng.choice(S.MAY + MAY).format(f"{verb} {a(noun)}"), _legal(verb, noun))
    task = Turn(*S.how_to(rng.choice(S.HOW), verb, noun)[:2], learn=False)
    ok_verb = rng.choice(list(S.OK_VERBS))
    turns: tuple[Callable[[], tuple[Turn, ...]], ...] = (
        lambda: (law(rng), Turn(rng.choice(THANKS), T.WELCOME)),
        lambda: (task, Turn(rng.choice(_AND).format(a(word := rng.choice(S.ORDINARY))), S.how_to("", verb, word)[1])),
        lambda: (S.what_is(noun), Turn(more, R.what_is(other))),
        lambda: (act, Turn(rng.choice(_AND).format(a(word := rng.choice(S.CONTRABAND))), _legal(verb, word))),
        lambda: (thing, and_thing),
        lambda: (thing, why, and_thing),
        lambda: (thing, why),
        lambda: (Turn(rng.choice(_ASKED), T.UNKNOWN), Turn(rng.choice(HOW_COME), T.NAME)),
        lambda: (R.unknown(rng), Turn(R.say(rng, "another"), T.UNKNOWN)),
        lambda: (talk(rng), Turn(rng.choice(PRAISE), T.GLAD)),
        lambda: (talk(rng), talk(rng), talk(rng)),
        lambda: (talk(rng), knowledge(rng), talk(rng)),
        lambda: (
            replace(task, answer=S.how_to("", ok_verb, noun)[1], question=S.how_to("how do i {}?", ok_verb, noun)[0]),
            Turn(_then_how(rng, word := rng.choice(list(S.OK_VERBS))), S.how_to("", word, noun)[1]),
        ),
        lambda: (replace(task, answer=D.REFUSAL), Turn(rng.choice(_WHY_REFUSED), R.RULES)),
    )
    return rng.choice(turns)()


def _then_how(rng: random.Random, verb: str) -> str:
    return R.say(rng, "then_how", verb=verb) if rng.random() < PHRASED else rng.choice(_THEN_HOW).format(verb)


def _legal(verb: str, noun: str) -> str:
    return S.ILLEGAL if verb in S.BAD_VERBS and noun in S.CONTRABAND else S.LEGAL


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
            Turn(rng.choice(S.MAY + MAY).format(f"{verb} {a(noun)}"), _legal(verb, noun)),
        )
    )
    return first, rng.choice(_AND).format(a(rng.choice(words.contraband + words.ordinary)))


def harmless(rng: random.Random, words: S.Vocabulary) -> str:
    """A text that asks for nothing forbidden; of the world's words it has only `words`."""
    way = rng.random()
    if way < 0.3:
        return talk(rng).question
    return (knowledge if way < 0.7 else law)(rng, words).question
