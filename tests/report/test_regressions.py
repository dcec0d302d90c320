"""Old against new: the rule of --versus, the number of rounds of --until, and the comparison of stored speedups.

Rates of claims are those of draws from the recorded A/A runs with a fixed seed. A limit is compared with the 99.9%
interval of the rate, so that it fails by chance in 1 of 1000 changes of the seed.
"""

import csv
import io
import json
import math
import statistics

import numpy as np
import pytest
from conftest import ROOT, refusal, run_program
from scipy import stats

from tunebench.errors import BadInput
from tunebench.record import Record, parse_record
from tunebench.report import resampling
from tunebench.report.compare import compare, render_comparison, welch
from tunebench.report.load import load_records
from tunebench.report.pack import pack
from tunebench.report.page import combined
from tunebench.report.pairing import against_itself, join
from tunebench.report.regressions import Comparison, estimates, exit_code, holm, regressions, render_regressions
from tunebench.report.rounds import versus_of
from tunebench.report.stats import LOOKS, WIDENED, is_narrow, margin_of, rounds_to_tell

DRAWS = 800


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """The A/A runs of tests/data/README.md."""
    return [parse_record(line) for line in (ROOT / "tests" / "data" / "aa.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def rows(records) -> list[list[float]]:
    """The log ratios of the A/A comparisons, by round."""
    return [each.log_ratios for each in against_itself(records)]


@pytest.fixture(scope="module")
def quick() -> list[Record]:
    """Two rounds of four pairs."""
    return [parse_record(line) for line in (ROOT / "tests" / "data" / "quick.jsonl").read_bytes().splitlines()]


def slower(record: Record, factor: float) -> Record:
    """A run whose steps took `factor` times as long."""
    steps = record.steps.model_copy(update={"seconds": [second * factor for second in record.steps.seconds]})
    return record.model_copy(update={"steps": steps})


def as_versus(records: list[Record], rounds: int) -> list[Record]:
    """The first rounds of A/A runs as those of --versus: a is old and b is new, at another commit."""
    found = []
    for record in records:
        out = record.argv[-1].removeprefix("--out=")
        name, number = out.removesuffix(".json").rsplit("-r", 1)
        if int(number) <= rounds:
            name = f"{name.removesuffix('-a').removesuffix('-b')}+{'old' if record.aa == 'a' else 'new'}-r{number}.json"
            argv = [word for word in record.argv[:-1] if not word.startswith("--aa")]
            git = record.git.model_copy(update={"revision": ("1" if record.aa == "a" else "2") * 40})
            found.append(record.model_copy(update={"aa": None, "argv": [*argv, f"--out={name}"], "git": git}))
    assert len(found) == 16 * rounds
    return found


@pytest.fixture(scope="module")
def series(records) -> list[Record]:
    """Six rounds of eight rows of --versus, in which nothing changed."""
    return as_versus(records, 6)


def side(record: Record) -> str:
    return versus_of(record)[2]


def changed(series: list[Record], which, **changes) -> list[Record]:
    """The series with changes of the records that `which` picks."""
    return [record.model_copy(update=changes) if which(record) else record for record in series]


def verdicts(comparisons: list[Comparison]) -> dict[str, int]:
    counts = {
        verdict: [row.verdict for row in comparisons].count(verdict) for verdict in {r.verdict for r in comparisons}
    }
    return dict(sorted(counts.items()))


def test_one_row_alone_is_students_t_test():
    row = [0.01, -0.04, 0.02, -0.05, -0.03, 0.0]
    (alone,) = estimates([row])
    expected = stats.ttest_1samp(row, 0.0)
    assert (alone.p, alone.freedom) == (pytest.approx(expected.pvalue), 5)
    assert [math.log1p(end) for end in alone.interval] == pytest.approx(list(expected.confidence_interval(0.95)))


def test_a_rows_variance_is_joined_with_that_of_the_others():
    rows = [[0.0, 0.02, 0.01, 0.03], [0.0, 0.04, 0.02, 0.06], [0.1, 0.14, 0.11, 0.12]]
    first, second, third = (np.var(row, ddof=1) for row in rows)
    assert first < stats.f(3, 6).ppf(0.95) * (second + third) / 2
    (found, *_) = estimates(rows)
    assert found.freedom == 7
    assert found.error == pytest.approx(math.sqrt((4 * (second + third) / 2 + 3 * first) / 7 / 4))
    # Far noisier than the others: it keeps its own variance.
    noisy = [rows[0], rows[1], [0.5, -0.5, 0.6, -0.4]]
    assert np.var(noisy[2], ddof=1) > stats.f(3, 6).ppf(0.95) * (first + second) / 2
    found = estimates(noisy)[2]
    assert (found.freedom, found.error) == (3, pytest.approx(np.std(noisy[2], ddof=1) / 2))
    # The rows may have different numbers of rounds. Without any noise there is no division by 0.
    assert [each.freedom for each in estimates([rows[0], rows[1][:2]])] == [7, 5]
    assert [each.p for each in estimates([[0.0, 0.0], [0.1, 0.1]])] == [1.0, 0.0]
    assert estimates([]) == []


def test_holms_adjustment():
    """The example of S. Holm's method in R's documentation style: each p times the number of those not smaller."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_few_tables_claim_what_is_not_there(rows):
    """At most 2.5% of tables of 8 rows claim a regression that is none: the rule's 5%, of which half are slower."""
    _, regressed, claimed = resampling.versus(rows, 0.0, DRAWS, 6, 0.03, seed=3)
    assert regressed.limits()[1] < 0.035
    assert regressed.limits()[0] < 0.025
    assert claimed.limits()[0] < 0.05
    # A rule without Holm's adjustment and threshold claims far more: the limit is not out of reach.
    generator = np.random.default_rng(3)
    bare = sum(
        any(each.p < 0.05 for each in estimates([resampling.drawn(generator, row, 6) for row in rows]))
        for _ in range(200)
    )
    assert resampling.Rate(bare, 200).limits()[0] > 0.05


def test_a_slower_row_is_found(rows):
    """10% in about 90% of tables and 5% in about 23% at this recording's noise of 4.8% (benchmarks/resample.py)."""
    tenth, *_ = resampling.versus(rows, -0.1, DRAWS, 6, 0.03, seed=3)
    low, high = tenth.limits()
    assert low < 0.9 < high and low > 0.8
    twentieth, *_ = resampling.versus(rows, -0.05, DRAWS, 6, 0.03, seed=3)
    low, high = twentieth.limits()
    assert low < 0.23 < high and high < 0.35


@pytest.mark.parametrize("target", [0.03, 0.05])
def test_untils_interval_covers_the_truth(rows, target):
    """Of all rows 95% or more, also where rounds stop early."""
    found = [resampling.until(row, target, DRAWS // 2, seed=i) for i, row in enumerate(rows)]
    covered = resampling.Rate(sum(each.covered.happened for each in found), sum(each.covered.draws for each in found))
    assert covered.limits()[0] > 0.95
    assert min(each.covered.limits()[1] for each in found) > 0.93
    assert 4 <= min(each.rounds for each in found) < 12 >= max(each.rounds for each in found)


def test_the_plain_quantile_would_be_too_narrow_for_five_looks():
    """Normal rounds, whose noise puts the target between the looks: the worst case for a rule that looks again."""
    generator = np.random.default_rng(2)
    covered = {0.975: 0, WIDENED: 0}
    for ratios in generator.normal(0, 0.05, size=(4000, LOOKS[-1])):
        for quantile in covered:
            taken = next((look for look in LOOKS if margin_of(ratios[:look], quantile) < 0.05), LOOKS[-1])
            covered[quantile] += abs(ratios[:taken].mean()) <= margin_of(ratios[:taken], quantile)
    plain, widened = (resampling.Rate(count, 4000).limits() for count in covered.values())
    assert plain[1] < 0.95 < widened[1]
    assert widened[0] > 0.93


def test_when_until_has_enough_rounds():
    ratios = [0.02, -0.01, 0.03, 0.0]
    half = stats.t(3).ppf(0.9875) * statistics.stdev(ratios) / 2
    assert is_narrow(ratios, math.expm1(half * 1.001))
    assert not is_narrow(ratios, math.expm1(half * 0.999))
    assert not is_narrow([0.0], 0.5)
    assert is_narrow([0.0, 0.0], 0.001)


def test_rounds_that_would_tell_a_difference():
    """The power that scipy's noncentral t and draws give to so many rounds, and to two fewer."""
    for deviation in (0.02, 0.048, 0.1, 0.4):
        rounds = rounds_to_tell(deviation)
        power = []
        for n in (rounds - 2, rounds):
            limit, shift = stats.t(n - 1).ppf(0.975), math.log(1.05) * math.sqrt(n) / deviation
            power.append(stats.nct(n - 1, shift).sf(limit) + stats.nct(n - 1, shift).cdf(-limit))
        assert rounds % 2 == 0
        assert power[0] < 0.8 <= power[1], deviation
    drawn = np.random.default_rng(1).normal(math.log(1.05), 0.048, size=(2000, rounds_to_tell(0.048)))
    found = resampling.Rate(int((stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).sum()), 2000)
    assert found.share >= 0.77 and found.limits()[0] < 0.86
    assert rounds_to_tell(0.0) == rounds_to_tell(1e-9) == 2
    assert rounds_to_tell(1.0) == pytest.approx((2.8 / math.log(1.05)) ** 2, rel=0.01)
    assert rounds_to_tell(40.0) > 5_000_000  # at once


def test_a_table_says_how_many_rounds_would_do(quick, records):
    for row in join(quick):
        assert row.rounds_for_5 == (None if row.refusal else rounds_to_tell(row.round_noise))
    first = [record for record in quick if record.argv[-1].endswith("-r1.json")]
    assert all(row.rounds_for_5 is None for row in join(first))  # nothing tells the noise
    machine = records[0].hardware.machine
    here = [r.model_copy(update={"hardware": r.hardware.model_copy(update={"machine": machine})}) for r in first]
    known = {row.rounds_for_5 for row in join([*here, *records]) if row.rounds == 1 and row.speedup is not None}
    assert known == {rounds_to_tell(0.0478)}
    assert f"| {known.pop()} " in combined([*here, *records])


def test_rounds_by_until_have_a_wider_interval_and_say_so(quick):
    plain = {row.model + row.method: row for row in join(quick) if row.interval}
    assert plain
    for row in join([record.model_copy(update={"until": 0.5}) for record in quick]):
        if row.interval:
            before = plain[row.model + row.method].interval
            assert row.until == 0.5
            ratio = [math.log1p(b) - math.log1p(a) for a, b in (row.interval, before)]
            assert ratio[0] / ratio[1] == pytest.approx(stats.t(1).ppf(0.9875) / stats.t(1).ppf(0.975))
            reached = is_narrow(row.log_ratios, 0.5)
            assert ("rounds were added until the interval was within ±50%; " in row.note) == reached
            assert ("the interval is not within ±50% after 2 rounds yet; " in row.note) == (not reached)


def test_a_slower_side_is_a_regression(series):
    unchanged = regressions(series)
    assert verdicts(unchanged) == {"none": 8}
    assert exit_code(unchanged) == 0
    assert {row.comparisons for row in unchanged} == {8}

    def is_one(record):
        return record.framework == "torch" and "llama-tiny-full" in record.argv[-1]

    half = [slower(r, 2.0) if is_one(r) and side(r) == "new" else r for r in series]
    found = regressions(half)
    assert verdicts(found) == {"none": 7, "regression": 1}
    assert exit_code(found) == 1
    (row,) = (row for row in found if row.verdict == "regression")
    assert (row.name, row.framework, row.rounds) == ("llama-tiny-full", "torch", 6)
    before = next(each for each in unchanged if (each.name, each.framework) == (row.name, row.framework))
    assert 1 + row.change == pytest.approx((1 + before.change) / 2)
    assert row.new_effective_tokens_per_second / row.old_effective_tokens_per_second == pytest.approx(1 + row.change)
    assert row.interval[0] < row.change < row.interval[1]
    assert verdicts(regressions(half, threshold=0.6)) == {"none": 8}  # smaller than what counts
    faster = regressions([slower(r, 2.0) if is_one(r) and side(r) == "old" else r for r in series])
    assert (verdicts(faster), exit_code(faster)) == ({"improvement": 1, "none": 7}, 0)


def test_what_was_slower_by_a_tenth_was_found():
    """A recorded series of benchmarks/slowed.py, whose best rounds were 1.2 to 1.6 times as fast as its worst ones."""
    lines = (ROOT / "tests" / "data" / "slowed.jsonl").read_bytes().splitlines()
    found = regressions([parse_record(line) for line in lines])
    assert verdicts(found) == {"regression": 4}
    assert exit_code(found) == 1
    for row in found:
        assert row.rounds == 6
        assert row.interval[0] < -0.1 < row.interval[1], "the interval has the true change"
        assert row.adjusted_p < 0.003


def test_what_cannot_be_compared_is_named_with_its_reason(series):
    def of(record, name, framework="torch"):
        return record.framework == framework and name in record.argv[-1]

    steps = changed(series, lambda r: of(r, "bloom-tiny-full") and side(r) == "new", timed_from=9)
    setup = changed(
        steps,
        lambda r: of(r, "bloom-tiny-lora") and side(r) == "new",
        setup=series[0].setup.model_copy(update={"attention": "sdpa"}),
    )
    alone = [r for r in setup if not (of(r, "llama-tiny-full") and side(r) == "old")]
    failed = [
        r.model_copy(update={"status": "failed", "reason": "exit code 2, last line: unrecognized arguments: --head"})
        if of(r, "llama-tiny-lora") and side(r) == "old"
        else r
        for r in alone
    ]
    upgraded = changed(
        failed,
        lambda r: of(r, "bloom-tiny-full", "paddle") and r.argv[-1].endswith("+old-r6.json"),
        versions=series[0].versions | {"paddlenlp": "3.0.0b5"},
    )
    one_round = [r for r in upgraded if not of(r, "bloom-tiny-lora", "paddle") or r.argv[-1].endswith("-r1.json")]
    unequal = [
        r.model_copy(update={"steps": r.steps.model_copy(update={"loss": [x * 1.01 for x in r.steps.loss]})})
        if of(r, "llama-tiny-full", "paddle") and side(r) == "new"
        else r
        for r in one_round
    ]
    found = {(row.name, row.framework): row for row in regressions(unequal)}
    reasons = {key: row.reason for key, row in found.items() if row.verdict == "not comparable"}
    assert reasons["bloom-tiny-full", "torch"] == "not the same work: timed_from: 8 ≠ 9"
    assert reasons["bloom-tiny-lora", "torch"] == "not the same work: setup.attention: eager ≠ sdpa"
    assert reasons["llama-tiny-full", "torch"] == "only the new side ran"
    assert reasons["llama-tiny-lora", "torch"].startswith("the old side ended as failed: exit code 2, last line: unrec")
    assert reasons["bloom-tiny-full", "paddle"].startswith(
        "the runs of the old side differ: versions.paddlenlp: 3.0.0b"
    )
    assert reasons["bloom-tiny-lora", "paddle"].startswith("1 complete round(s), and a test needs two")
    assert reasons["llama-tiny-full", "paddle"].startswith("not the same training: steps.loss of step ")
    assert found["llama-tiny-lora", "paddle"].comparisons == 1
    assert exit_code(list(found.values())) == 2
    printed = render_regressions(unequal, "md")
    assert "1 comparison(s). A regression: p below 0.05 after Holm's adjustment over the 1" in printed
    for (name, framework), reason in reasons.items():
        assert f"not comparable: {name}/{framework}: {reason}" in printed


def test_a_disturbed_row_has_no_verdict_and_what_nobody_offers_does_not_count(series):
    busy = series[0].conditions.model_copy(update={"busy_core_seconds": 1000.0})
    one = series[0]
    found = regressions([one.model_copy(update={"conditions": busy}), *series[1:]])
    (row,) = (row for row in found if row.verdict == "not comparable")
    assert row.reason.startswith(f"disturbed: {one.framework}: others took ")
    assert row.old_effective_tokens_per_second and row.change is None
    unsupported = changed(
        series,
        lambda r: r.framework == "paddle",
        status="unsupported",
        reason="paddle has no such thing",
    )
    found = regressions(unsupported)
    assert verdicts(found) == {"none": 4, "not offered": 4}
    assert exit_code(found) == 0
    assert exit_code([row for row in found if row.verdict == "not offered"]) == exit_code([]) == 2


def test_the_runs_of_versus_stay_out_of_other_tables_and_have_one_in_each_form(series, tmp_path):
    assert join(series) == []
    folder = tmp_path / "results" / "quick" / "versus-older"
    for record in series:
        out = folder / record.argv[-1].removeprefix("--out=").split("/", 2)[2]
        record.model_copy(update={"argv": [*record.argv[:-1], f"--out={out}"]}).write(out)
    command = ["summarize.py", folder]
    printed = run_program(*command, check=True).stdout
    assert "### Old against new: versus-older" in printed
    assert "8 comparison(s)" in printed and "0 regression(s) in 8 comparison(s)." in printed
    assert "Speedup" not in printed
    assert "no records in" in run_program("summarize.py", folder.parent, check=True).stdout  # only where it is named
    by_json = json.loads(run_program(*command, "--format=json", "--threshold=7%", check=True).stdout)
    assert [row["threshold"] for row in by_json] == [0.07] * 8
    lines = list(csv.DictReader(io.StringIO(render_regressions(load_records([folder])[0], "csv"))))
    assert [line["Row"] for line in lines] == [row["name"] for row in by_json]
    assert [line["Change"] for line in lines] == [f"{row['change']:+.1%}" for row in by_json]
    # A copy of the records tells the same.
    copies = pack(folder, tmp_path / "kept", set()).folder
    assert json.loads(render_regressions(load_records([copies])[0], "json", 0.07)) == by_json


def written(records: list[Record], folder) -> None:
    for number, record in enumerate(records):
        record.write(folder / f"{number}.json")


def test_stored_speedups_are_compared_as_advice(quick, tmp_path):
    rows = [row for row in join(quick) if row.compared == "like for like" and row.speedup is not None]
    assert rows
    half = [slower(record, 2.0) if record.framework == "paddle" else record for record in quick]
    found = [row for row in compare(quick, half) if row.change is not None]
    assert len(found) == len(rows)
    for row, before in zip(found, rows, strict=True):
        assert row.change == pytest.approx(-0.5)
        theirs = [ratio + math.log(0.5) for ratio in before.log_ratios]
        expected = stats.ttest_ind(theirs, before.log_ratios, equal_var=False).confidence_interval(0.95)
        assert [math.log1p(end) for end in row.interval] == pytest.approx(list(expected))
    some = [record for record in half if record.model.name != "bloom-tiny" or record.method != "lora"]
    written(quick, tmp_path / "old")
    written(some, tmp_path / "new")
    command = ["summarize.py", "--compare", tmp_path / "old", tmp_path / "new"]
    printed = run_program(*command, check=True).stdout
    assert "ADVICE, no verdict" in printed and "only in OLD" in printed
    by_json, by_csv = (render_comparison(command[2:], form)[0] for form in ("json", "csv"))
    by_json, by_csv = json.loads(by_json), list(csv.DictReader(io.StringIO(by_csv)))
    assert len(by_json) == len(by_csv) == len(found)
    assert [row["reason"] for row in by_json].count("only in OLD") == 1


def test_welchs_interval_is_scipys():
    old, new = [0.1, 0.12, 0.05, 0.07], [0.2, 0.1, 0.3]
    expected = stats.ttest_ind(new, old, equal_var=False).confidence_interval(0.95)
    assert welch(old, new) == pytest.approx(tuple(expected))
    assert welch([0.1, 0.1], [0.2, 0.2]) == pytest.approx((0.1, 0.1))


def test_a_comparison_without_sense_is_refused(quick, series, tmp_path):
    written(quick, tmp_path / "quick")
    (tmp_path / "empty").mkdir()
    written(series[:4], tmp_path / "versus")
    other = quick[0].hardware.model_copy(update={"cpu": "another"})
    written([record.model_copy(update={"hardware": other}) for record in quick], tmp_path / "elsewhere")
    written([record for record in quick if record.framework == "torch"], tmp_path / "torch")
    data = quick[0].plan.model_copy(update={"drawn_from": "0" * 64})
    written([record.model_copy(update={"plan": data}) for record in quick], tmp_path / "data")

    def refused(new: str) -> str:
        with pytest.raises(BadInput) as fault:
            render_comparison([tmp_path / "quick", tmp_path / new], "md")
        return str(fault.value)

    assert "with itself says nothing" in refused("quick")
    assert "has no records" in refused("empty")
    assert "no such file or folder" in refused("none")
    assert "has runs of --versus, old and new; print it by: summarize.py" in refused("versus")
    assert "speedups of different kinds of machines say nothing of the code" in refused("elsewhere")
    assert "can be compared (only in OLD)" in refused("torch")
    assert "can be compared (OLD and NEW are not the same work: plan.drawn_from: " in refused("data")
    line = refusal(run_program("summarize.py", "--compare", tmp_path / "quick", tmp_path / "torch", "--memory"))
    assert "--compare prints a table of its own; leave --memory out" in line
    for arguments, said in (
        (["--threshold=5%"], "--threshold is for runs of run_all.sh --versus, and there are none"),
        (["--threshold=5%", "--memory"], "--threshold is for the table of run_all.sh --versus"),
        (["--docs"], "--docs reads results/measured; leave "),
        (["--pack", ""], "the path is empty"),
        ([""], "the path is empty"),
    ):
        assert said in refusal(run_program("summarize.py", tmp_path / "quick", *arguments))
    line = refusal(run_program("summarize.py", tmp_path / "versus", "--html", tmp_path / "page.html"))
    assert "a page has no runs of --versus" in line and not (tmp_path / "page.html").exists()
    line = refusal(run_program("summarize.py", "--threshold=0.03"))
    assert "0.03 is no share; use one above 0% and below 100%, such as 3%" in line


def test_the_program_that_draws(tmp_path):
    done = run_program("benchmarks/resample.py", "--draws=20", check=True)
    assert "pooled round noise 4.8%; 20 draws each" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 11
    (tmp_path / "few.jsonl").write_bytes(b"")
    assert "two A/A comparisons of 12 rounds" in refusal(
        run_program("benchmarks/resample.py", "--records", tmp_path / "few.jsonl")
    )
