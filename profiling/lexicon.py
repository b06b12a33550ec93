"""The words that the synthetic English is made of.

Names and the words of secret phrases never occur in the filler: a name points at one statement of
a text and at nothing else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """What a stretch of prose is about.

    Attributes:
        people: Subjects, singular; the plural adds an ``s``.
        verbs: Transitive verbs in the plural form; the singular adds an ``s``.
        things: Objects, singular; the plural adds an ``s``.
        places: Phrases that close a sentence.
    """

    people: tuple[str, ...]
    verbs: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]


TOPICS: tuple[Topic, ...] = (
    Topic(
        ("baker", "cook", "waiter", "guest"),
        ("bake", "serve", "taste", "share"),
        ("cake", "soup", "plate", "spoon", "apple", "onion"),
        ("in the kitchen", "at the table", "near the oven"),
    ),
    Topic(
        ("sailor", "captain", "fisher", "diver"),
        ("pull", "load", "steer", "repair"),
        ("boat", "rope", "anchor", "net", "sail", "barrel"),
        ("at the harbour", "by the sea", "under the bridge"),
    ),
    Topic(
        ("hunter", "ranger", "walker", "camper"),
        ("follow", "see", "hear", "track"),
        ("bird", "hare", "path", "stream", "tree", "owl"),
        ("in the forest", "on the hill", "beside the lake"),
    ),
    Topic(
        ("farmer", "trader", "seller", "driver"),
        ("sell", "weigh", "count", "trade"),
        ("horse", "cart", "basket", "egg", "goat", "coin"),
        ("at the market", "on the road", "behind the barn"),
    ),
    Topic(
        ("teacher", "student", "writer", "reader"),
        ("read", "write", "explain", "quote"),
        ("book", "letter", "poem", "lesson", "map", "page"),
        ("at the school", "in the library", "by the window"),
    ),
    Topic(
        ("doctor", "nurse", "patient", "helper"),
        ("visit", "treat", "greet", "thank"),
        ("friend", "neighbour", "cousin", "bed", "bottle", "bandage"),
        ("in the clinic", "across the street", "at the door"),
    ),
    Topic(
        ("singer", "dancer", "player", "drummer"),
        ("play", "sing", "learn", "love"),
        ("song", "drum", "dance", "tune", "flute", "show"),
        ("on the stage", "in the hall", "after the feast"),
    ),
    Topic(
        ("mason", "builder", "painter", "miner"),
        ("build", "paint", "lift", "break"),
        ("wall", "stone", "brick", "roof", "gate", "tower"),
        ("in the village", "above the mine", "along the river"),
    ),
)

ADJECTIVES: tuple[str, ...] = (
    "old", "young", "small", "large", "quiet", "happy", "tired", "busy", "kind", "clever",
    "red", "green", "blue", "heavy", "light", "new", "broken", "clean", "warm", "cold",
)  # fmt: skip

OPENINGS: tuple[str, ...] = (
    "In the morning", "In the evening", "Later that day", "After the rain", "Before noon",
    "Every summer", "During the winter", "Once again",
)  # fmt: skip

ADVERBS: tuple[str, ...] = (
    "slowly", "often", "quickly", "gladly", "rarely", "always", "never", "carefully",
)  # fmt: skip

SHORT_SENTENCES: tuple[str, ...] = (
    "Rain fell.", "Birds sang.", "Night came.", "Snow melted.", "Time passed.",
)  # fmt: skip

KINDS_OF_NUMBERS: tuple[str, ...] = (
    "access code", "locker number", "badge number", "door code", "account number", "ticket number",
)  # fmt: skip

KINDS_OF_PHRASES: tuple[str, ...] = ("secret phrase", "pass phrase", "call sign")

NAMES: tuple[str, ...] = (
    "Alice", "Bruno", "Clara", "David", "Elena", "Frank", "Greta", "Henry", "Irene", "Jacob",
    "Karen", "Louis", "Maria", "Nolan", "Olive", "Peter", "Quinn", "Rosa", "Simon", "Tessa",
    "Umar", "Vera", "Walter", "Xenia", "Yusuf", "Zoe", "Adam", "Bella", "Carlos", "Diana",
    "Edgar", "Fiona", "George", "Hanna", "Ivan", "Julia", "Kevin", "Laura", "Martin", "Nadia",
    "Oscar", "Paula", "Ralph", "Sara", "Thomas", "Ursula", "Victor", "Wendy", "Aaron", "Beth",
    "Colin", "Dora", "Emil", "Flora", "Gavin", "Helen", "Ingrid", "James", "Kira", "Leo",
    "Mona", "Nina", "Otto", "Pablo", "Rita", "Stefan", "Tara", "Uwe", "Violet", "Wanda",
    "Anton", "Bianca", "Cyrus", "Daphne", "Ethan", "Felix", "Gina", "Hugo", "Isabel", "Jonas",
    "Katya", "Lars", "Mabel", "Nora", "Omar", "Priya", "Ruth", "Samuel", "Tilda", "Vince",
    "Amir", "Celia", "Dmitri", "Esther", "Gloria", "Marcus",
)  # fmt: skip

PHRASE_WORDS: tuple[str, ...] = (
    "amber", "falcon", "velvet", "copper", "lantern", "thunder", "meadow", "crystal", "marble",
    "shadow", "silver", "tiger", "ocean", "comet", "cactus", "dragon", "ember", "feather",
    "glacier", "hammer", "ivory", "jungle", "kettle", "lemon", "magnet", "nectar", "orbit",
    "pepper", "quartz", "rocket", "saddle", "tunnel", "umbrella", "violin", "walnut", "zebra",
    "canyon", "desert", "engine", "forge", "garnet", "helmet", "island", "jacket", "ladder",
    "mirror", "needle", "olive", "pirate", "ribbon",
)  # fmt: skip
