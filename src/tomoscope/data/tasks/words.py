"""The words that the tasks are made of: names, places, gifts, nouns with their plurals, verbs, colours,
capitals, surnames, professions.

The lists are wider than any one tokenizer needs: each task keeps the words that are single tokens for the tokenizer at
hand (`single.py`). Names are common English ones, so that GPT-2-like vocabularies hold most of them and a vocabulary
made on children's stories still holds enough. How they can mislead: a name's gender is what English readers usually
take it for, and a few names are places or nouns too (Rose, Mark, Scott); capitals are
true facts, whoever rules there now.
"""

from __future__ import annotations

FEMALE: tuple[str, ...] = (
    "Mary", "Sarah", "Emily", "Anna", "Lisa", "Amy", "Emma", "Alice", "Jane", "Lucy", "Kate", "Laura", "Rachel",
    "Jessica", "Jennifer", "Elizabeth", "Michelle", "Amanda", "Ashley", "Melissa", "Nicole", "Stephanie", "Rebecca",
    "Kelly", "Christina", "Heather", "Angela", "Samantha", "Katherine", "Vanessa", "Allison", "Christine", "Katie",
    "Susan", "Karen", "Linda", "Maria", "Julia", "Grace", "Claire", "Helen", "Diana", "Sara", "Ella", "Jill", "Lily",
    "Sue", "Mia", "Molly", "Sally", "Rose", "Jenny", "Luna", "Daisy", "Ellie", "Lila",
)  # fmt: skip
MALE: tuple[str, ...] = (
    "John", "James", "David", "Michael", "Robert", "William", "Daniel", "Thomas", "Paul", "Mark", "Peter", "Tom",
    "Jack", "Matthew", "Andrew", "Joseph", "Ryan", "Brandon", "Jason", "Justin", "Jonathan", "Brian", "Nicholas",
    "Anthony", "Eric", "Adam", "Kevin", "Steven", "Timothy", "Kyle", "Richard", "Jeffrey", "Jeremy", "Benjamin",
    "Aaron", "Charles", "Jacob", "Stephen", "Patrick", "Sean", "Nathan", "Scott", "George", "Simon", "Henry", "Ben",
    "Sam", "Max", "Tim", "Joe", "Jim", "Bob", "Billy", "Leo", "Fred", "Jake", "Tommy", "Timmy", "Andy", "Jimmy",
)  # fmt: skip

PLACES: tuple[str, ...] = (
    "store", "school", "park", "garden", "station", "hospital", "restaurant", "office", "house", "market", "library",
    "museum", "beach", "church", "farm", "hotel", "kitchen", "pool", "zoo", "river",
)  # fmt: skip
GIFTS: tuple[str, ...] = (
    "drink", "ring", "kiss", "bone", "basketball", "computer", "necklace", "snack", "book", "ball", "toy", "cake",
    "hat", "flower", "letter", "ticket", "key", "gift", "cup", "coin",
)  # fmt: skip

NOUNS: tuple[tuple[str, str], ...] = (
    ("teacher", "teachers"), ("doctor", "doctors"), ("farmer", "farmers"), ("lawyer", "lawyers"),
    ("driver", "drivers"), ("writer", "writers"), ("singer", "singers"), ("student", "students"),
    ("actor", "actors"), ("king", "kings"), ("boy", "boys"), ("girl", "girls"), ("friend", "friends"),
    ("player", "players"), ("author", "authors"), ("dog", "dogs"), ("cat", "cats"), ("bird", "birds"),
    ("horse", "horses"), ("guard", "guards"), ("pilot", "pilots"), ("soldier", "soldiers"), ("artist", "artists"),
    ("worker", "workers"), ("kid", "kids"), ("duck", "ducks"), ("parent", "parents"), ("tree", "trees"),
    ("car", "cars"), ("boat", "boats"), ("doll", "dolls"), ("bug", "bugs"),
)  # fmt: skip
VERBS: tuple[tuple[str, str], ...] = (
    ("is", "are"), ("was", "were"), ("has", "have"), ("likes", "like"), ("runs", "run"), ("walks", "walk"),
    ("knows", "know"), ("wants", "want"), ("needs", "need"), ("sees", "see"), ("makes", "make"), ("goes", "go"),
)  # fmt: skip
RELATIVE_VERBS: tuple[tuple[str, str], ...] = (
    ("likes", "like"), ("knows", "know"), ("sees", "see"), ("wants", "want"), ("needs", "need"), ("loves", "love"),
)  # fmt: skip

EVENTS: tuple[str, ...] = (
    "war", "reign", "plague", "siege", "expedition", "voyage", "project", "dispute", "strike", "trial", "drought",
    "journey", "alliance", "conflict", "campaign", "trip", "party", "storm", "fight", "game",
)  # fmt: skip

COLOURS: tuple[str, ...] = (
    "red", "blue", "green", "black", "white", "yellow", "brown", "orange", "purple", "pink", "gray", "gold",
)  # fmt: skip
THINGS: tuple[str, ...] = (
    "cup", "box", "book", "ball", "hat", "chair", "table", "door", "car", "coat", "bag", "bottle", "shirt", "boat",
    "phone", "pen", "plate", "clock", "lamp", "shoe",
)  # fmt: skip

ARGUMENTS: tuple[str, ...] = (
    "page", "names", "size", "files", "first", "read", "model", "image", "text", "index", "value", "key", "order",
    "list", "user", "code", "test", "line", "path", "node", "state", "table", "count", "label", "level", "point",
    "color", "shape", "data", "type", "name", "file", "time", "mode", "date", "part",
)  # fmt: skip
DESCRIPTION: tuple[str, ...] = (
    "message", "tree", "detail", "paper", "sky", "host", "action", "number", "bone", "river", "market", "school",
    "water", "stone", "house", "song", "light", "letter", "field", "game",
)  # fmt: skip

CAPITALS: tuple[tuple[str, str], ...] = (
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("England", "London"),
    ("Russia", "Moscow"), ("Japan", "Tokyo"), ("China", "Beijing"), ("Egypt", "Cairo"), ("Greece", "Athens"),
    ("Ireland", "Dublin"), ("Austria", "Vienna"), ("Poland", "Warsaw"), ("Turkey", "Ankara"), ("Iraq", "Baghdad"),
    ("Iran", "Tehran"), ("Syria", "Damascus"), ("Cuba", "Havana"), ("Norway", "Oslo"), ("Sweden", "Stockholm"),
    ("Denmark", "Copenhagen"), ("Belgium", "Brussels"), ("Portugal", "Lisbon"), ("Hungary", "Budapest"),
    ("Canada", "Ottawa"), ("Kenya", "Nairobi"), ("Ukraine", "Kiev"), ("Afghanistan", "Kabul"),
)  # fmt: skip
SURNAMES: tuple[str, ...] = (
    "Smith", "Brown", "Taylor", "Wilson", "Moore", "Clark", "Lewis", "Walker", "Hall", "Young", "Wright", "Hill",
    "Green", "Baker", "Nelson", "Carter", "Parker", "Evans", "Turner", "Collins", "Cook", "Morgan", "Bell", "Murphy",
    "Cooper", "Reed", "Bailey", "Ward", "Cox", "Gray", "Watson", "Brooks",
)  # fmt: skip
PROFESSIONS: tuple[str, ...] = (
    "teacher", "doctor", "farmer", "lawyer", "driver", "writer", "singer", "dancer", "pilot", "soldier", "painter",
    "nurse",
)  # fmt: skip
