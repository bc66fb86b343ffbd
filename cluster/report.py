"""A run as one HTML page that needs nothing else: curves, a browser of rollouts, the timeline of steps, settings and environment; or two runs' curves.

The numbers are put into the page as JSON, and drawn by `report_page/page.js` with Plotly, whose JavaScript goes into the page too.
"""

from __future__ import annotations

import html
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segmentation_service.palette import davis_palette

from cluster import __version__, status, timeline
from cluster.errors import DataError, UserError
from cluster.metrics import read_metrics
from cluster.report_rollouts import groups_of, short_values
from cluster.run_folder import RunFolder

PAGE = Path(__file__).parent / "report_page"
FILE = "report.html"
TIMELINE_STEPS, TIMELINE_SPANS = 12, 3000


@dataclass(frozen=True)
class Chart:
    """Names of metrics; one that ends with / stands for all that begin so, `!` in front of one leaves it out."""

    title: str
    about: str
    names: tuple[str, ...]
    stacked: bool = False


CHARTS = (
    Chart("Reward", "Mean over the completions of a step, and on the held-out episodes.", ("reward/mean", "reward/std", "eval/reward/mean")),
    Chart("Reward terms, weighted", "What each term adds to the reward before the length penalty.", ("reward/term/weighted_",)),
    Chart("Reward terms", "Each term by itself.", ("reward/term/", "!reward/term/weighted_", "!reward/term/original", "!reward/term/length_penalty")),
    Chart("IoU", "Of the answers' boxes, their masks on the target frame, and the masks through the video (J; held-out also J&F), with the truth.",
          ("iou/", "eval/iou/box", "eval/iou/mask", "eval/iou/video", "eval/j_and_f")),
    Chart("Held-out box IoU by difficulty", "", ("eval/iou/box/",)),
    Chart("Length", "Tokens of a completion, by difficulty, and of its reasoning.", ("length/response", "length/response/", "length/reasoning", "eval/length/response")),
    Chart("Length penalty", "Mean factor, by difficulty; shares of completions that it shortened and that hit the limit.",
          ("length/factor", "length/factor/", "length/penalised_fraction", "length/truncated_fraction")),
    Chart("Difficulty", "", ("difficulty/", "length/uncertainty")),
    Chart("KL to the reference", "Nats a token.", ("kl/reference",)),
    Chart("Mismatch of sampling and learning", "How far the engines' log-probs are from the learner's at the same weights.", ("mismatch/",)),
    Chart("Loss", "", ("learner/loss", "sft/loss", "eval/sft/loss")),
    Chart("Gradient norm", "Before clipping, and of each block.", ("learner/grad_norm", "learner/grad_norm/")),
    Chart("Learning rate", "", ("learner/lr",)),
    Chart("Entropy and clipping", "", ("learner/entropy", "clip/", "learner/tis_capped_fraction")),
    Chart("Groups", "Used, dropped and why; share whose rewards are all equal, which teach nothing.", ("groups/",)),
    Chart("Failures", "Episodes and completions that were left out; share of answers that cannot be parsed.", ("failures/", "answers/invalid_fraction", "sft/answers/invalid_fraction")),
    Chart("Staleness", "Completions by how many updates lie between their sampling and their training.", ("staleness/",), stacked=True),
    Chart("Stages of a step", "Seconds. Stages may overlap, where rollouts are made ahead.", ("seconds/", "!seconds/step"), stacked=True),
    Chart("Speed", "Tokens a second.", ("tokens/per_second", "learner/response_tokens_per_second")),
)


def write_report(folder: RunFolder, out: Path, against: RunFolder | None = None, megabytes: float = 20.0, groups: int = 300, note: Callable[[str], None] = print) -> str:
    """Write the page to `out`, with as many groups of rollouts, up to `groups`, as go into so many megabytes (10^6 bytes) -> what is in it.

    Raises DataError where a run has no metrics yet, or its files cannot be read; UserError where not even the numbers fit.
    """
    runs = [_run(f) for f in ([folder] if against is None else [folder, against])]
    data = {
        "runs": runs, "charts": _charts([run.pop("records") for run in runs]), "timeline": _timeline(folder.path / timeline.FILE), "groups": [],
        "differences": _differences(runs) if against else [], "colours": _colours(8), "tokens": False,
    }
    tokenizer = _tokenizer(folder, note)
    data["tokens"] = tokenizer is not None
    rest = int(megabytes * 1e6) - len(_page(data).encode())
    if rest < 0:
        raise UserError(f"without any rollout the page has {megabytes - rest / 1e6:.1f} MB already", f"give --megabytes of at least {megabytes - rest / 1e6 + 1:.0f}")
    seen = 0
    for seen, group in enumerate(groups_of(folder.rollouts, tokenizer), 1):
        size = len(_json(group).encode()) + 2
        if size > rest or len(data["groups"]) == groups:
            break
        data["groups"].append(group)
        rest -= size
        if not len(data["groups"]) % 50:
            note(f"{len(data['groups'])} groups of rollouts")
    data["groups"].sort(key=lambda g: (g["step"], g["group"]))
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(_page(data), encoding="utf-8")
    os.replace(partial, out)
    return f"{out}: {runs[0]['steps']} steps, {len(data['groups'])} groups of rollouts, {out.stat().st_size / 1e6:.1f} MB"


def _run(folder: RunFolder) -> dict[str, Any]:
    records = read_metrics(folder.metrics) if folder.metrics.exists() else []
    if not records:
        raise DataError(f"{folder.path} has no metrics yet", "wait for its first step")
    config = folder.config.read_text(encoding="utf-8")
    resumes = folder.path / "resumes.jsonl"
    return {
        "name": folder.name, "records": records, "steps": max(r["step"] for r in records), "state": status.look(folder, time.time())["state"],
        "config": config, "environment": json.loads(folder.environment.read_text(encoding="utf-8")),
        "resumes": [json.loads(line) for line in resumes.read_text(encoding="utf-8").splitlines()] if resumes.exists() else [],
    }


def _charts(records: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each chart with the series that the runs have: of every run one of each name. Then every other number, one chart each, for the page to offer."""
    columns = [_columns(of_run) for of_run in records]
    known = list(dict.fromkeys(name for of_run in columns for name in of_run))
    charts, used = [], set()
    for chart in CHARTS:
        names = [n for n in known if _matches(n, chart.names)]
        used |= set(names)
        if names:
            charts.append({"title": chart.title, "about": chart.about, "stacked": chart.stacked, "series": _series(columns, names), "other": False})
    others = [n for n in sorted(known) if n not in used]
    return charts + [{"title": n, "about": "", "stacked": False, "series": _series(columns, [n]), "other": True} for n in others]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    found = False
    for pattern in patterns:
        wanted = pattern.lstrip("!")
        if name == wanted or wanted[-1] in "/_" and name.startswith(wanted):
            found = not pattern.startswith("!")
            if not found:
                return False
    return found


def _columns(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric -> step -> value; of a step that was written twice, as after a resume, the last."""
    columns: dict[str, dict[int, float]] = {}
    for record in map(short_values, records):
        for name, value in record.items():
            if name not in ("step", "time") and value is not None:
                columns.setdefault(name, {})[record["step"]] = value
    return columns


def _series(columns: Sequence[Mapping[str, Mapping[int, float]]], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "run": run, "x": sorted(of_run[name]), "y": [of_run[name][step] for step in sorted(of_run[name])]}
        for name in names for run, of_run in enumerate(columns) if name in of_run
    ]  # fmt: skip


def _timeline(file: Path) -> list[dict[str, Any]]:
    """Some steps, evenly: for each its spans, (track, name, begin in seconds, seconds, details)."""
    spans = timeline.spans(file)
    ends = sorted(s.end for s in spans if (s.track, s.name) == ("loop", "train"))
    if not ends:
        return []
    firsts = [min(s.begin for s in spans), *ends]
    count = len(ends)
    steps = sorted({round(i * (count - 1) / max(1, min(count, TIMELINE_STEPS) - 1)) for i in range(min(count, TIMELINE_STEPS))})
    chosen = []
    for n in steps:
        begin, end = firsts[n], firsts[n + 1]
        inside = sorted((s for s in spans if s.end > begin and s.begin < end), key=lambda s: s.begin)[:TIMELINE_SPANS]
        step = next((s.details.get("version", n) + 1 for s in inside if (s.track, s.name) == ("loop", "train") and s.end == end), n + 1)
        clipped = [(s, max(s.begin, begin), min(s.end, end)) for s in inside]
        rows = [[s.track, s.name, round(a - begin, 4), round(b - a, 4), json.dumps(s.details) if s.details else ""] for s, a, b in clipped]
        chosen.append({"step": step, "seconds": round(end - begin, 3), "spans": rows})
    return chosen


def _differences(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """(setting, value in the first run, value in the second), of those that differ."""
    first, second = (dict(_flat(yaml.safe_load(run["config"]))) for run in runs)
    show = lambda values, key: json.dumps(values[key]) if key in values else "-"
    return [[key, show(first, key), show(second, key)] for key in [*first, *(k for k in second if k not in first)] if first.get(key) != second.get(key)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _tokenizer(folder: RunFolder, note: Callable[[str], None]) -> Any | None:
    """That of the run's policy, if it is still there and there are rollouts to read."""
    if not any(folder.rollouts.glob("*.parquet")):
        return None
    from transformers import AutoTokenizer

    from cluster import paths

    path = yaml.safe_load(folder.config.read_text(encoding="utf-8"))["policy"]["path"]
    try:
        return AutoTokenizer.from_pretrained(paths.resolve_path(path, "policy.path", allow_hub=True))
    except (OSError, ValueError, UserError) as error:
        note(f"the tokens' log-probs are left out: the tokenizer of {path} cannot be read ({str(error).splitlines()[0]})")
        return None


def _colours(count: int) -> list[str]:
    palette = davis_palette()
    return [f"rgb({palette[3 * n]},{palette[3 * n + 1]},{palette[3 * n + 2]})" for n in range(1, count + 1)]


def _json(values: Any) -> str:
    """For a script element, which ends at its first `</script`, whatever that stands in."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _page(data: Mapping[str, Any]) -> str:
    from plotly.offline import get_plotlyjs

    parts = {
        "{{TITLE}}": html.escape(" and ".join(run["name"] for run in data["runs"])), "{{VERSION}}": __version__, "{{CSS}}": (PAGE / "page.css").read_text(encoding="utf-8"),
        "{{PLOTLY}}": get_plotlyjs().replace("</script", "<\\/script"), "{{JS}}": (PAGE / "page.js").read_text(encoding="utf-8"), "{{DATA}}": _json(data),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    pieces = []
    while page:  # piece by piece, so that nothing in a value is taken for a place
        place = min(((page.find(mark), mark) for mark in parts if mark in page), default=(len(page), ""))
        pieces += [page[: place[0]], parts.get(place[1], "")]
        page = page[place[0] + len(place[1]) :]
    return "".join(pieces)
