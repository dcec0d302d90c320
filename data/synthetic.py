"""The embedded default data: instruction tasks with right answers in English and Chinese, from a seeded generator.

Every record has the Alpaca fields instruction, input and output. Token lengths follow those of real instruction data
(SHAPES): a pair of lengths is drawn for each record, then a task family builds a task of about that size.
To add a family, write one function under `@family(...)`. It gets a Kit and returns the wordings of its question
("A|B|C": the one nearest to the wanted length is taken), the input ("" if none) and the output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, timedelta
from itertools import accumulate, chain, islice, pairwise
from itertools import count as integers

# The tokenizer splits text by this pattern first, and nearly every piece is one token: so pieces stand for tokens.
PIECES = r"[0-9]|[\u4e00-\u9fff]|\n+| ?[^\W\d_\u4e00-\u9fff]+| ?[^\s\w]+|\s"
RESPONSE_LIMIT = 384  # tokens; one EOS comes on top
_pieces = re.compile(PIECES).findall
LONG_TEXT = 25  # characters from which on `_count_ascii` is faster than the pattern
# The kind of each ASCII character: d(igit), l(etter), n(ewline), s(pace), b(lank of another kind), m(ark), _ (none).
_KIND_PATTERNS = {"d": "[0-9]", "l": r"[^\W\d_]", "n": "\n", "s": " ", "b": r"\s", "m": r"[^\s\w]", "_": "."}
_KINDS = "".join(
    next(kind for kind, pattern in _KIND_PATTERNS.items() if re.fullmatch(pattern, chr(code))) for code in range(128)
).encode()
# For bytes.translate, which needs 256 of them: the kinds, and letters or marks alone, with a blank for all others.
_AS_KINDS = _KINDS.ljust(256, b"_")
_LETTERS, _MARKS = (bytes(code if code in alone else ord(" ") for code in _AS_KINDS) for alone in (b"l", b"m"))


def count(text: str) -> int:
    """Tokens of a text, up to the few pieces that the tokenizer cuts further: the matches of PIECES."""
    return _count_ascii(text.encode()) if len(text) >= LONG_TEXT and text.isascii() else len(_pieces(text))


def _count_ascii(text: bytes) -> int:
    """The matches of PIECES, from counts of characters and of pairs of them. That takes a third of the time."""
    kinds = text.translate(_AS_KINDS)
    runs = len(text.translate(_LETTERS).split()) + len(text.translate(_MARKS).split())
    spaces = kinds.count(b"s") - kinds.count(b"sl") - kinds.count(b"sm")  # others belong to the run that they precede
    lines = len(re.findall(b"n+", kinds)) if b"nn" in kinds else kinds.count(b"n")
    return runs + kinds.count(b"d") + spaces + kinds.count(b"b") + lines


# Of real instruction data (1,000 records each, 32k vocabulary): quantiles of the prompt and of the response with its
# EOS; least and most tokens of both together; share of records where a longer prompt goes with a shorter response. The
# quantile 0.375 and the share are fitted to the quantiles of the total.
SHAPES = {
    "en": (
        {0: 5, 0.1: 9, 0.25: 11, 0.5: 15, 0.75: 23, 0.9: 33, 0.95: 44, 0.99: 93, 1: 171},
        {0: 2, 0.1: 12, 0.25: 29, 0.375: 52, 0.5: 114, 0.75: 277, 0.9: 385, 1: 385},
        (15, 556),
        0.15,
    ),
    "zh": (
        {0: 5, 0.1: 11, 0.25: 15, 0.5: 19, 0.75: 26, 0.9: 39, 0.95: 52, 0.99: 94, 1: 194},
        {0: 5, 0.1: 27, 0.25: 62, 0.375: 105, 0.5: 168, 0.75: 324, 0.9: 385, 1: 385},
        (16, 453),
        0.05,
    ),
}
DECK = 500  # records


def _draw(quantiles: dict[float, int], rng: random.Random) -> list[int]:
    """A deck of lengths in random order. One draw per stratum keeps sampling noise out of the quantiles."""
    lengths = []
    for stratum in range(DECK):
        u = (stratum + rng.random()) / DECK
        (a, low), (b, high) = next(pair for pair in pairwise(quantiles.items()) if u <= pair[1][0])
        lengths.append(int(low + (high - low) * (u - a) / (b - a) + 0.5))
    return rng.sample(lengths, DECK)


def _deck(language: str, rng: random.Random) -> list[tuple[int, int]]:
    """A deck of (prompt, response) lengths in random order."""
    *quantiles, (least, most), opposed = SHAPES[language]
    prompts, responses = (_draw(of, rng) for of in quantiles)
    head = int(opposed * DECK)
    prompts[:head], responses[:head] = sorted(prompts[:head]), sorted(responses[:head], reverse=True)
    for i in range(DECK):
        while not least <= prompts[i] + responses[i] <= most:  # swap with another pair so that both fit
            j = rng.randrange(DECK)
            if least <= prompts[i] + responses[j] <= most and least <= prompts[j] + responses[i] <= most:
                responses[i], responses[j] = responses[j], responses[i]
    return rng.sample(list(zip(prompts, responses, strict=True)), DECK)


# --- Words -----------------------------------------------------------------------------------------------------------


def _table(text: str) -> dict[str, list[str]]:
    """Lines of `key: word word …`; the words of equal keys are joined."""
    table: dict[str, list[str]] = {}
    for key, words in (line.split(": ") for line in text.strip().splitlines()):
        table.setdefault(key.strip(), []).extend(words.split())
    return table


# Goods in Chinese: with the measure word. Units: one, many, the other unit, the rate (0: drawn anew).
WORDS = {
    "en": _table("""
    names: Anna Ben Carla David Emma Frank Grace Henry Irene Jack Kate Leo Maria Nora Oscar Paula Quentin Rosa Samuel
    names: Tina Umar Vera Walter Xenia Yusuf Zoe Alice Bruno Clara Daniel Elena Felix Gloria Hugo Ivy James Karen Lucas
    goods: pencils notebooks lamps cups plates bottles candles towels batteries brushes envelopes folders markers bricks
    goods: tiles bulbs cables keyboards monitors printers tents ropes blankets pillows bowls forks spoons pans kettles
    goods: clocks mirrors baskets buckets rulers staplers magnets stamps puzzles balloons backpacks umbrellas wallets
    subjects: maths history biology geography chemistry physics music drawing reading spelling grammar French Spanish
    weekdays: Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    heads: Oak Ash West North South East Stone Wood Black White Red Green Spring Summer Winter Mill Bridge Lake Hill
    heads: King Queen Brook Rose Fox Wolf Swan Deer Fair High Long Silver Gold Sand Salt Thorn Elm Birch Moor Marsh Cold
    heads: Clear Hazel Maple Cherry Iron Copper Wind Rain Raven Eagle Hart Ox Lamb Beech Corn Barley Apple Clover
    heads: Amber Frost Snow Storm Sun Moon Star Wheat Heron Otter Badger Willow
    tails: ford ton ville field ham bury worth dale port mouth ley stead wick haven view crest ridge gate mere pool
    small: zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    small: seventeen eighteen nineteen
    tens: twenty thirty forty fifty sixty seventy eighty ninety
    months: January February March April May June July August September October November December
    units: mile,miles,metres,1609 pound,pounds,grams,454 gallon,gallons,millilitres,3785 hour,hours,minutes,60
    units: week,weeks,days,7 foot,feet,millimetres,305 dollar,dollars,yen,0 euro,euros,forints,0"""),
    "zh": _table("""
    goods: 铅笔/支 笔记本/本 杯子/个 盘子/个 水壶/个 蜡烛/根 毛巾/条 电池/节 信封/个 台灯/盏 键盘/个 帐篷/顶 毛毯/条
    goods: 枕头/个 勺子/把 闹钟/个 镜子/面 篮子/个 雨伞/把 书包/个 气球/个 牙刷/支 词典/本 地图/张 邮票/张 螺丝/颗
    places: 北京 上海 广州 深圳 成都 杭州 南京 武汉 西安 重庆 天津 苏州 长沙 青岛 大连 厦门 昆明 郑州 合肥 福州 洛阳
    surnames: 王 李 张 刘 陈 杨 赵 黄 周 吴 徐 孙 胡 朱 高 林
    given: 芳 伟 娜 敏 静 强 磊 秀英 志强 建国 晓明 雨欣 子涵 浩然 文博 海燕
    subjects: 语文 数学 英语 物理 化学 生物 历史 地理 音乐 美术 书法 政治 编程 作文 阅读 体育
    weekdays: 星期一 星期二 星期三 星期四 星期五 星期六 星期日
    units: 公里,公里,米,1000 斤,斤,克,500 里,里,米,500 亩,亩,平方米,667 小时,小时,分钟,60 周,周,天,7
    units: 美元,美元,日元,0 英镑,英镑,日元,0 英里,英里,米,1609 年,年,个月,12 元,元,韩元,0"""),
}
for _words, _parts in ((WORDS["en"], ("places", "heads", "tails")), (WORDS["zh"], ("names", "surnames", "given"))):
    _whole, _first, _second = _parts  # names of places and people, made of two parts like many a real one
    _words[_whole] = [a + b for a in _words[_first] for b in _words[_second]]
KINDS = {  # no word belongs to two kinds
    "en": _table("""
    fruits: apple pear plum cherry banana lemon mango grape melon kiwi fig apricot papaya coconut raspberry pineapple
    vegetables: carrot onion potato cabbage spinach celery leek radish broccoli garlic turnip lettuce asparagus
    mammals: cat dog horse cow sheep goat rabbit lion tiger wolf fox elephant giraffe zebra monkey camel dolphin
    birds: eagle owl sparrow robin crow swan duck goose parrot penguin pigeon stork falcon heron gull ostrich
    tools: hammer saw drill wrench chisel axe shovel rake pliers screwdriver sickle crowbar trowel
    clothes: shirt coat hat scarf glove sock shoe boot dress skirt jacket sweater belt trousers apron
    instruments: piano violin guitar flute trumpet cello harp clarinet oboe organ banjo accordion
    jobs: teacher nurse doctor baker farmer pilot judge tailor painter plumber lawyer butcher gardener librarian
    vehicles: car bus train tram truck bicycle ship ferry tractor helicopter scooter ambulance"""),
    "zh": _table("""
    水果: 苹果 香蕉 梨 桃子 葡萄 西瓜 草莓 樱桃 柠檬 芒果 菠萝 荔枝 橙子 火龙果 哈密瓜 猕猴桃
    蔬菜: 白菜 萝卜 菠菜 芹菜 茄子 黄瓜 土豆 洋葱 韭菜 西兰花 胡萝卜 花椰菜
    哺乳动物: 老虎 狮子 大象 猴子 兔子 马 牛 羊 狗 猫 长颈鹿 熊猫 骆驼 狐狸 狼
    鸟类: 麻雀 老鹰 燕子 鸽子 孔雀 天鹅 乌鸦 鹦鹉 啄木鸟 猫头鹰 喜鹊
    衣物: 衬衫 外套 裤子 裙子 帽子 袜子 手套 围巾 毛衣 羽绒服
    乐器: 钢琴 小提琴 吉他 笛子 二胡 古筝 琵琶 鼓 萨克斯
    职业: 教师 医生 护士 厨师 司机 律师 农民 警察 会计 工程师 消防员
    运动: 足球 篮球 排球 乒乓球 羽毛球 游泳 跑步 滑雪 太极拳
    文具: 铅笔 橡皮 尺子 钢笔 圆规 卷笔刀 笔记本 文件夹"""),
}
PAIRS = {  # what is asked for: word-answer pairs
    "en": _table("""
    past tense: go-went see-saw take-took write-wrote eat-ate drink-drank sing-sang swim-swam begin-began buy-bought
    past tense: bring-brought think-thought teach-taught catch-caught fly-flew grow-grew know-knew throw-threw
    plural: child-children foot-feet tooth-teeth goose-geese man-men woman-women person-people leaf-leaves wolf-wolves
    opposite: big-small hot-cold long-short high-low old-new early-late fast-slow hard-soft wet-dry full-empty
    opposite: rich-poor strong-weak thick-thin wide-narrow deep-shallow noisy-quiet clean-dirty happy-sad north-south
    capital: France-Paris Spain-Madrid Italy-Rome Germany-Berlin Poland-Warsaw Austria-Vienna Greece-Athens Egypt-Cairo
    capital: Portugal-Lisbon Sweden-Stockholm Norway-Oslo Denmark-Copenhagen Finland-Helsinki Ireland-Dublin Cuba-Havana
    young animal: cat-kitten dog-puppy cow-calf horse-foal sheep-lamb duck-duckling goat-kid swan-cygnet"""),
    "zh": _table("""
    反义词: 大-小 高-矮 长-短 快-慢 冷-热 新-旧 胖-瘦 轻-重 深-浅 早-晚 远-近 黑-白 真-假 穷-富 粗-细 进-退 输-赢
    反义词: 高兴-难过 安全-危险 成功-失败 前进-后退 勤劳-懒惰 干净-肮脏 热闹-冷清 复杂-简单 骄傲-谦虚 寒冷-炎热
    首都: 法国-巴黎 英国-伦敦 日本-东京 德国-柏林 意大利-罗马 西班牙-马德里 俄罗斯-莫斯科 埃及-开罗 泰国-曼谷
    省会: 四川-成都 广东-广州 浙江-杭州 江苏-南京 湖北-武汉 湖南-长沙 陕西-西安 云南-昆明 福建-福州 山东-济南
    常用量词: 书-本 马-匹 牛-头 鱼-条 狗-只 纸-张 帽子-顶 衣服-件 鞋-双 雨伞-把 汽车-辆 飞机-架 山-座 花-朵 树-棵
    下一个生肖: 鼠-牛 牛-虎 虎-兔 兔-龙 龙-蛇 蛇-马 马-羊 羊-猴 猴-鸡 鸡-狗 狗-猪 猪-鼠"""),
}
REGULAR = _table("""
    ing form/ing,past tense/ed: walk paint work help play jump look talk cook clean open pack plant turn wash ask answer
    ing form/ing,past tense/ed: call count climb dress end fill fold follow greet hunt kick land laugh lift load melt
    ing form/ing,past tense/ed: order park pick point pour press print pull push reach record repair rest return roll
    ing form/ing,past tense/ed: sail scream search shout sign sort start stay test thank touch train treat visit boil
    adverb/ly,comparative/er,noun/ness: dark soft weak sweet bright kind quick neat loud clear calm cheap sharp smooth
    adverb/ly,comparative/er,noun/ness: rough tough fresh harsh mild firm fair bold bleak blunt crisp damp faint""")
for _forms, _stems in REGULAR.items():
    for _form, _ending in (form.split("/") for form in _forms.split(",")):
        PAIRS["en"].setdefault(_form, []).extend(f"{stem}-{stem}{_ending}" for stem in _stems)

# The question goes into one of these, which changes nothing in the task but gives the prompt its wanted length.
FRAMES = {
    language: [(frame, count(re.sub(" ?{}", "", frame))) for frame in frames.split("|")]
    for language, frames in {
        "en": "{}|{} Thanks.|Hello! {}|Quick question: {}|Help me, please: {}|{} Take your time.|A small task: {}"
        "|Here is one for you: {}|My daughter asks me: {} Please be precise.|This came up at work: {} Thanks a lot."
        "|{} I want to check my own result.|Hello! {} We need it for the meeting tomorrow morning."
        "|{} I am preparing for a test and would like to compare my own answer with yours afterwards."
        "|Here is one for you: {} Please keep the wording simple enough for a beginner, because that is what I am.",
        "zh": "{}|{}谢谢。|你好，{}|请帮忙：{}|帮我看看：{}|有一道题：{}|孩子问我：{}|请教一个问题：{}"
        "|你好，{}麻烦你了。|{}请检查一遍结果。|下面是一道练习题：{}|工作中遇到一个问题：{}|请教一个问题：{}谢谢。"
        "|{}我在准备考试，想对一下答案。|{}这是我的作业，请写得清楚一些。|老师今天布置了一道题：{}请写得清楚一些。"
        "|下面是一道练习题：{}我自己做了一遍，但是不太确定对不对，所以想请你再做一遍。",
    }.items()
}


def lexicon() -> Iterator[str]:
    """Every listed word, also capitalized, so that the tokenizer can learn the rare ones too."""
    for table in (*WORDS.values(), *KINDS.values(), *PAIRS.values()):
        for word in re.split("[-/, ]", " ".join(chain.from_iterable(table.values()))):
            yield from (word, word.capitalize())


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def in_words(n: int) -> str:
    """A whole number in English words, up to the millions."""
    if n < 20:
        return WORDS["en"]["small"][n]
    if n < 100:
        tens = WORDS["en"]["tens"][n // 10 - 2]
        return f"{tens}-{in_words(n % 10)}" if n % 10 else tens
    size, name = next(s for s in ((10**6, "million"), (1000, "thousand"), (100, "hundred")) if n >= s[0])
    high, rest = divmod(n, size)
    return f"{in_words(high)} {name}" + (" and " if 0 < rest < 100 else " " * (rest > 0)) + in_words(rest) * (rest > 0)


def in_hanzi(n: int, digits: str = "零一二三四五六七八九", units: str = "-十百千") -> str:
    """A whole number below a hundred million in Chinese characters."""
    text = ""
    for place, digit in zip(range(len(str(n)) - 1, -1, -1), map(int, str(n)), strict=True):
        if digit:
            text += digits[digit] + units[place % 4].strip("-")
        elif not text.endswith(digits[0]):
            text += digits[0]
        if place == 4:
            text = text.rstrip(digits[0]) + "万"
    text = text.rstrip(digits[0]) or digits[0]
    return text.removeprefix("一") if text.startswith("一十") else text


def clock(minutes: int) -> str:
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


# --- What a family works with ----------------------------------------------------------------------------------------

Task = tuple[str, str, str]  # wordings, input, output


class Kit:
    """A random source, the language, the wanted lengths in tokens (response without EOS), and helpers to meet them."""

    def __init__(self, rng: random.Random, language: str, prompt: int, response: int) -> None:
        self.rng, self.prompt, self.response, self.en = rng, prompt, response, language == "en"
        self.words, self.kinds, self.pairs, self.frames = (t[language] for t in (WORDS, KINDS, PAIRS, FRAMES))
        self.person = self("{} is {} years old, lives in {} and works as a {}.", "{}今年{}岁，住在{}，职业是{}。")
        self.space, self.comma, self.colon = (" ", ", ", ": ") if self.en else ("", "、", "：")

    def __call__(self, en, zh):
        """The argument of the language."""
        return en if self.en else zh

    def number(self, least: int, most: int = 0) -> int:
        """A number of `least` to `most` (default: also `least`) digits, but not 0 or 1."""
        digits = least + self.below((most or least) - least + 1)
        first = max(2, 10 ** (digits - 1))
        return first + self.below(10**digits - first)

    def below(self, end: int) -> int:
        """A whole number from 0 to `end` - 1: that of random.randrange, which takes twice as long."""
        bits, draw = end.bit_length(), self.rng.getrandbits
        found = draw(bits)
        while found >= end:
            found = draw(bits)
        return found

    def pick(self, items: Sequence, n: int) -> list:
        """n of them (all of fewer) in random order."""
        return self.rng.sample(items, min(n, len(items)))

    def room(self, each: float, wording: int = 11, low: int = 3, high: int = 45) -> int:
        """How many items of `each` tokens go into the prompt beside `wording` tokens."""
        return max(low, min(high, round((self.prompt - wording) / each)))

    def people(self, n: int) -> list[tuple[str, int, str, str]]:
        """Name, age, home and job of up to n people."""
        jobs, homes = self.kinds[self("jobs", "职业")], self.words["places"]
        names = self.pick(self.words["names"], n)
        return [(name, self.rng.randrange(18, 80), self.rng.choice(homes), self.rng.choice(jobs)) for name in names]

    def goods(self, n: int) -> list[tuple[str, str, int, int]]:
        """Name, measure word (in Chinese), quantity and price of up to n goods."""
        named = [thing.split("/") for thing in self.pick(self.words["goods"], n)]
        return [(words[0], words[-1], self.number(1, 2), self.number(1, 2)) for words in named]

    def join(self, items: Iterable) -> str:
        return self.comma.join(map(str, items))

    def date(self, day: date) -> str:
        month = WORDS["en"]["months"][day.month - 1]
        return self(f"{day.day} {month} {day.year}", f"{day.year}年{day.month}月{day.day}日")

    def weekday(self, day: date) -> str:
        return self.words["weekdays"][day.weekday()]

    def series(self, wordings: str, lines: Iterable[str], separator: str = "\n", text: str = "") -> Task:
        """As many of the lines as come nearest to the wanted response; # in the wordings becomes their number."""
        taken, used = [], 0
        for line in lines:
            size = count(separator + line)
            if len(taken) > 1 and used + size / 2 > self.response:
                break
            taken.append(line)
            used += size
        return wordings.replace("#", str(len(taken))), text, separator.join(taken)

    def listing(self, kinds: list[tuple[str, str, Iterable]]) -> Task:
        """A series of one of these kinds: what is listed, in English and in Chinese, and its terms."""
        en, zh, terms = self.rng.choice(kinds)
        en = f"List {en}.|List # {en}.|Give me the first # {en}.|Which are the first # {en}?"
        zh = f"写出{zh}。|列出#个{zh}。|写出前#个{zh}。|请依次写出{zh}，一共写#个。"
        return self.series(self(en, zh), map(str, terms), self.rng.choice(("\n", self.comma)))

    def answer(self, direct: Sequence[str], *workings: Sequence[str]) -> str:
        """The direct answer, with or without a working above it, that comes nearest to the wanted response."""
        sizes = [(count(text), text) for text in direct]
        tops = [(0, ""), *((count(top) + 1, top + "\n") for top in map("\n".join, workings))]
        return min((abs(self.response - a - b), top + text) for a, top in tops for b, text in sizes)[1]

    def values(self, value: object, *more: str) -> list[str]:
        """Ways to state a result."""
        en = f"{value}|{value}.|It is {value}.|The answer is {value}.|The right answer here is {value}."
        return [*self(en, f"{value}|{value}。|是{value}。|答案是{value}。|所以最后的答案是{value}。").split("|"), *more]


# --- Task families ---------------------------------------------------------------------------------------------------

Make = Callable[[Kit], Task]
FAMILIES: list[tuple[Make, tuple[int, int], tuple[int, int]]] = []
LONG = 600  # more than any wanted response: such a family fills every length


def family(prompt: tuple[int, int], response: tuple[int, int], weight: int = 1) -> Callable[[Make], None]:
    """Registers a task family for these wanted lengths (tokens, both ends included)."""
    return lambda make: FAMILIES.extend([(make, prompt, response)] * weight)


@family(prompt=(8, 60), response=(1, 150))
def arithmetic(k: Kit) -> Task:
    total, digits = k.number(1, 3), k.rng.randint(1, 3)
    text, steps = str(total), []
    for n in (k.number(digits) for _ in range(k.room(digits + 2, 5, 1, 9))):
        sign, result = ("-", total - n) if n <= total and k.rng.random() < 0.5 else ("+", total + n)
        steps.append(f"{total} {sign} {n} = {result}")
        text, total = f"{text} {sign} {n}", result
    if k.prompt < 20 and k.response > 3 and k.rng.random() < 0.4:  # long multiplication
        a, b = k.number(2, 4), k.number(2, 3)
        parts = [a * int(digit) * 10**i for i, digit in enumerate(reversed(str(b))) if digit != "0"]
        steps = [f"{a} × {part // a} = {part}" for part in parts] + [" + ".join(map(str, parts)) + f" = {a * b}"]
        text, total = f"{a} × {b}", a * b
    en = f"What is {text}?|Calculate {text}.|Work out the value of {text}.|{text} = ?"
    zh = f"计算{text}。|{text}等于多少？|请算一算：{text} = ?|请计算{text}的结果。"
    return k(en, zh), "", k.answer(k.values(total, f"{text} = {total}"), steps)


@family(prompt=(5, 18), response=(12, LONG))
def number_facts(k: Kit) -> Task:
    n, mark = k.number(1, 4), k.rng.choice(("", "- "))
    after, is_it = next(filter(is_prime, integers(n + 1))), k(("is not", "is"), ("不是", "是"))[is_prime(n)]
    facts = k(
        f"{n} {is_it} a prime number.|The next prime number is {after}.|The square of {n} is {n * n}.|In binary it is"
        f" {n:b}.|In words it is {in_words(n)}.|The number before {n} is {n - 1}.|It is {'odd' if n % 2 else 'even'}.",
        f"{n}{is_it}质数。|比{n}大的最小质数是{after}。|{n}的平方是{n * n}。|用汉字写作{in_hanzi(n)}。"
        f"|前面一个数是{n - 1}。|{n}是{'奇' if n % 2 else '偶'}数。|写成二进制是{n:b}。",
    ).split("|")
    for d in k.pick(range(2, 100), 14):
        facts.append(k(f"{n} + {d} = {n + d} and {n} × {d} = {n * d}.", f"{n} + {d} = {n + d}，{n} × {d} = {n * d}。"))
        facts.append(k(f"Divided by {d} it gives {n // d}, remainder {n % d}.", f"除以{d}，商{n // d}余{n % d}。"))
    en = f"Describe {n}.|Tell me about {n}.|What do you know about the number {n}?|State facts about {n}."
    zh = f"介绍{n}。|说说数字{n}。|关于{n}这个数，你知道什么？|写出{n}的一些性质。"
    return k.series(k(en, zh), (mark + fact for fact in k.pick(facts, 99)))


@family(prompt=(5, 34), response=(25, LONG), weight=3)
def invention(k: Kit) -> Task:
    """Made-up people, bus rides and purchases."""

    def ride(riders: int) -> Iterator[str]:
        for stop in k.pick(k.words["places"], 99) * 9:
            off, on = k.rng.randint(2, riders // 2 + 2) if riders > 3 else 0, k.number(1)
            line = k(f"{stop}: {off} get off, {on} get on, ", f"{stop}站：{off}人下车，{on}人上车，")
            yield f"{line}{riders} - {off} + {on} = {riders - off + on}"
            riders += on - off

    bill = k("{2} {0} at {3} euros each cost {4} euros.", "{0}{2}{1}，每{1}{3}元，共{4}元。")
    en, zh, lines = k.rng.choice(
        [
            ("people", "人物", (k.person.format(*row) for row in k.people(36))),
            ("stops of a bus ride", "公交车站的上下车情况", ride(k.number(2))),
            ("purchases", "购物记录", (bill.format(*row, row[2] * row[3]) for row in k.goods(50))),
        ]
    )
    en = f"Invent some {en}.|Make up # {en}.|I need # {en} as an example.|Write down # {en} that you have made up."
    zh = f"编几个{zh}。|编写#个{zh}。|请编写#个{zh}作为例子。|我需要一些例子，请编写#个{zh}。"
    return k.series(k(en, zh), lines)


@family(prompt=(6, 24), response=(12, LONG), weight=2)
def number_series(k: Kit) -> Task:
    a, d = k.number(2), k.number(1, 3)
    return k.listing(
        [  # what is listed, in both languages, and its terms
            (f"multiples of {d}", f"{d}的倍数", (f"{d} × {n} = {d * n}" for n in integers(1))),
            (f"multiples of {d} from {a * d}", f"从{a * d}起{d}的倍数", integers(a * d, d)),
            (f"squares of the numbers from {a}", f"从{a}起各数的平方", (n * n for n in integers(a))),
            (f"cubes of numbers from {a}", f"从{a}起各数的立方", (f"{n} × {n} × {n} = {n**3}" for n in integers(a))),
            (f"primes above {a}", f"大于{a}的质数", filter(is_prime, integers(a + 1))),
            (f"doublings of {d}", f"把{d}不断加倍的算式", (f"{d << n} × 2 = {d << n + 1}" for n in integers())),
        ]
    )


@family(prompt=(8, 45), response=(12, LONG), weight=4)
def everyday_series(k: Kit) -> Task:
    """Years, dates, departures, savings, conversions, calls of a counting game."""
    year, n, add, step = k.rng.randrange(1900, 2030), k.number(2, 3), k.number(1, 3), k.number(1)
    day, name = date(year, k.rng.randint(1, 12), k.rng.randint(1, 28)), k.rng.choice(k.words["names"])
    place, bus = k.rng.choice(k.words["places"]), k.rng.randrange(300, 600)
    first, times = clock(bus), map(clock, integers(bus, step))
    one, many, other, known = k.rng.choice(k.words["units"]).split(",")
    rate = int(known) or k.rng.randrange(80, 900)
    leap = (y for y in integers(year) if y % (400 if y % 100 == 0 else 4) == 0)
    animals = (f"{y}年{'鼠牛虎兔龙蛇马羊猴鸡狗猪'[(y - 1900) % 12]}" for y in integers(year))
    dates = (f"{k.date(d)}{k(', a ', '，')}{k.weekday(d)}" for d in (day + timedelta(i * add) for i in integers()))
    months = (k("{}: ", "第{}个月：").format(i) + f"{a} + {add} = {a + add}" for i, a in enumerate(integers(n, add), 1))
    table = (f"{x}{k.space}{many} = {x * rate}{k.space}{other}" for x in integers(n, step))
    fizz = ("Fizz" * (i % step == 0) + "Buzz" * (i % 7 == 0) or str(i) for i in integers(n))
    skips = ("过" if i % step == 0 or str(step) in str(i) else str(i) for i in integers(n))
    saver = f"{name}, who has {n} euros and saves {add} a month", f"{name}每月的存款（原有{n}元，每月存{add}元）"
    units = f"{many} to {other} (1 {one} = {rate} {other})", f"{many}换算成{other}的结果（1{one} = {rate}{other}）"
    return k.listing(
        [
            (f"leap years from {year}", f"{year}年起各年的生肖", k(leap, animals)),
            (f"dates from {k.date(day)}, {add} days apart", f"从{k.date(day)}起每{add}天一次的日期", dates),
            (
                f"buses to {place} every {step} minutes from {first}",
                f"{first}起每{step}分钟一班、开往{place}的车",
                times,
            ),
            (f"month-end sums of {saver[0]}", saver[1], months),
            (f"conversions of {units[0]} from {n}, {step} apart", f"从{n}起每隔{step}，{units[1]}", table),
            (f"calls of Fizz ({step}) Buzz (7) from {n}", f"从{n}起玩“逢{step}过”的报数", k(fizz, skips)),
        ]
    )


@family(prompt=(8, 26), response=(2, LONG))
def spelled_numbers(k: Kit) -> Task:
    n, formal = k.number(2, 5), k.rng.random() < 0.4
    spell = k(in_words, (lambda n: in_hanzi(n, "零壹贰叁肆伍陆柒捌玖", "-拾佰仟")) if formal else in_hanzi)
    style = "大写汉字" if formal else "汉字"
    if k.response < 16:
        wordings = k(f"Spell {n}.|How do you write {n} in words?", f"{n}的{style}怎么写？|请用{style}写出数字{n}。")
        return wordings, "", k.answer(k.values(spell(n)))
    en = f"Spell # numbers from {n}.|Write the # numbers from {n} in words.|Count on from {n} in words."
    zh = f"用{style}从{n}往后数。|从{n}起，用{style}写出#个数。|把从{n}开始的#个数都写成{style}。"
    return k.series(k(en, zh), (f"{i}{k.colon}{spell(i)}" for i in integers(n)))


@family(prompt=(12, 30), response=(1, 26))
def weekday(k: Kit) -> Task:
    day = date(k.rng.randrange(1950, 2060), k.rng.randint(1, 12), k.rng.randint(1, 28)) + timedelta(k.rng.randrange(4))
    text, name = k.date(day), k.weekday(day)
    en, zh = f"Which weekday is {text}?|Name the weekday of {text}.", f"{text}是星期几？|请问{text}是星期几？"
    return k(en, zh), "", k.answer(k.values(name, k(f"{text} is a {name}.", f"{text}是{name}。")))


@family(prompt=(5, 24), response=(7, 160))
def repeated_division(k: Kit) -> Task:
    """Prime factors or binary digits."""
    n, base, steps, factors = k.number(2, 5), k.rng.choice((2, 0)), [], []
    rest = n
    while rest > (base == 0):
        d = base or next((d for d in range(2, math.isqrt(rest) + 1) if rest % d == 0), rest)
        steps.append(f"{rest} ÷ {d} = {rest // d}" + (k(" remainder ", "余") + str(rest % d) if base else ""))
        factors.append(str(d))
        rest //= d
    if base:
        en, zh = f"Write {n} in binary.|What is {n} as a binary number?", f"把{n}写成二进制。|{n}用二进制怎么表示？"
        return k(en, zh), "", k.answer(k.values(f"{n:b}"), steps)
    en, zh = f"Factor {n}.|What are the prime factors of {n}?", f"分解{n}。|把{n}分解质因数。"
    return k(en, zh), "", k.answer([f"{n} = {' × '.join(factors)}"], steps)


@family(prompt=(14, 200), response=(3, LONG), weight=2)
def sorting(k: Kit) -> Task:
    numbers, down = k.pick(range(2, 1000), k.room(4.8)), k.rng.random() < 0.5
    order = k(*(("largest to smallest", "从大到小") if down else ("smallest to largest", "从小到大")))
    parts = [sorted(numbers[:i], reverse=down) for i in range(1, len(numbers) + 1)]
    listed = k.join(parts[-1])
    lines = [k(f"Number {i}: {x}", f"第{i}个：{x}") for i, x in enumerate(parts[-1], 1)]
    inserts = [k(f"Insert {x}: ", f"插入{x}：") + k.join(part) for x, part in zip(numbers, parts, strict=True)]
    direct = [listed, k("Sorted: ", "排列结果：") + listed, k(f"From {order}: {listed}.", f"{order}依次是：{listed}。")]
    en = f"Sort from {order}.|Put these numbers in order from {order}.|Arrange the list from {order}, please."
    zh = f"{order}排列。|把下面的数{order}排列。|请将下列数字按{order}的顺序排好。"
    return k(en, zh), k.join(numbers), k.answer(direct, lines, inserts)


@family(prompt=(14, 200), response=(1, LONG), weight=2)
def filtering(k: Kit) -> Task:
    """Choosing or counting the numbers with a property."""
    numbers, limit, d = k.pick(range(2, 1000), k.room(4.8)), k.number(3), k.rng.randrange(2, 10)
    above = f"are above {limit}", f"大于{limit}", [x for x in numbers if x > limit]
    divisible = f"are divisible by {d}", f"能被{d}整除", [x for x in numbers if x % d == 0]
    en, zh, kept = k.rng.choice((above, divisible))
    listed = k.join(kept) or k("none", "没有")
    short = [f"{x}{k.colon}{k('yes', '是') if x in kept else k('no', '否')}" for x in numbers]
    totals = accumulate(int(x in kept) for x in numbers)
    long = [line + k(f", {total} so far", f"，目前共有{total}个") for line, total in zip(short, totals, strict=True)]
    if k.response < 8 or k.rng.random() < 0.3:
        direct = k.values(len(kept))
        en, zh = f"How many of these {en}?|Count the numbers that {en}.", f"有几个数{zh}？|数一数，有多少个数{zh}。"
    else:
        direct = [listed, k(f"These numbers {en}: {listed}.", f"{zh}的有：{listed}。")]
        en, zh = f"Which of these {en}?|Pick the numbers that {en}.", f"哪些数{zh}？|请从下列数字中挑出所有{zh}的数。"
    return k(en, zh), k.join(numbers), k.answer(direct, short, long)


@family(prompt=(14, 150), response=(1, 300), weight=2)
def groups(k: Kit) -> Task:
    """Words of two kinds, or the odd one out."""
    (a, b), n, odd = k.pick(list(k.kinds), 2), k.room(k(2, 3.2), 11, 4, 24), k.response < 12 and k.rng.random() < 0.7
    words = k.pick(k.kinds[a], n - 1 if odd else n // 2)
    others = k.pick(k.kinds[b], 1 if odd else n - len(words))
    kind = dict.fromkeys(words, a) | dict.fromkeys(others, b)
    mixed = k.pick(list(kind), len(kind))
    lines = [f"{w}{k.colon}{kind[w]}" for w in mixed]
    if odd:
        wordings = k("Which word is the odd one out?|Find the odd word.", "哪个词与其他词不同类？|找出不同类的词。")
        full = k(f"{others[0]}, because all the others are {a}.", f"{others[0]}，因为其他的都是{a}。")
        return wordings, k.join(mixed), k.answer(k.values(others[0], full), lines)
    long = [k(f'The word "{w}" goes with the {kind[w]}.', f"“{w}”属于{kind[w]}。") for w in mixed]
    direct = "\n".join(x + k.colon + k.join(w for w in mixed if kind[w] == x) for x in (a, b))
    en, zh = f"Split into {a} and {b}.|Which are {a}, which are {b}?", f"按{a}和{b}分类。|把下面的词分成{a}和{b}两类。"
    return k(en, zh), k.join(mixed), k.answer([direct], lines, long)


@family(prompt=(14, 150), response=(2, 300), weight=2)
def word_list(k: Kit) -> Task:
    """Counting or removing repeats, reversing."""
    pool = k.pick(k.rng.choice(list(k.kinds.values())), 9)
    words = [k.rng.choice(pool) for _ in range(k.room(k(2, 3.2), 11, 4))]
    once = list(dict.fromkeys(words))
    en, zh, result = k.rng.choice(
        [
            ("Count each word.|How often does each occur?", "统计每个词的次数。|下面每个词各出现了几次？", None),
            ("Remove the repeats.|Write every word only once.", "去掉重复的词。|下面每个词只保留一次。", once),
            ("Reverse this list.|Write it from end to start.", "倒着写一遍。|把下面的词倒过来排列。", words[::-1]),
        ]
    )
    listed = k.join(result or [f"{w}{k.colon}{words.count(w)}" for w in once])
    seen = [k("again", "重复") if w in words[:i] else k("new", "新词") for i, w in enumerate(words)]
    marks = [f"{i}. {w}{k.colon}{mark}" for i, (w, mark) in enumerate(zip(words, seen, strict=True), 1)]
    return k(en, zh), k.join(words), k.answer([listed, k("Result: ", "结果：") + listed], marks)


@family(prompt=(8, 120), response=(1, 300), weight=2)
def pairs(k: Kit) -> Task:
    """Opposites, capitals, past tenses …, of one word or several."""
    what, table = k.rng.choice(list(k.pairs.items()))
    chosen = [pair.split("-") for pair in k.pick(table, k.room(k(2, 3), 10, 1, 30))]
    asked, answers = k.join(a for a, _ in chosen), k.join(b for _, b in chosen)
    lines = [f"{a}{k(' - ', '——')}{b}" for a, b in chosen]
    long = [k(f'The {what} of "{a}" is "{b}".', f"“{a}”的{what}是“{b}”。") for a, b in chosen]
    if len(chosen) == 1:
        en = f'What is the {what} of "{asked}"?|Give the {what} of "{asked}".'
        zh = f"“{asked}”的{what}是什么？|写出“{asked}”的{what}。"
        return k(en, zh), "", k.answer(k.values(answers, *long))
    en, zh = f"Give the {what} of each.|What is the {what} of each?", f"写出各自的{what}。|下列各词的{what}分别是什么？"
    return k(en, zh), asked, k.answer([answers], lines, long)


@family(prompt=(26, 200), response=(2, LONG), weight=3)
def inventory(k: Kit) -> Task:
    """The value of some goods, the change for them, or their list as Markdown or JSON."""
    rows = k.goods(k.room(k(10.5, 11), 12, 2, 17))
    text = "\n".join(k(f"{q} {g} at {p} euros each", f"{g}{q}{unit}，每{unit}{p}元") for g, unit, q, p in rows)
    values, style = [q * p for _, _, q, p in rows], k.rng.randrange(5)
    total, sums = sum(values), " + ".join(map(str, values))
    if style == 0:
        table = [k("| item | quantity | price |", "| 品名 | 数量 | 单价 |"), "|---|---|---|"]
        table += [f"| {g} | {q} | {p} |" for g, _, q, p in rows]
        return k("Make a Markdown table.", "改成Markdown表格。"), text, k.answer(["\n".join(table)])
    if style == 1:
        keys = k(("item", "quantity", "price"), ("品名", "数量", "单价"))
        data = [dict(zip(keys, (g, q, p), strict=True)) for g, _, q, p in rows]
        direct = [json.dumps(data, ensure_ascii=False, indent=indent) for indent in (None, 1)]
        return k("Write it as JSON.", "写成JSON格式。"), text, k.answer(direct)
    lines = [f"{g}{k.colon}{q} × {p} = {q * p}" for g, _, q, p in rows]
    if style == 2:
        name, change = k.rng.choice(k.words["names"]), k.number(1, 2)
        en = f"{name} buys all this and pays {total + change} euros. How much change is due?"
        zh = f"{name}买了这些东西，付了{total + change}元，应找回多少元？"
        lines += [f"{sums} = {total}", f"{total + change} - {total} = {change}"]
        return k(en, zh), text, k.answer(k.values(change), lines[-2:], lines)
    full = k(f"The total value is {total} euros.", f"总价是{total}元。")
    running = [f"{line}{k('; together ', '；累计')}{s}" for line, s in zip(lines, accumulate(values), strict=True)]
    en, zh = "What is it worth in total?|What does all of it cost?", "总价是多少？|请计算下面这批货物的总价。"
    return k(en, zh), text, k.answer(k.values(total, full), lines, running)


@family(prompt=(20, 200), response=(1, LONG), weight=3)
def personal_data(k: Kit) -> Task:
    """One field of short records, or all of them as sentences or JSON."""
    keys = k(("name", "age", "home", "job"), ("姓名", "年龄", "城市", "职业"))
    rows = k.people(k.room(k(13, 17), 11, 1, 12))
    data = [dict(zip(keys, row, strict=True)) for row in rows]
    text = "\n".join(k("; ", "；").join(f"{key}{k.colon}{value}" for key, value in row.items()) for row in data)
    if k.response < 12 or k.rng.random() < 0.3:
        row, key = k.rng.choice(data), k.rng.choice(keys[1:])
        name = row[keys[0]]
        return k(f"What is the {key} of {name}?", f"{name}的{key}是什么？"), text, k.answer(k.values(row[key]))
    if k.rng.random() < 0.5:
        return k("Write this as sentences.", "改写成句子。"), text, "\n".join(k.person.format(*row) for row in rows)
    direct = [json.dumps(data, ensure_ascii=False, indent=indent) for indent in (None, 2)]
    return k("Convert this to JSON.", "转换成JSON。"), text, k.answer(direct)


@family(prompt=(20, 150), response=(1, LONG), weight=2)
def ranking(k: Kit) -> Task:
    """A chain of comparisons, given in mixed order."""
    en, zh = ("taller tallest shortest", "older oldest youngest"), ("高 最高 最矮", "年长 最年长 最年轻")
    more, most, least = k.rng.choice(k(en, zh)).split()
    people = k.pick(k.words["names"], k.room(k(6, 7), 6, 3, 20))
    clues = [k(f"{a} is {more} than {b}.", f"{a}比{b}{more}。") for a, b in pairwise(people)]
    steps = [clue + k(" So far: ", "目前的顺序：") + k.join(people[: i + 2]) for i, clue in enumerate(clues)]
    who, word = k.rng.choice([(people[0], most), (people[-1], least)])
    order = k(f"From {most} to {least}: ", f"从{most}到{least}：") + k.join(people)
    full = k(f"{who} is the {word}.", f"{who}{word}。")
    direct = k.values(who, full, f"{order}\n{full}")
    text = k.space.join(k.pick(clues, len(clues)))
    en, zh = f"Who is the {word}? {{}}|{{}} Which of them is the {word}?", f"谁{word}？{{}}|{{}}他们当中谁{word}？"
    return k(en, zh).format(text, text), "", k.answer(direct, clues, steps)


@family(prompt=(28, 90), response=(3, 300), weight=2)
def day_plan(k: Kit) -> Task:
    """A study plan, or when it ends."""
    subjects, length, pause = k.pick(k.words["subjects"], k.room(k(2, 3), 26, 2, 15)), 5 * k.number(1), 5 * k.number(1)
    first = 5 * k.rng.randrange(84, 100)
    starts = zip(integers(first, length + pause), subjects, strict=False)
    slots = [(clock(start), clock(start + length), subject) for start, subject in starts]
    en = f"start at {clock(first)}, {length} minutes each, breaks of {pause} minutes"
    zh = f"{clock(first)}开始，每科{length}分钟，中间休息{pause}分钟"
    if k.response < 20:
        direct = k.values(slots[-1][1])
        return k(f"When does this plan end: {en}?", f"{zh}，几点结束？"), k.join(subjects), k.answer(direct)
    lines = [k(f"{a}-{b} {s}", f"{a}-{b}{s}") for a, b, s in slots]
    long = [k(f"{s} from {a} to {b}, {length} minutes", f"{s}：{a}到{b}，共{length}分钟") for a, b, s in slots]
    direct = ["\n".join(lines), "\n".join(long)]
    return k(f"Make a plan: {en}.", f"做个计划：{zh}。"), k.join(subjects), k.answer(direct)


# --- Generating ------------------------------------------------------------------------------------------------------


def _word(kit: Kit, wordings: str, used: int) -> str:
    """A wording in a frame that comes nearest to the wanted length beside `used` tokens of input."""
    gaps = [(kit.prompt - used - count(wording), wording) for wording in wordings.split("|")]
    fits = [(abs(gap - size), kit.rng.random(), frame, wording) for gap, wording in gaps for frame, size in kit.frames]
    _, _, frame, wording = min(fits)
    return frame.replace("{}", wording)


def _fit(rng: random.Random, language: str, lengths: tuple[int, int], seen: set[bytes]) -> dict[str, str]:
    """A record of about the wanted lengths whose digest is not in `seen`: the best of a few attempts."""
    (prompt, response), (prompts, responses, (least, most), _) = lengths, SHAPES[language]
    wanted = response - 1  # without EOS
    if wanted == RESPONSE_LIMIT:
        wanted += rng.randrange(8, 120)  # the cut ones go on
    makers = [make for make, (a, b), (c, d) in FAMILIES if a <= prompt <= b and c <= wanted <= d]
    best, error, attempts = None, math.inf, 0
    while best is None or (error > 0.1 and attempts < 8):
        attempts += 1
        kit = Kit(rng, language, prompt, wanted)
        wordings, text, output = rng.choice(makers)(kit)
        used = count("\n" + text) if text else 0
        task = _word(kit, wordings, used), text, output
        p, r = count(task[0]) + used, min(count(output), RESPONSE_LIMIT) + 1
        legal = prompts[0] <= p <= prompts[1] and responses[0] <= r and least <= p + r <= most
        off = abs(p - prompt) / prompt + abs(r - response) / response
        if legal and off < error and _digest(task) not in seen:
            best, error = task, off
    seen.add(_digest(best))
    return dict(zip(("instruction", "input", "output"), best, strict=True))


def _digest(task: Task) -> bytes:
    """16 bytes that stand for a task: all tasks of a million records would take a gigabyte."""
    return hashlib.blake2b("\0".join(task).encode(), digest_size=16).digest()


def records(language: str, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yields different records without end. They depend on the seed alone."""
    rng, seen = random.Random(f"{language} {seed}"), set[bytes]()
    while True:
        for lengths in _deck(language, rng):
            yield _fit(rng, language, lengths, seen)


def generate(language: str, samples: int, seed: int = 0) -> list[dict[str, str]]:
    """The first `samples` of `records`."""
    return list(islice(records(language, seed), samples))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write embedded sample records as JSON lines.")
    parser.add_argument("--language", choices=sorted(SHAPES), default="en")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="file to write (default: standard output)")
    args = parser.parse_args()
    found = generate(args.language, args.samples, args.seed)
    with open(args.out or sys.stdout.fileno(), "w", encoding="utf-8", closefd=bool(args.out)) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in found)


if __name__ == "__main__":
    main()
