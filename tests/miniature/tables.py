"""Write the tables of the studies into README.md, from results.jsonl: means over the seeds.

    python tests/miniature/tables.py             # with --check: only tell whether they are current

In the README a table stands between <!-- study: NAME --> and <!-- end -->, the table of costs
between <!-- costs --> and <!-- end -->.
"""

import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from run import RUNS, STUDIES, read_results  # noqa: E402

README = Path(__file__).with_name("README.md")


def cell(column: str, values: list[float]) -> str:
    """Mean ± standard error of the mean (with n - 1), in percent; for costs, the mean alone."""
    if not values:
        return "-"
    if column.endswith("a comparison"):
        return f"{statistics.mean(values):.3g}"
    error = (
        f" ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    )
    return f"{100 * statistics.mean(values):.1f}{error}"


def table(name: str, results: dict) -> str:
    """A study as Markdown: rows down, what was measured across, then the paper's figures."""
    study = STUDIES[name]
    runs = {row.run for row in study.rows}
    measured = {run: [] for run in runs}
    for (run, _), line in results.items():
        if run in runs:
            measured[run].append(line["measured"])
    seeds = sorted({len(values) for values in measured.values()})
    seeds = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    lines = [[f"percent, {seeds}", *study.columns]]
    for label, run, part, _ in study.rows:
        line = [label]
        for column in study.columns:
            line.append(cell(column, [values[part + column] for values in measured[run]]))
        lines.append(line)
    if study.paper:
        figures = [paper for *_, paper in study.rows]
        for line, figure in zip(lines, [f"paper: {study.paper}", *figures]):
            line.append(figure)
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its head."""
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_needed(runs: set[str]) -> set[str]:
    """These runs and those whose artifacts they use."""
    more = {needed for run in runs for needed in RUNS[run].needs} - runs
    return with_needed(runs | more) if more else runs


def costs(results: dict) -> str:
    """The minutes of each study with all it needs, two runs at a time; and of all, which share."""
    studies = {}
    for name, study in STUDIES.items():
        studies[name] = with_needed({row.run for row in study.rows})
    lines = [["study", "runs", "minutes on two cores"]]
    for name, runs in (studies | {"all": set(RUNS)}).items():
        seconds = [line["seconds"] for (run, _), line in results.items() if run in runs]
        lines.append([name, str(len(seconds)), f"{sum(seconds) / 2 / 60:.0f}"])
    return markdown(lines)


def filled_in(readme: str) -> str:
    """The README with every study's table, and that of the costs, as results.jsonl has it."""
    results = read_results()

    def fill(match: re.Match) -> str:
        body = table(match[2], results) if match[2] else costs(results)
        return f"{match[1]}\n{body}\n<!-- end -->"

    pattern = r"(<!-- (?:study: (\w+)|costs) -->)\n.*?<!-- end -->"
    return re.sub(pattern, fill, readme, flags=re.DOTALL)


if __name__ == "__main__":
    readme = README.read_text()
    if filled_in(readme) != readme:
        if "--check" in sys.argv:
            sys.exit("the README's tables are old; run python tests/miniature/tables.py")
        README.write_text(filled_in(readme))
