"""``cape report``: one self-contained HTML file with the tables, the figures and what they were made from."""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cape
from cape.errors import StoreError
from cape.evaluation.figures import figures, importance, png
from cape.evaluation.run import Evaluation, check_writable, evaluate
from cape.evaluation.table import Table, show
from cape.metamodel.artifact import resolve
from cape.metamodel.fit import fit_table
from cape.metamodel.rows import read_rows
from cape.paths import local_path

if TYPE_CHECKING:
    from cape.metamodel.artifact import MetaModel

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5b6475; --line: #d9dde5; --paper: #ffffff;
  --stripe: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #a2abbb; --line: #39404d; --paper: #161a21; --stripe: #1d222b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
p.note { color: var(--soft); font-size: .88rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr:nth-child(even) td { background: var(--stripe); }
tr.first td { border-top: 2px solid var(--soft); }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; }
"""

CAPTIONS = {
    "predicted_against_true": "Each point is one scored row: a model that the fit behind its prediction had not seen.",
    "errors": "Mean absolute error of every method; the dashed line is what no configuration-only predictor can beat.",
    "residuals": "How far predictions are off, as a factor.",
    "coverage": "Do the intervals keep their promise? Points on the line do.",
    "calibration": "Are predictions right on average? Each point is a tenth of a family's scored rows.",
    "figure_1": "The paper's Figure 1; T* itself falls with the learning rate, so the relative error is drawn too.",
    "distribution": "What there was to predict; read every error beside it.",
    "importance": "What each feature adds to the predicted log T*: XGBoost's own SHAP values and the line's terms; and"
    " how far the whole prediction, surface included, moves when the feature's values are dealt out anew.",
}


def report(
    meta_dir: Any,
    out_html: str | os.PathLike[str],
    model: MetaModel | str | os.PathLike[str] | None = None,
    prediction: Any | None = None,
    *,
    evaluation: Evaluation | None = None,
    title: str = "CAPE: steps to convergence, predicted before training",
) -> Path:
    """Write the HTML report of a meta-dataset.

    Args:
        meta_dir: directory or table of rows, or several. out_html: file to write.
        model: meta-regressor (or its directory) whose card and feature importance are shown; one is fitted where None.
        prediction: a ``Prediction`` (or its ``to_dict()``) to show, as an example of use.
        evaluation: an evaluation that was made already; without, the in-corpus protocol runs now.

    Raises:
        DataError, StoreError: as ``evaluate``, and where the file cannot be written.
    """
    path = local_path(out_html, "A report")
    if path.is_dir():
        raise StoreError(f"{path} is a directory; name the HTML file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)  # before minutes of fitting, as what follows
    check_writable(path.parent)
    if model is not None:
        model = resolve(model)
    rows = read_rows(meta_dir)
    made = evaluation or evaluate(rows, "in-corpus")
    meta_model = fit_table(rows) if model is None else model
    drawn = figures(made)
    drawn["importance"] = importance(meta_model, rows.take(~rows.augmented))
    parts = [f"<h1>{html.escape(title)}</h1>", _facts(rows, made)]
    if prediction is not None:
        facts = prediction if isinstance(prediction, Mapping) else prediction.to_dict()
        parts += ["<h2>A prediction</h2>", _definition(_flat(facts))]
    parts.append(_table(made.tables["main"]))
    parts += [_picture(name, png(figure)) for name, figure in drawn.items()]
    parts += [_table(table) for name, table in made.tables.items() if name != "main"]
    parts += ["<h2>The meta-regressor</h2>", _definition(_card_facts(meta_model))]
    if made.notes:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{html.escape(n)}</li>" for n in made.notes), "</ul>"]
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _facts(rows: Any, made: Evaluation) -> str:
    from cape.evaluation.protocols import PROTOCOLS

    failed, reached = int(rows.failed.sum()), int(rows.reached.sum())
    per_family = ", ".join(f"{f} {int((rows['family'] == f).sum()):,}" for f in rows.families)
    return _definition(
        {
            "rows": f"{len(rows):,} ({per_family})",
            "trials": f"{len(set(rows['trial_id'].tolist())):,}",
            "reached ε": f"{reached:,} rows, {len(rows) - reached - failed:,} censored, {failed:,} of failed trials",
            "datasets": ", ".join(sorted({str(d) for d in rows["dataset"]})),
            "ε": ", ".join(f"{e:g}" for e in sorted(set(rows["epsilon"].tolist()))),
            "protocol": f"{made.protocol}: {PROTOCOLS[made.protocol]}",
            "made by": f"cape {cape.__version__}",
        }
    )


def _card_facts(model: MetaModel) -> dict[str, Any]:
    card, preset = model.card, model.preset
    data = card["data"]
    shape = "one booster per family and a pooled one" if preset.per_family else "one booster for all families"
    return {
        "preset": f"{preset.name}: {preset.trees} trees of depth {preset.depth}, {shape}",
        "features": ", ".join(preset.features),
        "trials": f"{data['trials']:,}, intervals from out-of-fold predictions of {data['calibration_trials']:,}",
        "fingerprint": data["fingerprint"],
        "versions": ", ".join(f"{k} {v}" for k, v in card["versions"].items()),
    }


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in facts.items():
        name = f"{prefix}{key}".replace("_", " ") if not prefix else f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= _flat(value, f"{name}: ")
        elif isinstance(value, (list, tuple)):
            out[name] = "; ".join(_text(v) for v in value) or "none"
        else:
            out[name] = value
    return out


def _text(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "∞"
    return str(value)


def _definition(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(_text(v))}</dd>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _table(table: Table) -> str:
    number = [any(isinstance(r[j], (int, float)) for r in table.rows) for j in range(len(table.columns))]

    def cells(tag: str, values: tuple[Any, ...]) -> str:
        marks = (' class="number"' if n else "" for n in number)
        return "".join(f"<{tag}{m}>{html.escape(show(v))}</{tag}>" for m, v in zip(marks, values, strict=True))

    body, last = [], None
    for row in table.rows:
        start = ' class="first"' if last is not None and row[0] != last else ""
        body.append(f"<tr{start}>{cells('td', row)}</tr>")
        last = row[0]
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    head = f"<tr>{cells('th', table.columns)}</tr>"
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table><thead>{head}</thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def _picture(name: str, data: bytes) -> str:
    caption = CAPTIONS.get(name, "")
    code = base64.b64encode(data).decode()
    title = html.escape(name.replace("_", " ").capitalize())
    image = f'<img alt="{title}" src="data:image/png;base64,{code}">'
    return f'<h2>{title}</h2>\n{image}\n<p class="note">{html.escape(caption)}</p>'
