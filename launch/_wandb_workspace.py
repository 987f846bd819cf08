"""The panels of a W&B project as a definition, so that everybody in a team sees the same.

Names are those of the metrics (trainer/telemetry.py, moe/bias_hook.py, reweighting/hook.py); a regular expression
stands where their number depends on the run.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from trainer.phases import PHASES

NAME = "Evenkeel"
_HEAT_MAPS = ("moe/loads", "moe/bias")


def workspace(entity: str, project: str, *, group: str = "", name: str = NAME) -> Any:
    """A workspace of wandb-workspaces; `group`: show the runs of one group only, an ablation's for instance."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=panels, is_open=True, layout_settings=ws.SectionLayoutSettings(rows=3))
            for title, panels in _sections()
        ],
        settings=ws.WorkspaceSettings(x_axis="step", smoothing_type="exponential", smoothing_weight=0),
        runset_settings=ws.RunsetSettings(filters=[_is_group(group)] if group else []),
    )


def definition(space: Any) -> str:
    """The workspace as the JSON that W&B stores."""
    view = space._to_model()  # what `save` sends; there is no public name for it
    found = json.loads(view.model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps(found, indent=1) + "\n"


def save(space: Any) -> str:
    """Create the workspace on the server; returns its address. Raises what the server or the network raises."""
    return str(space.save().url)


def _is_group(group: str) -> Any:
    from wandb_workspaces import expr

    return expr.Metric("Group") == group


def _sections() -> Sequence[tuple[str, list[Any]]]:
    import wandb_workspaces.reports.v2 as wr

    def lines(title: str, *metrics: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x="step", y=list(metrics), **options)

    def matching(title: str, regex: str) -> Any:
        return wr.LinePlot(title=title, x="step", metric_regex=regex)

    def number(title: str, metric: str, aggregate: Literal["min", "mean"]) -> Any:
        return wr.ScalarChart(title=title, metric=metric, groupby_aggfunc=aggregate)

    return (
        ("Result", [
            number("best held-out loss", "best/eval_loss", "min"),
            number("final MaxVio", "final/maxvio_global", "mean"),
            lines("loss", "loss", "loss/ema"),
            lines("held-out loss", "eval/loss"),
            matching("held-out perplexity by domain", "eval/.*/ppl"),
            wr.RunComparer(diff_only="split"),
        ]),
        ("Balance", [
            lines("MaxVio of a batch", "moe/maxvio_batch"),
            lines("MaxVio of the held-out text", "eval/maxvio_global"),
            matching("MaxVio by layer", "moe/layer[0-9]+/maxvio"),
            lines("load entropy", "moe/load_entropy"),
            lines("experts without a token", "moe/dead_experts"),
            lines("largest bias", "moe/bias_absmax"),
            wr.MediaBrowser(title="loads and biases, layers x experts", media_keys=list(_HEAT_MAPS), num_columns=2),
        ]),
        ("Reweighting", [
            lines("effective sample size / B", "reweight/ess"),
            lines("largest weight x B", "reweight/max_weight"),
            lines("temperature", "reweight/temperature"),
            matching("share of the objective by domain", "domain/.*/weight"),
            matching("loss by domain", "domain/.*/loss"),
            wr.WeavePanelSummaryTable(table_name="reweight/documents"),
        ]),
        ("Speed", [
            lines("tokens a second", "tokens_per_s"),
            lines("MFU", "mfu"),
            lines(
                "where the time of a step goes",
                *(f"time/{phase}_s" for phase in PHASES),
                plot_type="stacked-area",
            ),
            lines("slowest rank / median rank", "time/rank_spread"),
            lines("memory, GiB", "memory/gib"),
        ]),
        ("Health", [
            lines("gradient norm", "grad_norm", log_y=True),
            lines("learning rate", "lr"),
            lines("steps applied", "step/applied"),
        ]),
    )  # fmt: skip
