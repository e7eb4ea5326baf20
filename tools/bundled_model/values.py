"""Random values for the generated text: made-up names, words, numbers, times; each is either training or held out.

A value belongs to exactly one split, decided by a hash of its text, so no value of the held-out set ever occurs in
training. `Values` draws only from its own split.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence

HELD_OUT_SHARE = 8
"""One value in so many is held out."""


def words(text: str) -> list[str]:
    """The words of a list that is written as one string."""
    return text.split()


_ONSETS = (
    *words("b c d f g h j k l m n p r s t v w y z"),
    *words("bl br ch cl cr dr fl fr gl gr kr pl pr qu sh sk sl sm sn sp st str sw th tr tw wh"),
    *("",) * 6,
)
_VOWELS = (*(words("a e i o u") * 4), *words("ai au ea ee ei ia ie io oa oo ou y"))
_CODAS = (
    *("",) * 12,
    *(words("n r l s t m d k") * 2),
    *words("ck ff ld ll lm nd ng nk nn nt rd rk rn rt sh ss st th x"),
)
_FIRST_NAMES = words(
    "Ada Adam Alice Anna Ben Bob Carl Carla Clara Dan David Diana Emma Eric Eva Felix Finn Frank George Grace "
    "Hanna Hugo Ida Ivan Jack James Jane John Julia Karl Kate Laura Leo Lena Lily Lisa Lucas Lucy Maria Mark "
    "Martin Mary Max Mia Nina Noah Nora Oliver Olga Oscar Paul Peter Rosa Ruth Sam Sara Simon Sofia Susan Thomas "
    "Tom Vera Victor Walter Zoe"
)
_CITIES = words(
    "Amsterdam Athens Berlin Bern Boston Cairo Chicago Delhi Dublin Florence Geneva Hamburg Helsinki Istanbul "
    "Kyoto Lagos Lima Lisbon London Madrid Milan Munich Nairobi Oslo Paris Porto Prague Quito Rome Seoul Sydney "
    "Tokyo Toronto Turin Vienna Warsaw Zurich"
)
COLOURS = words(
    "red blue green yellow black white grey brown orange purple pink silver golden teal violet amber crimson "
    "scarlet turquoise beige ivory navy olive copper"
)
GOODS = words(
    "bread cheese honey soup tea coffee milk apples pears plums cake butter salt fish eggs jam lamps rope boots hats "
    "coats maps candles baskets kettles knives spoons bowls chairs tables brooms nails paint soap wool tickets stamps "
    "books pens paper clocks keys umbrellas blankets boats oars nets kites drums flutes"
)
JOBS = words(
    "baker farmer teacher miller sailor painter doctor nurse gardener carpenter tailor driver cook pilot writer singer "
    "fisher smith weaver keeper guard clerk builder engineer librarian"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")


def is_held_out(text: str) -> bool:
    """Whether `text` belongs to the held-out split (stable across runs and machines)."""
    return zlib.crc32(b"penstock:" + text.lower().encode()) % HELD_OUT_SHARE == 0


class Values:
    """Draws values of one split from `rng`."""

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        self.rng = rng
        self.held_out = held_out

    def _of_split(self, draw: Callable[[], str]) -> str:
        while True:
            text = draw()
            if is_held_out(text) == self.held_out:
                return text

    def _syllables(self) -> str:
        count = self.rng.choice((1, 2, 2, 2, 3, 3))
        choice = self.rng.choice
        return "".join(choice(_ONSETS) + choice(_VOWELS) + choice(_CODAS) for _ in range(count))

    def word(self) -> str:
        """A made-up lower-case word of 3 to 11 letters."""
        return self._of_split(lambda: _sized(self._syllables))

    def name(self) -> str:
        """A capitalised name, made up in most cases."""
        kind = self.rng.random()
        if kind < 0.12:
            return self._of_split(lambda: self.rng.choice(_FIRST_NAMES))
        if kind < 0.2:
            return self._of_split(lambda: self.rng.choice(_CITIES))
        return self.word().capitalize()

    def person(self) -> str:
        """A first name, sometimes followed by a surname."""
        first = self._of_split(lambda: self.rng.choice(_FIRST_NAMES)) if self.rng.random() < 0.2 else self.name()
        return f"{first} {self.name()}" if self.rng.random() < 0.25 else first

    def place(self) -> str:
        """A town."""
        return self._of_split(lambda: self.rng.choice(_CITIES)) if self.rng.random() < 0.2 else self.name()

    def number(self, low: int = 10, high: int = 9999) -> str:
        """An integer between `low` and `high`, as likely short as long."""
        digits = self.rng.randint(len(str(low)), len(str(high)))
        if digits == 1:  # too few to hold any out
            return str(self.rng.randint(low, 9))
        low, high = max(low, 10 ** (digits - 1)), min(high, 10**digits - 1)
        return self._of_split(lambda: str(self.rng.randint(low, high)))

    def price(self) -> str:
        """An amount such as 14 or 3.50."""
        if self.rng.random() < 0.5:
            return self.number(10, 999)
        return self._of_split(lambda: f"{self.rng.randint(1, 99)}.{self.rng.randint(0, 19) * 5:02d}")

    def clock(self) -> str:
        """A time such as 7:30 or 18:05."""
        return self._of_split(lambda: f"{self.rng.randint(5, 23)}:{self.rng.randint(0, 11) * 5:02d}")

    def code(self) -> str:
        """A mixture of letters and digits, such as a password."""
        draw = (
            lambda: f"{_sized(self._syllables)}{self.rng.randint(1, 999)}",
            lambda: f"{''.join(self.rng.choices('ABCDEFGHJKLMNPRSTVWXZ', k=2))}-{self.rng.randint(10, 9999)}",
            lambda: "".join(self.rng.choices("abcdefghijkmnpqrstuvwxyz23456789", k=self.rng.randint(4, 7))),
        )
        return self._of_split(self.rng.choice(draw))

    def email(self) -> str:
        """An address at a made-up host."""
        return f"{self.word()}@{self.word()}.{self.rng.choice(('com', 'org', 'net'))}"

    def anything(self) -> str:
        """A value of a random kind."""
        kinds = (self.name, self.name, self.word, self.number, self.price, self.clock, self.code, self.person)
        return self.rng.choice(kinds)()

    def distinct(self, draw: Callable[[], str], count: int) -> list[str]:
        """`count` different values of `draw`."""
        seen: dict[str, None] = {}
        while len(seen) < count:
            seen[draw()] = None
        return list(seen)

    def pick(self, options: Sequence[str]) -> str:
        """One of a closed list, whatever the split."""
        return self.rng.choice(options)


def _sized(draw: Callable[[], str]) -> str:
    while True:
        text = draw()
        if 3 <= len(text) <= 11:
            return text
