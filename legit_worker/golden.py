"""The texts and pictures that `celery legit validate` compares. Pure.

In: nothing. Out: the same texts and pictures in the same order, every time. Short and long texts are mixed, so that a
batch must pad. Some texts differ in a word, a letter or a mark, so that a vector in the wrong place is noticed. Some
come twice.
"""

from __future__ import annotations

from typing import Any

#: Sizes of the pictures, in pixels: an image processor that keeps them makes images of different sizes.
PICTURES = tuple((64 + 8 * number, 120 - 8 * number) for number in range(8))

#: The words of the longest text: several times what the usual models take, so that both sides must cut it.
LONG_WORDS = 12_000

_ENGLISH = [
    "Hello.",
    "The parcel arrived on Tuesday.",
    "Please reset my password; the link in the mail has expired.",
    "A river that floods every spring leaves the best soil behind.",
    "She tuned the old piano by ear, one string after the other, until the whole house hummed along with it.",
    "Invoice 2041-B: 3 boxes of paper, 2 toner cartridges, total 184.50 EUR, due within 30 days.",
    "How do I bake bread without yeast?",
    "The committee met twice and agreed on nothing, which surprised nobody who had watched it meet before.",
    "to be continued",
    "STOP SHOUTING AT ME",
    "camelCase, snake_case, kebab-case and SCREAMING_CASE walk into a bar",
    "def add(a, b):\n    return a + b",
    'SELECT name, count(*) FROM visits WHERE day >= "2024-02-29" GROUP BY name;',
    '{"id": 7, "tags": ["new", "urgent"], "owner": null}',
    "<p>Bold claims need <b>bold</b> tags &amp; proof.</p>",
    "https://example.org/a/very/long/path?with=query&and=more#fragment",
    "3.14159 26535 89793 23846 26433 83279",
    "It's the dog's bone; the dogs' bones aren't ours, are they?",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "word " * 40,
]

#: These differ in a word, a letter, their order or a mark. Each has its own vector, close to its neighbours' vectors.
_ALIKE = [
    "The cat sat on the mat.",
    "The cat sat on the mat!",
    "The cat sat on the hat.",
    "The bat sat on the mat.",
    "The mat sat on the cat.",
    "The cats sat on the mat.",
    "Transfer 100 euros to Anna.",
    "Transfer 101 euros to Anna.",
    "Transfer 100 euros to Hanna.",
    "Do not transfer 100 euros to Anna.",
]

_SCRIPTS = [
    "Zwölf große Boxkämpfer jagen Viktor quer über den Sylter Deich.",
    "Où est passé l'élève naïf qui aimait tant le maïs ?",
    "El pingüino añejo cruzó la montaña; ¿quién lo diría?",
    "Żółta łódź płynie po jeziorze, a źrebię śpi.",
    "Ο γρήγορος ποταμός κυλά προς τη θάλασσα.",
    "Вечером в старом городе зажглись фонари.",
    "השוק נפתח מוקדם בבוקר.",
    "القطار يصل في الساعة الثامنة مساءً.",
    "English, then עברית, then العربية, then English again.",
    "गाँव के पास एक पुराना कुआँ है।",
    "แมวนอนอยู่บนหลังคา",
    "今日は雨が降っているので、傘を持って行きます。",
    "图书馆今天下午关门。",
    "봄이 오면 꽃이 핀다.",
    "ქართული ანბანი ლამაზია",
    "ትንሽ ድመት",
]

#: Combining marks, both spellings of one letter, emoji of several code points, and invisible characters.
_MARKS = [
    "caf\u00e9 au lait",
    "cafe\u0301 au lait",
    "Z\u0351\u036b\u0343a\u0363\u0349l\u0348\u036bg\u0322\u031bo\u0321",
    "🎉",
    "ship it 🚀🚀🚀",
    "👩\u200d👩\u200d👧\u200d👦 and 👍🏽 and 🇵🇹",
    "zero\u200bwidth\u200bspaces",
    "soft\u00adhyphen and no\u00a0break",
    "\u202eright to left by force\u202c",
    "\ufeffa mark at the start",
    "ﬁne ﬂour, ½ cup, №5, ℃, ™",
    "𝕞𝕒𝕥𝕙 𝓵𝓮𝓽𝓽𝓮𝓻𝓼 and 𐍈",
    "“curly” ‘quotes’ – dashes — and… an ellipsis",
]

_NEARLY_NOTHING = [
    " .",
    ".",
    "a",
    "7",
    "?!",
    "…",
    "-",
    "\u0301",
    "   lead and trail   ",
    "\n\n\nlines\n\n\n\nand\r\nlines\n\n",
    "\tcolumn\tcolumn\tcolumn",
    "a\u0000b",
]

_LONG = [
    "The lighthouse keeper wrote down every ship that passed, its flag, its course, and what the weather did to it. "
    * 3,
    "One paragraph about very little, which says so at length, and then says it again in other words. " * 9,
    "Rain. " * 90,
    "supercalifragilistic" * 60,
    "数" * 700,
    "the end of a long text does not count where the model cuts it, and the start does. " * 60,
    " ".join(str(number) for number in range(LONG_WORDS)),
]

_TWICE = [_ENGLISH[1], _ALIKE[0], _SCRIPTS[11], _LONG[0]]


def texts() -> list[str]:
    """Return all texts, short and long ones mixed."""
    groups = [_ENGLISH, _SCRIPTS, _NEARLY_NOTHING, _ALIKE, _LONG, _MARKS, _TWICE]
    longest = max(map(len, groups))
    return [group[row] for row in range(longest) for group in groups if row < len(group)]


def pictures() -> list[Any]:
    """Return a `PIL.Image.Image` of each size, in different colours."""
    from PIL import Image

    gradient = Image.linear_gradient("L")
    bands = [gradient.rotate(45 * number) for number in range(len(PICTURES))]
    return [
        Image.merge("RGB", (bands[number], bands[number - 1], bands[number - 3])).resize(size)
        for number, size in enumerate(PICTURES)
    ]
