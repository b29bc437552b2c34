"""Phrases of every build, so that the embedded models take up what people type and not only the citizens' phrases.

They mean nothing to the gold rater: a ``Disguise`` puts them in the place of a group's wishes in all its texts.
"""

from __future__ import annotations

from random import Random

NOUNS = """answer|bag|ball|band|bar|barrier|basket|bath|bell|bench|bill|block|board|bottle|bowl|box|branch|bridge|
budget|bus|button|camera|card|chair|chance|charge|choice|class|clock|cloth|code|coin|corner|cost|course|crowd|cup|date|deal|
deposit|desk|door|drain|drill|event|fee|fence|fight|film|fire|floor|form|friend|fund|game|garden|guide|habit|
hall|hand|hole|home|hour|idea|job|joke|key|kitchen|ladder|lamp|leak|lesson|letter|limit|line|list|lock|machine|map|
market|meal|member|minute|mistake|month|morning|name|night|nurse|offer|office|order|paper|pass|path|person|phone|
picture|pipe|place|plan|plant|plate|plot|pool|poster|price|prize|problem|project|queue|rate|record|refund|repair|rest|
reward|risk|road|roof|room|route|rule|sale|screen|season|seat|shelf|shift|shop|sign|smell|song|space|stair|stone|
stranger|street|surprise|table|tap|teacher|team|test|ticket|tool|toy|train|tree|trick|trip|view|visit|voice|vote|wall|
week|window|worker|yard|year""".replace("\n", "").split("|")
MASS = """air|anger|bread|care|cash|chaos|comfort|dirt|dust|fear|food|freedom|fun|glass|heat|help|ice|information|light|
litter|mess|milk|money|mud|music|news|noise|notice|paint|pain|peace|power|privacy|proof|rain|respect|rubbish|
safety|sand|shade|silence|sleep|smoke|snow|space|sport|stress|sugar|support|tea|time|traffic|training|trust|waste|water|
wood|work""".replace("\n", "").split("|")
ADJECTIVES = """bad|better|big|bright|broken|busy|calm|cheap|clean|clear|cold|common|dark|deep|different|dirty|dry|dull|
early|easy|empty|equal|expensive|extra|fair|familiar|fast|final|fresh|full|good|hard|heavy|hidden|high|honest|hot|kind|
large|late|lazy|local|long|loud|low|modern|narrow|new|nice|noisy|old|open|plain|poor|proper|public|quick|real|rich|
rude|safe|serious|shared|sharp|short|simple|slow|small|soft|spare|special|strange|strict|strong|tall|thin|tidy|tired|
warm|weak|weekly|wet|wide|wild|wrong|young""".replace("\n", "").split("|")
VERBS = """add|answer|ask|bake|book|bring|call|check|clean|close|collect|cook|cost|count|cover|cut|damage|decide|drink|
drive|drop|eat|enjoy|explain|feed|feel|fill|find|follow|forget|get|give|hear|help|hide|hire|hold|hurt|join|keep|know|
lead|learn|leave|lend|like|listen|live|look|lose|love|make|meet|miss|move|need|offer|open|own|pay|plan|play|prefer|
protect|put|raise|read|remember|rent|repair|ride|ruin|run|save|sell|send|share|show|sing|sit|sleep|spend|spoil|stand|
start|stay|stop|swim|take|talk|teach|throw|touch|train|trust|turn|use|visit|wait|walk|want|waste|watch|wear|work|write""".replace(
    "\n", ""
).split("|")
PREPOSITIONS = """about|after|along|around|at|before|behind|between|by|during|for|from|in|near|of|of|on|outside|over|
through|to|under|with|without""".replace("\n", "").split("|")
SUBJECTS = "it they we people everybody nobody most some others this that you".split()
ENDS = "after dark|all day|any more|as well|at night|at the moment|every week|first|in winter|on time|once a year|too"
AUXILIARIES = "can|cannot|could|do not|have to|may|must|never|rarely|should|should not|still|will|will not|would"


def _nouns(rng: Random) -> str:
    """A bare noun in the plural or one that has none."""
    noun = rng.choice(NOUNS) if rng.random() < 0.75 else rng.choice(MASS)
    return noun if noun in MASS else noun + ("es" if noun[-1] in "shx" else "s")


def _simple(rng: Random) -> str:
    """[determiner] [adjective] noun."""
    shape, adjective = rng.random(), f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.5 else ""
    if shape < 0.3:
        phrase = f"{adjective}{rng.choice(NOUNS)}"
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
    if shape < 0.55:
        noun = rng.choice(NOUNS) if rng.random() < 0.5 else _nouns(rng)
        return f"{rng.choice(('the', 'the', 'our', 'their'))} {adjective}{noun}"
    few = f"{rng.choice('more less some no enough many few'.split())} " if rng.random() < 0.3 else ""
    return f"{few}{adjective}{_nouns(rng)}"


def noun_phrase(rng: Random) -> str:
    """What somebody might name: "a spare key for visitors", "mud on the stairs", "people who never pay"."""
    shape, head = rng.random(), _simple(rng)
    if shape < 0.3:
        return head
    if shape < 0.7:
        tail = f"{rng.choice(PREPOSITIONS)} {_simple(rng)}"
        return f"{head} {tail} {rng.choice(PREPOSITIONS)} {_simple(rng)}" if rng.random() < 0.2 else f"{head} {tail}"
    if shape < 0.85:
        return f"{head} {rng.choice(('that', 'who', 'which'))} {_predicate(rng)}"
    if shape < 0.93:
        return f"{head} {rng.choice(ENDS.split('|'))}"
    verb = rng.choice(VERBS)
    return f"{verb.removesuffix('e')}ing {_simple(rng)}"


def _predicate(rng: Random) -> str:
    shape, verb = rng.random(), rng.choice(VERBS)
    if rng.random() < 0.45:
        verb = f"{rng.choice(AUXILIARIES.split('|'))} {verb}"
    if shape < 0.2:
        not_ = " not" if rng.random() < 0.2 else ""
        degree = f"{rng.choice('too very so already always'.split())} " if rng.random() < 0.5 else ""
        return f"{rng.choice(('are', 'is', 'get', 'were'))}{not_} {degree}{rng.choice(ADJECTIVES)}"
    if shape < 0.55:
        said = f"{verb} {_simple(rng)}"
    elif shape < 0.75:
        said = f"{verb} {rng.choice(PREPOSITIONS)} {_simple(rng)}"
    elif shape < 0.85:
        said = f"{verb} {_simple(rng)} {rng.choice(PREPOSITIONS)} {_simple(rng)}"
    else:
        said = verb
    return f"{said} {rng.choice(ENDS.split('|'))}" if rng.random() < 0.25 or said == verb else said


def clause(rng: Random) -> str:
    """What somebody might say: "the stairs are too narrow", "nobody will clean the tables after dark"."""
    subject = rng.choice(SUBJECTS) if rng.random() < 0.2 else _simple(rng)
    if rng.random() < 0.1:
        subject = f"{subject} {rng.choice(PREPOSITIONS)} {_simple(rng)}"
    return f"{subject} {_predicate(rng)}"
