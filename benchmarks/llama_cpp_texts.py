"""200 texts on which tokenizers disagree easily, and 20 prompts, for `benchmarks.llama_cpp`."""

from __future__ import annotations

import random
from collections.abc import Sequence

CODE = (
    "def f(x):\n    return x ** 2  # squared\n",
    "for (int i = 0; i < 10; ++i) {\n\tprintf(\"%d\\n\", i);\n}",
    "SELECT name, COUNT(*) FROM users WHERE id >= 1000 GROUP BY name;",
    "<div class=\"a-b\">&nbsp;<br/></div>\r\n<!-- end -->",
    "fn main() -> Result<(), Box<dyn Error>> { Ok(()) }",
    "x = {'a': [1, 2.5e-10, None], \"b\": r'\\d+'}\n\n\nclass A(B): pass",
    "\\frac{\\partial^2 u}{\\partial t^2} = c^2 \\nabla^2 u",
    "git commit -m 'fix: #1234' && git push origin HEAD~1..HEAD",
    "0x7fFF_FFFF 1_000_000 3.14159 1e-9 0b1010 12,345.67 2026-11-25T12:34:56Z",
    "camelCase snake_case SCREAMING_CASE kebab-case PascalCase HTTPServer2Go",
)  # fmt: skip
SCRIPTS = (
    "今天天气很好，我们去公园散步吧。",
    "日本語のテキストと漢字カナ交じり文。",
    "한국어 문장을 토큰으로 나눕니다.",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "שלום עולם, מה שלומך היום?",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "Ελληνικό κείμενο με τόνους.",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "Ünïcödé façade naïve Æsop œuvre",
    "ﬁnance ½ cup ² ³ № ™ ℃ Ⅷ",
    "e\u0301 n\u0303 o\u0308 a\u030a",
)
EMOJI = ("🙂", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "❤️", "🧑‍💻🚀✨", "🤷🏻‍♀️ ok")
SPACES = (
    " ", "  ", "   leading", "trailing   ", "a  b   c    d", "\t\ttabs\t", "\n\n\n", " \n \n", "\r\n\r\n",
    "a\u00a0b\u3000c\u2009d",
    "\u200bzero\u200bwidth", "    four\n        eight\n    four", "x" + " " * 40 + "y", "\n" * 20, " \t \t ",
)  # fmt: skip
PLAIN = (
    "The quick brown fox jumps over the lazy dog.",
    "I'll say it's they've we're don't CAN'T I'D you'LL",
    "What's 12345678901234567890 divided by 7?",
    "...!!! ??? --- *** (((nested))) [[brackets]] {{braces}}",
    "user@example.com https://example.org/path?q=1&r=a%20b#frag",
    "Dr. Smith's $1,000.00 (50%) - \"quoted\" 'single' “curly”",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "a",
    "A",
    "1",
    "?",
    "",
)


def texts(special: Sequence[str], count: int = 200) -> list[str]:
    """Varied texts: the ones above, and mixtures of them with special tokens as a user may type them."""
    rng = random.Random(7)
    base = [*CODE, *SCRIPTS, *EMOJI, *SPACES, *PLAIN]
    for token in list(special)[:8]:
        base += [token, f"say {token} twice{token}", token[:-1], f"{token} {token}"]
    base = list(dict.fromkeys(base))
    while len(base) < count:
        parts = rng.sample([*CODE, *SCRIPTS, *EMOJI, *SPACES, *PLAIN, *special], rng.randint(2, 4))
        text = rng.choice(["", " ", "\n", "  "]).join(parts)
        base.append(text[rng.randint(0, 5) :] if rng.random() < 0.5 else text)
    return base[:count]


PROMPTS = (
    "Write a Python function that reverses a string.", "What is a binary search tree?",
    "Write a SQL query that counts users per country.", "Explain recursion in one sentence.",
    "Write a JavaScript function that removes duplicates from an array.", "What does HTTP status 404 mean?",
    "Write a C function that swaps two integers.", "How do I list files in a directory in bash?",
    "Write a Python class for a stack.", "What is the time complexity of quicksort?",
    "Translate 'good morning' into French.", "Write a regular expression for an email address.",
    "Name three sorting algorithms.", "Write a Rust function that adds two numbers.",
    "What is the difference between a list and a tuple in Python?", "Write an HTML page with a heading.",
    "Explain what a hash map is.", "Write a Python one-liner that sums the squares of 1 to 10.",
    "How do I undo the last git commit?", "What is 17 times 23?",
)  # fmt: skip
