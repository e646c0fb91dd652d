"""The report as one self-contained web page: no script, no font, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from turnout.audit.compare import compare
from turnout.audit.device_time import DeviceTime
from turnout.audit.folding import across_phases, fold_layers
from turnout.audit.report import AuditReport, Finding
from turnout.audit.rules import CopyKind
from turnout.audit.svg import COLOURS, before_after, dataflow
from turnout.audit.terminal import summary

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #263238; margin: 2rem auto; max-width: 1280px;
       padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { margin-top: 2.2rem; font-size: 1.2rem }
.quiet { color: #607d8b } .note { background: #fff8e1; padding: .5rem .8rem; border-left: 4px solid #ffb300 }
.error { background: #ffebee; padding: .5rem .8rem; border-left: 4px solid #c62828 }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .25rem .8rem; text-align: left;
        border-bottom: 1px solid #eceff1; vertical-align: top } td.n, th.n { text-align: right }
.tag { color: #fff; border-radius: 4px; padding: .05rem .45rem; font-size: .85em; white-space: nowrap }
.big { font-size: 2.4rem; font-weight: 700 } code { font-size: .88em } details { margin: .3rem 0 }
summary { cursor: pointer; font-weight: 600 } .scroll { overflow-x: auto; border: 1px solid #eceff1 }
.flow text, .chart text { font: 12px system-ui, "DejaVu Sans", sans-serif } .flow .op { font-weight: 600 }
.flow .detail { font-size: 10.5px } .flow .kind { font-weight: 400; font-size: 10.5px; font-style: italic }
.flow .module { font-weight: 600; text-anchor: middle; fill: #37474f } .flow .lane { fill: #f5f7f8 }
.chart .value { fill: #607d8b }
.pair { display: flex; gap: 1rem; align-items: flex-start } .pair > div { flex: 1; min-width: 0 }
.pair svg { width: 100%; height: auto }
"""


def page(report: AuditReport) -> str:
    """A report as HTML text."""
    count = report.redundant_count()
    colour = COLOURS[CopyKind.DTYPE_MISMATCH] if count else COLOURS[CopyKind.FUSABLE]
    calls = ", ".join(f"{p.calls} x {p.name} ({p.operators} operators)" for p in report.phases)
    where = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    body = [
        f"<h1>Copies in {escape(report.target)}</h1>",
        f'<p class="quiet">{escape(calls)}; {escape(where)}</p>',
        f'<p><span class="big" style="color:{colour}">{count}</span> redundant copies</p>',
    ]
    if report.error:
        body.append(f'<p class="error">The program raised {escape(report.error)}; what ran before is reported.</p>')
    body.append(_summary(report))
    if report.picture is not None:
        body.append(_drawing(report))
    if report.device_time is not None:
        body.append(_device_time(report.device_time))
    body.append(_findings(report.findings))
    body += [f'<p class="note">Not seen: {escape(note)}</p>' for note in _notes(report)]
    return _document(f"Copies in {report.target}", body)


def comparison_page(before: AuditReport, after: AuditReport) -> str:
    """Two reports as HTML text: a chart of what changed, then both layers side by side."""
    body = [
        f"<h1>{escape(before.target)}: before and after</h1>",
        f'<p class="quiet">after: {escape(after.target)}</p>',
        f'<p><span class="big">{before.redundant_count()} &rarr; {after.redundant_count()}</span> redundant copies</p>',
        before_after(compare(before, after)),
        '<div class="pair">',
        *(
            f"<div><h2>{name}</h2>{_drawing(r, f'tip-{name.lower()}')}</div>"
            for name, r in (("Before", before), ("After", after))
            if r.picture
        ),
        "</div>",
    ]
    return _document(f"Before and after: {before.target}", body)


def _document(title: str, body: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _tag(kind: CopyKind) -> str:
    return f'<span class="tag" style="background:{COLOURS[kind]}">{kind.value}</span>'


def _summary(report: AuditReport) -> str:
    head, rows = summary(report)
    titles = "".join(f'<th class="n">{escape(name)}</th>' for name in head[1:])
    lines = []
    for kinds, (name, *cells) in rows:
        first = _tag(kinds[0]) if len(kinds) == 1 else f"<b>{escape(name)}</b>"
        lines.append(f"<tr><td>{first}</td>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>")
    return f"<table><tr><th>{head[0]}, per call</th>{titles}</tr>{''.join(lines)}</table>"


def _drawing(report: AuditReport, tip: str = "tip") -> str:
    picture = report.picture
    if picture is None:
        return ""
    legend = " ".join(_tag(kind) for kind in CopyKind if any(node.kind == kind for node in picture.nodes))
    return (
        f"<h2>One layer: {escape(picture.layer)}, from {escape(picture.first)} to {escape(picture.last)}</h2>"
        f"<p>{legend} <span class='quiet'>filled: redundant; dashed: other copies; hover for the evidence</span></p>"
        f'<div class="scroll">{dataflow(picture, tip)}</div>'
    )


def _device_time(times: DeviceTime) -> str:
    rows = []
    for phase in times.phases:
        rows.append(
            f'<tr><th>{escape(phase.name)}</th><td class="n">{phase.copy_calls:g}</td>'
            f'<td class="n">{phase.to_copy_calls:g}</td><td class="n">{phase.copy_us:.1f}</td>'
            f'<td class="n">{phase.share:.1%}</td></tr>'
        )
        rows += [
            f"<tr><td>{escape(' in '.join(filter(None, (row.inside, row.module or 'outside any module'))))}</td>"
            f'<td class="n">{row.calls:g}</td><td></td><td class="n">{row.us:.1f}</td><td></td></tr>'
            for row in phase.modules[:8]
        ]
    head = '<th></th><th class="n">copy_</th><th class="n">_to_copy</th><th class="n">us</th><th class="n">share</th>'
    return f"<h2>Device time ({escape(times.device)}), per forward</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


def _findings(findings: Iterable[Finding]) -> str:
    parts = ["<h2>Findings by layer</h2>"]
    for label, below in fold_layers(tuple(findings)):
        loud = [f for f in below if f.is_redundant or f.kind is CopyKind.HOST]
        if not loud:
            continue
        count = sum(f.count for f in loud)
        rows = "".join(_row(alike) for alike in across_phases(loud))
        parts.append(f"<details><summary>{escape(label)}: {count}</summary><table>{rows}</table></details>")
    return "\n".join(parts)


def _row(alike: list[Finding]) -> str:
    f = alike[0]
    what = f"{f.from_dtype} &rarr; {f.to_dtype}" if f.is_cast else escape(f.op)
    shapes = "; ".join(f"[{', '.join(map(str, each.shape))}] x {each.count} ({escape(each.phase)})" for each in alike)
    return (
        f"<tr><td>{_tag(f.kind)}</td><td>{escape(f.module)}<br><code>{escape(f.source)}</code></td>"
        f"<td>{what}<br><span class='quiet'>{shapes}</span></td>"
        f"<td>{escape(f.evidence)}<br><b>{escape(f.remedy)}</b></td></tr>"
    )


def _notes(report: AuditReport) -> tuple[str, ...]:
    return (*report.notes, *(report.device_time.notes if report.device_time else ()))
