"""The pieces of report.html: pure functions from the comparison to HTML. Texts are escaped; nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluation.measures import share_of_ceiling
from evaluation.plots import COLOURS, interval_text, kind, label, whole

STYLE = """
:root { color-scheme: light; --ink:#1f2430; --muted:#5b6472; --rule:#e3e6ea; --paper:#fbfbf9; --card:#fff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: clamp(1.5rem, 4.6vw, 2.2rem); line-height: 1.22; margin: .9rem 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .3rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; }
p { margin: .3rem 0 1rem; max-width: 46rem; } .muted { color: var(--muted); } small { color: var(--muted); }
.simulated { display: inline-block; background: #fff3cf; border: 1px solid #e6cf86; color: #5c4700;
  border-radius: .5rem; padding: .45rem .8rem; font-size: .92rem; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
.card, figure, .example { background: var(--card); border: 1px solid var(--rule); border-radius: .7rem; }
.card { padding: .8rem 1rem; border-top: .25rem solid var(--arm, var(--rule)); }
.card b { display: block; font-size: 1.7rem; line-height: 1.3; } .card span { color: var(--muted); font-size: .9rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  align-items: start; }
figure { margin: 0; padding: 1rem; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-weight: 600; margin-bottom: .5rem; } figcaption small { font-weight: 400; display: block; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: .7rem; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
tr:last-child td, tr:last-child th { border-bottom: 0; } thead th { color: var(--muted); font-weight: 500; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
td small { display: block; font-size: .78rem; }
.dot { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; margin-right: .5rem;
  background: var(--arm); vertical-align: -.05rem; }
.example { padding: 1rem 1.1rem; margin: .8rem 0; } .example summary { cursor: pointer; font-weight: 600; }
.says { border-left: .25rem solid var(--arm); padding: .1rem 0 .1rem .8rem; margin: 1rem 0; }
.says p { margin: .15rem 0 .4rem; }
.pill { display: inline-block; border-radius: .4rem; padding: .1rem .45rem; margin: 0 .3rem .3rem 0;
  font-size: .85rem; font-variant-numeric: tabular-nums; color: var(--ink); }
ol { padding-left: 1.3rem; } ol li { margin: .25rem 0; } dt { font-weight: 600; } dd { margin: 0 0 .5rem; }
code { font-size: .88em; overflow-wrap: anywhere; }
"""


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where undefined."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share as a whole percentage, or a dash."""
    return "–" if value is None else f"{whole(value)} %"


def find_pair(comparison: Mapping[str, Any], a: str, b: str) -> Mapping[str, Any]:
    """The pair row of two arms, given without their number (``sft_best_of``)."""
    return next(r for r in comparison["pairs"] if kind(r["a"]) == a and kind(r["b"]) == b)


def headline(comparison: Mapping[str, Any]) -> str:
    """The finding in one sentence: PPO against SFT, one sample each; says so when it is none."""
    row = find_pair(comparison, "ppo", "sft")
    if row["win_rate"] is None or row["low"] is None:
        return "PPO against SFT could not be measured in this run."
    figures = f"{percent(row['win_rate'])} of {row['n']} held-out deliberations (95 % interval "
    figures += f"{whole(row['low'])} to {whole(row['high'])} %)"
    if row["low"] > 0.5:
        return f"One PPO sample serves its group better than one SFT sample in {figures}."
    if row["high"] < 0.5:
        return f"PPO made statements worse: one sample beats one SFT sample in only {figures}."
    return f"PPO and SFT cannot be told apart: PPO is ahead in {figures}."


def cards(comparison: Mapping[str, Any]) -> str:
    """The comparisons the project promises, as large figures."""
    chosen = (("sft", "base"), ("sft_best_of", "sft"), ("sft_best_of", "best_opinion"), ("ppo", "sft"),
              ("ppo_best_of", "sft_best_of"))  # fmt: skip
    html = []
    for a, b in chosen:
        row = find_pair(comparison, a, b)
        verdict = "no clear difference"
        if row["low"] is not None and row["low"] > 0.5:
            verdict = "clearly ahead"
        elif row["high"] is not None and row["high"] < 0.5:
            verdict = "clearly behind"
        range_ = "–" if row["low"] is None else f"{whole(row['low'])} to {whole(row['high'])} %"
        html.append(
            f'<div class="card" style="--arm:{COLOURS[a]}"><span>{label(row["a"])} over {label(row["b"])}</span>'
            f"<b>{percent(row['win_rate'])}</b><span>{range_}, {verdict}</span></div>"
        )
    return f'<div class="cards">{"".join(html)}</div>'


def dot(arm: str) -> str:
    """The arm's name behind its colour."""
    return f'<span class="dot" style="--arm:{COLOURS[kind(arm)]}"></span>{label(arm)}'


def arms_table(comparison: Mapping[str, Any]) -> str:
    """One row an arm; intervals in small print under each gold mean."""
    names = ("Gold mean", "Gold min", "Quality", "Unanimity", "Predicted", "Words", "KL (nats)")
    bare = comparison["without_voice_penalty"]["arms"]
    rows = []
    for arm, row in comparison["arms"].items():
        low, high = row["intervals"]["mean"]
        cells = [
            f"{number(row['mean'])}<small>{number(low)} to {number(high)}</small>", number(row["min"]),
            number(row["quality"]), percent(row["unanimity"]), number(row["predicted"]), number(row["length"], 1),
            number(row["kl"]), number(bare[arm]["mean"]),
        ]  # fmt: skip
        rows.append(f"<tr><th>{dot(arm)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("Arm", *names, "Mean without voice penalty"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def matrix(comparison: Mapping[str, Any]) -> str:
    """Win rate of every row arm over every column arm, blue ahead and orange behind."""
    arms = list(comparison["arms"])
    rows = {(r["a"], r["b"]): r for r in comparison["pairs"]}
    lines = []
    for a in arms:
        cells = []
        for b in arms:
            if a == b:
                cells.append("<td></td>")
                continue
            share = rows[a, b]["win_rate"]
            tint = "#fff" if share is None else shade(2 * share - 1)
            cells.append(f'<td style="background:{tint}" title="{interval_text(rows[a, b])}">{percent(share)}</td>')
        lines.append(f"<tr><th>{dot(a)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{label(b)}</th>" for b in arms)
    return (
        f'<div class="scroll"><table><thead><tr><th>over →</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def shade(balance: float) -> str:
    """A light tint for -1 (orange) over 0 (near white) to 1 (blue); dark text stays readable on all of them."""
    end = (120, 178, 228) if balance > 0 else (240, 165, 110)
    part = min(1.0, abs(balance))
    return "#" + "".join(f"{round(248 + (c - 248) * part):02x}" for c in end)


def example(one: Mapping[str, Any], *, opened: bool) -> str:
    """A deliberation: opinions, then each arm's statement with every member's gold rating."""
    opinions = "".join(f"<li>{escape(text)}</li>" for text in one["opinions"])
    said = []
    for arm, entry in one["arms"].items():
        pills = "".join(
            f'<span class="pill" style="background:{shade((r - 4) / 3)}">member {i} · {r:.1f}</span>'
            for i, r in enumerate(entry["agreement"], start=1)
        )
        text = escape(entry["statement"]) or "<em>(empty)</em>"
        said.append(
            f'<div class="says" style="--arm:{COLOURS[kind(arm)]}"><b>{label(arm)}</b> <small>gold mean '
            f"{number(entry['mean'])}</small><p>{text}</p>{pills}</div>"
        )
    return (
        f'<details class="example"{" open" if opened else ""}><summary>{escape(one["question"])}</summary>'
        f"<p class=muted>Opinions of the members</p><ol>{opinions}</ol>{''.join(said)}</details>"
    )


def preference_text(figures: Mapping[str, float | None]) -> str:
    """The preference model's numbers in a sentence."""
    accuracy, ceiling = figures["accuracy"], figures["ceiling"]
    if accuracy is None or ceiling is None:
        return "The preference model was not measured in this run."
    way = share_of_ceiling(accuracy, ceiling)
    text = f"It orders {100 * accuracy:.1f} % of a citizen's non-tied pairs as the citizen does. Two noisy ratings of "
    text += f"the same citizen agree on {100 * ceiling:.1f} %: the model goes {100 * way:.0f} % of the way from chance "
    text += "to that ceiling"
    text += ", beyond it because a prediction has no rating noise." if way > 1 else "."
    if figures["correlation"] is not None:
        text += f" Correlation with noise-free gold agreement: {figures['correlation']:.2f}."
    return text


def definitions(comparison: Mapping[str, Any]) -> str:
    """How the numbers are defined, what made them, and what was undefined."""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in comparison["definitions"].items())
    versions = _list(comparison["versions"])
    seconds = _list({stage: f"{value:.0f} s" for stage, value in comparison["seconds"].items()})
    undefined = {label(a): row["undefined"] for a, row in comparison["arms"].items() if row["undefined"]}
    missing = "; ".join(f"{a}: " + ", ".join(f"{k} {n}" for k, n in u.items()) for a, u in undefined.items()) or "none"
    return (
        f"<details class=example><summary>Definitions, versions, times</summary><dl>{items}</dl>"
        f"<p>Undefined values: {escape(missing)}.</p><h3>Versions</h3>{versions}<h3>Seconds by stage</h3>{seconds}"
        f"</details>"
    )


def _list(items: Mapping[str, object]) -> str:
    return "<p>" + "<br>".join(f"{escape(str(k))}: <code>{escape(str(v))}</code>" for k, v in items.items()) + "</p>"


def page(comparison: Mapping[str, Any], plots: Mapping[str, tuple[str, str]], examples: Sequence[str]) -> str:
    """The whole document. ``plots``: name -> (image data URI, alternative text)."""
    facts = (
        f"{comparison['deliberations']} held-out deliberations with {comparison['members']} members; welfare "
        f"{comparison['welfare']}; {comparison['candidates']} candidates a policy; seed {comparison['seed']}"
    )
    warnings = "".join(f"<p><b>Careful:</b> {escape(text)}.</p>" for text in comparison["warnings"])

    def figure(name: str, title: str, note: str) -> str:
        source, alternative = plots[name]
        return (
            f"<figure><figcaption>{title}<small>{note}</small></figcaption>"
            f'<img src="{source}" alt="{escape(alternative)}"></figure>'
        )

    return f"""<!doctype html>
<html lang="en-GB"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which statement would the group endorse?</title><style>{STYLE}</style></head><body><main>
<div class="simulated">Simulated citizens: every rating here comes from a program, and says nothing about people.</div>
<h1>{escape(headline(comparison))}</h1>
<p class="muted">{escape(facts)}.</p>{warnings}
{cards(comparison)}
<h2>The arms</h2>
<p class="muted">Gold ratings from 1 to 7. Unanimity: every member at 5 or above. KL: distance from the SFT policy.</p>
{arms_table(comparison)}
<h2>Who wins against whom</h2>
<p class="muted">By gold mean agreement of the group; ties count one half; the best opinion is the member's own opinion
with the highest gold mean, the strongest human baseline.</p>
<div class="plots">{figure("win_rates", "Win rates", "With 95 % bootstrap intervals over deliberations")}
{figure("best_of", "Best of n", "Gold welfare; bands are 95 % intervals")}</div>
<h3 style="margin-top:1.4rem">All pairs: row over column</h3>{matrix(comparison)}
<h2>How the policy learned</h2>
<div class="plots">{figure("learning", "Welfare", "A widening gap between predicted and gold is over-optimisation")}
{figure("kl", "KL", "Distance from the SFT policy")}{figure("length", "Length", "Of the statements")}</div>
<h2>The preference model</h2><p>{escape(preference_text(comparison["preference"]))}</p>
<div class="plots">{figure("preference", "Pairwise accuracy", "Held-out citizens and topics, noisy ratings")}</div>
<h2>Typical deliberations</h2>
<p class="muted">Not picked: the median, lower and upper quartile by PPO's gold mean.
Pills: each member's gold agreement.</p>
{"".join(examples)}
<h2>Small print</h2>{definitions(comparison)}
</main></body></html>
"""
