"""What a report computes, against numbers worked out beside it."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path

import numpy as np
import pytest

from phd_megatron.errors import UserError
from phd_megatron.sweep import scaling
from phd_megatron.sweep.compare import reach_rows, read_named, rows_at, write_comparison
from phd_megatron.sweep.curves import Curve, read_curve, smooth
from phd_megatron.sweep.document import Figure, Heading, Table, Text, markdown, page
from phd_megatron.sweep.experts import load_entropy
from phd_megatron.sweep.figures import draw_experts, draw_losses, draw_scaling
from phd_megatron.sweep.scaling import Fit, fit_law
from phd_megatron.sweep.statistics import Difference, Result, baseline_of, make_groups, paired, paired_over
from phd_megatron.sweep.store import Entry, State


def metrics(
    path: Path, losses: list[float], seconds: float = 2.0, flops: float = 100.0, validation: float | None = None
) -> Path:
    """Every second iteration is logged; 10 tokens an iteration."""
    lines = [
        {
            "iteration": 2 * index,
            "consumed_samples": 2 * index,
            "consumed_tokens": 20 * index,
            "consumed_flops": flops * index,
            "lm_loss": loss,
            "iteration_seconds": seconds,
            "validation_loss": validation if index == len(losses) else None,
        }
        for index, loss in enumerate(losses, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def curve(tmp_path: Path, losses: list[float], name: str = "a", **options) -> Curve:
    return read_curve(name, metrics(tmp_path / f"{name}.jsonl", losses, **options))


# ---------------------------------------------------------------- curves


def test_curve_axes_and_interpolation(tmp_path: Path) -> None:
    a = curve(tmp_path, [4.0, 3.0, 2.5])
    assert a.tokens == [20, 40, 60]
    assert a.seconds == [4.0, 8.0, 12.0]
    assert a.at("tokens", 30) == 3.5
    assert a.at("flops", 100) == 4.0
    assert a.at("seconds", 12) == 2.5
    assert a.at("tokens", 10) is None
    assert a.at("tokens", 61) is None
    assert a.reaches("flops", 3.0) == 200
    assert a.reaches("flops", 2.0) is None
    assert a.final() == (2.5, "training (EMA)")
    assert curve(tmp_path, [4.0, 3.0], validation=3.5).final() == (3.5, "validation")


def test_a_validation_before_the_end_is_not_the_final_loss(tmp_path: Path) -> None:
    path = metrics(tmp_path / "a.jsonl", [4.0, 3.0, 2.5])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["validation_loss"] = 1.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_curve("a", path)
    assert (found.validation, found.final()) == ([(1, 1.5)], (2.5, "training (EMA)"))


def test_smoothing_keeps_short_curves_and_constants() -> None:
    assert smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    assert smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    noisy = [2.0 + (-1) ** i * 0.5 for i in range(500)]
    assert max(abs(value - 2.0) for value in smooth(noisy)[200:]) < 0.06
    assert smooth([]) == []


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    assert curve(tmp_path, [4.0, math.nan, 3.0]).seconds == [4.0, 12.0]
    with pytest.raises(UserError, match="no finite loss"):
        curve(tmp_path, [math.inf])


def test_files_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text(json.dumps({"iteration": 1, "consumed_samples": 1, "lm_loss": 1.0}) + "\n")
    with pytest.raises(UserError, match="older version"):
        read_curve("old", old)
    with pytest.raises(UserError, match="No such file"):
        read_curve("x", tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        read_named(str(tmp_path))


# ---------------------------------------------------------------- statistics


def result(tmp_path: Path, final: float, state: str = "finished", **axes: str) -> Result:
    name = "-".join(axes.values())
    entry = Entry(name, axes, 6, 6, 10, {"non_embedding_parameters": 1e6})
    return Result(entry, state, curve(tmp_path, [4.0, 3.0, final], name))  # type: ignore[arg-type]


def test_groups_pairs_and_intervals(tmp_path: Path) -> None:
    finals = {"pre": {"1": 2.50, "2": 2.60, "3": 2.55}, "hybrid": {"1": 2.30, "2": 2.42, "3": 2.34}}
    results = [
        result(tmp_path, final, scheme=scheme, seed=seed) for scheme, by in finals.items() for seed, final in by.items()
    ]
    results.append(result(tmp_path, 9.0, "diverged", scheme="hybrid", seed="4"))
    pre, hybrid = groups = make_groups(results)
    assert pre.mean == pytest.approx(2.55)
    assert pre.spread == pytest.approx(0.05)
    assert baseline_of(hybrid, groups, {"scheme": "pre"}) is pre
    assert baseline_of(pre, groups, {"scheme": "pre"}) is None
    difference = paired(hybrid, pre)
    assert difference is not None
    # differences -0.20, -0.18, -0.21: mean -0.196667, standard deviation 0.0152753, t(0.975, 2) = 4.302653
    assert difference.pairs == 3
    assert difference.mean == pytest.approx(-0.1966667, abs=1e-6)
    half = 4.302653 * 0.0152753 / math.sqrt(3)
    assert difference.interval == pytest.approx((-0.1966667 - half, -0.1966667 + half), abs=1e-5)
    assert difference.verdict == "lower"


def test_a_family_is_compared_by_its_means_over_sizes(tmp_path: Path) -> None:
    finals = {("pre", "s"): (3.0, 3.2), ("pre", "l"): (2.0, 2.1), ("hyb", "s"): (2.8, 3.0), ("hyb", "l"): (1.9, 1.9)}
    results = [
        result(tmp_path, final, scheme=scheme, size=size, seed=str(seed))
        for (scheme, size), by_seed in finals.items()
        for seed, final in enumerate(by_seed)
    ]
    small, large, other_small, other_large = make_groups(results)
    difference = paired_over([(other_small, small), (other_large, large)])
    assert difference is not None
    # means over sizes: 2.35 and 2.45 against 2.5 and 2.65, so -0.15 and -0.20 by seed
    assert (difference.pairs, difference.mean) == (2, pytest.approx(-0.175))
    assert difference.spread == pytest.approx(0.15 / math.sqrt(2))
    other_large.results.pop("1")
    one = paired_over([(other_small, small), (other_large, large)])
    assert one is not None
    assert (one.pairs, one.interval) == (1, None)


def test_final_losses_are_those_of_finished_members(tmp_path: Path) -> None:
    """Every other state is told of and counted nowhere: the loss of half a schedule is not that of a whole one."""
    for state in typing.get_args(State):
        members = [result(tmp_path, 2.5, s="a", seed="1"), result(tmp_path, 1.0, state, s="a", seed="2")]
        (group,) = make_groups(members)
        assert [member.final for member in group.results.values()] == [2.5, 1.0]
        assert group.finals == ([2.5, 1.0] if state == "finished" else [2.5]), state
        assert group.mean == (1.75 if state == "finished" else 2.5)
        assert (group.spread is None) == (state != "finished")
        (other,) = make_groups([result(tmp_path, 3.0, s="b", seed=seed) for seed in ("1", "2")])
        for pair in (paired(group, other), paired_over([(group, other)]), paired(other, group)):
            assert pair is not None and pair.pairs == (2 if state == "finished" else 1)
    (lone,) = make_groups([result(tmp_path, 2.5, "stopped", s="a", seed="1")])
    assert (lone.finals, lone.mean, lone.spread) == ([], None, None)


def test_difference_of_two_seeds_by_hand(tmp_path: Path) -> None:
    a, b = (
        make_groups([result(tmp_path, loss, s=name, seed=str(i)) for i, loss in enumerate(losses)])[0]
        for name, losses in (("a", (2.0, 2.4)), ("b", (2.5, 2.7)))
    )
    found = paired(a, b)
    # -0.5 and -0.3: mean -0.4, standard deviation 0.2/sqrt(2), over sqrt(2) 0.1; t(0.975, 1) = 12.70620
    assert found is not None and found.interval is not None
    assert found.mean == pytest.approx(-0.4)
    assert found.interval == pytest.approx((-0.4 - 1.270620, -0.4 + 1.270620), abs=1e-6)
    assert found.spread == pytest.approx(0.4 / math.sqrt(2))  # that of a, the larger of the two
    assert paired(a, b, lambda mine, other: (1.0, 3.0) if mine.seed == "1" else None) == Difference(1, -2.0, None, None)


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (Difference(1, -1.0, None, None), "one seed: no statement"),
        (Difference(3, -0.1, (-0.2, 0.01), 0.01), "not separated from the seeds' spread"),
        (Difference(3, -0.1, (-0.12, -0.08), 0.2), "not separated from the seeds' spread"),
        (Difference(3, 0.1, (0.08, 0.12), 0.02), "higher"),
        (Difference(3, -0.1, (-0.12, -0.08), 0.02), "lower"),
        (Difference(3, 0.1, (-0.01, 0.2), 0.02), "not separated from the seeds' spread"),
        (Difference(3, 0.1, (0.0, 0.2), 0.02), "not separated from the seeds' spread"),
        (Difference(3, 0.1, (0.08, 0.12), 0.1), "not separated from the seeds' spread"),
    ],
)
def test_an_ordering_needs_more_than_the_seeds_spread(difference: Difference, verdict: str) -> None:
    assert difference.verdict == verdict


def test_one_seed_has_no_interval_and_no_pair_no_difference(tmp_path: Path) -> None:
    pre, other = make_groups([result(tmp_path, 2.5, s="pre", seed="1"), result(tmp_path, 2.4, s="x", seed="1")])
    assert paired(other, pre) == Difference(1, pytest.approx(-0.1), None, None)
    lone, wrong = make_groups([result(tmp_path, 2.5, s="pre", seed="1"), result(tmp_path, 2.4, s="x", seed="2")])
    assert paired(wrong, lone) is None


# ---------------------------------------------------------------- scaling laws


def test_laws_are_found_again() -> None:
    sizes = [1e6, 3e6, 1e7, 3e7, 1e8, 3e8]
    losses = [1.7 + 40 * n**-0.2 for n in sizes]
    fit = fit_law(sizes, [1e9] * 6, losses)
    assert isinstance(fit, Fit)
    assert fit.formula == "E + A N^-alpha"
    found = {name: estimate.value for name, estimate in fit.estimates.items()}
    assert found == pytest.approx({"E": 1.7, "A": 40, "alpha": 0.2}, rel=1e-3)
    assert max(map(abs, fit.residuals)) < 1e-6
    assert fit.predict(1e9) == pytest.approx(1.7 + 40 * 1e9**-0.2, rel=1e-3)
    assert fit.freedom == 3


def test_intervals_hold_the_truth_and_grow_with_noise() -> None:
    sizes = [n for n in (1e6, 2e6, 4e6, 8e6, 1.6e7, 3.2e7, 6.4e7) for _ in range(3)]

    def widths(noise: float) -> float:
        losses = [(1.7 + 40 * n**-0.2) * (1 + noise * ((7 * i) % 5 - 2)) for i, n in enumerate(sizes)]
        fit = fit_law(sizes, [1e9] * len(sizes), losses)
        assert isinstance(fit, Fit)
        interval = fit.estimates["alpha"].interval
        assert interval is not None
        assert interval[0] < 0.2 < interval[1]
        return interval[1] - interval[0]

    assert widths(0.001) < 0.5 * widths(0.005)


NOISE = [0.011, -0.007, 0.004, -0.012, 0.006, 0.009, -0.003, -0.008, 0.002, 0.010, -0.005, 0.001]


def test_interval_of_a_power_law_is_that_of_a_straight_line() -> None:
    """log L = log A - alpha log N: numpy's covariance of a line, and the formula of the slope's variance."""
    sizes = [n for n in (1e6, 1e7, 1e8) for _ in range(4)]
    losses = [40 * n**-0.2 * math.exp(noise) for n, noise in zip(sizes, NOISE, strict=True)]
    fit = fit_law(sizes, [1e9] * 12, losses)
    assert isinstance(fit, Fit)
    assert (fit.formula, fit.freedom) == ("A N^-alpha", 10)
    x, y = np.log(sizes), np.log(losses)
    (slope, _), unscaled = np.polyfit(x, y, 1, cov="unscaled")
    rest = y - np.polyval(np.polyfit(x, y, 1), x)
    variance = float(rest @ rest) / (12 - 2)
    half = 2.228139 * math.sqrt(unscaled[0, 0] * variance)  # t(0.975, 10) = 2.228139
    # The sizes are four times -1, 0 and 1 decades from their middle: the sum of squares is 8 (ln 10)^2.
    assert unscaled[0, 0] == pytest.approx(1 / (8 * math.log(10) ** 2))
    alpha = fit.estimates["alpha"]
    assert alpha.interval is not None
    assert alpha.value == pytest.approx(-slope, abs=1e-7)
    assert (alpha.interval[1] - alpha.interval[0]) / 2 == pytest.approx(half, rel=1e-4)
    assert sum(alpha.interval) / 2 == pytest.approx(alpha.value)
    assert fit.estimates["A"].value == pytest.approx(math.exp(y.mean() - slope * x.mean()), rel=1e-5)
    assert fit.estimates["A"].interval is None
    assert fit.residuals == pytest.approx(np.exp(rest) - 1, abs=1e-7)
    assert fit.predict(1e9) == pytest.approx(math.exp(np.polyval(np.polyfit(x, y, 1), math.log(1e9))), rel=1e-5)


def test_intervals_of_a_law_with_an_offset_are_those_of_its_linearisation() -> None:
    """The Jacobian by hand: log(E + A n^-alpha) by log E, log A and alpha, at the fitted values."""
    sizes = np.array([n for n in (1e6, 3e6, 1e7, 1e8) for _ in range(3)])
    losses = (1.7 + 40 * sizes**-0.2) * np.exp(np.array(NOISE) / 10)
    fit = fit_law(sizes.tolist(), [1e9] * 12, losses.tolist())
    assert isinstance(fit, Fit)
    e, a, alpha = (fit.estimates[name].value for name in ("E", "A", "alpha"))
    power = a * sizes**-alpha
    rest = np.log(losses) - np.log(e + power)
    jacobian = np.stack([np.full(12, e), power, -power * np.log(sizes)], 1) / (e + power)[:, None]
    assert abs(jacobian.T @ rest).max() < 1e-5, "these are the least squares"
    covariance = np.linalg.inv(jacobian.T @ jacobian) * float(rest @ rest) / (12 - 3)
    half = 2.262157 * np.sqrt(np.diag(covariance))  # t(0.975, 9) = 2.262157
    interval, offset = fit.estimates["alpha"].interval, fit.estimates["E"].interval
    assert interval is not None and offset is not None
    assert interval == pytest.approx((alpha - half[2], alpha + half[2]), rel=1e-3)
    assert offset == pytest.approx((e * math.exp(-half[0]), e * math.exp(half[0])), rel=1e-3)


def test_as_many_points_as_parameters_have_no_interval() -> None:
    fit = fit_law([1e6, 3e6, 1e7, 3e7], [1e9] * 4, [1.7 + 40 * n**-0.2 for n in (1e6, 3e6, 1e7, 3e7)])
    assert isinstance(fit, Fit) and fit.freedom == 1
    three = fit_law([1e6, 1e7, 1e8], [1e9] * 3, [40 * n**-0.2 for n in (1e6, 1e7, 1e8)])
    assert isinstance(three, Fit) and three.freedom == 1
    assert three.estimates["alpha"].value == pytest.approx(0.2)
    assert scaling._half_widths(np.eye(2), 1.0, 0, 12.7) is None
    assert scaling._half_widths(np.ones((4, 2)), 1.0, 2, 4.3) is None, "two parameters that cannot be told apart"


def test_law_in_sizes_and_tokens() -> None:
    points = [(n, d) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)]
    losses = [1.6 + 30 * n**-0.25 + 90 * d**-0.3 for n, d in points]
    fit = fit_law([n for n, _ in points], [d for _, d in points], losses)
    assert isinstance(fit, Fit)
    assert fit.estimates["alpha"].value == pytest.approx(0.25, rel=0.02)
    assert fit.estimates["beta"].value == pytest.approx(0.3, rel=0.02)
    assert fit.predict(1e7, 1e9) == pytest.approx(losses[4], rel=1e-3)
    found = {name: estimate.value for name, estimate in fit.estimates.items()}
    assert found == pytest.approx({"E": 1.6, "A": 30, "alpha": 0.25, "B": 90, "beta": 0.3}, rel=0.02)
    assert fit.formula == "E + A N^-alpha + B D^-beta" and fit.freedom == 4


def test_too_few_points_make_no_law() -> None:
    assert "needs three" in str(fit_law([1e6, 1e7], [1, 1], [3, 2]))
    three = fit_law([1e6, 1e7, 1e8], [1, 1, 1], [3.0, 2.5, 2.2])
    assert isinstance(three, Fit)
    assert set(three.estimates) == {"A", "alpha"}
    assert "five parameters" in str(fit_law([1e6, 1e7, 1e8], [1, 1, 2], [3.0, 2.5, 2.2]))


# ---------------------------------------------------------------- experts, documents, comparison


def test_load_entropy() -> None:
    assert load_entropy([5, 5, 5, 5]) == pytest.approx(1.0)
    assert load_entropy([7, 0, 0]) == 0.0
    assert load_entropy([1, 3]) == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))


def test_documents_hold_everything(tmp_path: Path) -> None:
    draw_experts({"a": ([1.0, 2.0], [0.9, 1.0])}, tmp_path, "f", "entropy")
    blocks = [Heading("H"), Text("a < b"), Table(["x", "y"], [["a|b", "1"]]), Figure("f", "caption")]
    assert markdown("T", blocks) == (
        "# T\n\n## H\n\na < b\n\n| x | y |\n| --- | ---: |\n| a\\|b | 1 |\n\n![caption](f.png)\n"
    )
    text = page("T", blocks, tmp_path)
    assert "a &lt; b" in text
    assert "data:image/svg+xml;base64," in text
    assert "f.svg" not in text


def test_figures_are_the_same_each_time(tmp_path: Path) -> None:
    fit = fit_law([1e6, 1e7, 1e8], [1, 1, 1], [3.0, 2.5, 2.2])
    assert isinstance(fit, Fit)
    for folder in ("one", "two"):
        draw_losses({"s": {"a": [curve(tmp_path, [4.0, 3.0])]}}, tmp_path / folder, "losses", "nats")
        draw_scaling([("a", [1e6, 1e7, 1e8], [1, 1, 1], [3.0, 2.5, 2.2], fit)], tmp_path / folder, "scaling", "nats")
    for name in ("losses.svg", "scaling.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_comparison_at_equal_costs(tmp_path: Path) -> None:
    a = curve(tmp_path, [4.0, 3.0, 2.0], "a")
    b = curve(tmp_path, [3.0, 2.0], "b", flops=200.0, seconds=4.0)
    assert rows_at(a, b, "tokens")[-1] == ["original tokens", "40", "3.0000", "2.0000", "-1.0000"]
    assert rows_at(a, b, "flops")[-1] == ["FLOPs", "300", "2.0000", "2.5000", "+0.5000"]
    assert rows_at(a, b, "seconds")[-1] == ["training seconds", "12", "2.0000", "2.5000", "+0.5000"]
    assert reach_rows(a, b)[0] == ["original tokens", "60", "40", "0.667"]
    with pytest.raises(UserError, match="both runs are called 'a'"):
        write_comparison(a, a, tmp_path, "nats")
