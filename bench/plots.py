"""The pictures of bench/report.py: speedups, roofline, growth curves, shares of a step."""

from __future__ import annotations

import io

import matplotlib
from matplotlib import ticker

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from bench.record import OURS, Spread, contenders, speedups, times

# Ours dark, the others by name, so that one contender has one colour on every picture.
COLOURS = {
    OURS: "#1b2a41", "eager": "#d1495b", "compiled": "#edae49", "fused": "#a05d3b",
    "drjit": "#7a5195", "jax": "#3d8b7d", "taichi": "#5b8fd1", "warp": "#8a8d91",
}  # fmt: skip
OTHERS = ("#4f9d4f", "#c77dba", "#b5a642")
STYLE = {"font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "axes.edgecolor": "#8a8d91", "axes.axisbelow": True,
         "grid.color": "#e4e4e4", "legend.frameon": False, "savefig.dpi": 150,
         "figure.constrained_layout.use": True}  # fmt: skip
WIDTH = 10.0  # inches
BAR = 0.19  # inches, a bar of the speedups


def colours(rows: list[dict]) -> dict[str, str]:
    """Contender to colour."""
    names = contenders(rows)
    unknown = [name for name in names if name not in COLOURS]
    return COLOURS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(unknown)}


def draw(record: dict) -> dict[str, bytes]:
    """Name to PNG, of every picture for which there are rows."""
    rows = record["rows"]
    ops = dict.fromkeys(row["op"] for row in rows)
    jobs = {"overview": (overview,)} | {f"speedup-{op}": (speedup_bars, op) for op in ops}
    jobs |= {"roofline": (roofline, record["limits"]), "growth": (growth,), "stages": (stages,)}
    found = {}
    with plt.rc_context(STYLE):
        for name, (plot, *arguments) in jobs.items():
            if figure := plot(rows, *arguments):
                found[name] = _png(figure)
    return found


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _plain_ticks(axis) -> None:
    """1, 2, 5, 10 and so on, on a logarithmic axis, as plain numbers."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())


def _short(x: float) -> str:
    """4096 as 4096, 262144 as 256k, 2^20 as 1M; other numbers with a decimal prefix."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if x >= 10 * unit or (x >= unit > 1024 and x % unit == 0):
            return f"{x / unit:.3g}{letter}"
    return f"{x:g}"


def overview(rows: list[dict]):
    """The size "paper" of every op, else its first: ours against the fastest other library."""
    rows = [r for r in rows if not r.get("curve")]
    sizes = {}
    for row in rows:
        if row["size"] == "paper" or row["op"] not in sizes:
            sizes[row["op"]] = row["size"]
    found = {}
    for (op, size, direction, dtype), peers in speedups(rows).items():
        others = [name for name in peers if not name.startswith(f"{OURS}-")]
        if size == sizes[op] and others:
            name = min(others, key=lambda n: peers[n].middle)
            found[f"{op}, {size}\n{direction}, {dtype}"] = {name: peers[name]}
    return _bars(found, colours(rows), "Time of the fastest other / ours, warm cache")


def speedup_bars(rows: list[dict], op: str):
    """A bar for each contender and case of an op, without growth curves."""
    found = speedups([r for r in rows if r["op"] == op and not r.get("curve")])
    found = {f"{size}\n{direction}, {dtype}": peers
             for (_, size, direction, dtype), peers in found.items()}  # fmt: skip
    return _bars(found, colours(rows), f"{op}: time of others / ours, warm cache")


def _bars(found: dict[str, dict[str, Spread]], palette: dict[str, str], title: str):
    """How many times ours is faster: label -> contender -> ratio."""
    if not found:
        return None
    lines = sum(len(peers) + 1 for peers in found.values())
    figure, axes = plt.subplots(figsize=(WIDTH, 0.8 + max(BAR * lines, 0.4 * len(found))))
    y, marks = 0.0, []
    for peers in found.values():
        marks.append(y + (len(peers) - 1) / 2)
        for name, ratio in sorted(peers.items(), key=lambda p: p[1].middle):
            reach = [[ratio.middle - ratio.low], [ratio.high - ratio.middle]]
            axes.barh(y, ratio.middle - 1, 0.8, 1, color=palette[name], xerr=reach,
                      error_kw={"elinewidth": 1, "ecolor": "#333333", "capsize": 2})  # fmt: skip
            text = f"{ratio.middle:.3g}×  {name}{', noisy' * ratio.noisy}"
            axes.annotate(text, (max(ratio.high, 1), y), (5, 0),
                          textcoords="offset points", va="center", fontsize=8)  # fmt: skip
            y += 1
        y += 1
    ratios = [ratio for peers in found.values() for ratio in peers.values()]
    axes.set(xscale="log", ylim=(y - 1.4, -0.6), title=title)
    axes.set_xlim(0.8 * min(1, *(r.low for r in ratios)), 3 * max(1, *(r.high for r in ratios)))
    axes.set_yticks(marks, list(found))
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=palette[OURS], linewidth=1.2)
    _plain_ticks(axes.xaxis)
    axes.grid(axis="x")
    return figure


def roofline(rows: list[dict], limits: dict):
    """Operations a second over operations a byte, below what memory and multiply-adds allow."""
    timed = [r for r in rows if times(r) and r["bytes"] and r["flops"] and not r.get("curve")]
    if not timed:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 5.2))
    shades = _shades(row["op"] for row in timed)
    for row in timed:
        x, y = row["flops"] / row["bytes"], row["flops"] / times(row).middle * 1e-6
        mark = ("o", 7, 1.0) if row["contender"] == OURS else ("x", 4, 0.6)
        axes.plot(x, y, mark[0], color=shades[row["op"]], markersize=mark[1], alpha=mark[2])
    fma, read = limits["fma_gflops"], limits["read_gbs"]
    intensities = [row["flops"] / row["bytes"] for row in timed]
    low, high = min(*intensities, fma / read) / 2, max(*intensities, fma / read) * 4
    axes.plot([low, fma / read, high], [low * read, fma, fma], color="#1b2a41", linewidth=1.5)
    middle = (low * fma / read) ** 0.5
    for text, place in ((f"multiply-adds {fma:.3g} GFLOP/s", (high, fma)),
                        (f"reads {read:.3g} GB/s", (middle, middle * read))):  # fmt: skip
        axes.annotate(text, place, (-4, 4), textcoords="offset points", ha="right", fontsize=8)
    for op, shade in shades.items():
        axes.plot([], [], "s", color=shade, label=op)
    axes.plot([], [], "ko", label="ours")
    axes.plot([], [], "kx", markersize=4, label="others")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s",
             title="Roofline: counted operations and bytes, measured limits")  # fmt: skip
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def _shades(names) -> dict[str, tuple]:
    """A colour for each of the names."""
    names = list(dict.fromkeys(names))
    palette = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    return {name: palette(i % palette.N) for i, name in enumerate(names)}


def growth(rows: list[dict]):
    """Milliseconds over points, levels, table size, rays, samples: a panel for each and op."""
    panels: dict[tuple, dict[tuple, list]] = {}
    for row in rows:
        if row.get("curve") and times(row):
            lines = panels.setdefault((row["op"], row["curve"]), {})
            points = lines.setdefault((row["contender"], row["direction"]), [])
            points.append((row["at"], times(row)))
    if not panels:
        return None
    palette, down = colours(rows), -(-len(panels) // 3)
    directions = dict.fromkeys(d for lines in panels.values() for _, d in lines)
    dashes = {d: ("-", "--", ":", "-.")[i % 4] for i, d in enumerate(directions)}
    figure, grid = plt.subplots(down, 3, squeeze=False,
                                figsize=(WIDTH, 2.6 * down + 0.4))  # fmt: skip
    for axes, ((op, parameter), lines) in zip(grid.flat, panels.items()):
        _curves(axes, lines, palette, dashes, logarithmic=not parameter.startswith("log2"))
        axes.set(title=op, xlabel=parameter, ylabel="ms")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    names = dict.fromkeys(name for lines in panels.values() for name, _ in lines)
    handles = [plt.Line2D([], [], color=palette[name], marker="o", markersize=3, label=name)
               for name in names]  # fmt: skip
    handles += [plt.Line2D([], [], color="grey", linestyle=dash, label=direction)
                for direction, dash in dashes.items()]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _curves(axes, lines: dict[tuple, list], palette, dashes, logarithmic: bool) -> None:
    """One panel: (contender, direction) -> [(value, ms)]."""
    for (name, direction), points in lines.items():
        x, y = zip(*sorted(points))
        axes.plot(x, [t.middle for t in y], dashes[direction], color=palette[name], marker="o",
                  markersize=3, linewidth=1.3)  # fmt: skip
        axes.fill_between(x, [t.low for t in y], [t.high for t in y], color=palette[name],
                          alpha=0.2, linewidth=0)  # fmt: skip
    axes.set(xscale="log" if logarithmic else "linear", yscale="log")
    _plain_ticks(axes.yaxis)
    values = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(values[:: -(-len(values) // 5)], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda x, _: _short(x))
    axes.grid()


def stages(rows: list[dict]):
    """What each measured step spends on its stages."""
    steps = [r for r in rows if r.get("stages")]
    if not steps:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 1.0 + 0.5 * len(steps)))
    shades = _shades(name for row in steps for name in row["stages"])
    for y, row in enumerate(steps):
        left, total = 0.0, sum(row["stages"].values())
        for name, ms in row["stages"].items():
            share = 100 * ms / total
            axes.barh(y, share, 0.7, left, color=shades[name], edgecolor="white")
            if share > 5:
                axes.text(left + share / 2, y, f"{share:.0f} %", ha="center", va="center",
                          fontsize=8)  # fmt: skip
            left += share
    labels = [f"{r['contender']}, {r['size']}\n{r['direction']}: {sum(r['stages'].values()):.3g} ms"
              for r in steps]  # fmt: skip
    axes.set_yticks(range(len(steps)), labels)
    axes.set(xlim=(0, 100), ylim=(len(steps) - 0.5, -0.5), xlabel="percent of the step",
             title="Share of a step by stage")  # fmt: skip
    axes.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in shades.values()], shades,
                loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)  # fmt: skip
    return figure
