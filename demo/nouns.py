"""The demo model's nouns: one emoji each, chosen to be told apart at 30 pixels."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun of a scene; `emoji` picks the sprite in every style."""

    emoji: str
    singular: str
    plural: str

    @property
    def with_article(self) -> str:
        """`an eagle`, `a shark`; by sound, hence the exceptions."""
        vowel = self.singular[0] in "aeiou" and not self.singular.startswith(("uni", "ufo"))
        return f"{'an' if vowel else 'a'} {self.singular}"


_IRREGULAR = {
    "butterfly": "butterflies",
    "fish": "fishes",
    "mouse": "mice",
    "octopus": "octopuses",
    "sheep": "sheep",
    "strawberry": "strawberries",
    "trophy": "trophies",
    "wolf": "wolves",
}

_TABLE = """
🐶 dog      🐱 cat       🐭 mouse      🐰 rabbit    🦊 fox        🐻 bear       🐼 panda
🐨 koala    🐯 tiger     🦁 lion       🐮 cow       🐷 pig        🐸 frog       🐵 monkey
🐧 penguin  🦆 duck      🦅 eagle      🦉 owl       🦇 bat        🦄 unicorn    🐝 bee
🦋 butterfly 🐌 snail    🐞 ladybug    🐢 turtle    🐍 snake      🐙 octopus    🦑 squid
🦀 crab     🐠 fish      🐬 dolphin    🐳 whale     🦈 shark      🐊 crocodile  🦓 zebra
🐘 elephant 🦒 giraffe   🐑 sheep      🦔 hedgehog  🦩 flamingo   🦚 peacock    🐔 chicken
🍎 apple    🍌 banana    🍍 pineapple  🍓 strawberry 🍉 watermelon 🍋 lemon     🥝 kiwi
🥑 avocado  🍆 eggplant  🥕 carrot     🍄 mushroom  🥨 pretzel    🍔 burger     🍕 pizza
🌭 hot-dog  🌮 taco      🍩 donut      🍪 cookie    🎂 cake       🍭 lollipop   🥐 croissant
🥚 egg      🚗 car       🚌 bus        🚜 tractor   🚲 bicycle    🚂 train      🚁 helicopter
🚀 rocket   ⛵ sailboat  🚑 ambulance  🛴 scooter   🛸 ufo        ⚽ football   🏀 basketball
🎈 balloon  🎸 guitar    🎺 trumpet    🥁 drum      📷 camera     💻 laptop     ⏰ clock
🔑 key      🔨 hammer    💡 light-bulb 📕 book      ☂ umbrella    👑 crown      🎩 top-hat
👟 sneaker  👗 dress     🎁 gift       🪑 chair     🚪 door       🧲 magnet     🔔 bell
🏆 trophy   💎 diamond   ⚓ anchor     🌵 cactus    🌻 sunflower  🌹 rose       🌳 tree
⭐ star     🤖 robot     👻 ghost      ⛄ snowman   🏠 house      ⛺ tent       🎃 pumpkin
"""


def _plural(singular: str) -> str:
    if singular in _IRREGULAR:
        return _IRREGULAR[singular]
    return singular + ("es" if singular.endswith(("s", "x", "ch", "sh")) else "s")


def _parse(table: str) -> tuple[Noun, ...]:
    words = table.split()
    names = [name.replace("-", " ") for name in words[1::2]]
    return tuple(Noun(e, n, _plural(n)) for e, n in zip(words[::2], names, strict=True))


NOUNS: tuple[Noun, ...] = _parse(_TABLE)
