"""The page: whole, self-contained, true to the numbers, safe with any text."""

from __future__ import annotations

import copy
import html.parser
import re

import pytest

from evaluation import page, plots
from evaluation.comparison import compare
from evaluation.report import print_table, table, write_report

from world import PREFERENCE, make_history, make_world

KEYS = {"welfare": "nash", "preference": PREFERENCE, "versions": {}, "seconds": {"ppo": 12.0}, "draws": 200}


@pytest.fixture(scope="module")
def comparison():
    return compare(*make_world(50), **KEYS)


@pytest.fixture(scope="module")
def written(comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    return write_report(folder, comparison, make_history(10))


class Balance(html.parser.HTMLParser):
    """Fails on a tag closed out of order."""

    VOID = ("meta", "br", "img", "link", "hr")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_page_is_well_formed_and_self_contained(written):
    text = written.read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 6 and all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    assert "<script" not in text and "@import" not in text and "url(" not in text


def test_page_says_that_citizens_are_simulated_before_any_number(written):
    text = written.read_text(encoding="utf-8")
    assert 0 < text.index("Simulated citizens") < text.index("<h1>")


def test_plots_lie_beside_and_no_temporary_file_is_left(written):
    names = sorted(p.name for p in written.parent.iterdir())
    assert names == ["best_of.png", "kl.png", "learning.png", "length.png", "preference.png", "report.html",
                     "win_rates.png"]  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written.parent.glob("*.png"))


def test_same_data_gives_the_same_bytes(written, comparison, tmp_path):
    again = write_report(tmp_path, comparison, make_history(10))
    assert again.read_bytes() == written.read_bytes()


def test_text_of_people_is_escaped(comparison, tmp_path):
    bad = copy.deepcopy(comparison)
    bad["examples"][0]["question"] = "Should <script>alert(1)</script> be free?"
    bad["examples"][0]["opinions"][0] = "<img src=http://evil.example/x>"
    bad["examples"][0]["arms"]["ppo"]["statement"] = '"><b onload=x>'
    text = write_report(tmp_path, bad, []).read_text(encoding="utf-8")
    assert "<script" not in text and "<img src=http" not in text and "<b onload" not in text


def test_example_shows_each_arm_with_every_members_rating(comparison):
    one = comparison["examples"][0]
    text = page.example(one, opened=True)
    assert text.count('class="says"') == 6
    assert text.count('class="pill"') == 6 * len(one["opinions"])
    assert all(f"{entry['mean']:.2f}" in text for entry in one["arms"].values())


def set_pair(comparison, low, value, high):
    other = copy.deepcopy(comparison)
    page.find_pair(other, "ppo", "sft").update(win_rate=value, low=low, high=high)  # type: ignore[attr-defined]
    return page.headline(other)


def test_headline_tells_better_worse_and_undecided(comparison):
    assert "better" in set_pair(comparison, 0.51, 0.6, 0.7)
    assert "worse" in set_pair(comparison, 0.2, 0.3, 0.49)
    assert "cannot be told apart" in set_pair(comparison, 0.45, 0.55, 0.65)
    assert "could not be measured" in set_pair(comparison, None, None, None)


def test_shares_never_round_to_all_or_nothing():
    assert plots.whole(0.996) == "99.6" and plots.whole(1.0) == "100" and plots.whole(0.003) == "0.3"
    assert plots.whole(0.714) == "71" and page.percent(None) == "–"


def test_undefined_values_are_dashes_not_zeros(comparison, tmp_path, capsys):
    bare = copy.deepcopy(comparison)
    for row in bare["arms"].values():
        row["kl"] = None
    bare["preference"] = dict.fromkeys(PREFERENCE)
    text = write_report(tmp_path, bare, []).read_text(encoding="utf-8")
    assert "not measured in this run" in text
    line = next(line for line in table(bare).splitlines() if line.startswith("ppo "))
    assert " – " in line and "0.00" not in line


def test_win_rate_figure_draws_every_key_pair_at_its_value(comparison):
    figure = plots.draw(plots.win_rates, comparison)
    drawn = [float(line.get_xdata()[0]) for line in figure.axes[0].lines if line.get_markersize() == 9
             and line.get_marker() == "o"]  # fmt: skip
    expected = [100 * page.find_pair(comparison, a, b)["win_rate"] for a, b in plots.KEY_PAIRS]
    assert drawn == pytest.approx(expected)


def test_learning_curves_hold_the_log():
    history = make_history(10)
    axes = plots.draw(plots.learning, history).axes[0]
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert curves["gold, held out"] == [row["eval/gold_welfare"] for row in history if "eval/gold_welfare" in row]
    assert len(curves["predicted, training rollouts"]) == 11


def test_empty_log_says_so():
    for make in (plots.learning, plots.divergence, plots.length):
        axes = plots.draw(make, []).axes[0]
        assert [t.get_text() for t in axes.texts] == ["not logged in this run"]


def test_null_log_entries_are_skipped():
    assert plots.series([{"step": 0, "reward": None}, {"step": 1, "reward": 2.0}], "rollout") == ([1], [2.0])


def test_figures_leave_the_callers_style_alone(comparison):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.draw(plots.best_of, comparison)
    assert dict(matplotlib.rcParams) == before


def test_colours_differ_between_arms_and_labels_read_well():
    assert len(set(plots.COLOURS.values())) == 6
    assert plots.label("ppo_best_of_8") == "PPO, best of 8" and plots.kind("ppo_best_of_8") == "ppo_best_of"


def test_terminal_table(comparison, capsys):
    print_table(comparison)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len({len(line) for line in lines[:2]}) == 1 and "simulated citizens" in out
    ppo = comparison["arms"]["ppo"]
    row = next(line.split() for line in lines if line.startswith("ppo "))
    assert row[1:3] == [f"{ppo['mean']:.2f}", f"{ppo['min']:.2f}"]
