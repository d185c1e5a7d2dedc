#!/usr/bin/env python3
"""usage: report.py DIRECTORY --load BEFORE AFTER --runs N

Turns samples.tsv and load.jsonl of scripts/bench.sh into results.md, results.json, cold.svg and load.svg, and prints the tables.
"""

import argparse
import json
import math
import os
import platform
import statistics
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ["#2563eb", "#d97706", "#6b7280", "#059669", "#9ca3af", "#d1d5db", "#dc2626"]


def read_samples(path: Path) -> dict:
    """{section: {case: {who: [value]}}} in the order of the file."""
    sections: dict = {}
    for line in path.read_text().splitlines():
        section, case, who, value = line.split("\t")
        sections.setdefault(section, {}).setdefault(case, {}).setdefault(who, []).append(float(value))
    return sections


def quantile(values: list, part: float) -> float:
    return sorted(values)[round((len(values) - 1) * part)]


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def summary(values: list) -> dict:
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values), "p99": quantile(values, 0.99)}


def with_budget(people: dict) -> dict:
    """Adds what a cold build may take: half more than the longer of the two parts that can overlap."""
    parts = [statistics.median(people[part]) for part in ("decompress alone", "write + fsync alone") if part in people]
    return people | {"budget: 1.5 × the longer of these two": [1.5 * max(parts)]} if len(parts) == 2 else people


def comparison(title: str, cases: dict) -> list:
    """One line per case and who; the ratio says how many times as long as cloudletd it took."""
    many = any(len(values) >= 50 for who in cases.values() for values in who.values())
    p99 = " p99 |" if many else ""
    lines = [f"### {title}", "", f"| input | who | median, ms |{p99} min–max | times as long |", "|---|---|---:|" + ("---:|" if many else "") + "---:|---:|"]
    for case, people in cases.items():
        ours = statistics.median(next(iter(people.values())))
        people = with_budget(people)
        for who, values in people.items():
            found = summary(values)
            tail = f" {number(found['p99'])} |" if many else ""
            lines.append(f"| {case} | {who} | {number(found['median'])} |{tail} {number(found['min'])}–{number(found['max'])} | {found['median'] / ours:.2f} |")
    return [*lines, ""]


def load_rows(path: Path) -> list:
    """Medians of the rounds of each concurrency."""
    rounds: dict = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rounds.setdefault(row["in_flight"], []).append(row)
    keys = ["per_second", "p50_ms", "p99_ms", "max_ms", "allocated_bytes", "peer_per_second"]
    return [
        {"in_flight": at, "rounds": len(rows), "renders": sum(row["renders"] for row in rows)}
        | {key: statistics.median(row[key] for row in rows) for key in keys if key in rows[0]}
        for at, rows in rounds.items()
    ]


def load_table(rows: list) -> list:
    lines = ["### Many at once: qcow2 overlays, complete injection, durable, through gRPC", "", "| in flight | renders | failed | per second | p50, ms | p99, ms | slowest, ms | qemu-img create -b, per second |", "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        lines.append(f"| {row['in_flight']} | {row['renders']} | 0 | {number(row['per_second'])} | {number(row['p50_ms'])} | {number(row['p99_ms'])} | {number(row['max_ms'])} | {number(row['peer_per_second']) if 'peer_per_second' in row else '–'} |")
    lines += ["", f"Allocated per volume: {rows[0]['allocated_bytes'] / 1024:.0f} KiB."]
    return [*lines, ""]


def fact_lines(facts: dict) -> list:
    """One line per figure of the daemon itself."""
    return [f"- {name[0].upper()}{name[1:]}: {number(values[0])}." for people in facts.values() for name, values in people.items()] + [""]


class Svg:
    """Just enough."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.parts: list = []

    def text(self, x: float, y: float, text: str, anchor: str = "start", size: int = 12, colour: str = "#111827") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>')

    def line(self, points: list, colour: str, width: float = 1) -> None:
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

    def rect(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')

    def dot(self, x: float, y: float, colour: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')

    def save(self, path: Path) -> None:
        width, height = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif">'
        path.write_text("\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *self.parts, "</svg>", ""]))


def cold_plot(cases: dict, path: Path) -> None:
    """Bars: seconds by input and who."""
    bars = [(case, who, statistics.median(values) / 1000) for case, people in cases.items() for who, values in people.items()]
    names = list(dict.fromkeys(who for _, who, _ in bars))
    svg = Svg(760, 60 + 22 * len(bars) + 14 * len(cases))
    svg.text(20, 24, "Tarball to durable ext4 disk, seconds (median; shorter is better)", size=14)
    longest, y, last = max(value for _, _, value in bars), 44, None
    for case, who, value in bars:
        if case != last:
            y += 14
            svg.text(150, y + 13, case, anchor="end")
            last = case
        svg.rect(160, y, 380 * value / longest, 16, COLOURS[names.index(who) % len(COLOURS)])
        svg.text(166 + 380 * value / longest, y + 13, f"{value:.2f} s  {who}", size=11)
        y += 22
    svg.save(path)


def load_plot(rows: list, path: Path) -> None:
    """Lines: latency against concurrency, both logarithmic."""
    svg = Svg(640, 400)
    left, right, top, bottom = 70, 500, 50, 340
    steps = [math.log2(row["in_flight"]) for row in rows]
    values = [row[key] for row in rows for key in ("p50_ms", "p99_ms")]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    x = lambda value: left + (right - left) * math.log2(value) / max(steps[-1], 1)
    y = lambda value: bottom - (bottom - top) * (math.log10(value) - low) / (high - low)
    svg.text(20, 24, "Warm renders through gRPC: latency against renders in flight", size=14)
    for power in range(low, high + 1):
        svg.line([(left, y(10**power)), (right, y(10**power))], "#e5e7eb")
        svg.text(left - 8, y(10**power) + 4, f"{10**power:g} ms", anchor="end", size=11)
    for row in rows:
        svg.text(x(row["in_flight"]), bottom + 18, str(row["in_flight"]), anchor="middle", size=11)
        svg.text(x(row["in_flight"]), bottom + 34, f"{row['per_second']:.0f}/s", anchor="middle", size=11, colour="#6b7280")
    for key, colour, name in (("p50_ms", COLOURS[0], "p50"), ("p99_ms", COLOURS[1], "p99")):
        points = [(x(row["in_flight"]), y(row[key])) for row in rows]
        svg.line(points, colour, 2)
        for at in points:
            svg.dot(*at, colour)
        svg.text(right + 10, points[-1][1] + 4, name, colour=colour)
    svg.save(path)


def machine() -> dict:
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "unknown")
    return {"cpu": model, "cores": os.cpu_count(), "kernel": platform.release()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--load", nargs=2, required=True)
    parser.add_argument("--runs", required=True)
    arguments = parser.parse_args()
    directory, host = arguments.directory, machine()
    sections, rows = read_samples(directory / "samples.tsv"), load_rows(directory / "load.jsonl")
    lines = [f"{host['cores']} cores ({host['cpu']}), Linux {host['kernel']}; load average {arguments.load[0]} before and {arguments.load[1]} after; {arguments.runs} rounds, interleaved.", ""]
    titles = {"cold": "Cold build: tarball to durable ext4 disk of 4 GiB", "small-files": "Cold build of many small files", "flat": "Cold build of one large directory", "edit": "Edit in place", "warm": "Warm render through gRPC, complete injection, durable; the peers inject what their names say", "block": "Block volumes by direct I/O, through gRPC", "appliance": "Files put into an overlay by an appliance", "start": "Start of the daemon"}
    for section, title in titles.items():
        if section in sections:
            lines += comparison(title, sections[section])
    if rows:
        lines += load_table(rows)
        load_plot(rows, directory / "load.svg")
    lines += fact_lines(sections.get("load", {}))
    if "cold" in sections:
        cold_plot(sections["cold"] | sections.get("small-files", {}) | sections.get("flat", {}), directory / "cold.svg")
    found = {section: {case: {who: summary(values) for who, values in people.items()} for case, people in cases.items()} for section, cases in sections.items()}
    result = {"host": host, "load_average": [float(value) for value in arguments.load], "runs": int(arguments.runs), "sections": found, "load": rows}
    (directory / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "results.md").write_text("\n".join(lines))
    print("\n".join(lines))


main()
