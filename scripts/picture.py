#!/usr/bin/env python3
"""Draw a run: its loss in bits per byte, its evaluations, the n-gram baselines, changes of mesh.

jaxscale evaluate --workdir=WORKDIR --baselines --json=WORKDIR/evaluate.json
python scripts/picture.py WORKDIR docs/images/run.png      (or .svg)
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxscale import records
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import CheckpointConfig

# Okabe and Ito's palette, which every kind of colour vision tells apart; lines differ in style too.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#5A5A5A"
SIZE_INCHES, DOTS_PER_INCH = (9.0, 4.6), 144


@dataclasses.dataclass(frozen=True)
class Point:
    """A figure after so many steps."""

    step: int
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class Picture:
    """What there is to draw.

    Attributes:
      training: of the batches that were trained on.
      validation: of held-out documents, during and after the run.
      baselines: name to bits per byte on the held-out documents.
      meshes: the first step of each mesh, and its axes in words.
      title: the run in words.
    """

    training: list[Point]
    validation: list[Point]
    baselines: dict[str, float]
    meshes: list[tuple[int, str]]
    title: str


def main(argv: Sequence[str] | None = None) -> int:
    """Read a workdir and write a picture; return the exit code."""
    parser = argparse.ArgumentParser(description="Draw a run.")
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path, help=".png or .svg")
    args = parser.parse_args(argv)
    try:
        picture = read_run(args.workdir)
    except FileNotFoundError as error:
        print(f"{error.filename}: no such file; the first lines of {__file__} say what makes it")
        return 2
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, args.picture)
    print(f"{args.picture}: written")
    return 0


def read_run(workdir: pathlib.Path) -> Picture:
    """Read metrics, evaluation and checkpoints of a workdir.

    Raises:
      FileNotFoundError: it lacks the metrics, or evaluate.json.
    """
    last_lines = {
        (line[records.KIND], line[records.STEP]): line
        for line in records.read_lines(workdir / records.METRICS_FILE)
    }
    lines = sorted(last_lines.values(), key=lambda line: line[records.STEP])
    evaluations = [line for line in lines if line[records.KIND] == records.KIND_EVALUATION]
    result = records.read_json(workdir / "evaluate.json")
    final = result["rows"][0]
    # A loss is per token. What a nat of it makes in bits per byte, an evaluation has measured.
    bits_per_nat = final[records.BITS_PER_BYTE] / final[records.LOSS]
    return Picture(
        training=[
            Point(line[records.STEP], line[records.LOSS] * bits_per_nat)
            for line in lines
            if line[records.KIND] == records.KIND_TRAIN and line[records.LOSS] is not None
        ],
        # A score of the last step is replaced by that of evaluate.json, which may cover more.
        validation=[
            Point(line[records.STEP], line[records.BITS_PER_BYTE])
            for line in [*evaluations, final]
            if line is final or line[records.STEP] != final[records.STEP]
        ],
        baselines={
            "unigram": final[records.UNIGRAM_BITS_PER_BYTE],
            "bigram": final[records.BIGRAM_BITS_PER_BYTE],
        },
        meshes=read_meshes(workdir),
        title=describe(workdir, result["config"]),
    )


def read_meshes(workdir: pathlib.Path) -> list[tuple[int, str]]:
    """Return the step from which each mesh trained, told by the checkpoints that are left."""
    checkpointer = Checkpointer(workdir, CheckpointConfig(), read_only=True)
    found: list[tuple[int, str]] = []
    start = 0
    for step in checkpointer.all_steps():
        sizes = checkpointer.read_meta(step)["mesh"]
        mesh = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        if not found or found[-1][1] != mesh:
            found.append((start, mesh or "one device"))
        start = step
    return found


def describe(workdir: pathlib.Path, config: dict[str, Any]) -> str:
    """Return model, data and devices of the run in one line."""
    model, environment = config["model"], records.read_json(workdir / records.ENVIRONMENT_FILE)
    kind = "fake CPU" if environment["fake_devices"] else environment["device_kind"]
    return (
        f"{model['num_layers']} layers of width {model['width']} on {config['data']['source']}, "
        f"{environment['num_devices']} {kind} devices"
    )


def draw(picture: Picture, path: pathlib.Path) -> None:
    """Write the picture in the format that the name of `path` asks for."""
    # Imported here: no other part of the project needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    last = max(point.step for point in picture.training + picture.validation)
    draw_baselines(axes, picture.baselines)
    draw_meshes(axes, picture.meshes, last)
    draw_curves(axes, picture)
    axes.set_xlim(0, last)
    axes.margins(y=0.1)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.set_title(picture.title, loc="left", fontsize=11, color=GREY, pad=26)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def draw_baselines(axes: Any, baselines: dict[str, float]) -> None:
    """Draw a dashed line per baseline, named at its left end."""
    for name, bits in baselines.items():
        axes.axhline(bits, color=GREY, linestyle=(0, (6, 4)), linewidth=1.2)
        axes.annotate(
            f"{name} {bits:.2f}",
            (1, bits),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=GREY,
        )


def draw_meshes(axes: Any, meshes: list[tuple[int, str]], last: int) -> None:
    """Name each mesh above the steps that it trained, with a line where the next one takes over."""
    starts = [start for start, _ in meshes]
    for (start, mesh), end in zip(meshes, [*starts[1:], last], strict=True):
        if start:
            axes.axvline(start, color=GREY, linestyle=":", linewidth=1.4)
        axes.annotate(
            mesh,
            ((start + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=10,
        )


def draw_curves(axes: Any, picture: Picture) -> None:
    """Draw training as a line and held-out documents as points, the last with its figure."""
    axes.plot(
        [point.step for point in picture.training],
        [point.bits_per_byte for point in picture.training],
        color=BLUE,
        linewidth=2,
        label="training batches",
    )
    axes.plot(
        [point.step for point in picture.validation],
        [point.bits_per_byte for point in picture.validation],
        color=VERMILION,
        marker="D",
        markersize=7,
        linestyle="none",
        label="held-out documents",
        clip_on=False,
        zorder=3,
    )
    final = picture.validation[-1]
    axes.annotate(
        f"model {final.bits_per_byte:.2f}",
        (final.step, final.bits_per_byte),
        xytext=(-6, -18),
        textcoords="offset points",
        ha="right",
        color=VERMILION,
        fontweight="bold",
    )
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.97))


if __name__ == "__main__":
    sys.exit(main())
