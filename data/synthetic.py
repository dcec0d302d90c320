"""The embedded default data: instruction tasks with right answers in English and Chinese, from a seeded generator.

Every record has the Alpaca fields instruction, input and output. Token lengths follow those of real instruction data
(SHAPES): a pair of lengths is drawn for each record, then a task family builds a task of about that size.
To add a family, write one function under `@family(...)`. It gets a Kit and returns the wordings of its question
("A|B|C": the one nearest to the wanted length is taken), the input ("" if none) and the output.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, timedelta
from itertools import accumulate, chain
from itertools import count as integers
from itertools import pairwise
from typing import NamedTuple

# The tokenizer splits text by this pattern first, and nearly every piece is one token: so pieces stand for tokens.
PIECES = r"[0-9]|[\u4e00-\u9fff]|\n+| ?[^\W\d_\u4e00-\u9fff]+| ?[^\s\w]+|\s"
RESPONSE_LIMIT = 384  # tokens; one EOS comes on top
_pieces = re.compile(PIECES).findall


def count(text: str) -> int:
    """Tokens of a text, up to the few pieces that the tokenizer cuts further."""
    return len(_pieces(text))


# --- Lengths ---------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Token lengths: quantiles of prompt and response (EOS included), and how the two go together."""

    prompt: dict[float, int]
    response: dict[float, int]
    total: tuple[int, int]  # least and most tokens of prompt and response together
    opposed: float  # share of records where a longer prompt goes with a shorter response


# Measured on 1,000 real instruction records each (32k vocabulary); 0.375 and `opposed` are fitted to the totals.
SHAPES = {
    "en": Shape(
        {0: 5, 0.1: 9, 0.25: 11, 0.5: 15, 0.75: 23, 0.9: 33, 0.95: 44, 0.99: 93, 1: 171},
        {0: 2, 0.1: 12, 0.25: 29, 0.375: 60, 0.5: 114, 0.75: 277, 0.9: 385, 1: 385},
        (15, 556),
        0.15,
    ),
    "zh": Shape(
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
    rng.shuffle(lengths)
    return lengths


def _deck(shape: Shape, rng: random.Random) -> list[tuple[int, int]]:
    """A deck of (prompt, response) lengths in random order."""
    prompts, responses = _draw(shape.prompt, rng), _draw(shape.response, rng)
    head = int(shape.opposed * DECK)
    prompts[:head], responses[:head] = sorted(prompts[:head]), sorted(responses[:head], reverse=True)
    least, most = shape.total
    for i in range(DECK):
        while not least <= prompts[i] + responses[i] <= most:  # swap with another pair so that both fit
            j = rng.randrange(DECK)
            if least <= prompts[i] + responses[j] <= most and least <= prompts[j] + responses[i] <= most:
                responses[i], responses[j] = responses[j], responses[i]
    pairs = list(zip(prompts, responses, strict=True))
    rng.shuffle(pairs)
    return pairs


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
    months: January February March April May June July August September October November December
    units: mile,miles,metres,1609 pound,pounds,grams,454 gallon,gallons,millilitres,3785 hour,hours,minutes,60
    units: week,weeks,days,7 foot,feet,millimetres,305 dollar,dollars,yen,0 euro,euros,forints,0 year,years,months,12"""),
    "zh": _table("""
    goods: 铅笔/支 笔记本/本 杯子/个 盘子/个 水壶/个 蜡烛/根 毛巾/条 电池/节 信封/个 台灯/盏 键盘/个 帐篷/顶 毛毯/条
    goods: 枕头/个 勺子/把 闹钟/个 镜子/面 篮子/个 雨伞/把 书包/个 气球/个 牙刷/支 词典/本 地图/张 邮票/张 螺丝/颗
    places: 北京 上海 广州 深圳 成都 杭州 南京 武汉 西安 重庆 天津 苏州 长沙 青岛 大连 厦门 昆明 郑州 合肥 福州 洛阳
    subjects: 语文 数学 英语 物理 化学 生物 历史 地理 音乐 美术 书法 政治 编程 作文 阅读 体育
    weekdays: 星期一 星期二 星期三 星期四 星期五 星期六 星期日
    units: 公里,公里,米,1000 斤,斤,克,500 里,里,米,500 亩,亩,平方米,667 小时,小时,分钟,60 周,周,天,7
    units: 美元,美元,日元,0 英镑,英镑,日元,0 英里,英里,米,1609 年,年,个月,12 元,元,韩元,0"""),
}
SURNAMES, GIVEN = "王李张刘陈杨赵黄周吴徐孙胡朱高林", "芳 伟 娜 敏 静 强 磊 秀英 志强 建国 晓明 雨欣 子涵 浩然 文博 海燕"
WORDS["zh"]["names"] = [surname + given for surname in SURNAMES for given in GIVEN.split()]
WORDS["en"]["places"] = [  # made of two parts, like many a real one
    a + b
    for a in """Oak Ash West North South East Stone Wood Black White Red Green Spring Summer Winter Mill Bridge Lake
    Hill King Queen Brook Rose Fox Wolf Swan Deer Fair High Long Silver Gold Sand Salt Thorn Elm Birch Moor Marsh Cold
    Clear Hazel Maple Cherry Iron Copper Wind Rain Raven Eagle Hart Ox Lamb Beech Corn Barley Apple Clover""".split()
    for b in "ford ton ville field ham bury worth dale port mouth ley stead wick haven view crest ridge gate".split()
]
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
    adverb/ly,comparative/er,noun/ness: rough tough fresh harsh mild firm fair bold bleak blunt crisp damp dull faint""")
for _forms, _stems in REGULAR.items():
    for _form, _ending in (form.split("/") for form in _forms.split(",")):
        PAIRS["en"].setdefault(_form, []).extend(f"{stem}-{stem}{_ending}" for stem in _stems)

# Said before and after the question without changing the task: they close the gap to the wanted length of the prompt.
OPENINGS = {
    "en": "|Hello!|Quick question:|Help me, please:|A small task:|Here is one for you:|This came up at work today:",
    "zh": "|你好，|请帮忙：|帮我看看：|有一道题：|孩子问我：|请教一个问题：|下面是一道练习题：|工作中遇到一个问题：",
}
CLOSINGS = {
    "en": "|Thanks.|Thank you!|Please be precise.|Take your time.|It is my homework.|I want to check my own result."
    "|We need it for the meeting tomorrow morning.|Please keep the wording simple enough for a beginner."
    "|I am preparing for a test and would like to compare my own answer with yours afterwards.",
    "zh": "|谢谢。|请仔细。|麻烦你了。|这是我的作业。|请检查一遍结果。|我想核对自己的答案。|老师今天布置了这道题。"
    "|我在准备考试，想对一下答案。|请写得清楚一些，方便初学者看懂。|我自己做了一遍，但是不太确定对不对，所以想请你再做一遍。",
}


def _additions(language: str) -> list[list[tuple[str, str]]]:
    """For each gap in tokens, the pairs of opening and closing that fill it best."""
    space = " " if language == "en" else ""
    openings, closings = OPENINGS[language].split("|"), CLOSINGS[language].split("|")
    pairs = [(a and a + space, b and space + b) for a in openings for b in closings]
    sizes = {pair: count(pair[0].rstrip()) + count(pair[1]) for pair in pairs}
    off = [min(abs(gap - size) for size in sizes.values()) for gap in range(max(sizes.values()) + 1)]
    return [[pair for pair in pairs if abs(gap - sizes[pair]) == off[gap]] for gap in range(len(off))]


ADDITIONS = {language: _additions(language) for language in SHAPES}


def lexicon() -> Iterator[str]:
    """Every listed word, so that the tokenizer can learn the rare ones too."""
    for table in (*WORDS.values(), *KINDS.values(), *PAIRS.values()):
        for entry in chain.from_iterable(table.values()):
            yield from re.split("[-/,]", entry)


# --- Numbers ---------------------------------------------------------------------------------------------------------


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def in_words(n: int) -> str:
    """A whole number in English words, up to the millions."""
    if n < 20:
        return """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen""".split()[n]
    if n < 100:
        tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()[n // 10 - 2]
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
        self.words, self.kinds, self.pairs = WORDS[language], KINDS[language], PAIRS[language]
        self.space, self.comma, self.colon = (" ", ", ", ": ") if self.en else ("", "、", "：")

    def __call__(self, en, zh):
        """The argument of the language."""
        return en if self.en else zh

    def number(self, least: int, most: int = 0) -> int:
        """A number of `least` to `most` (default: also `least`) digits, but not 0 or 1."""
        digits = self.rng.randint(least, most or least)
        return self.rng.randrange(max(2, 10 ** (digits - 1)), 10**digits)

    def pick(self, items: Sequence, n: int) -> list:
        """n of them (all of fewer) in random order."""
        return self.rng.sample(items, min(n, len(items)))

    def goods(self, n: int) -> list[tuple[str, str, int, int]]:
        """Things to buy: name, measure word ("" in English), quantity, price of one."""
        named = [(*thing.split("/"), "")[:2] for thing in self.pick(self.words["goods"], n)]
        return [(*names, self.number(1, 2), self.number(1, 2)) for names in named]

    def join(self, items: Iterable) -> str:
        return self.comma.join(map(str, items))

    def room(self, each: float, wording: int = 11, low: int = 3, high: int = 45) -> int:
        """How many items of `each` tokens go into the prompt beside `wording` tokens."""
        return max(low, min(high, round((self.prompt - wording) / each)))

    def date(self, day: date) -> str:
        month = WORDS["en"]["months"][day.month - 1]
        return self(f"{day.day} {month} {day.year}", f"{day.year}年{day.month}月{day.day}日")

    def series(self, lines: Iterable[str], wordings: str, separator: str = "\n") -> Task:
        """As many of the lines as come nearest to the wanted response; # in the wordings becomes their number."""
        taken: list[str] = []
        used = 0
        for line in lines:
            size = count(separator + line)
            if len(taken) > 1 and used + size / 2 > self.response:
                break
            taken.append(line)
            used += size
        return wordings.replace("#", str(len(taken))), "", separator.join(taken)

    def answer(self, direct: Sequence[str], *workings: Sequence[str], about: int | Sequence | None = None) -> str:
        """The direct answer, below one of the workings where there is room, and facts about something in the rest."""
        best, least = "", math.inf
        sizes = [count(text) for text in direct]
        for working in ("", *("\n".join(lines) + "\n" for lines in workings)):
            room = self.response - count(working)
            for text, size in zip(direct, sizes, strict=True):
                gap = room - size if size <= room else 1.5 * (size - room)
                if gap < least:
                    best, least = working + text, gap
        gap, remarks = self.response - count(best), []
        for remark in self.facts(about) if about is not None and gap > 4 else ():
            size = count(self.space + remark)
            if size <= gap + 1:
                remarks.append(remark)
                gap -= size
        return best + (("\n" if "\n" in best else self.space) + self.space.join(remarks) if remarks else "")

    def values(self, value: object, *more: str) -> list[str]:
        """Ways to state a result."""
        en = f"{value}|{value}.|It is {value}.|The answer is {value}.|The right answer here is {value}."
        return [*self(en, f"{value}|{value}。|是{value}。|答案是{value}。|所以最后的答案是{value}。").split("|"), *more]

    def facts(self, about: int | Sequence) -> list[str]:
        """True sentences in random order, about a number or a list of numbers or words."""
        facts = self._number_facts(about) if isinstance(about, int) else self._list_facts(about)
        return self.pick(facts, len(facts))

    def _number_facts(self, n: int) -> list[str]:
        a, b, c, d = self.rng.randrange(1, n + 2), self.number(1), self.number(2), self.rng.randrange(3, 13)
        after, root, digits, prime = next(filter(is_prime, integers(n + 1))), math.isqrt(n) + 1, str(n), is_prime(n)
        sums, high, low, square = sum(map(int, digits)), max(digits), min(digits), root * root
        return self(
            f"{n} is {'odd' if n % 2 else 'even'}.|Twice {n} is {2 * n}.|{n} + {a} = {n + a}.|{n} × {b} = {n * b}."
            f"|The square of {n} is {n * n}.|The digits of {n} add up to {sums}.|In words it is {in_words(n)}."
            f"|{n} {'is' if prime else 'is not'} a prime number.|The next prime number after {n} is {after}."
            f"|Divided by {d}, {n} gives {n // d} with remainder {n % d}.|In binary it is {n:b}.|{n} × {c} = {n * c}."
            f"|The smallest square number above {n} is {root} × {root} = {square}.|The number before it is {n - 1}."
            f"|Ten times as much would be {10 * n}.|Five more than {n} is {n + 5}.|To reach {n + c}, one has to add {c}."
            f"|Its largest digit is {high} and its smallest is {low}.|Read backwards, the digits are {digits[::-1]}."
            f"|Three times {n} is {3 * n}, and four times it is {4 * n}.|Added to a hundred, {n} gives {n + 100}.",
            f"{n}是{'奇' if n % 2 else '偶'}数。|{n}的两倍是{2 * n}。|{n} + {a} = {n + a}。|{n} × {b} = {n * b}。"
            f"|{n}的平方是{n * n}。|{n}的各位数字之和是{sums}。|用汉字写作{in_hanzi(n)}。|扩大到十倍就是{10 * n}。"
            f"|{n}{'是' if prime else '不是'}质数。|比{n}大的最小质数是{after}。|{n} × {c} = {n * c}。|加上一百等于{n + 100}。"
            f"|{n}除以{d}，商是{n // d}，余数是{n % d}。|写成二进制是{n:b}。|它前面的一个数是{n - 1}。"
            f"|比{n}大的最小平方数是{root} × {root} = {square}。|比{n}多5的数是{n + 5}。|再加上{c}就等于{n + c}。"
            f"|各位数字中最大的是{high}，最小的是{low}。|把数字倒过来读是{digits[::-1]}。|它的三倍是{3 * n}，四倍是{4 * n}。",
        ).split("|")

    def _list_facts(self, items: Sequence) -> list[str]:
        ends, back = (items[0], items[-1]), self.join(items[::-1])
        facts = [self(f"There are {len(items)} entries.", f"一共有{len(items)}项。"), self(f"In reverse: {back}.", f"倒过来是{back}。")]
        facts += [self("The first is {} and the last is {}.", "第一项是{}，最后一项是{}。").format(*ends)]
        facts += [self(f"Number {i} is {item}.", f"第{i}项是{item}。") for i, item in enumerate(items, 1)]
        if isinstance(items[0], str):
            return facts + [self(f'"{w}" has {len(w)} letters.', f"“{w}”有{len(w)}个字。") for w in items]
        high, low, total, even = max(items), min(items), sum(items), sum(x % 2 == 0 for x in items)
        return facts + self(
            f"The largest number is {high}.|The smallest number is {low}.|All together they make {total}."
            f"|The largest minus the smallest is {high - low}.|There are {even} even and {len(items) - even} odd numbers."
            f"|Each number doubled: {self.join(2 * x for x in items)}.|Running totals: {self.join(accumulate(items))}.",
            f"最大的数是{high}。|最小的数是{low}。|全部加起来是{total}。|最大数与最小数相差{high - low}。"
            f"|其中偶数有{even}个，奇数有{len(items) - even}个。|每个数都加倍后是{self.join(2 * x for x in items)}。"
            f"|依次累加得到{self.join(accumulate(items))}。",
        ).split("|")


# --- Task families ---------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """A maker of tasks, and the wanted lengths (tokens) it is asked for."""

    make: Callable[[Kit], Task]
    prompt: tuple[int, int]
    response: tuple[int, int]


FAMILIES: list[Family] = []
LONG = 600  # more than any wanted response: such a family fills every length


def family(prompt: tuple[int, int], response: tuple[int, int]) -> Callable[[Callable[[Kit], Task]], None]:
    """Registers a task family for these wanted lengths (tokens, both ends included)."""
    return lambda make: FAMILIES.append(Family(make, prompt, response))


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
    wordings = k(
        f"What is {text}?|Calculate {text}.|Work out the value of {text}.|{text} = ?",
        f"计算{text}。|{text}等于多少？|请算一算：{text} = ?|请计算{text}的结果。",
    )
    return wordings, "", k.answer(k.values(total, f"{text} = {total}"), steps, about=total)


@family(prompt=(5, 24), response=(12, LONG))
def number_facts(k: Kit) -> Task:
    n, mark = k.number(2, 4), k.rng.choice(("", "- "))
    wordings = k(
        f"Describe {n}.|Tell me about {n}.|What do you know about the number {n}?|State facts about {n}.",
        f"介绍{n}。|说说数字{n}。|关于{n}这个数，你知道什么？|写出{n}的一些性质。",
    )
    return k.series((mark + fact for fact in dict.fromkeys(k.facts(n) + k.facts(n))), wordings)


@family(prompt=(7, 30), response=(12, LONG))
def sequence(k: Kit) -> Task:
    a, d, year = k.number(2), k.number(1, 3), k.rng.randrange(1880, 2030)
    en, zh, terms = k.rng.choice(
        [
            (f"multiples of {d}", f"{d}的倍数", (f"{d} × {n} = {d * n}" for n in integers(1))),
            (f"multiples of {d} from {a * d}", f"从{a * d}起{d}的倍数", integers(a * d, d)),
            (f"squares from {a} × {a}", f"从{a}的平方起的平方数", (n * n for n in integers(a))),
            (f"cubes from {a}", f"从{a}的立方起的立方数", (f"{n} × {n} × {n} = {n**3}" for n in integers(a))),
            (f"primes above {a}", f"大于{a}的质数", filter(is_prime, integers(a + 1))),
            (f"leap years from {year}", f"{year}年起的闰年", (y for y in integers(year) if y % (400 if y % 100 == 0 else 4) == 0)),
        ]
    )
    wordings = k(
        f"List # {en}.|Give me the first # {en}.|Which are the first # {en}?|List some {en}.",
        f"列出#个{zh}。|写出前#个{zh}。|请依次写出{zh}，一共写#个。|写出{zh}。",
    )
    return k.series(map(str, terms), wordings, k.rng.choice(("\n", k.comma)))


@family(prompt=(8, 26), response=(2, LONG))
def spelled_numbers(k: Kit) -> Task:
    n, formal = k.number(2, 5), k.rng.random() < 0.4
    spell = k(in_words, (lambda n: in_hanzi(n, "零壹贰叁肆伍陆柒捌玖", "-拾佰仟")) if formal else in_hanzi)
    style = "大写汉字" if formal else "汉字"
    if k.response < 16:
        wordings = k(
            f"Spell {n}.|Write {n} in words.|How do you write {n} in words?",
            f"{n}的{style}怎么写？|用{style}写{n}。|请把{n}写成{style}。",
        )
        return wordings, "", k.answer(k.values(spell(n)))
    wordings = k(
        f"Spell # numbers from {n}.|Write the # numbers from {n} in words.|Count on from {n} in words.",
        f"用{style}从{n}往后数。|从{n}起，用{style}写出#个数。|把从{n}开始的#个数都写成{style}。",
    )
    return k.series((f"{i}{k.colon}{spell(i)}" for i in integers(n)), wordings)


@family(prompt=(14, 45), response=(2, LONG))
def conversion(k: Kit) -> Task:
    one, many, other, known = k.rng.choice(k.words["units"]).split(",")
    rate, n, step = int(known) or k.rng.randrange(80, 900), k.number(2), k.number(1)
    lines = (f"{x}{k.space}{many} = {x * rate}{k.space}{other}" for x in integers(n, step))
    if k.response < 30:
        wordings = k(
            f"Convert {n} {many} to {other} (1 {one} = {rate}).|How many {other} are {n} {many}, if 1 {one} is {rate}?",
            f"1{one}是{rate}{other}，{n}{many}是多少{other}？|已知1{one}等于{rate}{other}，请把{n}{many}换算成{other}。",
        )
        return wordings, "", k.answer(k.values(n * rate, next(lines)), [f"{n} × {rate} = {n * rate}"], about=n * rate)
    wordings = k(
        f"At 1 {one} = {rate} {other}, convert # values from {n} {many} in steps of {step}.|Make a table of {many} in"
        f" {other} with # rows, from {n} in steps of {step}. Use 1 {one} = {rate} {other}.",
        f"1{one}是{rate}{other}，从{n}{many}起每隔{step}换算一次，共#行。|列一张{many}换算{other}的表，从{n}开始，每行增加"
        f"{step}，共#行（1{one} = {rate}{other}）。",
    )
    return k.series(lines, wordings)


@family(prompt=(12, 36), response=(1, LONG))
def dates(k: Kit) -> Task:
    day, step = date(k.rng.randrange(1950, 2060), 1, 1) + timedelta(k.rng.randrange(365)), k.number(1, 2)
    start, weekdays = k.date(day), k.words["weekdays"]
    days = (day + timedelta(i * step) for i in integers())
    lines = (k(f"{k.date(d)}, a {weekdays[d.weekday()]}", f"{k.date(d)}，{weekdays[d.weekday()]}") for d in days)
    if k.response < 24:
        end, weekday = k.date(day + timedelta(step)), weekdays[day.weekday()]
        if k.response < 6 or k.rng.random() < 0.3:
            wordings = k(f"Which weekday is {start}?|Name the day of the week of {start}.", f"{start}是星期几？|请问{start}这一天是星期几？")
            return wordings, "", k.answer(k.values(weekday, next(lines)))
        wordings = k(
            f"Add {step} days to {start}.|Which date is {step} days after {start}?|It is {start}. What is the date in {step} days?",
            f"{start}再过{step}天是哪一天？|从{start}起，{step}天以后是几月几日？|今天是{start}，{step}天后是什么日期？",
        )
        return wordings, "", k.answer(k.values(end, k(f"{step} days after {start} it is {end}.", f"{start}再过{step}天是{end}。")))
    wordings = k(
        f"List # dates, {step} days apart, from {start} on.|A plant is watered on {start} and then every {step} days. Give the"
        f" first # dates.|List every {step} days from {start}.",
        f"从{start}起每{step}天一次，列出#个日期。|花从{start}开始每{step}天浇一次水，写出前#次的日期和星期。",
    )
    return k.series(lines, wordings)


@family(prompt=(14, 45), response=(2, LONG))
def savings(k: Kit) -> Task:
    name, start, add, n = k.pick(k.words["names"], 1)[0], k.number(2, 3), k.number(1, 3), k.rng.randrange(3, 25)
    if k.response < 40:
        total = start + n * add
        wordings = k(
            f"{name} has {start} euros and saves {add} a month. How much is it after {n} months?|{start} euros grow by"
            f" {add} a month. What is there after {n} months?",
            f"{name}有{start}元，每月存{add}元，{n}个月后有多少元？|存款{start}元，每月增加{add}元，{n}个月后一共是多少元？",
        )
        end = k(f"After {n} months there are {total} euros.", f"{n}个月后一共有{total}元。")
        return wordings, "", k.answer(k.values(total, end), [f"{n} × {add} = {n * add}", f"{start} + {n * add} = {total}"])
    wordings = k(
        f"{name} has {start} euros and saves {add} a month. Show # months.|At first there are {start} euros in the box of"
        f" {name}. Every month {name} puts in {add} more. How many are in it after each of # months?",
        f"{name}有{start}元，每月存{add}元，逐月列出#个月的存款。|{name}的存钱罐里原来有{start}元，以后每个月放进去{add}元。"
        f"请逐月算出#个月里面各有多少元。",
    )
    months = enumerate(integers(start, add), 1)
    return k.series((k(f"Month {i}: ", f"第{i}个月：") + f"{a} + {add} = {a + add}" for i, a in months), wordings)


@family(prompt=(5, 24), response=(8, 160))
def repeated_division(k: Kit) -> Task:
    """Prime factors or binary digits."""
    n, binary, steps, factors = k.number(2, 5), k.rng.random() < 0.5, [], []
    rest = n
    while rest > (0 if binary else 1):
        d = 2 if binary else next((d for d in range(2, math.isqrt(rest) + 1) if rest % d == 0), rest)
        steps.append(f"{rest} ÷ {d} = {rest // d}" + (k(" remainder ", "余") + str(rest % d) if binary else ""))
        factors.append(str(d))
        rest //= d
    if binary:
        wordings = k(f"Write {n} in binary.|What is {n} as a binary number?", f"把{n}写成二进制。|{n}用二进制怎么表示？")
        return wordings, "", k.answer(k.values(f"{n:b}"), steps, about=n)
    wordings = k(f"Factor {n}.|Factor {n} into primes.|What are the prime factors of {n}?", f"分解{n}。|把{n}分解质因数。")
    return wordings, "", k.answer([f"{n} = {' × '.join(factors)}"], steps, about=n)


@family(prompt=(14, 190), response=(3, LONG))
def sorting(k: Kit) -> Task:
    numbers, down = k.pick(range(2, 1000), k.room(4.8)), k.rng.random() < 0.5
    order = k(*(("largest to smallest", "从大到小") if down else ("smallest to largest", "从小到大")))
    parts = [sorted(numbers[:i], reverse=down) for i in range(1, len(numbers) + 1)]
    listed = k.join(parts[-1])
    wordings = k(
        f"Sort from {order}.|Put these numbers in order from {order}.|Arrange the list from {order}, please.",
        f"{order}排列。|把下面的数{order}排列。|请将下列数字按{order}的顺序排好。",
    )
    lines = [k(f"Number {i}: {x}", f"第{i}个：{x}") for i, x in enumerate(parts[-1], 1)]
    inserts = [k(f"Insert {x}: {k.join(part)}", f"插入{x}：{k.join(part)}") for x, part in zip(numbers, parts, strict=True)]
    direct = [listed, k(f"Sorted: {listed}", f"排列结果：{listed}"), k(f"From {order}: {listed}.", f"{order}依次是：{listed}。")]
    return wordings, k.join(numbers), k.answer(direct, lines, inserts, about=numbers)


@family(prompt=(14, 190), response=(1, LONG))
def filtering(k: Kit) -> Task:
    """Choosing or counting the numbers with a property."""
    numbers, limit, d = k.pick(range(2, 1000), k.room(4.8)), k.number(3), k.rng.randrange(2, 10)
    en, zh, keep = k.rng.choice(
        [
            (f"are above {limit}", f"大于{limit}", lambda x: x > limit),
            (f"are divisible by {d}", f"能被{d}整除", lambda x: x % d == 0),
            ("have an odd last digit", "的个位是奇数", lambda x: x % 2 == 1),
        ]
    )
    kept, totals = [x for x in numbers if keep(x)], list(accumulate(map(keep, numbers)))
    listed = k.join(kept) or k("none", "没有")
    short = [f"{x}{k.colon}{k('yes', '是') if keep(x) else k('no', '否')}" for x in numbers]
    long = [line + k(f", {t} so far", f"，目前共有{t}个") for line, t in zip(short, totals, strict=True)]
    if k.response < 8 or k.rng.random() < 0.3:
        wordings = k(f"How many of these {en}?|Count the numbers that {en}.", f"有几个数{zh}？|数一数，下面有多少个数{zh}。")
        direct = k.values(len(kept))
    else:
        wordings = k(f"Which of these {en}?|Pick the numbers that {en}.", f"哪些数{zh}？|请从下列数字中挑出所有{zh}的数。")
        direct = [listed, k(f"These numbers {en}: {listed}.", f"{zh}的有：{listed}。")]
    return wordings, k.join(numbers), k.answer(direct, short, long, about=numbers)


@family(prompt=(14, 150), response=(1, LONG))
def groups(k: Kit) -> Task:
    """Words of two kinds, or the odd one out."""
    (a, b), n, odd = k.pick(list(k.kinds), 2), k.room(k(2, 3.2), 11, 4, 24), k.response < 12 and k.rng.random() < 0.7
    words = k.pick(k.kinds[a], n - 1 if odd else n // 2)
    kind = dict.fromkeys(words, a) | dict.fromkeys(k.pick(k.kinds[b], 1 if odd else n - len(words)), b)
    mixed = k.pick(list(kind), len(kind))
    lines = [f"{w}{k.colon}{kind[w]}" for w in mixed]
    if odd:
        (other,) = (w for w in mixed if kind[w] == b)
        wordings = k("Which word is the odd one out?|Find the odd word.", "哪个词与其他词不同类？|找出不同类的词。")
        full = k(f"{other}, because all the others are {a}.", f"{other}，因为其他的都是{a}。")
        return wordings, k.join(mixed), k.answer(k.values(other, full), lines)
    wordings = k(
        f"Split into {a} and {b}.|Sort these words into {a} and {b}.|Which of these are {a} and which are {b}?",
        f"按{a}和{b}分类。|把下面的词分成{a}和{b}两类。|下列词语中，哪些是{a}，哪些是{b}？",
    )
    long = [k(f'The word "{w}" goes with the {kind[w]}.', f"“{w}”属于{kind[w]}。") for w in mixed]
    direct = "\n".join(x + k.colon + k.join(w for w in mixed if kind[w] == x) for x in (a, b))
    return wordings, k.join(mixed), k.answer([direct], lines, long, about=mixed)


@family(prompt=(14, 150), response=(2, LONG))
def word_list(k: Kit) -> Task:
    """Counting or removing repeats, reversing, sorting."""
    pool = k.pick(k.rng.choice(list(k.kinds.values())), 9)
    words = [k.rng.choice(pool) for _ in range(k.room(k(2, 3.2), 11, 4))]
    once = list(dict.fromkeys(words))
    wordings, direct = k.rng.choice(
        [
            (k("Count each word.|How often does each word occur?", "统计每个词的次数。|下面每个词各出现了几次？"), [f"{w}{k.colon}{words.count(w)}" for w in once]),
            (k("Remove the repeats.|Write every word only once.", "去掉重复的词。|下面每个词只保留一次。"), once),
            (k("Reverse this list.|Write it from end to start.", "倒着写一遍。|把下面的词倒过来排列。"), words[::-1]),
            (k("Put the words in alphabetical order.", "按字数从少到多排列，字数相同的不动。"), sorted(words, key=k(str, len))),
        ]
    )
    marks = [f"{i}. {w}{k.colon}{k('again', '重复') if w in words[: i - 1] else k('new', '新词')}" for i, w in enumerate(words, 1)]
    result = k.join(direct)
    return wordings, k.join(words), k.answer([result, k("Result: ", "结果：") + result], marks, about=words)


@family(prompt=(8, 120), response=(1, LONG))
def pairs(k: Kit) -> Task:
    """Opposites, capitals, past tenses …, of one word or several."""
    what, table = k.rng.choice(list(k.pairs.items()))
    chosen = [pair.split("-") for pair in k.pick(table, k.room(k(2, 3), 10, 1, 30))]
    asked, answers = k.join(a for a, _ in chosen), k.join(b for _, b in chosen)
    lines = [f"{a}{k(' - ', '——')}{b}" for a, b in chosen]
    long = [k(f'The {what} of "{a}" is "{b}".', f"“{a}”的{what}是“{b}”。") for a, b in chosen]
    if len(chosen) == 1:
        wordings = k(f'What is the {what} of "{asked}"?|Give the {what} of "{asked}".', f"“{asked}”的{what}是什么？|写出“{asked}”的{what}。")
        return wordings, "", k.answer(k.values(answers, *long), about=[answers])
    wordings = k(f"Give the {what} of each.|What is the {what} of each of these?", f"写出各自的{what}。|下列各词的{what}分别是什么？")
    return wordings, asked, k.answer([answers], lines, long, about=[b for _, b in chosen])


@family(prompt=(28, 190), response=(2, LONG))
def inventory(k: Kit) -> Task:
    """The value of a stock, or its list as Markdown or JSON."""
    rows = k.goods(k.room(k(9.5, 11), 12, 2, 18))
    text = "\n".join(k(f"{q} {g} at {p} euros", f"{g}{q}{m}，每{m}{p}元") for g, m, q, p in rows)
    values, style = [q * p for _, _, q, p in rows], k.rng.randrange(4)
    full = k(f"The total value is {sum(values)} euros.", f"总价是{sum(values)}元。")
    if style == 0:
        table = [k("| item | quantity | price |", "| 品名 | 数量 | 单价 |"), "|---|---|---|", *(f"| {g} | {q} | {p} |" for g, _, q, p in rows)]
        return k("Make a Markdown table.", "改成Markdown表格。"), text, k.answer(["\n".join(table)], about=values)
    if style == 1:
        keys = k(("item", "quantity", "price"), ("品名", "数量", "单价"))
        data = [dict(zip(keys, (g, q, p), strict=True)) for g, _, q, p in rows]
        direct = [json.dumps(data, ensure_ascii=False, indent=indent) for indent in (None, 1)]
        return k("Write it as JSON.", "写成JSON格式。"), text, k.answer(direct)
    wordings = k("What is it worth in total?|Work out what all of this costs together.", "总价是多少？|请计算下面这批货物的总价。")
    lines = [f"{g}{k.colon}{q} × {p} = {q * p}" for g, _, q, p in rows]
    running = [f"{line}{k('; together ', '；累计')}{s}" for line, s in zip(lines, accumulate(values), strict=True)]
    return wordings, text, k.answer(k.values(sum(values), full), lines, running, about=values)


@family(prompt=(20, 190), response=(1, LONG))
def personal_data(k: Kit) -> Task:
    """One field of short records, or all of them as sentences or JSON."""
    keys, jobs = k(("name", "age", "home", "job"), ("姓名", "年龄", "城市", "职业")), k.kinds[k("jobs", "职业")]
    names = k.pick(k.words["names"], k.room(k(13, 17), 11, 1, 12))
    rows = [(name, k.rng.randrange(18, 80), k.rng.choice(k.words["places"]), k.rng.choice(jobs)) for name in names]
    data = [dict(zip(keys, row, strict=True)) for row in rows]
    text = "\n".join(k("; ", "；").join(f"{key}{k.colon}{value}" for key, value in row.items()) for row in data)
    if k.response < 12 or k.rng.random() < 0.4:
        row, key = k.rng.choice(data), k.rng.choice(keys[1:])
        wordings = k(f"What is the {key} of {row['name']}?", f"{row['姓名']}的{key}是什么？")
        return wordings, text, k.answer(k.values(row[key]))
    if k.rng.random() < 0.5:
        sentence = k("{} is {} years old, lives in {} and works as a {}.", "{}今年{}岁，住在{}，职业是{}。")
        return k("Write this as sentences.", "改写成句子。"), text, k.answer(["\n".join(sentence.format(*row) for row in rows)])
    direct = [json.dumps(data, ensure_ascii=False, indent=indent) for indent in (None, 2)]
    return k("Convert this to JSON.|Write it as a JSON array of objects.", "转换成JSON。|请将下面的资料写成JSON数组。"), text, k.answer(direct)
