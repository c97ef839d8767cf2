"""Tables and a plot from benchmark rows.

    python -m benchmarks.report                      # print the tables of benchmarks/results/*.jsonl
    python -m benchmarks.report --plot docs/benchmarks.png --readme README.md README_ZH.md --docs docs/benchmarks.md

``--readme`` and ``--docs`` rewrite what stands between two marker comments, so that a number in a document is always a
row: the main tables there, those of the other sets of workloads here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import paged_report, selector_report
from benchmarks.harness import RESULTS, Row
from sparseattn.testing.timing import break_even

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN = "<!-- benchmarks: begin (written by python -m benchmarks.report) -->"
END = "<!-- benchmarks: end -->"
NAMES = {
    "sparseattn_gluon": "**sparseattn** (Gluon)",
    "sparseattn_gluon_deterministic": "**sparseattn** (Gluon), deterministic",
    "sparseattn_triton": "**sparseattn** (Triton)",
    "sparseattn": "**sparseattn** (Triton)",
    "sparseattn_xattention": "**sparseattn**, xattention",
    "fa4": "FlashAttention-4",
    "flashinfer_variable": "FlashInfer, variable blocks",
    "flashinfer_bsr": "FlashInfer, equal blocks",
    "flashprefill": "FlashPrefill",
    "flex_attention": "FlexAttention",
    "sparseattn_gluon_dense": "sparseattn (Gluon), dense",
    "sparseattn_triton_dense": "sparseattn (Triton), dense",
    "sparseattn_dense": "sparseattn, dense",
    "cudnn_dense": "cuDNN, dense",
    "fa4_dense": "FlashAttention-4, dense",
    "fa4_dense_deterministic": "FlashAttention-4, dense, deterministic",
    "flashinfer_dense": "FlashInfer, dense",
    "sdpa": "sdpa (Transformers' default)",
    "sdpa_cudnn": "sdpa, cuDNN forced",
}
OURS = ("sparseattn_gluon", "sparseattn_triton")
#: What ships in the package.
BREAK_EVEN = Path(__file__).parents[1] / "sparseattn" / "integrations" / "break_even.json"


def read(paths: Iterable[Path]) -> list[Row]:
    """Rows of JSON-lines files, those without a time left out."""
    rows = [json.loads(line) for path in sorted(paths) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "ms" in row or "first_call_s" in row]


def of_set(rows: list[Row], name: str) -> list[Row]:
    """Timed rows of a set of block-sparse workloads; rows from before there were sets are ``targets``."""
    found = [row for row in rows if row["bench"] == "block_sparse" and "ms" in row]
    return [row for row in found if row.get("set", "targets") == name]


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    body = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in body)


def thousand(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def milliseconds(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def where(rows: list[Row]) -> str:
    """One line for the environments of rows: device, versions, commits, and clocks where rows have them."""
    seen = []
    for row in rows:
        env = row["env"]
        parts = [env["device"], f"torch {env['torch']}", f"Triton {env['triton']}"]
        parts += [f"{package} {version}" for package, version in (env.get("rivals") or {}).items() if version]
        parts.append(f"commit {env['commit']}")
        line = ", ".join(str(part) for part in parts)
        if line not in seen:
            seen.append(line)
    clocks = [row["gpu"]["sm_mhz"] for row in rows if (row.get("gpu") or {}).get("sm_mhz")]
    if clocks:
        seen.append(f"SM clock right after a measurement {min(clocks):.0f} to {max(clocks):.0f} MHz")
    return "; ".join(seen)


Key = tuple[Any, ...]


def density_table(rows: list[Row], header: Sequence[str], key: Callable[[Row], Key]) -> str:
    """A line for every ``key`` and implementation, a column for every density.

    A cell holds TFLOP/s and milliseconds, after a plus sign those of building the mask or the plan where a row has
    them, and for our kernels the speed relative to FlashAttention-4's in the same run.
    """
    densities = sorted({row["density"] for row in rows}, reverse=True)
    found = {(key(row), row["impl"], row["density"]): row for row in rows}
    # Rows of one run share an environment, down to the second it was looked at.
    rivals = {(key(row), row["density"], row["env"].get("time")): row["tflops"] for row in rows if row["impl"] == "fa4"}

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        taken = f"{milliseconds(row['ms'])} ms"
        extra = row.get("plan_ms", row.get("build_ms"))
        if extra is not None:
            taken += f" + {milliseconds(extra)} ms"
        rival = rivals.get((key(row), row["density"], row["env"].get("time"))) if row["impl"] in OURS else None
        if rival:
            taken += f", {row['tflops'] / rival:.2f}x"
        return f"{row['tflops']:.0f} ({taken})"

    lines = []
    for group in sorted({key(row) for row in rows}):
        for impl, name in NAMES.items():
            cells = [found.get((group, impl, density)) for density in densities]
            if any(cells):
                lines.append([*(shown(part) for part in group), name, *map(cell, cells)])
    return table([*header, "", *[f"density {density:g}" for density in densities]], lines)


def shown(part: object) -> object:
    """A key's part as a table shows it: lengths in thousands, ranked words without their rank."""
    if isinstance(part, tuple):
        return part[1]
    return thousand(part) if isinstance(part, int) else part


def by_pass(row: Row) -> tuple[int, str]:
    """Sorts forward before backward."""
    return (("forward", "backward").index(row["op"]), row["op"])


def by_lists(row: Row) -> tuple[int, str]:
    heads = row["mask_heads"]
    name = {1: "one for all", row["kv_heads"]: "by KV head", row["heads"]: "by head"}.get(heads, str(heads))
    return heads, name


def shape_of(row: Row) -> str:
    dims = row["head_dim"], row.get("head_dim_v", row["head_dim"])
    dim = str(dims[0]) if dims[0] == dims[1] else f"{dims[0]} (values {dims[1]})"
    return f"{row['dtype']}, batch 1, {row['heads']} query and {row['kv_heads']} KV heads of {dim}"


RATIO = "x: speed relative to FlashAttention-4's block-sparse kernels in the same run."


def block_sparse(rows: list[Row]) -> str:
    timed = of_set(rows, "targets")
    if not timed:
        return ""
    body = density_table(timed, ["pass", "tokens"], lambda row: (by_pass(row), row["n"]))
    head = timed[0]
    ratio = f" {RATIO}" if any(row["impl"] == "fa4" for row in timed) else ""
    text = (
        f"Block-sparse attention over random masks of {head['block']} x {head['block']} blocks, causal; "
        f"{shape_of(head)}. TFLOP/s of the selected blocks, diagonal blocks counted whole (median time).{ratio}"
    )
    calls = [row for row in rows if "first_call_s" in row and row.get("set") == "targets"]
    said = ", ".join(f"{row['op']} {row['first_call_s']:.1f} s ({NAMES[row['impl']]})" for row in calls)
    first = f"\n\nFirst call of a process that finds nothing compiled: {said}." if calls else ""
    return f"{text}\n\n{body}{first}\n\n{where(timed)}."


def quick(rows: list[Row]) -> str:
    title = "The same beside FlashAttention-4, everything in one process."
    return _set(rows, "quick", title, ["pass", "tokens"], lambda row: (by_pass(row), row["n"]))


def _set(rows: list[Row], name: str, title: str, header: Sequence[str], key: Callable[[Row], Key]) -> str:
    rows = of_set(rows, name)
    if not rows:
        return ""
    ratio = f" {RATIO}" if any(row["impl"] == "fa4" for row in rows) else ""
    return f"{title}{ratio}\n\n{density_table(rows, header, key)}\n\n{where(rows)}."


def shared(rows: list[Row]) -> str:
    title = "Lists that all heads or the heads of a group share, and lists by head; causal, 128 x 128 blocks."
    return _set(rows, "shared", title, ["tokens", "lists"], lambda row: (row["n"], by_lists(row)))


def short(rows: list[Row]) -> str:
    title = "The last queries of a sequence of 64K keys; causal, 128 x 128 blocks."
    return _set(rows, "short", title, ["queries", "lists"], lambda row: (row["nq"], by_lists(row)))


def dims(rows: list[Row]) -> str:
    def key(row: Row) -> Key:
        dim, value = row["head_dim"], row["head_dim_v"]
        return by_pass(row), (dim, str(dim) if dim == value else f"{dim}, values {value}")

    return _set(rows, "dims", "Head dims, at 16K tokens; causal, 128 x 128 blocks.", ["pass", "head dim"], key)


def blocks(rows: list[Row]) -> str:
    def key(row: Row) -> Key:
        return by_pass(row), (-row["block_q"] * row["block"], f"{row['block_q']} x {row['block']}")

    return _set(rows, "blocks", "Block sizes (queries x keys), at 16K tokens; causal.", ["pass", "blocks"], key)


def flashinfer(rows: list[Row]) -> str:
    title = (
        "FlashInfer's workload: 20 x 50 blocks of equal size, not causal; 32 heads of 128, fp16. After the plus sign: "
        "building our mask, on the device, and FlashInfer's plan."
    )
    return _set(rows, "flashinfer", title, ["tokens", "lists"], lambda row: (row["n"], by_lists(row)))


def breakeven(rows: list[Row]) -> str:
    """The density up to which our kernels are no slower than dense cuDNN, and what lists cost at density 1."""
    rows = of_set(rows, "breakeven")
    dense = {row["n"]: row["ms"] for row in rows if row["impl"] == "cudnn_dense"}
    lines = []
    for n in sorted({row["n"] for row in rows}):
        for impl in OURS:
            sparse = {row["density"]: row for row in rows if (row["n"], row["impl"]) == (n, impl)}
            own = next((r["ms"] for r in rows if (r["n"], r["impl"]) == (n, f"{impl}_dense")), None)
            if not sparse or n not in dense:
                continue
            selected = [row["selected"] for row in sparse.values()]
            density = break_even(selected, [row["ms"] for row in sparse.values()], dense[n])
            said = "none: dense is faster at every measured density" if density is None else f"{density:.2f}"
            full = sparse[1.0]["ms"] if 1.0 in sparse else None
            cost = f"{100 * (full / own - 1):+.1f}%" if full and own else ""
            cells = ["" if ms is None else milliseconds(ms) for ms in (dense[n], own, full)]
            lines.append([thousand(n), NAMES[impl], *cells, cost, said])
    if not lines:
        return ""
    header = ["tokens", "", "cuDNN dense ms", "own dense ms", "density 1 ms", "cost of lists", "break-even density"]
    title = "Break-even: the highest density at which block-sparse attention is as fast as dense cuDNN (forward)."
    return f"{title}\n\n{table(header, lines)}\n\n{where(rows)}."


def selectors(rows: list[Row], name: str, *, shortest: int = 0, best: bool = False) -> str:
    """The table of a set of selectors; ``shortest`` and ``best`` as :func:`selector_report.lines` takes them."""
    rows = selector_report.of_set(rows, name)
    if name == "short":
        header, body = selector_report.short_lines(rows, milliseconds)
    else:
        header, body = selector_report.table_of(rows, milliseconds, shortest=shortest, best=best)
    if not body:
        return ""
    dense = selector_report.dense_line(rows, milliseconds, shortest)
    parts = [selector_report.TITLES[name], table(header, body), " ".join(filter(None, (dense, f"{where(rows)}.")))]
    return "\n\n".join(parts)


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
        name = f"**sparseattn**, {row['method']}" if "method" in row else NAMES[row["impl"]]
        name += f", threshold {row['threshold']:g}" if "threshold" in row else ""
        rival = dense.get((row["n"], row["layers"]))
        cells = [f"{row['ms'] / 1e3:.2f}", f"{rival / row['ms']:.2f}x" if rival else ""]
        density = f"{row['density']:.1%}" if "density" in row else "100.0%"
        lines.append([thousand(row["n"]), row["layers"], name, density, *cells])
    return (
        f"Time to first token of a {rows[0]['shape']}-shaped model with random weights (whose attention is nearly "
        "even: read the density, not the threshold); speed-up over the faster dense sdpa.\n\n"
        + table(["tokens", "layers", "", "density", "seconds", "speed-up"], lines)
        + f"\n\n{where(rows)}."
    )


def paged(rows: list[Row], name: str) -> str:
    """The table of a set of serving workloads."""
    timed = paged_report.of_set(rows, name)
    if not timed:
        return ""
    rivals = any(row["impl"].startswith("flashinfer") for row in timed)
    ratio = " x: speed relative to FlashInfer's fastest kernels in the same run." if rivals and name != "host" else ""
    return f"{paged_report.TABLES[name].title}{ratio}\n\n{table(*paged_report.lines(timed, name))}\n\n{where(timed)}."


def joined(parts: Iterable[str], otherwise: str) -> str:
    return "\n\n".join(part for part in parts if part) or otherwise


def tables(rows: list[Row]) -> str:
    """The main tables, in markdown."""
    otherwise = "No rows yet: `python -m benchmarks.block_sparse` on a GPU writes some."
    long = selectors(rows, "table", shortest=32768, best=True)
    return joined((block_sparse(rows), quick(rows), long, ttft(rows)), otherwise)


def details(rows: list[Row]) -> str:
    """The tables of the other sets, in markdown."""
    otherwise = "No rows of these sets yet: `python -m benchmarks.block_sparse --set shared` on a GPU writes some."
    found = [one(rows) for one in (shared, short, dims, blocks, flashinfer, breakeven)]
    found += [selectors(rows, name) for name in selector_report.TITLES]
    return joined(found + [paged(rows, name) for name in paged_report.TABLES], otherwise)


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


def digest(rows: list[Row]) -> str:
    """What the plot of these rows shows, in a few letters, which the picture carries: an old one is found out."""
    shown = [[r["op"], r["n"], r["impl"], r["density"], r["selected"], r["tflops"]] for r in of_set(rows, "targets")]
    return hashlib.sha256(json.dumps(sorted(shown)).encode()).hexdigest()[:16]


def plot(rows: list[Row], path: Path) -> None:
    """Write ``drawing`` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing(rows).savefig(path, dpi=110, metadata={"Rows": digest(rows)})


def drawing(rows: list[Row]) -> Figure:
    """Block-sparse TFLOP/s over density, a panel a pass and length, one line an implementation, alike in all panels."""
    from matplotlib.figure import Figure

    rows = of_set(rows, "targets")
    panels = sorted({(row["op"], row["n"]) for row in rows}, key=lambda key: (key[0] != "forward", key[1]))
    figure = Figure(figsize=(4 * max(1, len(panels)), 3.8))
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)
    present = {row["impl"] for row in rows}
    colors = {impl: f"C{i}" for i, impl in enumerate(impl for impl in NAMES if impl in present)}
    lines = {}
    for axis, (op, n) in zip(axes[0], panels, strict=False):
        for impl, color in colors.items():
            points = sorted((r["selected"], r["tflops"]) for r in rows if (r["op"], r["n"], r["impl"]) == (op, n, impl))
            if points:
                label = NAMES[impl].replace("**", "")
                (lines[label],) = axis.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
        axis.set(title=f"{op}, {thousand(n)} tokens", xlabel="density", xscale="log", ylim=(0, None))
        ticks = sorted({r["density"] for r in rows if (r["op"], r["n"]) == (op, n)})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TFLOP/s of the selected blocks")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=len(lines) or 1, fontsize=9, frameon=False)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and a plot from rows.")
    parser.add_argument("rows", type=Path, nargs="*", help="JSON-lines files; default benchmarks/results/*.jsonl")
    parser.add_argument(
        "--readme", type=Path, nargs="+", default=[], help="rewrite the main tables between the markers of these files"
    )
    parser.add_argument("--docs", type=Path, help="rewrite the tables of the other sets in this one")
    parser.add_argument("--plot", type=Path, help="write a PNG")
    parser.add_argument(
        "--break-even", type=Path, nargs="?", const=BREAK_EVEN,
        help="rewrite from which length on models select blocks, as rows of benchmarks.selectors --set short say",
    )  # fmt: skip
    options = parser.parse_args(argv)
    rows = read(options.rows or RESULTS.glob("*.jsonl"))
    print(tables(rows), details(rows), sep="\n\n")
    documents = [(readme, tables(rows)) for readme in options.readme]
    documents += [(options.docs, details(rows))] if options.docs else []
    for document, text in documents:
        document.write_text(inject(document.read_text(encoding="utf-8"), text), encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)
    if options.break_even:
        found = json.dumps(selector_report.break_even(rows), indent=1)
        options.break_even.write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
