"""The wandb workspace of our runs, for scripts/dashboard.py: a panel for every metric of metrics.toml, by section."""

import json
from collections.abc import Collection
from typing import Any

from wandb_workspaces import workspaces as ws
from wandb_workspaces.reports import v2 as wr

from trainers.metrics import Panel, all_panels

TABLES = {"Samples": ("samples", "eval/samples")}
"""By section: the tables that it shows beside its panels."""
COLUMNS, ROWS = 3, 2  # of panels that a section shows at once


def workspace(
    entity: str, project: str, name: str, logged: Collection[str], tables: Collection[str] = ()
) -> ws.Workspace:
    """All panels of which at least one metric is logged, over the axis `step`; nothing is sent.

    A panel of a family of metrics, such as one a rank, finds them by a pattern: it shows as many as a run has.

    Args:
        entity: user or team on wandb.
        project: there.
        name: of the workspace.
        logged: names of metrics; panels that would stay empty are left out.
        tables: those of `TABLES` that were logged.
    """
    sections = []
    for section in dict.fromkeys(panel.section for panel in all_panels()):
        shown: list = [line_plot(panel) for panel in all_panels() if panel.section == section and panel.names(logged)]
        shown += [wr.WeavePanelSummaryTable(table_name=table) for table in TABLES.get(section, ()) if table in tables]
        if shown:
            layout = ws.SectionLayoutSettings(columns=COLUMNS, rows=ROWS)
            sections.append(ws.Section(name=section, panels=shown, is_open=True, layout_settings=layout))
    settings = ws.WorkspaceSettings(x_axis="step", sort_panels_alphabetically=False)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def line_plot(panel: Panel) -> wr.LinePlot:
    """One panel of ours as one of wandb's.

    >>> from trainers.metrics import panel_of
    >>> line_plot(panel_of("rank/0/cpu_s")).metric_regex
    '^(rank/\\\\d+/cpu_s)$'
    >>> line_plot(panel_of("train/entropy")).y
    ['train/entropy']
    """
    family = any(metric.is_family for metric in panel.metrics)
    return wr.LinePlot(
        title=panel.title,
        x="step",
        y=[] if family else [metric.name for metric in panel.metrics],
        metric_regex=f"^({'|'.join(metric.pattern for metric in panel.metrics)})$" if family else None,
        title_x="step",
        title_y="" if panel.unit == "-" else panel.unit,
        plot_type="stacked-area" if panel.stacked else "line",
    )


def specification(made: ws.Workspace) -> dict[str, Any]:
    """What wandb would be sent to save it, as JSON-ready data."""
    view = made._to_model()  # `save` sends this model's spec, and there is no other way to see it
    return json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
