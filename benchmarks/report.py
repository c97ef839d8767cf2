"""Tables and a plot from benchmark rows.

    python -m benchmarks.report                      # print the tables of benchmarks/results/*.jsonl
    python -m benchmarks.report --plot docs/benchmarks.png --readme README.md

``--readme`` rewrites what stands between the two marker comments, so that a number in a document is always a row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, Row

BEGIN = "<!-- benchmarks: begin (written by python -m benchmarks.report) -->"
END = "<!-- benchmarks: end -->"
NAMES = {
    "sparseattn": "**sparseattn** (Triton)",
    "sparseattn_dense": "sparseattn, dense",
    "sparseattn_xattention": "**sparseattn_xattention**",
    "flex_attention": "FlexAttention",
    "cudnn_dense": "cuDNN, dense",
    "sdpa": "sdpa (Transformers' default)",
    "sdpa_cudnn": "sdpa, cuDNN forced",
}


def read(paths: Iterable[Path]) -> list[Row]:
    """Rows of JSON-lines files, those without a time left out."""
    rows = [json.loads(line) for path in sorted(paths) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "ms" in row]


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    body = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in body)


def thousand(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def milliseconds(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def where(rows: list[Row]) -> str:
    """One line for the environments of rows: device, versions, commits."""
    seen = []
    for row in rows:
        env = row["env"]
        parts = [env["device"], f"torch {env['torch']}", f"Triton {env['triton']}", f"commit {env['commit']}"]
        line = ", ".join(str(part) for part in parts)
        if line not in seen:
            seen.append(line)
    return "; ".join(seen)


def block_sparse(rows: list[Row]) -> str:
    rows = [row for row in rows if row["bench"] == "block_sparse"]
    if not rows:
        return ""
    densities = sorted({row["density"] for row in rows}, reverse=True)
    found = {(row["op"], row["n"], row["impl"], row["density"]): row for row in rows}
    lines = []
    for op, n in sorted({(row["op"], row["n"]) for row in rows}, key=lambda key: (key[0] != "forward", key[1])):
        for impl in NAMES:
            cells = [found.get((op, n, impl, density)) for density in densities]
            if any(cells):
                shown = [f"{row['tflops']:.0f} ({milliseconds(row['ms'])} ms)" if row else "" for row in cells]
                lines.append([op, thousand(n), NAMES[impl], *shown])
    head = rows[0]
    shape = f"{head['dtype']}, batch 1, {head['heads']} query and {head['kv_heads']} KV heads of {head['head_dim']}"
    return (
        f"Block-sparse attention over random masks of {head['block']} x {head['block']} blocks, causal; {shape}. "
        f"TFLOP/s of the selected blocks, diagonal blocks counted whole (median time).\n\n"
        + table(["pass", "tokens", "", *[f"density {density:g}" for density in densities]], lines)
        + f"\n\n{where(rows)}."
    )


def xattention(rows: list[Row]) -> str:
    rows = [row for row in rows if row["bench"] == "xattention"]
    sparse = [row for row in rows if row["impl"] == "sparseattn"]
    if not sparse:
        return ""
    dense = {row["n"]: row["ms"] for row in rows if row["impl"] == "cudnn_dense"}
    phases = {(row["n"], row["stride"], row["threshold"], row["phase"]): row for row in sparse}
    lines = []
    for n, stride, threshold in sorted({key[:3] for key in phases}):
        select, attend, both = (phases.get((n, stride, threshold, p)) for p in ("selection", "attention", "both"))
        if not (select and attend and both):
            continue
        cells = [milliseconds(row["ms"]) for row in (select, attend, both)]
        rival = [milliseconds(dense[n]), f"{dense[n] / both['ms']:.1f}x"] if n in dense else ["", ""]
        quality = [f"{both['selected']:.1%}", f"{both['recall']:.3f}"]
        lines.append([thousand(n), stride, threshold, *quality, *cells, *rival])
    header = ["tokens", "stride", "threshold", "density", "recall", "selection ms", "attention ms", "both ms"]
    return (
        "XAttention on structured queries and keys (sinks, local bands, columns, topics): blocks kept, attention mass "
        "they hold, and time.\n\n" + table([*header, "cuDNN dense ms", "speed-up"], lines) + f"\n\n{where(sparse)}."
    )


def ttft(rows: list[Row]) -> str:
    rows = [row for row in rows if row["bench"] == "ttft"]
    if not rows:
        return ""
    dense = {
        (row["n"], row["layers"]): min(
            r["ms"] for r in rows if r["impl"].startswith("sdpa") and (r["n"], r["layers"]) == (row["n"], row["layers"])
        )
        for row in rows
        if row["impl"].startswith("sdpa")
    }
    lines = []
    for row in rows:
        setting = f", threshold {row['threshold']:g}" if "threshold" in row else ""
        rival = dense.get((row["n"], row["layers"]))
        cells = [f"{row['ms'] / 1e3:.2f}", f"{rival / row['ms']:.2f}x" if rival else ""]
        density = f"{row['density']:.1%}" if "density" in row else "100.0%"
        lines.append([thousand(row["n"]), row["layers"], NAMES[row["impl"]] + setting, density, *cells])
    return (
        f"Time to first token of a {rows[0]['shape']}-shaped model with random weights (whose attention is nearly "
        "even: read the density, not the threshold); speed-up over the faster dense sdpa.\n\n"
        + table(["tokens", "layers", "", "density", "seconds", "speed-up"], lines)
        + f"\n\n{where(rows)}."
    )


def tables(rows: list[Row]) -> str:
    """All tables of these rows, in markdown."""
    parts = [part for part in (block_sparse(rows), xattention(rows), ttft(rows)) if part]
    return "\n\n".join(parts) or "No rows yet: `python -m benchmarks.block_sparse` on a GPU writes some."


def inject(document: str, text: str) -> str:
    """``document`` with ``text`` between the markers.

    Raises:
        ValueError: The markers are not there.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"document: expected the markers {BEGIN!r} and {END!r}, got neither or one.")
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


def plot(rows: list[Row], path: Path) -> None:
    """Draw block-sparse TFLOP/s over density, a panel a pass and length, one line an implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["bench"] == "block_sparse"]
    panels = sorted({(row["op"], row["n"]) for row in rows}, key=lambda key: (key[0] != "forward", key[1]))
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(4 * max(1, len(panels)), 3.4), squeeze=False)
    for axis, (op, n) in zip(axes[0], panels, strict=False):
        for impl, name in NAMES.items():
            points = sorted((r["selected"], r["tflops"]) for r in rows if (r["op"], r["n"], r["impl"]) == (op, n, impl))
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name.replace("**", ""))
        axis.set(title=f"{op}, {thousand(n)} tokens", xlabel="density", xscale="log", ylim=(0, None))
        ticks = sorted({r["density"] for r in rows if (r["op"], r["n"]) == (op, n)})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TFLOP/s of the selected blocks")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and a plot from rows.")
    parser.add_argument("rows", type=Path, nargs="*", help="JSON-lines files; default benchmarks/results/*.jsonl")
    parser.add_argument("--readme", type=Path, help="rewrite the tables between the markers of this file")
    parser.add_argument("--plot", type=Path, help="write a PNG")
    options = parser.parse_args(argv)
    rows = read(options.rows or RESULTS.glob("*.jsonl"))
    text = tables(rows)
    print(text)
    if options.readme:
        document = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(inject(document, text), encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
