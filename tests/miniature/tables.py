"""Write the tables of the studies into the README.md beside it, from results.jsonl.

    python tests/miniature/tables.py   # with --check only says whether they are up to date

A cell is the mean and the standard error over the seeds. In the README a table stands between
<!-- study: NAME --> and <!-- end -->, the table of the costs between <!-- costs --> and
<!-- end -->.
"""

import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from run import RUNS, STUDIES, read_results  # noqa: E402

README = Path(__file__).with_name("README.md")


def cell(column: str, values: list[float]) -> str:
    """Print mean ± standard error of the mean (with n - 1) in percent; for a cost the mean."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    if column.endswith("a comparison"):
        return f"{mean:.3g}"
    if len(values) == 1:
        return f"{100 * mean:.1f}"
    error = 100 * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * mean:.1f} ± {error:.1f}"


def table(name: str, results: dict) -> str:
    """Print a study as Markdown: rows down, measures across, then the paper's figures."""
    study = STUDIES[name]
    measured = {row.run: [] for row in study.rows}
    for (run, _), line in results.items():
        if run in measured:
            measured[run].append(line["measured"])
    counts = sorted({len(seeds) for seeds in measured.values()})
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    head = [f"percent, {seeds}", *study.columns]
    if study.paper:
        head.append(f"paper: {study.paper}")
    lines = [head]
    for row in study.rows:
        cells = [row.label]
        for column in study.columns:
            cells.append(cell(column, [seed[row.part + column] for seed in measured[row.run]]))
        if study.paper:
            cells.append(row.paper)
        lines.append(cells)
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """Print a table whose first line is its head."""
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_needed(runs: set[str]) -> set[str]:
    """Add the runs whose artifacts these runs use."""
    more = {needed for run in runs for needed in RUNS[run].needs} - runs
    return with_needed(runs | more) if more else runs


def costs(results: dict) -> str:
    """Print the cost of each study with the runs it needs, and of all, since studies share runs."""
    studies = {}
    for name, study in STUDIES.items():
        studies[name] = with_needed({row.run for row in study.rows})
    studies["all"] = set(RUNS)
    lines = [["study", "runs", "minutes on two cores"]]
    for name, runs in studies.items():
        seconds = [line["seconds"] for (run, _), line in results.items() if run in runs]
        lines.append([name, str(len(seconds)), f"{sum(seconds) / 2 / 60:.0f}"])
    return markdown(lines)


def filled_in(readme: str) -> str:
    """Fill in the tables of every study and of the costs, as results.jsonl has them."""
    results = read_results()

    def fill(match: re.Match) -> str:
        return f"{match[1]}\n{table(match[2], results)}\n<!-- end -->"

    readme = re.sub(r"(<!-- study: (\w+) -->)\n.*?<!-- end -->", fill, readme, flags=re.DOTALL)
    with_costs = rf"\1\n{costs(results)}\n<!-- end -->"
    return re.sub(r"(<!-- costs -->)\n.*?<!-- end -->", with_costs, readme, flags=re.DOTALL)


if __name__ == "__main__":
    readme = README.read_text()
    filled = filled_in(readme)
    if filled != readme:
        if "--check" in sys.argv:
            sys.exit("the README's tables are old; run python tests/miniature/tables.py")
        README.write_text(filled)
