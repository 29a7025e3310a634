"""Makes tests/tokenizer/corpus.json: strings and the ids that the reference's own tokenizer gives them."""

import json
import random
import shutil
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from reference import TOKENIZER, full_tokenizer_json, write_compact

SEED = 11

LANGUAGES = [
    "The quick brown fox jumps over the lazy dog.",
    "Franz jagt im komplett verwahrlosten Taxi quer durch Bayern. Straße, Größe, Übermut.",
    "Portez ce vieux whisky au juge blond qui fume. L'été, où ça? Cœur naïf.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia. ¿Qué? ¡Sí!",
    "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim. Ação, coração.",
    "Quel vituperabile xenofobo zelante assaggia il whisky ed esclama: alleluja! Perché no?",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig. Zażółć gęślą jaźń.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Árvíztűrő tükörfúrógép.",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul, ısı.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Жебракують філософи при ґанку церкви в Гадячі, ще й шатро їхнє п'яне знаємо.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Τι κάνεις;",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. ١٢٣٤٥",
    "گذاشتن فنجان‌های چای روی میز، آیا می‌خواهید؟",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले विष्णु। १२३",
    "আমি বাংলায় গান গাই। ৪৫৬",
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்.",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "Do bạch kim rất quý nên sẽ dùng để lắp vô xương. Tiếng Việt có dấu.",
    "いろはにほへと ちりぬるを。東京タワーは三百三十三メートルです。カタカナ、ﾊﾝｶｸ。",
    "다람쥐 헌 쳇바퀴에 타고파. 키스의 고유조건은 입술끼리 만나야 한다.",
    "天地玄黄,宇宙洪荒。日月盈昃,辰宿列张。这张图片里有什么?",
    "後生可畏,焉知來者之不如今也。臺灣的夜市很熱鬧!",
    "ღია კარი, დღეს კარგი ამინდია.",
    "Ողջույն, ինչպե՞ս եք։",
    "ሰላም ልዑል። እንዴት ነህ?",
    "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ",
    "Tha mi à Alba. Þetta er íslenska: ð, æ, ö. Ťažký ĺad.",
    "Ĉiuj homoj estas denaske liberaj. Ŝanĝu ĵaŭdon!",
    "မြန်မာဘာသာ ខ្មែរ ລາວ བོད་ཡིག",
]

CODE = [
    "fn main() {\n    println!(\"{}\", 1_000u64.pow(2));\n}\n",
    "def f(x: int) -> dict[str, list[int]]:\n\treturn {f'{x!r}': [x ** 2 for _ in range(10)]}  # done\n",
    "#include <stdio.h>\r\nint main(void)\r\n{\r\n\treturn printf(\"%5.2f\\n\", 3.14159);\r\n}\r\n",
    "SELECT t.id, COUNT(*) FROM \"Tab_le\" t WHERE t.x >= 0x1F AND name LIKE '%a\\_b%' GROUP BY 1;",
    "{\"a\": [1, 2.5e-10, null, true], \"b\": {\"c\": \"\\u00e9\\n\"}}",
    "<div class=\"x-y\" data-id='42'>&nbsp;&lt;b&gt;</div><!-- note --><br/>",
    "const s = `${a?.b ?? 'c'}`; let r = /^[\\w.-]+@\\d{2,}$/gi.test(x) ? x >>> 0 : ~~y;",
    "git log --oneline --graph HEAD~3..HEAD | awk '{print $1}' && echo $((2+2)) >> /dev/null 2>&1",
    "\\begin{align}\n  E &= mc^2 \\\\\n  \\int_0^\\infty e^{-x^2}\\,dx &= \\frac{\\sqrt{\\pi}}{2}\n\\end{align}",
    "apiVersion: v1\nkind: Pod\nmetadata:\n  labels: {app: x}\nspec:\n    - name: \"y\"\n",
    "| a | b |\n|---|:-:|\n| `x` | **y** |\n\n> quote\n\n1. one\n   - two\n\n```rust\nlet x = 1;\n```\n",
    "0x7fff_ffff 0b1010 1e-9 1_000_000 077 1.0f32 -0.0 +5 1/2 50% #FF00aa $9.99 €20,50 ¥300 2^10 3×4÷2",
    "::std::vec::Vec::<u8>::with_capacity(4)[..2]; a->b; c::d(); e!=f; g===h; i<=>j; k<<=1; @decorator; #![attr]",
    "https://example.org:8080/a/b%20c?q=1&r=%C3%A9#frag mailto:me+tag@example.co.uk C:\\Users\\me\\file.txt ~/.config",
    "2024-02-29T23:59:60.123Z 12:34:56 1,234,567.89 192.168.0.1 fe80::1%eth0 550e8400-e29b-41d4-a716-446655440000",
    "i'll you've he's they'RE I'M we'D can'T 'tis o'clock rock 'n' roll ’s ’ll I’ve don’t",
]

EMOJI = [
    "🙂", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷🇯🇵", "1️⃣2️⃣#️⃣", "❤️ vs ❤", "🧑🏿‍🚀 to the 🌕!", "a🙂b🙂c", "🫠🫡🪿",
    "🙂🙂🙂🙂🙂🙂🙂🙂", "☺️☹︎", "✅ done ❌ failed ⚠️", "→ ⇒ ∀x∈ℝ ∃y ≠ ∅ ∑∏√∞ ≤≥ ≈", "♠♥♦♣ ♔♕ ☀☁☂ ⌘⌥⇧", "½ ⅓ ² ³ ₁ ⁿ № ™ © ® ℃ Å",
    "𝕳𝖊𝖑𝖑𝖔 𝓌ℴ𝓇𝓁𝒹 ｆｕｌｌｗｉｄｔｈ ｈａｌｆ", "Z̸̢̛a̶̡͝l̵̨͘g̷̢̕o̸͜͝", "┌──┬──┐\n│  │  │\n└──┴──┘", "░▒▓█ ◀▶ ●○ ★☆", "¯\\_(ツ)_/¯ (╯°□°)╯︵ ┻━┻ ಠ_ಠ",
]

# Normalisation: strings that NFC changes, or that look as if it should.
NORMALISATION = [
    "e\u0301", "\u00e9", "cafe\u0301 vs caf\u00e9", "A\u030a \u212b \u00c5", "\u1100\u1161\u11a8 \uac01", "\u0928\u093c \u0929",
    "q\u0307\u0323 q\u0323\u0307", "\u1e9b\u0323", "\ufb01 \ufb03", "\u2126 \u03a9", "\u0344", "\u0958", "\u2adc", "\uf900 \u8c48",
    "o\u0302\u0301 \u1ed1 o\u0301\u0302", "s\u0323\u0307 \u1e69", "\u0061\u0315\u0300\u05ae\u0062", "\u3099 か\u3099 が", "\u200b\u200d\ufeff",
    "\u0301 at the start", "\u0374 \u037e \u0387 \u1fef", "i\u0307 İ ı", "\u09c7\u09be \u09cb", "\U0001d15e", "\u0340\u0341", "\u2000 \u2001",
]

WHITESPACE = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r\n\r\n", "\t", "\t\t", " \n", "\n ", " \n \n ", "   \n   x", "x   \n   ", "x \t y",
    "a b", "a  b", "a   b", "a    b", "a\u00a0b", "a\u00a0\u00a0b", "a\u3000b", "a\u2003 b", "a\u0085b", "a\u2028b\u2029c", "\u000b\u000c", "  leading",
    "trailing  ", "a\n\n\nb", "a \n\n b", "a\r\rb", " " * 15 + "x", " " * 64, "\n" * 9 + "x", "\t" * 7 + "x", "!\n\n?", "a.\r\n b", "  !", "  1", "   a1",
    "x" + " " * 130 + "y", "\u1680a\u180eb\u202fc\u205fd", "\x1c\x1d\x1e\x1f", "a\x00b", "\x7f\x01\x02",
]

NUMBERS = [
    "0", "7", "12", "123", "1234567890", "3.14159", "1,000", "1 000 000", "00012", "1e10", "v1.2.3", "x1y2z3", "٣٤٥", "४५", "Ⅷ ⅳ", "①②③", "²³", "一二三", "1st 2nd 3rd",
    "-40°C", "6.02214076e23", "12:30", "#1", "no.5", "2+2=4", "10%", "½", "0.1+0.2", "１２３",
]

WORDS = [
    "a", "I", "Hello", "hello", "HELLO", "hElLo", " Hello", "Hello ", "Hello, world!", "supercalifragilisticexpialidocious", "antidisestablishmentarianism",
    "Donaudampfschifffahrtsgesellschaftskapitän", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "!!!!!!!!!!!!!!!!", "................", "----------------", "================",
    "________________", "abcabcabcabcabcabc", "'", "''", "'s", "it's", "'S", "'ſ", "'ll'll", "don't've", "\"quoted\"", "(parens)", "[a]{b}<c>", "a/b\\c|d", "user@host", "@user #tag",
    "...and", "-dash", "--flag", "_under_score", "camelCaseWord", "snake_case_word", "kebab-case-word", "SCREAMING_CASE", "mixed漢字and kana", "русскийenglish", "ab\u0301c",
    "What is in this picture?", "Describe the image in detail.", "Picture 1: ", "Read the text in the image, then translate it into English.",
]

# Look like control tokens, but are none.
NEARLY_CONTROL = [
    "<|im_start", "im_start|>", "<|im_start |>", "<|IM_START|>", "< |im_end|>", "<|im_end|", "|im_end|>", "<tool_call", "tool_call>", "< tool_call>", "<|unknown|>", "<|>", "<||>", "<s></s>", "[INST]",
    "<|image_pad", "<|vision_start\n|>",
]

TEMPLATES = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "  What?\n\n"}],
    [{"role": "user", "content": "\nnewline first"}, {"role": "assistant", "content": "ends in newline\n"}, {"role": "user", "content": "\n\n"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
    [{"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}]}],
    [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "\nWhat happens?"}]}],
    [
        {"role": "system", "content": "Du bist höflich."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "这是什么?"}]},
        {"role": "assistant", "content": "一只猫 🐈"},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
    ],
    [{"role": "user", "content": "e\u0301 decomposed"}, {"role": "assistant", "content": [{"type": "text", "text": "A\u030a"}]}],
    [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
]

CONTROL = [
    "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b", "<|im_end|>\n\n<|im_start|>", " <|im_start|> ", "<tool_call>\n{\"name\": \"f\"}\n</tool_call>",
    "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>", "<|box_start|>(12,34),(56,78)<|box_end|>", "<|object_ref_start|>cat<|object_ref_end|>", "<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>",
    "<|repo_name|>r<|file_sep|>f", "<|quad_start|>1<|quad_end|>", "e<|im_end|>\u0301", "<|im_start|><|im_start|>", "<<|im_end|>>", "<|video_pad|><|vision_pad|><|fim_pad|>",
]


def random_strings(draw: random.Random) -> list[str]:
    """Strings of characters from many blocks, unpaired surrogates left out."""
    blocks = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF)]
    blocks += [(0x1E00, 0x1FFF), (0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFFFD), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF)]
    strings = []
    for _ in range(50):
        own = draw.sample(blocks, draw.randint(1, 4))
        characters = []
        for _ in range(draw.randint(1, 60)):
            characters.append(draw.choice([" ", "\n", "'", "s"]) if draw.random() < 0.2 else chr(draw.randint(*draw.choice(own))))
        strings.append("".join(characters))
    return strings


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(full_tokenizer_json()), encoding="utf-8")
        for name in ("tokenizer_config.json", "config.json"):
            shutil.copyfile(TOKENIZER / "model" / name, Path(folder) / name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    added = tokenizer.get_added_vocab()
    if len(added) != 22 or len(tokenizer) != 151665:
        raise RuntimeError(f"{len(added)} added tokens, {len(tokenizer)} in all")
    plain = LANGUAGES + CODE + EMOJI + NORMALISATION + WHITESPACE + NUMBERS + WORDS + NEARLY_CONTROL + random_strings(random.Random(SEED))
    template = json.loads((TOKENIZER / "model" / "chat_template.json").read_text())["chat_template"]
    rendered = [
        tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True) for chat in TEMPLATES
    ]
    cases = []
    for kind, strings in (("plain", plain), ("control", CONTROL), ("template", rendered)):
        for string in strings:
            if kind == "plain" and any(token in string for token in added):
                raise RuntimeError(f"{string!r} holds a control token")
            ids = tokenizer(string, add_special_tokens=False)["input_ids"]
            case = {"kind": kind, "text": string, "ids": ids}
            decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            # Normalisation cannot be undone, so the decoded text is kept where it differs.
            if decoded != string:
                case["decoded"] = decoded
            cases.append(case)
    write_compact(TOKENIZER / "corpus.json", {"cases": cases})
    print(f"{len(cases)} strings, {sum('decoded' in case for case in cases)} changed by normalisation")


if __name__ == "__main__":
    main()
